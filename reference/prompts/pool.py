"""Prompt sources: the world's generator, or files."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from reference.config.settings import REWARDS, WORLD_REWARDS, WORLD_SOURCES, Config, is_world
from reference.errors import ConfigError, did_you_mean
from reference.interfaces import Prompt, plain_prompts
from reference.prompts.files import mixture_of_epoch, parse_spec, passes, read_mixture
from reference.text_files import prompt_lines
from reference.world.scenes import KINDS, prompt_of, random_scene, tokens

# The kinds of scenes that each of WORLD_SOURCES takes in turn.
_KINDS = {
    "world": KINDS,
    "world:text": tuple(kind for kind in KINDS if "text" in kind),
    "world:objects": tuple(kind for kind in KINDS if "text" not in kind),
}
_IN_VAIN = 20_000  # draws without a new prompt, after which there are no more
_FIRST_EPOCHS = 10  # at most so many tell the spread of rewards at the start, the unit of gains


class Pool(NamedTuple):
    """Training prompts: those of each source, and the source's share of an epoch; no weights for equal shares."""

    sources: tuple[tuple[Prompt, ...], ...]
    weights: tuple[float, ...] = ()


def pool_of(prompts: Iterable[Prompt]) -> Pool:
    """A pool with one source."""
    return Pool((tuple(prompts),))


def all_prompts(pool: Pool) -> list[Prompt]:
    """The prompts of all sources."""
    return [prompt for source in pool.sources for prompt in source]


def training_pool(config: Config) -> Pool:
    """The training prompts of a run.

    Raises:
        ConfigError: a source cannot be used; every line at fault is named.
    """
    r = config.rollout
    return Pool(tuple(map(tuple, _sources(r.prompts, config, r.pool, held_out=False))), r.weights)


def held_out_prompts(config: Config) -> list[Prompt]:
    """The ``log.eval_prompts`` prompts of evaluations: the world's own, or those of ``rollout.held_out`` in turn.

    Of a file of GenEval's each task gives its prompts in turn, so that a limit leaves none of them out.

    Raises:
        ConfigError: a source cannot be used; every line at fault is named.
    """
    count = config.log.eval_prompts
    sources = _sources(config.rollout.held_out or ("world",), config, count, held_out=True)
    return list(itertools.islice(_in_turn([list(_in_turn(_by_task(source))) for source in sources]), count))


def _in_turn(groups: Sequence[Sequence[Prompt]]) -> Iterator[Prompt]:
    """The first prompt of each group, then the second ones."""
    return (prompt for turn in itertools.zip_longest(*groups) for prompt in turn if prompt is not None)


def _by_task(source: Sequence[Prompt]) -> list[list[Prompt]]:
    """The prompts of each of GenEval's tasks, others as one group."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in source:
        groups.setdefault(prompt.metadata.get("geneval", {}).get("tag", ""), []).append(prompt)
    return list(groups.values())


def repeated_prompts(held_out: Iterable[Prompt], trained: Iterable[Prompt]) -> int:
    """How many held-out prompts are trained on, but for case and spaces."""
    seen = {_plain(prompt) for prompt in trained}
    return sum(_plain(prompt) in seen for prompt in held_out)


def _plain(prompt: Prompt) -> str:
    """A prompt's text, in lower case and with single spaces."""
    return " ".join(prompt.text.casefold().split())


def _sources(names: Sequence[str], config: Config, count: int, *, held_out: bool) -> list[list[Prompt]]:
    """The prompts of each source."""

    def read(spec: str | Path) -> list[Prompt]:
        if spec not in WORLD_SOURCES:
            return read_prompts(spec)
        seed = 0 if held_out else config.seed
        return plain_prompts(world_prompts(count, seed, held_out=held_out, source=str(spec)))

    sources = read_mixture(names, read) if is_world(config.model.base) else read_mixture(names)
    _check_rewards(sources, config)
    return sources


def _check_rewards(sources: Sequence[Sequence[Prompt]], config: Config) -> None:
    """Raise if a source restricts its prompts to a reward that does not exist: it would silently never apply."""
    shipped = WORLD_REWARDS if is_world(config.model.base) else REWARDS
    known = (*config.rewards, *config.log.watch, *shipped)
    for name in dict.fromkeys(name for source in sources for prompt in source for name in prompt.rewards or ()):
        if name not in known:
            listed, hint = ", ".join(dict.fromkeys(known)), did_you_mean(name, known)
            raise ConfigError(f"rollout.prompts: expected rewards after # to be among {listed}, got {name!r}.{hint}")


def world_prompts(count: int, seed: int, *, held_out: bool, source: str = "world") -> list[str]:
    """Distinct prompts of one of ``WORLD_SOURCES``, its kinds in turn.

    Raises:
        ConfigError: there are not as many.

    Example:
        >>> world_prompts(2, 0, held_out=True) == world_prompts(3, 0, held_out=True)[:2]
        True
    """
    rng = random.Random(f"prompts {seed} {held_out}")
    found: dict[str, int] = {}
    for draw, kind in enumerate(itertools.cycle(_KINDS[source])):  # where single objects run out, other kinds fill in
        if len(found) == count:
            break
        found.setdefault(prompt_of(random_scene(rng, kind, held_out=held_out)), draw)
        if draw - next(reversed(found.values())) > _IN_VAIN:
            name = "log.eval_prompts" if held_out else "rollout.pool"
            raise ConfigError(f"{name}: expected at most {len(found)}, as many as {source} has to offer, got {count}.")
    return list(found)


def read_prompts(spec: str | Path) -> list[Prompt]:
    """Prompts of a file in the world's language, ``[text:]path[#reward,reward]``.

    Raises:
        ConfigError: the file cannot be read, has no prompt, or has lines that cannot be used (all are named).
    """
    path, format, rewards = parse_spec(spec)
    if format not in (None, "text"):
        raise ConfigError(f"rollout.prompts: expected [text:]path[#reward,reward] for the small world, got {spec!r}.")
    prompts, faults = [], []
    for number, line in prompt_lines(path):
        try:
            tokens(line)
            prompts.append(Prompt(line, {}, rewards))
        except ValueError as error:
            faults.append(f"  line {number}: {error}")
    if faults:
        raise ConfigError(f"rollout.prompts: cannot use these lines of {path}:\n" + "\n".join(faults))
    return prompts


def prompts_of_epoch(pool: Pool, count: int, seed: int, epoch: int) -> list[Prompt]:
    """The ``count`` prompts of an epoch: pass after pass through a source, or its share of each of several.

    A function of the epoch alone, so that a resumed run continues where the other stopped.
    """
    if len(pool.sources) == 1:
        return passes(pool.sources[0], epoch * count, (epoch + 1) * count, seed)
    return mixture_of_epoch(pool.sources, pool.weights, count, seed, epoch)


def prompt_numbers(prompts: Sequence[Prompt], pool: Pool) -> Tensor:
    """The place in its pool of each prompt, ``[N]``; one text has one number, however often it is there."""
    place: dict[str, int] = {}
    for number, prompt in enumerate(all_prompts(pool)):
        place.setdefault(prompt.text, number)
    return torch.tensor([place[prompt.text] for prompt in prompts])


def learns_spread(epoch: int, pool: Pool, config: Config) -> bool:
    """Whether an epoch tells the spread of rewards at the start: once through the prompts, but not for long."""
    return epoch < min(math.ceil(len(all_prompts(pool)) / config.rollout.prompts_per_epoch), _FIRST_EPOCHS)


def images_of_epoch(pool: Pool, config: Config, epoch: int) -> list[Prompt]:
    """The prompt of each image of an epoch, one prompt's side by side."""
    r = config.rollout
    chosen = prompts_of_epoch(pool, r.prompts_per_epoch, config.seed, epoch)
    return [prompt for prompt in chosen for _ in range(r.images_per_prompt)]
