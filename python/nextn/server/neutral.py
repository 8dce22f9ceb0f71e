"""Fields that other servers have, which load generators and routers send with the value that asks for nothing."""

from __future__ import annotations

import msgspec

from nextn.server.errors import unsupported

NEUTRAL: dict[str, tuple[bool, str]] = {
    "background": (False, "a request is answered where it is asked"),
    "continue_final_message": (False, "an answer is a turn of its own"),
    "log_metrics": (True, "every request is counted"),
    "no_logs": (False, "logs hold no text of requests in any case"),
    "return_bytes": (False, "answers are text"),
    "return_entropy": (False, "it is not computed"),
    "return_hidden_states": (False, "they are not kept"),
    "return_routed_experts": (False, "they are not kept"),
    "stream_reasoning": (True, "reasoning is streamed as it comes"),
}
"""Per field the one value that is served, and why no other is."""


def check_neutral(asked: msgspec.Struct) -> None:
    """Refuse by name what asks for something that is not done. Raises ApiError 400."""
    for name, (value, reason) in NEUTRAL.items():
        if getattr(asked, name, None) not in (None, value):
            raise unsupported(f"'{name}' is supported as {str(value).lower()} only: {reason}.", name)
