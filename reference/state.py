"""The state of a run, its checkpoints and its folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils import _pytree as pytree

from reference import checkpoint
from reference.balance import Balance
from reference.config import Config, LogConfig, ScoringConfig
from reference.errors import CheckpointError, ConfigError
from reference.estimate import Tree
from reference.live import Live
from reference.policy import Policy, adapter_state, load_adapter, lora_layers
from reference.progress import Progress
from reference.toml import from_toml, to_toml

LORA = "pytorch_lora_weights.safetensors"


class State(NamedTuple):
    """All that changes from step to step and is in a checkpoint, besides the weights in the policy."""

    epoch: int
    part: int  # optimiser steps already taken in this epoch
    step: int  # optimiser steps since the start
    skipped: int  # steps in a row without a finite gradient
    ema: Tree
    balance: Balance
    previous: Tree | None  # the gradient of the step before a refresh
    progress: Progress


def open_run(config: Config, resume: bool) -> None:
    """Make the run folder and write ``config.toml``; refuse to write over a run, or to go on as a different one."""
    run = config.run
    metrics = run / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size and not resume:
        raise ConfigError(f"run: {run} already holds a run. Continue it with --resume, or choose another --run.")
    started = run / "config.toml"
    if resume and started.exists() and _essentials(from_toml(started, Config())) != _essentials(config):
        raise ConfigError(
            f"--resume: the run in {run} was started with another configuration (see its config.toml). Only epochs, "
            "threads, devices, what memory depends on, and the log and scoring tables may change; start another run "
            "for anything else."
        )
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.toml").write_text(to_toml(config), encoding="utf-8")
        (run / "metrics.jsonl").touch()
    except OSError as error:
        raise ConfigError(f"run: cannot write to {run}: {error}. Choose another --run.") from error


def load_run(run: Path, device: str, models: Sequence[str] = ()) -> tuple[Config, dict[str, Any]]:
    """A run's configuration, with another device and more sources of rewards' models, and its newest checkpoint.

    Raises:
        ConfigError: it is no folder of a run, or has no checkpoint.
    """
    if not (run / "config.toml").is_file():
        raise ConfigError(f"--run: expected the folder of a run, with its config.toml, got {run}.")
    config = from_toml(run / "config.toml", Config())
    scoring = dataclasses.replace(config.scoring, models=(*config.scoring.models, *models))
    return dataclasses.replace(config, device=device, scoring=scoring), newest(run)


def newest(run: Path) -> dict[str, Any]:
    """The newest checkpoint of a run.

    Raises:
        ConfigError: it has none.
    """
    state = checkpoint.latest(run / "checkpoints")
    if state is None:
        raise ConfigError(f"--run: {run} has no checkpoint yet. Train it, or give another run.")
    return state


def save_state(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    state: State,
    config: Config,
    live: Live,
    *,
    last: bool = False,
) -> None:
    """Write a checkpoint, and the averaged weights for diffusers. A disk that is full stops nothing but the last one:
    the run goes on, and tries again. Of several processes, whose states are the same, the main one writes."""
    if not live.main:
        return
    leaves, _ = pytree.tree_flatten(state.balance)
    data = {
        "epoch": state.epoch,
        "part": state.part,
        "step": state.step,
        "skipped": state.skipped,
        "default": adapter_state(policy, "default"),
        "old": adapter_state(policy, "old"),
        "ema": state.ema,
        "optimizer": optimizer.state_dict(),
        "balance": leaves,
        "previous": state.previous,
        "progress": tuple(state.progress),
        "rng": checkpoint.rng_state(),
        "metrics": live.position(),
    }
    try:
        checkpoint.save(config.run / "checkpoints", state.step, data)
        export_lora(policy, state.ema, config.run)
    except CheckpointError as error:
        if last:
            raise
        live.say(f"warning: {error} Training goes on; free some space before the next checkpoint.")


def restore_state(
    saved: dict[str, Any],
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    fresh: State,
    config: Config,
    *,
    main: bool = True,
) -> State:
    """Put a checkpoint back, and cut what was logged after it; of several processes, the main one cuts."""
    load_adapter(policy, "default", saved["default"])
    load_adapter(policy, "old", saved["old"])
    optimizer.load_state_dict(saved["optimizer"])
    leaves, spec = pytree.tree_flatten(fresh.balance)
    if main:
        with (config.run / "metrics.jsonl").open("r+b") as file:
            file.truncate(saved["metrics"])
    device = next(iter(fresh.ema.values())).device
    balance = [x.to(like.device) for x, like in zip(saved["balance"], leaves, strict=True)]
    previous = saved["previous"]
    return State(
        saved["epoch"],
        saved["part"],
        saved["step"],
        saved["skipped"],
        {name: x.to(device) for name, x in saved["ema"].items()},
        pytree.tree_unflatten(balance, spec),
        None if previous is None else {name: x.to(device) for name, x in previous.items()},
        Progress(*saved["progress"]),
    )


def export_lora(policy: Policy, ema: Tree, run: Path) -> None:
    """Write the averaged weights in diffusers' format, whole or not at all: ``pipeline.load_lora_weights(run)``.

    Raises:
        CheckpointError: they could not be written.
    """
    temporary = run / f"{LORA}.tmp"
    try:
        save_file(lora_layers(policy, ema), temporary, metadata={"format": "pt"})
        os.replace(temporary, run / LORA)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {run / LORA}: {error}.") from error


def _essentials(config: Config) -> Config:
    """A configuration without what may differ between the parts of one run."""
    return dataclasses.replace(
        config,
        run=Path(),
        epochs=0,
        threads=0,
        device="",
        model=dataclasses.replace(config.model, cache=Path(), compile=False, gradient_checkpointing=False, shard=False),
        rollout=dataclasses.replace(config.rollout, batch=0),
        scoring=ScoringConfig(),
        optim=dataclasses.replace(config.optim, micro_batch=0),
        log=LogConfig(),
    )
