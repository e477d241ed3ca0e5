"""What a run would do, before it does it: rows, steps, solves, and estimates of memory and time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from reference.config.settings import REWARDS, Config, is_world, pulls, training_times
from reference.config.toml import to_toml
from reference.errors import ConfigError
from reference.policy.adapters import Policy, parameters, target_layers, velocity
from reference.policy.load import adapted, load_model
from reference.processes.devices import device_of
from reference.prompts.pool import all_prompts, held_out_prompts, training_pool
from reference.rewards.scorer import scorer_of, sources_of
from reference.run.inputs import check_held_out
from reference.run.live import check_trackers, clock
from reference.step.method import method_of
from reference.text_files import names_missing_folder

_BYTES = 4  # float32
_TRIED_ANYWHERE = 10_000_000  # parameters of a model that is timed without a GPU, too


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

    The small world is loaded and timed for the estimates. Of Stable Diffusion 3 nothing but configurations is read; on
    a GPU the transformer is timed with random weights, and its memory is measured. What a run would be refused for, as
    far as that shows without weights, is said.
    """
    work = _work(config)
    lines, missing = _counts(config, work), list[str]()
    looks: dict[str, Callable[[Config, _Work], dict[str, str]]] = {}
    if is_world(config.model.base):
        base, policy = load_model(config, [])
        condition = base.encode(["a red circle"])
        found = _measure(config, policy, torch.randn(1, *base.latent_shape, device=base.device), condition)
        lines |= _memory(config, sum(p.numel() for p in parameters(policy).values())) | _time(config, work, found)
    else:
        looks = {"model": _stable_diffusion, "prompts": _prompts, "rewards": _rewards}
    for name, look in {**looks, "trackers": _trackers}.items():
        try:
            lines |= look(config, work)
        except ConfigError as error:
            missing.append(f"{name}: {error}")
    if missing:
        lines["missing"] = "; ".join(text.partition(":")[0] for text in missing) + ": see below"
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


class _Measured(NamedTuple):
    """Seconds of a forward pass, and of forward and backward, of one image; GB at the peak on a GPU, else 0."""

    forward: float
    train: float
    peak: float


def _time(config: Config, work: _Work, found: _Measured) -> dict[str, str]:
    """Lines about time."""
    r, log, (forward, train, peak) = config.rollout, config.log, found
    others = 2.0 if pulls(config.loss) else 1.0  # forward passes of the old policy and of the base
    more = work.refreshes / max(work.steps, 1)  # of a second backward pass
    epoch = work.images * (r.steps * forward + work.J * (train + others * forward + more * (train - forward)))
    evaluations = 1 + math.ceil(config.epochs / (log.eval_every or config.epochs))
    total = config.epochs * epoch + evaluations * log.eval_prompts * log.eval_images * log.eval_steps * forward
    lines = {
        "time": f"about {clock(total)} here: {epoch:.1f} s an epoch, without scoring and decoding",
        "an image": f"{1000 * forward:.1f} ms a forward pass, {1000 * train:.1f} ms with backward, measured now",
    }
    return lines | ({"peak": f"{peak:.1f} GB with a micro-batch, measured now with random weights"} if peak else {})


def _stable_diffusion(config: Config, work: _Work) -> dict[str, str]:
    """Lines about a model that is not the small world's."""
    # seconds of imports, which the small world does without
    from reference.policy.sd3 import empty_transformer

    (transformer, shape), m = empty_transformer(config.model), config.model
    size = {"float32": 4, "bf16": 2}[m.precision] * sum(p.numel() for p in transformer.parameters())
    layers = [transformer.get_submodule(name) for name in target_layers(transformer, m.lora_targets)]
    lines = _memory(config, sum(m.lora_rank * sum(layer.weight.shape) for layer in layers))
    lines["base"] = f"{size / 1e9:.2f} GB of transformer weights in {m.precision}"
    lines["base"] += ", spread over all processes" if m.shard else ""
    return lines | _time_of_random_weights(config, work, transformer, shape)


def _prompts(config: Config, work: _Work) -> dict[str, str]:
    """A line about prompts."""
    pool, held_out = training_pool(config), held_out_prompts(config)
    check_held_out(held_out, pool)
    return {"prompts": f"{len(all_prompts(pool))} for training, {len(held_out)} held out"}


def _rewards(config: Config, work: _Work) -> dict[str, str]:
    """No line, but an error where a function of the user's, a server or the folder of a model is not there."""
    names = dict.fromkeys(config.rewards + config.log.watch)
    scorer_of(config, [name for name in names if name not in REWARDS or name == "unifiedreward"])
    for name, source in sources_of(config).items():
        parts = source.split(",") if name in names and name != "unifiedreward" else []
        for path in filter(names_missing_folder, parts):
            raise ConfigError(f"scoring.models: {name}: expected a folder or an id on the hub, got {path}.")
    return {}


def _trackers(config: Config, work: _Work) -> dict[str, str]:
    """No line, but an error where a tracker cannot be used."""
    check_trackers(config.log.trackers)
    return {}


def _time_of_random_weights(
    config: Config, work: _Work, transformer: SD3Transformer2DModel, shape: Sequence[int]
) -> dict[str, str]:
    """Lines about time and memory of a model that was not downloaded: on a GPU, or where it is small."""
    device, c = device_of(config.device), transformer.config
    if device.type != "cuda" and sum(p.numel() for p in transformer.parameters()) > _TRIED_ANYWHERE:
        return {"time": "not estimated: there is no GPU here"}
    try:
        transformer = transformer.to_empty(device=device)
        for tensor in (*transformer.parameters(), *transformer.buffers()):
            torch.nn.init.normal_(tensor.data, std=0.02)
        policy = adapted(transformer, config)
        policy.model.to(device)
        dtype = next(transformer.parameters()).dtype
        tokens = 77 + config.model.t5_tokens
        condition = (
            torch.randn(1, tokens, c["joint_attention_dim"], device=device, dtype=dtype),
            torch.randn(1, c["pooled_projection_dim"], device=device, dtype=dtype),
        )
        x = torch.randn(1, *shape, device=device)
        return _time(config, work, _measure(config, policy, x, condition))
    except torch.OutOfMemoryError:
        return {"time": "not estimated: the model and a micro-batch do not fit here; lower optim.micro_batch"}


def _measure(config: Config, policy: Policy, x: Tensor, condition: Sequence[Tensor]) -> _Measured:
    """Time a micro-batch of copies of one latent and condition, on their device."""
    if config.threads:
        torch.set_num_threads(config.threads)
    n, gpu = min(config.optim.micro_batch, 32), x.device.type == "cuda"
    x, condition = x.repeat(n, 1, 1, 1), [c.repeat(n, *[1] * (c.ndim - 1)) for c in condition]
    t = torch.rand(n, device=x.device)

    def forward() -> None:
        with torch.no_grad():
            velocity(policy, x, t, condition)

    def both() -> None:
        trained = list(parameters(policy).values())
        torch.autograd.grad(velocity(policy, x, t, condition).square().mean(), trained)

    def seconds(run: Callable[[], None]) -> float:
        run()
        began = _now(gpu)
        for _ in range(3):
            run()
        return (_now(gpu) - began) / 3 / n

    if gpu:
        torch.cuda.reset_peak_memory_stats(x.device)
    found = seconds(forward), seconds(both)
    return _Measured(*found, torch.cuda.max_memory_allocated(x.device) / 1e9 if gpu else 0.0)


def _now(gpu: bool) -> float:
    """The clock, after what a GPU still has to do."""
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter()
