"""Prompts to images: deterministic sampling with diffusers' own schedulers and their own float timesteps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

Sampler = Literal["euler", "dpm2"]


def times(scheduler: FlowMatchEulerDiscreteScheduler, steps: int) -> Tensor:
    """The ``steps`` times ``[steps]`` in (0, 1], from noise to image, at which a sampler evaluates the model."""
    sigmas: Tensor = _ready(scheduler, "euler", steps).sigmas
    return sigmas[:steps].float()


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
