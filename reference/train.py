"""The training loop, top to bottom: sample, score, weigh, step, follow."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from marble_core import ema_tree, eval_ema_decay, gains_since_start, update_gains
from reference.config.checks import validate
from reference.config.settings import Config
from reference.errors import Interrupted, TrainingError, with_the_way_on
from reference.policy.adapters import follow_old, parameters
from reference.processes.alive import stop_on_interrupt, together
from reference.processes.devices import tf32
from reference.processes.peers import Peers, connect
from reference.processes.sums import any_of, check_equal
from reference.prompts.pool import images_of_epoch, learns_spread, prompt_numbers
from reference.run import checkpoint
from reference.run.held_out import evaluate_held_out, evaluation_due
from reference.run.opening import opened
from reference.run.records import epoch_notes, log_epoch, log_step
from reference.run.report import final_report
from reference.run.state import Run, State, save_state
from reference.run.watch import end_epoch, observe_step
from reference.step.balance import Step, is_finite, step_gradient
from reference.step.batch import Weighed, advantages, images_of_steps, step_rows, whole_step
from reference.step.chance import generator, seed_everything
from reference.step.estimate import Tree
from reference.step.gradients import Rows
from reference.step.method import refreshes_at
from reference.step.rollout import Rollout, sample_epoch, sampling_of

_STOPPED = "stopped after step {}; go on with --resume"
_MAX_SKIPPED = 10  # steps in a row without a finite gradient
_NOT_FINITE = (
    f"the gradient was not finite {_MAX_SKIPPED} steps in a row (last at step {{}}). The weights of the last good step "
    "are saved; look at the rewards, or start another run with a lower optim.lr or optim.clip."
)
_NOTHING_APPLIES = (
    "none of the rewards applies to any prompt: there is nothing to learn. Give prompts with what the rewards need to "
    "know (docs/prompts.md), or other rewards."
)


def train(config: Config, *, resume: bool = False) -> Path:
    """Train, and write everything to ``config.run``; returns the path of the report.

    Under a launcher, all its processes train as one, and process 0 writes.

    Raises:
        ConfigError: the configuration, the prompts or the run folder cannot be used; nothing has been done.
        TrainingError, RewardError: the run stopped; its newest state is saved.
        Interrupted: Ctrl-C; its newest state is saved.
    """
    validate(config)
    peers = connect(config.device, sharded=config.model.shard)
    with together(peers):
        return _train(config, resume, peers)


def _train(config: Config, resume: bool, peers: Peers) -> Path:
    """``train`` on this process."""
    if config.threads:
        torch.set_num_threads(config.threads)
    with opened(config, resume, peers) as (run, state, rng), stop_on_interrupt() as stop, tf32(run.base.device):
        check_equal({"the checkpoints' steps": torch.tensor(state.step)}, peers)
        _loop(run, state, stop, rng)
    return final_report(config.run) if peers.rank == 0 else config.run / "report.html"


def _loop(run: Run, state: State, stop: list[bool], rng: dict[str, Any] | None) -> None:
    """Epoch after epoch. A state is saved before anything that may fail, evaluations included."""
    config, save_every = run.config, run.config.log.save_every
    if state.evaluated < 0:
        save_state(run, state)
    while True:
        if evaluation_due(config, state):
            state = _evaluated(run, state)
            if state.epoch >= config.epochs:
                save_state(run, state, last=True)
        if state.epoch >= config.epochs:
            return
        state = _epoch(run, state, stop, rng)
        rng = None
        if (save_every and state.epoch % save_every == 0) or evaluation_due(config, state):
            save_state(run, state, last=state.epoch >= config.epochs)


def _evaluated(run: Run, state: State) -> State:
    """Judge the averaged weights on held-out prompts. The state was saved before."""
    try:
        evaluate_held_out(run, state)
    except Exception as error:
        raise with_the_way_on(error, state.step) from error
    return state._replace(evaluated=state.epoch)


def _epoch(run: Run, state: State, stop: list[bool], rng: dict[str, Any] | None) -> State:
    """One epoch, or what is left of it: its rollout depends on the seed, the epoch and the old policy alone. Whatever
    stops it leaves the newest state on disk."""
    config, clock, cpu = run.config, [time.monotonic()], time.process_time()
    try:
        _stop_if_asked(run, state, stop)
        rollout = _sampled(run, state, stop, clock)
        values, applicable = rollout.scores
        numbers = prompt_numbers(rollout.prompts, run.inputs.pool)
        learning = learns_spread(state.epoch, run.inputs.pool, config)
        so_far = update_gains(state.gains, values, numbers, applicable=applicable, learning=learning)
        if not so_far.images.any():
            raise TrainingError(_NOTHING_APPLIES)
        gains = gains_since_start(so_far)
        weighed = Weighed(rollout, *advantages(rollout.scores, config), state.epoch)
        parts = images_of_steps(len(rollout.prompts), config, state.epoch)
        if rng is not None:
            checkpoint.set_rng_state(rng)
        while state.part < len(parts):
            _stop_if_asked(run, state, stop)
            run.live.phase(state.epoch, f"training, step {state.part + 1} of {len(parts)}")
            rows = step_rows(run.base, weighed, parts[state.part], config, state.part, run.peers)
            whole = whole_step(parts[state.part], config, run.peers)
            refresh = refreshes_at(run.method, state.step)
            micro_batch, verify = config.optim.micro_batch, not state.verified
            step = Step(refresh, gains, weighed.A, weighed.A_sum, state.previous, micro_batch, whole, verify)
            state = _step(run, state, rows, step)
            if state.skipped >= _MAX_SKIPPED:
                state = state._replace(skipped=0)
                raise TrainingError(_NOT_FINITE.format(state.step))
    except Exception as error:
        save_state(run, state)
        raise with_the_way_on(error, state.step) from error
    follow_old(run.policy, state.step, config.optim.old_decay)
    clock.append(time.monotonic())
    health, warnings = end_epoch(state.health, state.epoch)
    notes = epoch_notes(weighed.A, rollout.scores, so_far, config.rewards) + warnings
    log_epoch(run, state, rollout.scores, gains, clock, time.process_time() - cpu, notes)
    return state._replace(epoch=state.epoch + 1, part=0, gains=so_far, health=health)


def _stop_if_asked(run: Run, state: State, stop: list[bool]) -> None:
    """Raise if any process was asked to stop: all come here together."""
    if any_of(stop[0], run.peers):
        raise Interrupted(_STOPPED.format(state.step))


def _sampled(run: Run, state: State, stop: list[bool], clock: list[float]) -> Rollout:
    """An epoch's images and their scores; the times of sampling and scoring go into ``clock``."""
    config, epoch = run.config, state.epoch
    seed_everything(config.seed, epoch, run.peers)
    prompts = images_of_epoch(run.inputs.pool, config, epoch)

    def drawn(share: float) -> None:
        if stop[0] and run.peers.size == 1:  # several processes stop after sampling, together
            raise Interrupted(_STOPPED.format(state.step))
        if share == 1:
            clock.append(time.monotonic())
            run.live.phase(epoch, "scoring")

    run.live.phase(epoch, "sampling")
    how, draws = sampling_of(config.rollout, run.peers), generator(config.seed, "rollout", epoch)
    rollout = sample_epoch(run.policy, run.base, run.inputs.trained, prompts, draws, how, drawn)
    clock.append(time.monotonic())
    return rollout


def _step(run: Run, state: State, rows: Rows, step: Step) -> State:
    """One optimiser step: the balanced gradient, clipped; skipped if it is not finite.

    The last thing that can fail for another process's sake comes before anything has changed.
    """
    policy, config = run.policy, run.config
    result = step_gradient(policy, rows, state.balance, run.method, config.loss, step)
    finite = is_finite(result.gradient)
    if result.refresh is not None:
        norms = torch.stack([x.norm() for x in result.gradient.values()])
        check_equal({"coefficients": result.coefficients, "gradients": norms}, run.peers)
    metrics = dict(result.metrics)
    if finite:
        metrics["grad_norm"] = _descend(run, result.gradient)
        decay = eval_ema_decay(state.step, config.optim.ema_cap)
        state = state._replace(ema=ema_tree(state.ema, parameters(policy), decay), balance=result.balance)
    next_refresh = refreshes_at(run.method, state.step + 1)
    state = state._replace(
        step=state.step + 1,
        part=state.part + 1,
        skipped=0 if finite else state.skipped + 1,
        previous=result.gradient if finite and next_refresh else None,
        health=observe_step(state.health, metrics),
        verified=state.verified or step.refresh,
    )
    log_step(run, state, metrics, result, step.refresh)
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
