"""Speculative decoding with the model's own NextN layer: draft k tokens, verify, accept, commit.

``cycle.py`` is the algorithm; ``acceptance.py`` the rules by which drafts are kept.
"""
