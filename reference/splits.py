"""Which prompts are held out: decided by a hash of their text, the same everywhere and for every seed."""

from __future__ import annotations

import hashlib

HELD_OUT_SHARE = 0.2


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the fifth that no training sees: decided by a hash, so the same everywhere."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32
