"""Prompt sources: the world's generator, or a text file with one prompt a line."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

from reference.errors import ConfigError
from reference.world.scenes import KINDS, prompt_of, random_scene, tokens


def training_prompts(source: str, pool: int, seed: int) -> list[str]:
    """The pool of training prompts: ``pool`` generated ones that are not held out, or those of a file."""
    return world_prompts(pool, seed, held_out=False) if source == "world" else read_prompts(Path(source))


def world_prompts(count: int, seed: int, *, held_out: bool) -> list[str]:
    """Distinct prompts of the world, its kinds in turn.

    Example:
        >>> world_prompts(2, 0, held_out=True) == world_prompts(3, 0, held_out=True)[:2]
        True
    """
    rng = random.Random(f"prompts {seed} {held_out}")
    found: dict[str, None] = {}
    for kind in itertools.cycle(KINDS):  # single objects run out first: the other kinds then fill their places
        if len(found) == count:
            break
        found[prompt_of(random_scene(rng, kind, held_out=held_out))] = None
    return list(found)


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one a line.

    Raises:
        ConfigError: the file cannot be read, has no prompt, or has lines that cannot be used (all are named).
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"rollout.prompts: cannot read {path}: {error}") from error
    prompts, faults = [], []
    for number, line in enumerate(lines, start=1):
        try:
            tokens(line)
            prompts.append(line.strip())
        except ValueError as error:
            faults.append(f"  line {number}: {error}" if line.strip() else f"  line {number}: empty")
    if not lines:
        raise ConfigError(f"rollout.prompts: expected at least one prompt, got an empty file {path}.")
    if faults:
        raise ConfigError(f"rollout.prompts: cannot use these lines of {path}:\n" + "\n".join(faults))
    return prompts


def prompts_of_epoch(prompts: Sequence[str], count: int, seed: int, epoch: int) -> list[str]:
    """The ``count`` prompts of an epoch: pass after pass through the pool, each in an order of its own.

    A function of the epoch alone, so that a resumed run continues where the other stopped.
    """
    chosen = []
    for position in range(epoch * count, (epoch + 1) * count):
        turn, place = divmod(position, len(prompts))
        order = list(range(len(prompts)))
        random.Random(f"order {seed} {turn}").shuffle(order)
        chosen.append(prompts[order[place]])
    return chosen
