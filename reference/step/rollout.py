"""Prompts to images and scores: deterministic sampling with diffusers' own schedulers and their own float timesteps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from reference.config.settings import RolloutConfig
from reference.interfaces import Prompt, Scores
from reference.policy.adapters import Adapter, Policy, merged, velocity
from reference.policy.base import Base
from reference.processes.alive import begin_pass
from reference.processes.peers import ALONE, Peers, share_of
from reference.processes.sums import gather_rows
from reference.rewards.scorer import Scorer, score_images
from reference.step.chance import noise_of

Sampler = Literal["euler", "dpm2"]


class Sampling(NamedTuple):
    """How images are sampled.

    Attributes:
        sampler: Euler, or DPM-Solver of order 2.
        steps: evaluations of the model.
        batch: images at a time.
        peers: the processes that draw them, each its ``share_of``.
    """

    sampler: Sampler
    steps: int
    batch: int
    peers: Peers = ALONE


def sampling_of(rollout: RolloutConfig, peers: Peers = ALONE) -> Sampling:
    """The sampling of training images."""
    return Sampling(rollout.sampler, rollout.steps, rollout.batch, peers)


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
    prompts: list[Prompt],
    draws: torch.Generator,
    how: Sampling,
    on_drawn: Callable[[float], None] = lambda share: None,
) -> Rollout:
    """Draw an epoch's images from the old policy and score them; of several processes, each does its share.

    Args:
        prompts: of every image, one prompt's side by side.
        draws: of the noise.
        how: the sampling.
        on_drawn: called after every batch with the share of the images that are there, for clocks and progress.

    Raises:
        RewardError: a reward failed.
        PeerError: another process failed.
    """
    N, own = len(prompts), share_of(len(prompts), how.peers)
    noise = noise_of(own, N, base.latent_shape, draws)
    mine, latents = prompts[own.start : own.stop], []

    def drawn() -> Iterator[Tensor]:
        for x0, images in generate_batches(policy, base, [p.text for p in mine], noise, "old", how, N):
            latents.append(x0.cpu())
            on_drawn(sum(map(len, latents)) / len(mine))
            yield images

    scores = score_images(scorer, drawn(), mine)
    return Rollout(prompts, torch.cat(latents), gather_scores(scores, own, N, how.peers), own.start)


def generate_batches(
    policy: Policy,
    base: Base,
    texts: Sequence[str],
    noise: Tensor,
    adapter: Adapter,
    how: Sampling,
    total: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Sample a latent and an image for each prompt, on the base's device, a batch at a time.

    Args:
        texts: of the prompts, N.
        noise: ``[N, C, H, W]``, what each image begins with.
        adapter: whose images.
        how: the sampling.
        total: how many images all processes make, if these are one process's share of them. Where they share the base,
            a process with fewer images draws some more, for the others' sake, and throws them away.

    Raises:
        PeerError: another process has failed.
    """
    table = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    embeds, pooled = base.encode(list(table))
    place = torch.tensor([table[text] for text in texts], device=embeds.device)
    N, most = len(texts), -(-(total or 0) // how.peers.size) if how.peers.sharded else 0
    extra = max(0, most - N)
    place = torch.cat([place, place.new_zeros(extra)])
    noise = torch.cat([noise, noise.new_zeros(extra, *noise.shape[1:])])
    for start in range(0, N + extra, how.batch):
        begin_pass(how.peers)
        here = slice(start, start + how.batch)
        condition = (embeds[place[here]], pooled[place[here]])
        flow = lambda x, t, condition=condition: velocity(policy, x, t, condition)  # noqa: E731
        with torch.no_grad(), merged(policy, adapter):
            x0 = sample(flow, noise[here].to(base.device), base.scheduler, sampler=how.sampler, steps=how.steps)
        if start < N:
            x0 = x0[: N - start]
            yield x0, base.decode(x0)


@torch.no_grad()
def sample(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    scheduler: FlowMatchEulerDiscreteScheduler,
    *,
    sampler: Sampler,
    steps: int,
) -> Tensor:
    """Follow the flow from noise to latents; deterministic.

    Args:
        velocity: from ``x_t [B, ...]`` and ``t [B]`` in [0, 1] to ``v [B, ...]``.
        noise: ``[B, ...]``, standard normal.
        scheduler: the model's; its shift is used by both samplers.
        sampler: Euler, or DPM-Solver++ of order 2.
        steps: evaluations of the model.

    Returns:
        Latents ``[B, ...]``.
    """
    ready = _ready(scheduler, sampler, steps)
    x = noise
    for t, timestep in zip(ready.sigmas[:steps].float(), ready.timesteps, strict=True):
        v = velocity(x, t.to(x).expand(x.shape[0]))
        x = ready.step(v, timestep, x, return_dict=False)[0]
    return x


def times(scheduler: FlowMatchEulerDiscreteScheduler, steps: int) -> Tensor:
    """The ``steps`` times ``[steps]`` in (0, 1], from noise to image, at which a sampler evaluates the model."""
    sigmas: Tensor = _ready(scheduler, "euler", steps).sigmas
    return sigmas[:steps].float()


def _ready(scheduler: FlowMatchEulerDiscreteScheduler, sampler: Sampler, steps: int) -> Any:
    """A fresh scheduler of the wanted kind, set to ``steps``: schedulers keep state from one call to the next."""
    euler = copy.deepcopy(scheduler)
    euler.set_timesteps(steps)
    if sampler == "euler":
        return euler
    dpm = DPMSolverMultistepScheduler(
        solver_order=2, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=scheduler.config["shift"]
    )
    dpm.set_timesteps(steps)
    # The same times as Euler's, so that both samplers and the training see one schedule.
    dpm.sigmas, dpm.timesteps = euler.sigmas.clone(), euler.timesteps.clone()
    return dpm


def gather_scores(scores: Scores, own: range, total: int, peers: Peers) -> Scores:
    """The scores of all processes' images, from those of this one's."""
    values, applicable = gather_rows((scores.values, scores.applicable.double()), own, total, peers)
    return Scores(values, applicable.bool())
