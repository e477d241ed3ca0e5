"""The training loop, top to bottom: sample, score, weigh, step, follow."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from marble_core import (
    SLOW_DECAY,
    STANDARD_DECAY,
    ema_tree,
    eval_ema_decay,
    old_policy_decay,
    soft_min_weights,
)
from reference.config.checks import validate
from reference.config.settings import Config, Rule, refreshes_at, rule_of
from reference.errors import CheckpointError, ConfigError, Interrupted, PeerError, RewardError, TrainingError
from reference.interfaces import Scores
from reference.policy.adapters import Policy, adapter_state, load_adapter, parameters
from reference.policy.base import Base
from reference.policy.load import load_model
from reference.processes.devices import tf32
from reference.processes.peers import (
    World,
    any_of,
    check_equal,
    connect,
    first_on_machine,
    meet,
    require_enough,
    stop_on_interrupt,
    together,
)
from reference.prompts.pool import all_prompts
from reference.run import checkpoint
from reference.run.held_out import evaluate_held_out
from reference.run.inputs import Inputs, prepare
from reference.run.live import Live, check_trackers
from reference.run.report import write_report
from reference.run.state import Run, State, open_run, restore_state, save_state
from reference.run.watch import end_epoch, init_health, observe_step
from reference.step.balance import Step, StepResult, applied_coefficients, init_balance, is_finite, step_gradient
from reference.step.batch import Rollout, advantages, images_of_steps, sample_epoch, step_rows, whole_step
from reference.step.estimate import Tree
from reference.step.gains import Progress, gains_of, init_progress, update_progress
from reference.step.generation import generator
from reference.step.gradients import Rows, Whole

_MAX_SKIPPED = 10  # steps in a row without a finite gradient
_NOT_FINITE = (
    f"the gradient was not finite {_MAX_SKIPPED} steps in a row (last at step {{}}). The weights of the last good step "
    "are saved; try a lower optim.lr, a lower optim.clip, or look at the rewards."
)
_NOTHING_APPLIES = (
    "none of the rewards applies to any prompt: there is nothing to learn. Give prompts with what the rewards need to "
    "know (docs/prompts.md), or other rewards."
)
_FIRST_EPOCHS = 10  # at most so many tell the spread of rewards at the start, the unit of gains


def train(config: Config, *, resume: bool = False) -> Path:
    """Train, and write everything to ``config.run``; returns the path of the report.

    Under a launcher, all its processes train as one, and process 0 writes.

    Raises:
        ConfigError: the configuration, the prompts or the run folder cannot be used; nothing has been done.
        TrainingError, RewardError: the run stopped; its newest state is saved.
        Interrupted: Ctrl-C; its newest state is saved.
    """
    validate(config)
    world = connect(config.device)
    with together(world):
        return _train(config, resume, world)


def _train(config: Config, resume: bool, world: World) -> Path:
    """``train`` on this process."""
    main = world.rank == 0
    if config.threads:
        torch.set_num_threads(config.threads)
    if main:
        check_trackers(config.log.trackers)
    meet(world)
    base, policy, inputs, optimizer = _loaded(config, world)
    if main:
        open_run(config, resume)
    meet(world)
    live = Live(config.run, config.log.trackers, config.epochs, main=main)
    try:
        run = Run(config, rule_of(config), base, policy, optimizer, inputs, world, live)
        state, rng = _fresh(run), None
        if resume:
            state, rng = _resumed(run, state)
        check_equal({"the checkpoints' steps": torch.tensor(state.step)}, world)
        with stop_on_interrupt() as stop, tf32(base.device):
            _loop(run, state, stop, rng)
    finally:
        live.close()
    return _report(config.run) if main else config.run / "report.html"


def _loaded(config: Config, world: World) -> tuple[Base, Policy, Inputs, torch.optim.Optimizer]:
    """Load everything that a run needs, before its folder is touched."""
    with first_on_machine(world):
        inputs = prepare(config)
    base, policy = load_model(config, [p.text for p in [*all_prompts(inputs.pool), *inputs.held_out]], world)
    images = config.rollout.prompts_per_epoch * config.rollout.images_per_prompt
    seen = len(inputs.held_out) * config.log.eval_images
    require_enough({"images of an epoch": images, "images of an evaluation": seen}, world)
    o = config.optim
    optimizer = torch.optim.AdamW(
        parameters(policy).values(), lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, eps=o.eps
    )
    return base, policy, inputs, optimizer


def _fresh(run: Run) -> State:
    """The state before the first epoch."""
    K, policy = len(run.config.rewards), run.policy
    balance = init_balance(K, run.rule, parameters(policy))
    return State(0, 0, 0, -1, 0, adapter_state(policy, "default"), balance, None, init_progress(K), init_health())


def _resumed(run: Run, fresh: State) -> tuple[State, dict[str, Any] | None]:
    """The newest whole checkpoint, and the generators' state where it was saved within an epoch.

    Raises:
        ConfigError: all checkpoints are damaged; they and the records are left as they are.
    """
    folder = run.config.run / "checkpoints"
    saved = checkpoint.latest(folder)
    if saved is None:
        raise ConfigError(
            f"--resume: no checkpoint in {folder} can be used; nothing was changed. Put a whole one back, or start "
            "another run with another --run and without --resume."
        )
    state = restore_state(run, saved, fresh)
    run.live.start(state.epoch)
    return state, saved["rng"] if state.part > 0 else None


def _loop(run: Run, state: State, stop: list[bool], rng: dict[str, Any] | None) -> None:
    """Epoch after epoch. A state is saved before anything that may fail, evaluations included."""
    log, epochs = run.config.log, run.config.epochs
    if state.evaluated < 0:
        save_state(run, state)
    while True:
        if _evaluation_due(run.config, state):
            state = _evaluated(run, state)
            if state.epoch == epochs:
                save_state(run, state, last=True)
        if state.epoch == epochs:
            return
        state = _epoch(run, state, stop, rng)
        rng = None
        if _due(state.epoch, log.save_every) or _evaluation_due(run.config, state):
            save_state(run, state, last=state.epoch == epochs)


def _due(epoch: int, every: int) -> bool:
    """Whether something that happens every so many epochs, 0 for never, happens after this one."""
    return every > 0 and epoch % every == 0


def _evaluation_due(config: Config, state: State) -> bool:
    """Whether this state is to be evaluated, and has not been."""
    wanted = state.epoch in (0, config.epochs) or _due(state.epoch, config.log.eval_every)
    return wanted and state.part == 0 and state.evaluated < state.epoch


def _evaluated(run: Run, state: State) -> State:
    """Judge the averaged weights on held-out prompts. The state was saved before."""
    last = state.epoch == run.config.epochs
    name = "before" if state.epoch == 0 else "after" if last else f"epoch-{state.epoch:04d}"
    try:
        evaluate_held_out(run, state, name)
    except Exception as error:
        raise _stopped(error, state) from error
    return state._replace(evaluated=state.epoch)


def _stopped(error: Exception, state: State) -> Exception:
    """An error with how to go on; what is not the trainer's own becomes one of its errors."""
    go_on = f"The state of step {state.step} is saved: go on with --resume."
    if isinstance(error, Interrupted | PeerError | ConfigError | CheckpointError):
        return error
    if isinstance(error, RewardError | TrainingError):
        return type(error)(f"{error} {go_on}" if str(error).endswith(".") else f"{error}. {go_on}")
    return TrainingError(f"training stopped by {type(error).__name__}: {error}. {go_on}")


def _report(run: Path) -> Path:
    """Write the report; a run without one is complete all the same.

    Raises:
        TrainingError: it could not be written.
    """
    try:
        return write_report(run)
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"the report could not be written: {error}. The run itself is complete; write it again with "
            f"python -m reference report --run {run}"
        ) from error


def _epoch(run: Run, state: State, stop: list[bool], rng: dict[str, Any] | None) -> State:
    """One epoch, or what is left of it: its rollout depends on the seed, the epoch and the old policy alone.

    Whatever stops it leaves the newest state on disk.
    """
    config, clock, cpu = run.config, [time.monotonic()], time.process_time()
    try:
        rollout = _sampled(run, state, clock)
        learning = state.epoch < _first_epochs(run.inputs, config)
        texts, images = [prompt.text for prompt in rollout.prompts], config.rollout.images_per_prompt
        progress = update_progress(state.progress, texts, rollout.scores, images, learning=learning)
        if not progress.images.any():
            raise TrainingError(_NOTHING_APPLIES)
        gains = gains_of(progress)
        run.live.phase(state.epoch, "training")
        A, A_sum = advantages(rollout.scores, config)
        prior = _sum_weights(A, A_sum) if run.rule.kind == "weighted-sum" else _prior(gains, run.rule)
        parts = images_of_steps(len(A), config, state.epoch)
        if rng is not None:
            checkpoint.set_rng_state(rng)
        while state.part < len(parts):
            if any_of(stop[0], run.world):
                raise Interrupted(f"stopped after step {state.step}; go on with --resume")
            rows = step_rows(run.base, rollout, A, A_sum, parts[state.part], config, state.epoch, state.part)
            state = _step(run, state, rows, whole_step(parts[state.part], config, run.world), prior)
            if state.skipped >= _MAX_SKIPPED:
                state = state._replace(skipped=0)
                raise TrainingError(_NOT_FINITE.format(state.step))
    except Exception as error:
        save_state(run, state)
        raise _stopped(error, state) from error
    decay = old_policy_decay(state.step, SLOW_DECAY if config.optim.old_decay == "slow" else STANDARD_DECAY)
    load_adapter(run.policy, "old", ema_tree(parameters(run.policy, "old"), parameters(run.policy), decay))
    clock.append(time.monotonic())
    health, warnings = end_epoch(state.health, state.epoch)
    notes = _constant_rewards(A, rollout.scores, config.rewards) + _idle_rewards(progress, config.rewards) + warnings
    _log_epoch(run, state, rollout.scores, gains, clock, time.process_time() - cpu, notes)
    return state._replace(epoch=state.epoch + 1, part=0, progress=progress, health=health)


def _sampled(run: Run, state: State, clock: list[float]) -> Rollout:
    """An epoch's images and their scores; the times of sampling and scoring go into ``clock``."""
    _seed_everything(run.config.seed, state.epoch, run.world)

    def sampled() -> None:
        clock.append(time.monotonic())
        run.live.phase(state.epoch, "scoring")

    run.live.phase(state.epoch, "sampling")
    trained, pool = run.inputs.trained, run.inputs.pool
    rollout = sample_epoch(run.policy, run.base, trained, pool, run.config, state.epoch, sampled, run.world)
    clock.append(time.monotonic())
    return rollout


def _first_epochs(inputs: Inputs, config: Config) -> int:
    """The epochs that tell the spread of rewards at the start: once through the prompts, but not for long."""
    return min(math.ceil(len(all_prompts(inputs.pool)) / config.rollout.prompts_per_epoch), _FIRST_EPOCHS)


def _step(run: Run, state: State, rows: Rows, whole: Whole, prior: Tensor) -> State:
    """One optimiser step: the balanced gradient, clipped; skipped if it is not finite.

    The last thing that can fail for another process's sake comes before anything has changed.
    """
    rule, policy, config = run.rule, run.policy, run.config
    at = state.step
    step = Step(
        refresh=refreshes_at(rule, at),
        prior=prior,
        metric=_inverse_metric(run.optimizer, policy) if rule.metric == "adam" else None,
        previous=state.previous,
        verify=not state.verified,
    )
    size = config.optim.micro_batch
    result = step_gradient(policy, rows, state.balance, rule, config.loss, step, micro_batch=size, whole=whole)
    finite, applied = is_finite(result.gradient), applied_coefficients(rule, result.balance, prior)
    if result.refresh is not None:
        norms = torch.stack([x.norm() for x in result.gradient.values()])
        check_equal({"coefficients": applied, "gradients": norms}, whole.world)
    metrics = dict(result.metrics)
    if finite:
        metrics["grad_norm"] = _descend(run, result.gradient)
        decay = eval_ema_decay(state.step, config.optim.ema_cap)
        state = state._replace(ema=ema_tree(state.ema, parameters(policy), decay), balance=result.balance)
    keep = result.gradient if finite and refreshes_at(rule, at + 1) else None
    health = observe_step(state.health, metrics)
    skipped = 0 if finite else state.skipped + 1
    state = state._replace(step=at + 1, part=state.part + 1, skipped=skipped, previous=keep, health=health)
    state = state._replace(verified=state.verified or step.refresh)
    _log_step(run, state, metrics, result, step.refresh)
    return state


def _descend(run: Run, gradient: Tree) -> float:
    """One step of the optimiser along a gradient, clipped; returns its length before that."""
    trained = parameters(run.policy)
    for name, p in trained.items():
        p.grad = gradient[name].clone()
    length = float(torch.nn.utils.clip_grad_norm_(trained.values(), run.config.optim.clip))
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return length


def _log_step(run: Run, state: State, metrics: dict[str, float], result: StepResult, refresh: bool) -> None:
    """Record a step with the coefficients that it applied, and what was found at a refresh."""
    names, where = run.config.rewards, {"epoch": state.epoch, "step": state.step}
    record = {"refresh": refresh, "skipped": state.skipped > 0, **metrics}
    run.live.log({"kind": "step", **where, **record, "coefficients": _named(names, result.coefficients.tolist())})
    if result.refresh is not None:
        run.live.log({"kind": "refresh", **where, **{k: _named(names, v) for k, v in result.refresh.items()}})


def _named(names: Sequence[str], value: Any) -> Any:
    """Lists with an entry a reward, also nested ones, as dictionaries."""
    return {k: _named(names, v) for k, v in zip(names, value, strict=True)} if isinstance(value, list) else value


def _sum_weights(A: Tensor, A_sum: Tensor) -> Tensor:
    """Weights ``[K]`` with which the raw sum adds the rewards' own advantages: ``A_sum = A w``, exactly so with one
    standard deviation for all prompts."""
    found: Tensor = torch.linalg.lstsq(A.double(), A_sum.double().unsqueeze(1), driver="gelsd").solution.squeeze(1)
    return found


def _prior(gains: Tensor, rule: Rule) -> Tensor:
    """Weights of the advantages before balancing ``[K]``: the user's, tilted towards rewards that lag."""
    prior = torch.tensor(rule.prior or [1.0] * len(gains), dtype=torch.float64)
    return soft_min_weights(gains, prior, rule.softmin, keep=rule.keep)


def _inverse_metric(optimizer: torch.optim.Optimizer, policy: Policy) -> dict[str, Tensor] | None:
    """``1 / (sqrt(v_hat) + eps)`` by parameter, AdamW's step for a unit of gradient; None before its first step."""
    group = optimizer.param_groups[0]
    found = {}
    for name, p in parameters(policy).items():
        state = optimizer.state.get(p)
        if not state:
            return None
        v_hat = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        found[name] = 1 / (v_hat.sqrt() + group["eps"])
    return found


def _constant_rewards(A: Tensor, scores: Scores, names: tuple[str, ...]) -> list[str]:
    """A warning for each reward that says nothing about this epoch's images."""
    silent = (A == 0).all(0) & scores.applicable.any(0)
    return [
        f"reward {name!r} was constant within every group; its coefficient is carried over"
        for name, quiet in zip(names, silent.tolist(), strict=True)
        if quiet
    ]


def _idle_rewards(progress: Progress, names: tuple[str, ...]) -> list[str]:
    """A warning for each reward that has applied to no image so far, after 1, 2, 4, 8 epochs and so on."""
    if progress.epochs & (progress.epochs - 1):
        return []
    return [
        f"reward {name!r} has applied to no image in {progress.epochs} epochs: nothing is learnt from it and its share "
        "of the weights is lost. Give prompts that it applies to, or leave it out"
        for name, images in zip(names, progress.images.sum(0).tolist(), strict=True)
        if not images
    ]


def _log_epoch(
    run: Run, state: State, scores: Scores, gains: Tensor, clock: list[float], cpu: float, notes: list[str]
) -> None:
    """Record an epoch's rewards on its training prompts, its times and its warnings."""
    names, live, summary = run.config.rewards, run.live, {}
    for name, values, on in zip(names, scores.values.T, scores.applicable.T, strict=True):
        x = values[on]
        std = float(x.std()) if len(x) > 1 else None
        summary[name] = {"mean": float(x.mean()) if len(x) else None, "std": std, "n": len(x)}
    seconds = {k: b - a for k, a, b in zip(("sample", "score", "train"), clock, clock[1:], strict=False)}
    record: dict[str, Any] = {"epoch": state.epoch, "step": state.step, "images": len(scores.values)}
    record |= {"seconds": seconds, "cpu_seconds": cpu}
    record |= {"gains": dict(zip(names, gains.tolist(), strict=True))}
    live.log({"kind": "epoch", **record, "rewards": summary, "warnings": notes})
    for note in notes:
        live.say(f"warning, epoch {state.epoch}: {note}")
    live.show(state.epoch, {k: v["mean"] for k, v in summary.items() if v["mean"] is not None})


def _seed_everything(seed: int, epoch: int, world: World) -> None:
    """Seed the global generators, for rewards that use them, differently on each process."""
    purpose = ("global", epoch, world.rank)[: 3 if world.rank else 2]
    value = int(torch.randint(2**31, (), generator=generator(seed, *purpose)))
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
