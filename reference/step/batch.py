"""From scored images to the rows of an optimiser step: weigh, choose, noise. Functions of the seed and the epoch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from marble_core import group_advantages
from reference.config.settings import Config, training_times
from reference.interfaces import Scores
from reference.policy.base import Base
from reference.processes.peers import ALONE, Peers
from reference.step.chance import generator, noise_of
from reference.step.filling import busiest, filled_up
from reference.step.gradients import Rows, Whole
from reference.step.rollout import Rollout, times


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


def whole_step(index: Tensor, config: Config, peers: Peers) -> Whole:
    """What a step of these images is over all processes."""
    half = halves_of(index, config)
    return Whole(peers, int((half == 0).sum()), len(half))


class Weighed(NamedTuple):
    """An epoch's images with their advantages ``[N, K]`` and those of the raw sum ``[N]``, in ``config``'s epoch."""

    rollout: Rollout
    A: Tensor
    A_sum: Tensor
    epoch: int


def step_rows(base: Base, weighed: Weighed, index: Tensor, config: Config, part: int, peers: Peers = ALONE) -> Rows:
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
    return filled_up(rows, *busiest(index, half, config, peers)) if peers.sharded else rows
