"""The rewards of a run: found by name, on their device, and scored in the background if asked for."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reference.config.settings import REWARDS, Config
from reference.errors import ConfigError, RewardError
from reference.interfaces import Prompt, Reward, Scores, load_callable, score
from reference.processes.devices import device_of
from reference.world.rewards import REWARDS as WORLD

_TRIALS = 8  # of a reward before anything is sampled
_WAITING = 4  # chunks of images that may wait to be scored before sampling does


class Scorer(NamedTuple):
    """Rewards by name, and how they are computed.

    Attributes:
        rewards: the order is that of the columns.
        device: where images are given to them.
        batch: images at a time; 0 for all.
        background: score in a thread of its own while the next images are made.
    """

    rewards: Mapping[str, Reward]
    device: torch.device
    batch: int = 0
    background: bool = False


def scorer_of(config: Config, names: Sequence[str], loaded: Mapping[str, Reward] | None = None) -> Scorer:
    """The rewards of these names, as a run computes them.

    Args:
        loaded: rewards that are there already; a name of theirs is not loaded again.

    Raises:
        ConfigError: a name or a source cannot be used.
    """
    s = config.scoring
    device = device_of(config.device) if s.device == "auto" else device_of(s.device, "scoring.device")
    missing = tuple(name for name in names if name not in (loaded or {}))
    new = load_rewards(missing, device, sources_of(config))
    if s.timeout:
        new = {name: limited(name, reward, s.timeout) for name, reward in new.items()}
    found = dict(loaded or {}) | new
    return Scorer({name: found[name] for name in names}, device, s.batch, s.background)


def sources_of(config: Config) -> dict[str, str]:
    """Where rewards load their models from, by name.

    Raises:
        ConfigError: an entry is not name=source.
    """
    sources = dict(entry.partition("=")[::2] for entry in config.scoring.models)
    for name, source in sources.items():
        if name not in REWARDS or not source:
            known = ", ".join(sorted(REWARDS))
            got = f"{name}={source}"
            raise ConfigError(f"scoring.models: expected name=source with a name of {known}, got {got!r}.")
    return sources


def load_rewards(
    names: Sequence[str], device: torch.device | None = None, sources: Mapping[str, str] | None = None
) -> dict[str, Reward]:
    """Rewards by name: the world's, those of reference/rewards/, or callables by dotted path.

    Args:
        device: of models that a reward loads; the CPU by default.
        sources: folder, hub id or URL by name, for those that do not use their default.

    Raises:
        ConfigError: a name is unknown, or its model cannot be loaded.
    """
    device = device or torch.device("cpu")
    return {name: _load(name, device, (sources or {}).get(name)) for name in names}


def _load(name: str, device: torch.device, source: str | None) -> Reward:
    """One reward."""
    if name in WORLD:
        return WORLD[name] if device.type == "cpu" else _on_cpu(WORLD[name])
    if name in REWARDS:
        from reference.quiet import quiet_libraries  # seconds of imports, which the small world does without

        with quiet_libraries():
            reward: Reward = load_callable(f"reference.rewards.{name}:load", "rewards")(device, source)
        return reward
    return load_callable(name, "rewards")


def limited(name: str, reward: Reward, seconds: float) -> Reward:
    """A reward that fails when it takes too long. What hangs cannot be stopped: its thread ends with the process."""

    def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Any:
        found: list[Any] = []

        def work() -> None:
            try:
                with torch.no_grad():  # which each thread has for itself
                    found.extend((reward(images, prompts, metadata), None))
            except BaseException as error:
                found.extend((None, error))

        thread = threading.Thread(target=work, name=f"reward {name}", daemon=True)
        thread.start()
        thread.join(seconds)
        if len(found) < 2:
            raise RewardError(
                f"reward {name!r} took longer than scoring.timeout = {seconds:g} s for {len(images)} images"
            )
        result, error = found
        if error is not None:
            raise error
        return result

    return score


def _on_cpu(reward: Reward) -> Reward:
    """The world's rewards read pixels on the CPU."""

    def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor | Scores:
        return reward(images.cpu(), prompts, metadata)

    return score


def score_images(scorer: Scorer, images: Iterable[Tensor], prompts: Sequence[Prompt]) -> Scores:
    """Score images that arrive batch by batch, in chunks of ``scorer.batch`` whatever the batches are.

    In the background, a chunk is scored while the next images are made; the chunks and their order are the same, and
    so are the scores.

    Args:
        images: batches ``[b, 3, H, W]``, in the order of the prompts.

    Raises:
        RewardError: a reward failed; no more images are asked for.
    """
    found: list[Scores | Future[Scores]] = []
    with _executor(scorer) as submit:
        for first, chunk in _chunks(images, scorer.batch or len(prompts), len(prompts)):
            waiting = [x for x in found if isinstance(x, Future)]
            for future in [f for f in waiting if f.done()] + waiting[:-_WAITING]:
                future.result()
            part = prompts[first : first + len(chunk)]
            found.append(submit(scorer.rewards, chunk.to(scorer.device), part, first))
        parts = [x.result() if isinstance(x, Future) else x for x in found]
    return Scores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _chunks(images: Iterable[Tensor], size: int, total: int) -> Iterator[tuple[int, Tensor]]:
    """Batches cut and joined to chunks of one size, the last one perhaps smaller, each with its first number."""
    kept: list[Tensor] = []
    first = arrived = 0
    for batch in images:
        kept.append(batch)
        arrived += len(batch)
        while arrived - first >= size or (arrived == total and arrived > first):
            joined = torch.cat(kept)
            yield first, joined[:size]
            kept, first = [joined[size:]], min(first + size, total)


_Submit = Callable[[Mapping[str, Reward], Tensor, Sequence[Prompt], int], "Scores | Future[Scores]"]


@contextlib.contextmanager
def _executor(scorer: Scorer) -> Iterator[_Submit]:
    """Score at once, or in one thread: rewards see the images in the same order, one chunk at a time."""
    if not scorer.background:
        yield lambda rewards, images, prompts, first: score(rewards, images, prompts, first=first)
        return
    threads = torch.get_num_threads()  # of this thread; another one starts with its own
    pool = ThreadPoolExecutor(1, "rewards", torch.set_num_threads, (threads,))
    try:
        yield lambda rewards, images, prompts, first: pool.submit(score, rewards, images, prompts, first=first)
    finally:
        pool.shutdown(cancel_futures=True)


def try_rewards(scorer: Scorer, prompts: Sequence[Prompt], shape: Sequence[int]) -> None:
    """Let every reward score images of noise, with prompts that it applies to: faults show before hours of work.

    Two prompts of each kind are tried, a kind being the rewards of a source and the names of its metadata, and more of
    them while the reward applies to none.

    Args:
        prompts: to choose from.
        shape: of an image, ``[3, H, W]``.

    Raises:
        RewardError: one of them fails.
    """
    draws = torch.Generator().manual_seed(0)
    for name, reward in scorer.rewards.items():
        kinds: dict[tuple[Any, ...], list[Prompt]] = {}
        for prompt in prompts:
            if prompt.rewards is None or name in prompt.rewards:
                kinds.setdefault((prompt.rewards, *sorted(prompt.metadata)), []).append(prompt)
        for turn in range(_TRIALS):
            fitting = [prompt for kind in kinds.values() for prompt in kind[2 * turn : 2 * turn + 2]]
            noise = torch.rand(len(fitting), *shape, generator=draws).to(scorer.device)
            if not fitting or score({name: reward}, noise, fitting).applicable.any():
                break
