"""What a run would do, before it does it: rows, steps, solves, and estimates of memory and time."""

from __future__ import annotations

import math
import time

import torch

from marble_core import refresh_due
from reference.base import load_base
from reference.config import Config, rule_of, to_toml, training_times
from reference.policy import add_lora, parameters, velocity

_BYTES = 4  # float32


def plan(config: Config) -> str:
    """The resolved plan as text; loads the model and times one forward and backward pass for the estimates."""
    r, rule, K = config.rollout, rule_of(config), len(config.rewards)
    images = r.prompts_per_epoch * r.images_per_prompt
    J = config.loss.timesteps_per_image or training_times(config)
    steps = config.epochs * config.optim.steps_per_epoch
    refreshes = sum(refresh_due(step, rule.refresh_every) for step in range(steps))
    all_rows = sum(
        any(refresh_due(step + ahead, rule.refresh_every) for ahead in range(rule.accumulate)) for step in range(steps)
    )
    forward, train, P = _measure(config)
    backwards = {"shared": 2.0, "k_pass": K + 1.0}[rule.rows]
    others = 2.0 if config.loss.kl_weight > 0 else 1.0  # forward passes of the old policy and of the base
    step = train + others * forward + (backwards - 1) * (train - forward) * all_rows / max(steps, 1)
    epoch = images * (r.steps * forward + J * step)
    every = config.log.eval_every or config.epochs
    evaluations = 1 + math.ceil(config.epochs / every)
    evaluation = config.log.eval_prompts * config.log.eval_images * config.log.eval_steps * forward
    kept = {"moments": 1, "moment_halves": 2, "consecutive": 1}.get(rule.gram, int(rule.step == "moments"))
    kept += 2 if rule.accumulate > 1 else 0
    # two adapters, EMA, Adam, gradient, step before and shared; K rows of two halves and their sum, and what is kept
    memory = P * _BYTES * (2 + 1 + 2 + 1 + 2 + (3 + kept) * K)
    total = config.epochs * epoch + evaluations * evaluation
    lines = {
        "rule": f"{config.balance}: {rule}",
        "rewards": f"K = {K}: {', '.join(config.rewards)}",
        "an epoch": f"{r.prompts_per_epoch} prompts x {r.images_per_prompt} images = {images} images",
        "rows": f"{images} x {J} timesteps = {images * J}, {images * J // config.optim.steps_per_epoch} a step",
        "run": f"{config.epochs} epochs = {steps} optimiser steps = {config.epochs * images} images",
        "refreshes": f"{refreshes}, every {rule.refresh_every} steps, with {backwards:.0f} backward passes each"
        + (", to measure cosines" if rule.kind != "solve" or rule.solver == "prior" else "")
        + (f"; {all_rows} steps compute all {K} gradients" if rule.accumulate > 1 else ""),
        "trained": f"{P} parameters; the gradients of {K} rewards take {K * P * _BYTES / 1e6:.1f} MB"
        + (f", and {kept} times that is kept" if kept else ""),
        "memory": f"about {memory / 1e6:.0f} MB beside the base model and the activations of one micro-batch",
        "time": f"about {total / 60:.0f} min here: {epoch:.1f} s an epoch, without scoring",
        "an image": f"{1000 * forward:.1f} ms a forward pass, {1000 * train:.1f} ms with backward, measured now",
    }
    return "\n".join([to_toml(config).rstrip(), "", "# plan", *(f"# {k:12}{v}" for k, v in lines.items())])


def _measure(config: Config) -> tuple[float, float, int]:
    """Seconds of a forward pass, and of a forward and backward pass, of one image; number of trained parameters."""
    if config.threads:
        torch.set_num_threads(config.threads)
    base = load_base(config.model.base)
    m = config.model
    policy = add_lora(base.transformer, rank=m.lora_rank, alpha=m.lora_alpha, targets=m.lora_targets, seed=0)
    n = min(config.optim.micro_batch, 32)
    embeds, pooled = base.encode(["a red circle"] * n)
    x, t = torch.randn(n, *base.latent_shape), torch.rand(n)

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
