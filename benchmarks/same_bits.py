"""Hashes of the adapters that a tiny run of every rule ends with: the same before and after a change that moves code.

python -m benchmarks.same_bits
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from pathlib import Path

import torch

from reference.config.presets import preset
from reference.config.settings import BUILT_IN_RULES, SolveConfig
from reference.run.state import newest
from reference.train import train

_SOLVES = ("marble", "marble-paper", "catch-up", "noise-aware", "cone", "upgrad")


def adapters(rule: str, folder: Path) -> str:
    """Train preset ``tiny`` for three epochs with a rule; returns a hash of the trained, old and averaged adapters."""
    solve = SolveConfig(refresh_every=2) if rule in _SOLVES else SolveConfig()
    config = dataclasses.replace(preset("tiny"), run=folder / rule, balance=rule, epochs=3, threads=1, solve=solve)
    train(config)
    state, found = newest(config.run), hashlib.sha256()
    for kind in ("default", "old", "ema"):
        for name, x in sorted(state[kind].items()):
            found.update(name.encode() + x.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    """Print a line a rule."""
    with tempfile.TemporaryDirectory() as folder:
        lines = [f"{rule:14}{adapters(rule, Path(folder))}" for rule in BUILT_IN_RULES]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
