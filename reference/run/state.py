"""The state of a run, its checkpoints and its folder."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils import _pytree as pytree

from marble_core import GainState
from reference.config.settings import Config, LogConfig, ScoringConfig
from reference.config.toml import from_toml, to_toml
from reference.errors import CheckpointError, ConfigError
from reference.policy.adapters import Policy, adapter_state, load_adapter, lora_layers
from reference.policy.base import Base
from reference.processes.peers import Peers
from reference.run import checkpoint
from reference.run.inputs import Inputs
from reference.run.live import Live
from reference.run.lock import check_unlocked
from reference.run.watch import Health
from reference.step.balance import Balance
from reference.step.estimate import Tree
from reference.step.method import Method
from reference.text_files import whole, write_whole

LORA = "pytorch_lora_weights.safetensors"
VERSION = 3  # of the checkpoint format


class Run(NamedTuple):
    """What a run is: nothing here is replaced while it goes on, though the policy's weights change."""

    config: Config
    method: Method
    base: Base
    policy: Policy
    optimizer: torch.optim.Optimizer
    inputs: Inputs
    peers: Peers
    live: Live


class State(NamedTuple):
    """All that changes from step to step and is in a checkpoint, besides the weights in the policy."""

    epoch: int
    part: int  # optimiser steps already taken in this epoch
    step: int  # optimiser steps since the start
    evaluated: int  # the epoch of the last evaluation, -1 before the first
    skipped: int  # steps in a row without a finite gradient
    ema: Tree
    balance: Balance
    previous: Tree | None  # the gradient of the step before a refresh
    gains: GainState
    health: Health
    verified: bool = False  # since this process began, the gradients of a refresh were compared with autograd's


def check_folder(config: Config, resume: bool) -> None:
    """Refuse to write over a run, or to go on as a different one. Nothing is written.

    Raises:
        ConfigError: the folder cannot be used, and what to do.
    """
    run, metrics = config.run, config.run / "metrics.jsonl"
    check_unlocked(run)
    if not resume and begun(run):
        raise ConfigError(f"run: {run} already holds a run. Continue it with --resume, or choose another --run.")
    if not resume and metrics.exists() and metrics.stat().st_size:
        raise ConfigError(
            f"run: {run} already holds the records of a run, {metrics.name}, and no checkpoint to go on from. Choose "
            "another --run, or move the folder away."
        )
    if resume and not begun(run):
        raise ConfigError(
            f"--resume: {run} has no checkpoint to go on from; nothing was changed. Check --run, or start another run "
            "with another --run and without --resume."
        )
    if resume and _other_run(run / "config.toml", config):
        raise ConfigError(
            f"--resume: the run in {run} was started with another configuration (see its config.toml). Only epochs, "
            "threads, devices, what memory depends on, and the log and scoring tables may change; start another run "
            "for anything else."
        )


def write_config(config: Config) -> None:
    """Make the run folder, with its ``config.toml``: the last thing before a run begins or goes on.

    Raises:
        ConfigError: there is no place for it.
    """
    run = config.run
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_whole(run / "config.toml", to_toml(config).encode())
        (run / "metrics.jsonl").touch()
    except OSError as error:
        raise ConfigError(f"run: cannot write to {run}: {error}. Choose another --run.") from error


def _other_run(started: Path, config: Config) -> bool:
    """Whether a run was started with another configuration.

    Raises:
        ConfigError: nothing says how it was started, or another version does, whose configurations had other keys.
    """
    if not started.is_file():
        raise ConfigError(
            f"--resume: {started} is missing, which says how the run was started; nothing was changed. Put it back, or "
            "start another run with another --run and without --resume."
        )
    try:
        before = from_toml(started, Config())
    except ConfigError as error:
        raise ConfigError(
            f"--resume: {started} is of another version ({error}) Go on with the version that wrote it, or start "
            "another run."
        ) from error
    return essentials(before) != essentials(config)


def begun(run: Path) -> bool:
    """Whether a run folder has checkpoints. Every run writes its first one before it does anything else."""
    return any((run / "checkpoints").glob("step-*.ckpt"))


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


def save_state(run: Run, state: State, *, last: bool = False) -> None:
    """Write a checkpoint, and the averaged weights for diffusers. A disk that is full stops nothing but the last one:
    the run goes on, and tries again. Of several processes, whose states are the same, the main one writes.

    Raises:
        CheckpointError: the last one could not be written.
    """
    live = run.live
    if not live.main:
        return
    leaves, _ = pytree.tree_flatten(state.balance)
    data = {
        "version": VERSION,
        "epoch": state.epoch,
        "part": state.part,
        "step": state.step,
        "evaluated": state.evaluated,
        "skipped": state.skipped,
        "default": adapter_state(run.policy, "default"),
        "old": adapter_state(run.policy, "old"),
        "ema": state.ema,
        "optimizer": run.optimizer.state_dict(),
        "balance": leaves,
        "previous": state.previous,
        "gains": tuple(state.gains),
        "health": tuple(state.health),
        "given": run.inputs.given,
        "rng": checkpoint.rng_state(),
        "metrics": live.position,
        "pending": live.pending,
    }
    live.sync()
    try:
        checkpoint.save(run.config.run / "checkpoints", state.step, data)
        export_lora(run.policy, state.ema, run.config.run)
    except CheckpointError as error:
        if last:
            raise
        live.say(f"warning: {error} Training goes on; free some space before the next checkpoint.")


def usable(config: Config, given: dict[str, str], fresh: State) -> dict[str, Any]:
    """The newest whole checkpoint of a run that is to go on. Nothing is written.

    Args:
        given: what the prompts are now.
        fresh: the state of such a run before its first epoch, which the checkpoint has to be like.

    Raises:
        ConfigError: there is none, or it does not fit.
    """
    folder = config.run / "checkpoints"
    saved = checkpoint.latest(folder)
    if saved is None:
        raise ConfigError(
            f"--resume: no checkpoint in {folder} can be used; nothing was changed. Put a whole one back, or start "
            "another run with another --run and without --resume."
        )
    _check_fits(saved, config, given, fresh)
    return _with_records(saved, config.run / "metrics.jsonl")


def _check_fits(saved: dict[str, Any], config: Config, given: dict[str, str], fresh: State) -> None:
    """Raise if a checkpoint has another format, was saved with other prompts, is from later than is asked for, or is
    that of another model or rule."""
    if saved.get("version") != VERSION:
        raise ConfigError(
            f"--resume: the checkpoints in {config.run} have format {saved.get('version', 1)}, this version reads "
            f"{VERSION}. Go on with the version that wrote them, or start another run."
        )
    _check_given(saved["given"], given)
    least = saved["epoch"] + (saved["part"] > 0)
    if least > config.epochs:
        raise ConfigError(
            f"--resume: expected epochs to be at least the {least} that {config.run} has begun, got {config.epochs}; "
            f"nothing was changed. Give --epochs {least} or more, or start another run with another --run."
        )
    shapes, now = ({name: x.shape for name, x in tree.items()} for tree in (saved["default"], fresh.ema))
    if shapes != now or len(saved["balance"]) != len(pytree.tree_leaves(fresh.balance)):
        raise ConfigError(
            f"--resume: the checkpoints in {config.run} are of another {'model' if shapes != now else 'balance'} than "
            "this one; nothing was changed. Put the old one back, or start another run with another --run."
        )


def _with_records(saved: dict[str, Any], metrics: Path) -> dict[str, Any]:
    """A checkpoint that counts on the records that are there: some may be lost, after a power cut, say.

    The last of them was that of the evaluation, if there was one, which is then made again.
    """
    found = metrics.read_bytes()[: saved["metrics"]] if metrics.is_file() else b""
    kept = found.partition(b"\0")[0]
    if len(kept) == saved["metrics"]:
        return saved
    warnings.warn(
        f"{metrics}: expected the {saved['metrics']} bytes that were there at the checkpoint, got {len(kept)}: records "
        "are lost. The run goes on with those that are left; its report and comparisons lack the others.",
        stacklevel=2,
    )
    evaluated = min(saved["evaluated"], saved["epoch"] - 1)
    return saved | {"metrics": kept.rfind(b"\n") + 1, "evaluated": evaluated}


def restore_state(run: Run, saved: dict[str, Any], fresh: State) -> State:
    """Put a ``usable`` checkpoint back, and cut what was logged after it; of several processes, the main one cuts."""
    load_adapter(run.policy, "default", saved["default"])
    load_adapter(run.policy, "old", saved["old"])
    run.optimizer.load_state_dict(saved["optimizer"])
    leaves, spec = pytree.tree_flatten(fresh.balance)
    run.live.cut(saved["metrics"], saved["pending"])
    device = next(iter(fresh.ema.values())).device
    balance = [x.to(like.device) for x, like in zip(saved["balance"], leaves, strict=True)]
    previous = saved["previous"]
    return State(
        saved["epoch"],
        saved["part"],
        saved["step"],
        saved["evaluated"],
        saved["skipped"],
        {name: x.to(device) for name, x in saved["ema"].items()},
        pytree.tree_unflatten(balance, spec),
        None if previous is None else {name: x.to(device) for name, x in previous.items()},
        GainState(*saved["gains"]),
        Health(*saved["health"]),
    )


def _check_given(before: dict[str, str], now: dict[str, str]) -> None:
    """Raise if the content of the prompts is another one than when the run was saved."""
    other = sorted(key for key in before if before[key] != now.get(key))
    if other:
        raise ConfigError(
            f"--resume: the {' and the '.join(other)} are not those that the run was started with: the content of a "
            "file has changed. Put the old files back, or start another run."
        )


def export_lora(policy: Policy, ema: Tree, run: Path) -> None:
    """Write the averaged weights in diffusers' format, whole or not at all: ``pipeline.load_lora_weights(run)``.

    Raises:
        CheckpointError: they could not be written.
    """
    try:
        with whole(run / LORA) as temporary:
            save_file(lora_layers(policy, ema), temporary, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {run / LORA}: {error}.") from error


def essentials(config: Config) -> Config:
    """A configuration without what may differ between the parts of one run, or between two that are compared."""
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
