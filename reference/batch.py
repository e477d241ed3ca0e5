"""From prompts to the rows of an optimiser step: sample, score, weigh, noise. Functions of the seed and the epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from marble_core import group_advantages
from reference.balance import Rows
from reference.base import Base
from reference.config import Config, training_times
from reference.evaluate import generate, generator
from reference.policy import Policy
from reference.prompts import prompts_of_epoch
from reference.rollout import times
from reference.scoring import Reward, Scores, score


class Rollout(NamedTuple):
    """The images of an epoch, one prompt's side by side: prompts, latents ``[N, C, H, W]`` and scores ``[N, K]``."""

    prompts: list[str]
    x0: Tensor
    scores: Scores


def sample_epoch(
    policy: Policy,
    base: Base,
    rewards: Mapping[str, Reward],
    pool: Sequence[str],
    config: Config,
    epoch: int,
    on_sampled: Callable[[], None] = lambda: None,
) -> Rollout:
    """Draw an epoch's images from the old policy and score them.

    Args:
        on_sampled: called between the two, for clocks and progress.

    Raises:
        RewardError: a reward failed.
    """
    r = config.rollout
    chosen = prompts_of_epoch(pool, r.prompts_per_epoch, config.seed, epoch)
    prompts = [prompt for prompt in chosen for _ in range(r.images_per_prompt)]
    noise = torch.randn(len(prompts), *base.latent_shape, generator=generator(config.seed, "rollout", epoch))
    x0, images = generate(policy, base, prompts, noise, adapter="old", sampler=r.sampler, steps=r.steps, batch=r.batch)
    on_sampled()
    return Rollout(prompts, x0, score(rewards, images, prompts, [None] * len(prompts)))


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
    group are not, they add up to zero.
    """
    order = torch.randperm(N, generator=generator(config.seed, "order", epoch))
    half = group_of(N, config) % 2
    return [part[half[part].argsort(stable=True)] for part in order.tensor_split(config.optim.steps_per_epoch)]


def step_rows(
    base: Base, rollout: Rollout, A: Tensor, A_sum: Tensor, index: Tensor, config: Config, epoch: int, part: int
) -> Rows:
    """Rows of one step: each of its images at some of the sampler's own times, with fresh noise."""
    random = generator(config.seed, "rows", epoch, part)
    schedule = times(base.scheduler, config.rollout.steps)[: training_times(config)]
    J = config.loss.timesteps_per_image or len(schedule)
    chosen = torch.rand(len(index), len(schedule), generator=random).argsort(1)[:, :J]
    image = index.repeat_interleave(J)
    embeds, pooled = base.encode([rollout.prompts[i] for i in image.tolist()])
    clean = rollout.x0[image]
    noise = torch.randn(clean.shape, generator=random)
    half = group_of(len(rollout.prompts), config)[image] % 2
    if half.min() == half.max():  # one prompt, or two of a kind: halves of its images must do
        half = (torch.arange(len(half)) >= len(half) // 2).long()
    return Rows(clean, noise, schedule[chosen.flatten()], embeds, pooled, A[image], A_sum[image], half)
