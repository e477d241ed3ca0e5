"""Held-out evaluation: the same prompts and noise every time, means over prompts with 95 % intervals."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from reference.interfaces import Prompt, Scores
from reference.policy.adapters import Adapter, Policy, merged, velocity, weights_of
from reference.policy.base import Base
from reference.processes.peers import ALONE, World, begin_pass, gather_rows, share_of
from reference.rewards.scorer import Scorer, score_images
from reference.step.rollout import Sampler, sample

_ROWS = 256  # of noise drawn at a time


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A generator that depends on the seed and on what it is for, and on nothing that happened before."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def noise_of(own: Tensor | range, total: int, shape: Sequence[int], draws: torch.Generator) -> Tensor:
    """Some rows, in ascending order, of ``torch.randn(total, *shape, generator=draws)``, in memory for those alone.

    Args:
        own: their numbers.
        total: of rows.
        shape: of a row.
        draws: is left as if all had been drawn.
    """
    if len(own) == total:
        return torch.randn(total, *shape, generator=draws)
    numbers, found = torch.as_tensor(own, dtype=torch.int64), torch.empty(len(own), *shape)
    # torch draws normals in blocks of 16, so that chunks of multiples of 16 rows give the same numbers as one draw
    for start in range(0, total, _ROWS):
        chunk = torch.randn(min(_ROWS, total - start), *shape, generator=draws)
        here = (numbers >= start) & (numbers < start + _ROWS)
        found[here] = chunk[numbers[here] - start]
    return found


def gather_scores(scores: Scores, own: range, total: int, world: World) -> Scores:
    """The scores of all processes' images, from those of this one's."""
    values, applicable = gather_rows((scores.values, scores.applicable.double()), own, total, world)
    return Scores(values, applicable.bool())


def generate_batches(
    policy: Policy,
    base: Base,
    prompts: Sequence[str],
    noise: Tensor,
    *,
    adapter: Adapter,
    sampler: Sampler,
    steps: int,
    batch: int,
    total: int | None = None,
    world: World = ALONE,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Sample a latent and an image for each prompt, on the base's device, a batch at a time.

    Args:
        noise: ``[N, C, H, W]``, what each image begins with.
        total: how many images all processes make, if these prompts are one process's share of them. Where they share
            the base, a process with fewer images draws some more, for the others' sake, and throws them away.
        world: the processes.

    Raises:
        PeerError: another process has failed.
    """
    table = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    embeds, pooled = base.encode(list(table))
    place = torch.tensor([table[prompt] for prompt in prompts], device=embeds.device)
    N, most = len(prompts), -(-(total or 0) // world.size) if world.sharded else 0
    extra = max(0, most - N)  # drawn for the others' sake
    place = torch.cat([place, place.new_zeros(extra)])
    noise = torch.cat([noise, noise.new_zeros(extra, *noise.shape[1:])])
    for start in range(0, N + extra, batch):
        begin_pass(world)
        here = slice(start, start + batch)
        condition = (embeds[place[here]], pooled[place[here]])
        flow = lambda x, t, condition=condition: velocity(policy, x, t, condition)  # noqa: E731
        with torch.no_grad(), merged(policy, adapter):
            x0 = sample(flow, noise[here].to(base.device), base.scheduler, sampler=sampler, steps=steps)[: N - start]
        if start < N:
            yield x0, base.decode(x0)


def evaluate(
    policy: Policy,
    base: Base,
    weights: Mapping[str, Tensor],
    prompts: Sequence[Prompt],
    scorer: Scorer,
    *,
    images: int,
    sampler: Sampler,
    steps: int,
    batch: int,
    seed: int,
    world: World = ALONE,
) -> tuple[Scores, Tensor]:
    """Score ``images`` images of each prompt, drawn with other adapter weights than the trained ones.

    Of several processes, each draws its ``share_of`` the images; all get all scores.

    Returns:
        ``(Scores [P * images, K], images)``, the images of a prompt side by side, on the CPU; this process's share of
        them.
    """
    repeated = [prompt for prompt in prompts for _ in range(images)]
    total, own = len(repeated), share_of(len(repeated), world)
    noise = noise_of(own, total, base.latent_shape, generator(seed, "evaluation"))
    repeated = repeated[own.start : own.stop]
    texts, pictures = [prompt.text for prompt in repeated], []

    def drawn() -> Iterator[Tensor]:
        for _, made in generate_batches(
            policy,
            base,
            texts,
            noise,
            adapter="default",
            sampler=sampler,
            steps=steps,
            batch=batch,
            total=total,
            world=world,
        ):
            pictures.append(made.cpu())
            yield made

    with weights_of(policy, weights):
        scores = score_images(scorer, drawn(), repeated)
    return gather_scores(scores, own, total, world), torch.cat(pictures)


def first_images(own: Tensor, prompts: int, images: int, count: int, world: World) -> Tensor:
    """The first image of each of the first ``count`` prompts, from this process's share of all prompts' images."""
    share, wanted = share_of(prompts * images, world), range(0, min(prompts, count) * images, images)
    here = [place for place, number in enumerate(wanted) if number in share]
    first = here[0] if here else 0
    rows = own[[wanted[place] - share.start for place in here]]
    return gather_rows(rows, range(first, first + len(here)), len(wanted), world)


def prompt_means(scores: Scores, images: int) -> Tensor:
    """Mean score of each prompt and reward, ``[P, K]``; NaN where the reward does not apply."""
    values = torch.where(scores.applicable, scores.values, torch.nan)
    return values.reshape(-1, images, values.shape[1]).nanmean(1)


def within_std(scores: Scores, images: int) -> Tensor:
    """Standard deviation of each reward ``[K]`` over the images of one prompt, pooled over prompts: the unit in which
    advantages are measured. NaN with one image a prompt, or where the reward never applies.
    """
    x = torch.where(scores.applicable, scores.values, torch.nan).reshape(-1, images, scores.values.shape[1])
    count = (~x.isnan()).sum(1)
    squares = (x - x.nanmean(1, keepdim=True)).square().nansum((0, 1))
    return (squares / (count - 1).clamp(min=0).sum(0)).sqrt()


def seed_everything(seed: int, epoch: int, world: World) -> None:
    """Seed the global generators, for rewards that use them, differently on each process."""
    purpose = ("global", epoch, world.rank)[: 3 if world.rank else 2]
    value = int(torch.randint(2**31, (), generator=generator(seed, *purpose)))
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
