"""What a run would do, before it does it: rows, steps, solves, and estimates of memory and time."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch

from reference.config.settings import Config, is_world, pulls, training_times
from reference.config.toml import to_toml
from reference.errors import ConfigError
from reference.policy.adapters import parameters, target_layers, velocity
from reference.policy.load import load_model
from reference.prompts.pool import all_prompts, held_out_prompts, training_pool
from reference.step.method import method_of

_BYTES = 4  # float32


class _Work(NamedTuple):
    """What a run does: images and timesteps of an epoch, steps, those that compute K gradients."""

    images: int
    J: int
    steps: int
    refreshes: int


class Plan(NamedTuple):
    """What a run would do, in words, and what it lacks."""

    text: str
    missing: tuple[str, ...]


def plan(config: Config) -> Plan:
    """Resolve a configuration to a plan.

    The small world is loaded and timed for the estimates. Of Stable Diffusion 3 nothing but the configuration of the
    transformer is read; what is missing is said.
    """
    work = _work(config)
    lines, missing = _counts(config, work), list[str]()
    if is_world(config.model.base):
        forward, train, P = _measure(config)
        lines |= _memory(config, P) | _time(config, work, forward, train)
    else:
        more, missing = _stable_diffusion(config)
        lines |= more
    text = [to_toml(config).rstrip(), "", "# plan", *(f"# {k:12}{v}" for k, v in lines.items())]
    return Plan("\n".join(text), tuple(missing))


def _work(config: Config) -> _Work:
    """Count."""
    r, every = config.rollout, method_of(config).every
    steps = config.epochs * config.optim.steps_per_epoch
    J = config.loss.timesteps_per_image or training_times(config)
    return _Work(r.prompts_per_epoch * r.images_per_prompt, J, steps, math.ceil(steps / every) if every else 0)


def _counts(config: Config, work: _Work) -> dict[str, str]:
    """Lines about what is done, whatever the model."""
    r, method, K, images = config.rollout, method_of(config), len(config.rewards), work.images
    rows = images * work.J
    return {
        "rule": config.balance,
        "rewards": f"K = {K}: {', '.join(config.rewards)}",
        "an epoch": f"{r.prompts_per_epoch} prompts x {r.images_per_prompt} images = {images} images",
        "rows": f"{images} x {work.J} timesteps = {rows}, {rows // config.optim.steps_per_epoch} a step",
        "run": f"{config.epochs} epochs = {work.steps} optimiser steps = {config.epochs * images} images",
        "refreshes": f"{work.refreshes}, every {method.every} steps, with 2 backward passes each"
        + ("" if method.solves else ", to measure cosines"),
    }


def _memory(config: Config, P: int) -> dict[str, str]:
    """Lines about what the adapters, their optimiser and K gradients take."""
    K, kept = len(config.rewards), 2 if method_of(config).memory is not None else 0
    # two adapters, EMA, Adam, gradient, step before and shared; K rows of two halves and their sum, and what is kept
    memory = P * _BYTES * (2 + 1 + 2 + 1 + 2 + (3 + kept) * K)
    return {
        "trained": f"{P} parameters; the gradients of {K} rewards take {K * P * _BYTES / 1e6:.1f} MB"
        + (f", and {kept} times that is kept" if kept else ""),
        "memory": f"about {memory / 1e6:.0f} MB beside the base model and the activations of one micro-batch",
    }


def _time(config: Config, work: _Work, forward: float, train: float) -> dict[str, str]:
    """Lines about time, from seconds of a forward pass, and of forward and backward, of one image."""
    r, log = config.rollout, config.log
    others = 2.0 if pulls(config.loss) else 1.0  # forward passes of the old policy and of the base
    more = work.refreshes / max(work.steps, 1)  # of a second backward pass
    epoch = work.images * (r.steps * forward + work.J * (train + others * forward + more * (train - forward)))
    evaluations = 1 + math.ceil(config.epochs / (log.eval_every or config.epochs))
    total = config.epochs * epoch + evaluations * log.eval_prompts * log.eval_images * log.eval_steps * forward
    return {
        "time": f"about {total / 60:.0f} min here: {epoch:.1f} s an epoch, without scoring",
        "an image": f"{1000 * forward:.1f} ms a forward pass, {1000 * train:.1f} ms with backward, measured now",
    }


def _stable_diffusion(config: Config) -> tuple[dict[str, str], list[str]]:
    """Lines about a model and prompts, and what of them is not here yet."""
    from reference.policy.sd3 import empty_transformer  # seconds of imports, which the small world does without

    lines: dict[str, str] = {}
    missing: list[str] = []
    try:
        transformer, m = empty_transformer(config.model), config.model
        size = {"float32": 4, "bf16": 2}[m.precision] * sum(p.numel() for p in transformer.parameters())
        layers = [transformer.get_submodule(name) for name in target_layers(transformer, m.lora_targets)]
        lines |= _memory(config, sum(m.lora_rank * sum(layer.weight.shape) for layer in layers))
        lines["base"] = f"{size / 1e9:.2f} GB of transformer weights in {m.precision}"
        lines["base"] += ", spread over all processes" if m.shard else ""
    except ConfigError as error:
        missing.append(f"model: {error}")
    try:
        pool, held_out = training_pool(config), held_out_prompts(config)
        lines["prompts"] = f"{len(all_prompts(pool))} for training, {len(held_out)} held out"
    except ConfigError as error:
        missing.append(f"prompts: {error}")
    lines["time"] = "not estimated: it is the GPU's, see docs/benchmarks.md"
    if missing:
        lines["missing"] = "; ".join(text.partition(":")[0] for text in missing) + ": see below"
    return lines, missing


def _measure(config: Config) -> tuple[float, float, int]:
    """Seconds of a forward pass, and of a forward and backward pass, of one image; number of trained parameters."""
    if config.threads:
        torch.set_num_threads(config.threads)
    base, policy = load_model(config, [])
    n = min(config.optim.micro_batch, 32)
    embeds, pooled = base.encode(["a red circle"] * n)
    x, t = torch.randn(n, *base.latent_shape, device=base.device), torch.rand(n, device=base.device)

    def forward() -> None:
        with torch.no_grad():
            velocity(policy, x, t, (embeds, pooled))

    def both() -> None:
        trained = list(parameters(policy).values())
        torch.autograd.grad(velocity(policy, x, t, (embeds, pooled)).square().mean(), trained)

    seconds = []
    for run in (forward, both):
        run()
        began = time.perf_counter()
        for _ in range(3):
            run()
        seconds.append((time.perf_counter() - began) / 3 / n)
    return seconds[0], seconds[1], sum(p.numel() for p in parameters(policy).values())
