"""From prompts to the rows of an optimiser step: sample, score, weigh, noise. Functions of the seed and the epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from marble_core import group_advantages
from reference.config.settings import Config, training_times
from reference.interfaces import Prompt, Scores
from reference.policy.adapters import Policy
from reference.policy.base import Base
from reference.processes.peers import ALONE, World, share_of
from reference.prompts.pool import Pool, prompts_of_epoch
from reference.rewards.scorer import Scorer, score_images
from reference.step.generation import gather_scores, generate_batches, generator, noise_of
from reference.step.gradients import PER_ROW, Rows, Whole, part_of
from reference.step.rollout import times


class Rollout(NamedTuple):
    """The images of an epoch, one prompt's side by side.

    Attributes:
        prompts: N.
        x0: ``[n, C, H, W]``, latents on the CPU: those of this process's images.
        scores: ``[N, K]``.
        first: number of the first of the n images.
    """

    prompts: list[Prompt]
    x0: Tensor
    scores: Scores
    first: int = 0


def sample_epoch(
    policy: Policy,
    base: Base,
    scorer: Scorer,
    pool: Pool,
    config: Config,
    epoch: int,
    on_sampled: Callable[[], None] = lambda: None,
    world: World = ALONE,
) -> Rollout:
    """Draw an epoch's images from the old policy and score them; of several processes, each does its share.

    Args:
        on_sampled: called when the last image is there, for clocks and progress.

    Raises:
        RewardError: a reward failed.
        PeerError: another process failed.
    """
    r = config.rollout
    chosen = prompts_of_epoch(pool, r.prompts_per_epoch, config.seed, epoch)
    prompts = [prompt for prompt in chosen for _ in range(r.images_per_prompt)]
    N, own = len(prompts), share_of(len(prompts), world)
    noise = noise_of(own, N, base.latent_shape, generator(config.seed, "rollout", epoch))
    mine = prompts[own.start : own.stop]
    texts, latents = [prompt.text for prompt in mine], []

    def drawn() -> Iterator[Tensor]:
        for x0, images in generate_batches(
            policy,
            base,
            texts,
            noise,
            adapter="old",
            sampler=r.sampler,
            steps=r.steps,
            batch=r.batch,
            total=N,
            world=world,
        ):
            latents.append(x0.cpu())
            yield images

    scores = score_images(scorer, drawn(), mine, on_sampled)
    return Rollout(prompts, torch.cat(latents), gather_scores(scores, own, N, world), own.start)


def advantages(scores: Scores, config: Config) -> tuple[Tensor, Tensor]:
    """Advantages of every reward ``[N, K]``, and those of the weighted sum of raw rewards ``[N]``, in float32."""
    groups = group_of(scores.values.shape[0], config)
    A = group_advantages(scores.values, groups, applicable=scores.applicable, std=config.loss.std)
    weights = torch.tensor(config.reward_weights or [1.0] * len(config.rewards), dtype=torch.float64)
    total = (scores.values * weights).sum(1, keepdim=True)
    A_sum = group_advantages(total, groups, std=config.loss.std).squeeze(1)
    return A.float(), A_sum.float()


def group_of(N: int, config: Config) -> Tensor:
    """Which prompt of its epoch each of ``N`` images belongs to, ``[N]``."""
    return torch.arange(N) // config.rollout.images_per_prompt


def images_of_steps(N: int, config: Config, epoch: int) -> list[Tensor]:
    """Indices of the images of each of the epoch's steps, at random, those of even prompts before those of odd ones.

    The two halves of a step share no prompt, so that their gradients are independent: advantages within one prompt's
    group are not, they add up to zero. Their sizes are the same in every epoch, so that code is compiled once.
    """
    order = torch.randperm(N, generator=generator(config.seed, "order", epoch))
    half, steps = group_of(N, config)[order] % 2, config.optim.steps_per_epoch
    even, odd = order[half == 0].tensor_split(steps), order[half == 1].tensor_split(steps)
    # what does not divide goes to the first steps of the one and to the last ones of the other
    return [torch.cat([a, b]) for a, b in zip(even, reversed(odd), strict=True)]


def halves_of(index: Tensor, config: Config) -> Tensor:
    """Which half of its step each row of these images is in, 0 and then 1, one image's rows side by side."""
    J = config.loss.timesteps_per_image or training_times(config)
    half = (index // config.rollout.images_per_prompt % 2).repeat_interleave(J)
    if half.min() == half.max():  # one prompt, or two of a kind: halves of its images must do
        half = (torch.arange(len(half)) >= len(half) // 2).long()
    return half


def whole_step(index: Tensor, config: Config, world: World) -> Whole:
    """What a step of these images is over all processes."""
    half = halves_of(index, config)
    return Whole(world, int((half == 0).sum()), len(half))


class Weighed(NamedTuple):
    """An epoch's images with their advantages ``[N, K]`` and those of the raw sum ``[N]``, in ``config``'s epoch."""

    rollout: Rollout
    A: Tensor
    A_sum: Tensor
    epoch: int


def step_rows(base: Base, weighed: Weighed, index: Tensor, config: Config, part: int, world: World = ALONE) -> Rows:
    """Rows of one step: each of its images at some of the sampler's own times, with fresh noise.

    Of several processes, each gets the rows of its own images, the same ones whatever their number is; where they share
    the base, all get equally many, filled up with rows of weight 0.
    """
    rollout, random = weighed.rollout, generator(config.seed, "rows", weighed.epoch, part)
    schedule = times(base.scheduler, config.rollout.steps)[: training_times(config)]
    J = config.loss.timesteps_per_image or len(schedule)
    chosen = torch.rand(len(index), len(schedule), generator=random).argsort(1)[:, :J].flatten()
    image = index.repeat_interleave(J)
    place = image - rollout.first
    own = ((place >= 0) & (place < len(rollout.x0))).nonzero().flatten()
    noise = noise_of(own, len(image), base.latent_shape, random)
    image = image[own]
    texts = [rollout.prompts[i].text for i in image.tolist()]
    table = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    embeds, pooled = base.encode(list(table) or [rollout.prompts[0].text])
    prompt = torch.tensor([table[text] for text in texts], dtype=torch.int64)
    half = halves_of(index, config)
    rows = Rows(
        rollout.x0[place[own]], noise, schedule[chosen[own]], embeds, pooled, weighed.A[image], weighed.A_sum[image],
        half[own], prompt, torch.ones(len(own)),
    )  # fmt: skip
    return filled_up(rows, *_busiest(index, half, config, world)) if world.sharded else rows


def _busiest(index: Tensor, half: Tensor, config: Config, world: World) -> tuple[int, int]:
    """The most rows that any process has in the first half of a step, and in the second."""
    N, J = config.rollout.prompts_per_epoch * config.rollout.images_per_prompt, len(half) // len(index)
    shares = [share_of(N, World(rank, world.size)) for rank in range(world.size)]
    image = index.repeat_interleave(J)
    owned = torch.stack([(image >= share.start) & (image < share.stop) for share in shares])
    return int(owned[:, half == 0].sum(1).max()), int(owned[:, half == 1].sum(1).max())


def filled_up(rows: Rows, first: int, second: int) -> Rows:
    """Rows of weight 0 behind either half, until there are ``first`` and ``second``."""
    own = int((rows.half == 0).sum())
    a, b = part_of(rows, slice(own)), part_of(rows, slice(own, None))
    parts = [a, _blank(rows, first - own, 0), b, _blank(rows, second - (len(rows.half) - own), 1)]
    return rows._replace(**{name: torch.cat([getattr(x, name) for x in parts]) for name in PER_ROW})


def _blank(rows: Rows, count: int, half: int) -> Rows:
    """Rows of nothing, of which all that is computed is finite."""
    blank = {name: (x := getattr(rows, name)).new_zeros(count, *x.shape[1:]) for name in PER_ROW}
    blank |= {"t": blank["t"] + 0.5, "noise": blank["noise"] + 1.0, "half": blank["half"] + half}
    return rows._replace(**blank)
