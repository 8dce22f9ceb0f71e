"""The rule that keeps a twentieth of everything for the quiz, by a hash that no seed or order can move."""

import hashlib

HELD_OUT_ONE_IN = 20


def is_held_out(key: str) -> bool:
    """Whether an item belongs to the held-out part. The key names what must be new: phrasing x fact, or operands."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0
