"""The training loop, top to bottom: sample, score, weigh, step, follow."""

from __future__ import annotations

import math
import random
import time
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
    refresh_due,
    soft_min_weights,
)
from reference import checkpoint
from reference.balance import Step, applied_coefficients, init_balance, is_finite, step_gradient
from reference.base import Base
from reference.batch import advantages, images_of_steps, sample_epoch, step_rows, whole_step
from reference.config import Config, Rule, rule_of
from reference.devices import tf32
from reference.distributed import (
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
from reference.errors import Interrupted, PeerError, RewardError, TrainingError
from reference.evaluate import evaluate, first_images, generator, interval, prompt_means, within_std
from reference.inputs import Inputs, prepare
from reference.live import Live, save_grid
from reference.model import load_model
from reference.policy import Policy, adapter_state, load_adapter, parameters
from reference.progress import gains_of, init_progress, update_progress
from reference.prompts import all_prompts
from reference.report import write_report
from reference.rows import Rows, Whole
from reference.scoring import Scores
from reference.state import State, open_run, restore_state, save_state
from reference.validation import validate

_MAX_SKIPPED = 10  # steps in a row without a finite gradient
_NOT_FINITE = (
    f"the gradient was not finite {_MAX_SKIPPED} steps in a row (last at step {{}}). The weights of the last good step "
    "are saved; try a lower optim.lr, a lower optim.clip, or look at the rewards."
)
_FIRST_EPOCHS = 10  # at most so many tell the spread of rewards at the start, the unit of gains


def train(config: Config, *, resume: bool = False) -> Path:
    """Train, and write everything to ``config.run``; returns the path of the report.

    Under a launcher, all its processes train as one, and process 0 writes.

    Raises:
        ConfigError: the configuration, the prompts or the run folder cannot be used; nothing has been done.
        TrainingError, RewardError: the run stopped; its last state is saved.
        Interrupted: Ctrl-C; its last state is saved.
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
    if main:
        open_run(config, resume)
    meet(world)
    K = len(config.rewards)
    balance = init_balance(K, rule_of(config), parameters(policy))
    state = State(0, 0, 0, 0, adapter_state(policy, "default"), balance, None, init_progress(K))
    saved = checkpoint.latest(config.run / "checkpoints") if resume else None
    if saved is not None:
        state = restore_state(saved, policy, optimizer, state, config, main=main)
    elif main:
        (config.run / "metrics.jsonl").write_text("", encoding="utf-8")  # of a run that ended before it saved anything
    check_equal({"the checkpoints' steps": torch.tensor(state.step)}, world)
    live = Live(config.run, config.log.trackers, config.epochs, state.epoch, main=main)
    try:
        with stop_on_interrupt() as stop, tf32(base.device):
            if saved is None:
                _evaluate(policy, base, state, inputs, config, live, world, "before")
            rng = saved["rng"] if saved is not None and state.part > 0 else None
            while state.epoch < config.epochs:
                state = _epoch(policy, base, optimizer, state, inputs, config, live, world, stop, rng)
                rng = None
                last = state.epoch == config.epochs
                if last or _due(state.epoch, config.log.eval_every):
                    name = "after" if last else f"epoch-{state.epoch:04d}"
                    _evaluate(policy, base, state, inputs, config, live, world, name)
                if last or _due(state.epoch, config.log.save_every):
                    save_state(policy, optimizer, state, config, live, last=last)
    finally:
        live.close()
    return write_report(config.run) if main else config.run / "report.html"


def _due(epoch: int, every: int) -> bool:
    """Whether something that happens every so many epochs, 0 for never, happens after this one."""
    return every > 0 and epoch % every == 0


def _epoch(
    policy: Policy,
    base: Base,
    optimizer: torch.optim.Optimizer,
    state: State,
    inputs: Inputs,
    config: Config,
    live: Live,
    world: World,
    stop: list[bool],
    rng: dict[str, Any] | None,
) -> State:
    """One epoch, or what is left of it: its rollout depends on the seed, the epoch and the old policy alone."""
    rule, clock, cpu = rule_of(config), [time.monotonic()], time.process_time()
    names, images = config.rewards, config.rollout.images_per_prompt
    _seed_everything(config.seed, state.epoch, world)

    def sampled() -> None:
        clock.append(time.monotonic())
        live.phase(state.epoch, "scoring")

    live.phase(state.epoch, "sampling")
    try:
        rollout = sample_epoch(policy, base, inputs.trained, inputs.pool, config, state.epoch, sampled, world)
    except (RewardError, PeerError):
        save_state(policy, optimizer, state, config, live)
        raise
    clock.append(time.monotonic())

    live.phase(state.epoch, "training")
    A, A_sum = advantages(rollout.scores, config)
    texts = [prompt.text for prompt in rollout.prompts]
    learning = state.epoch < _first_epochs(inputs, config)
    progress = update_progress(state.progress, texts, rollout.scores, images, learning=learning)
    gains = gains_of(progress)
    prior = _prior(gains, rule)
    parts = images_of_steps(len(A), config, state.epoch)
    if rng is not None:
        checkpoint.set_rng_state(rng)
    while state.part < len(parts):
        if any_of(stop[0], world):
            save_state(policy, optimizer, state, config, live)
            raise Interrupted(f"stopped after step {state.step}; go on with --resume")
        rows = step_rows(base, rollout, A, A_sum, parts[state.part], config, state.epoch, state.part)
        try:
            whole = whole_step(parts[state.part], config, world)
            state = _step(policy, optimizer, state, rows, whole, rule, prior, config, live)
        except PeerError:
            save_state(policy, optimizer, state, config, live)
            raise
        state = state._replace(part=state.part + 1)
        if state.skipped >= _MAX_SKIPPED:
            save_state(policy, optimizer, state._replace(skipped=0), config, live)
            raise TrainingError(_NOT_FINITE.format(state.step))

    decay = old_policy_decay(state.step, SLOW_DECAY if config.optim.old_decay == "slow" else STANDARD_DECAY)
    load_adapter(policy, "old", ema_tree(parameters(policy, "old"), parameters(policy), decay))
    clock.append(time.monotonic())
    notes = _constant_rewards(A, rollout.scores, names)
    _log_epoch(state, rollout.scores, gains, names, clock, time.process_time() - cpu, notes, live)
    return state._replace(epoch=state.epoch + 1, part=0, progress=progress)


def _first_epochs(inputs: Inputs, config: Config) -> int:
    """The epochs that tell the spread of rewards at the start: once through the prompts, but not for long."""
    return min(math.ceil(len(all_prompts(inputs.pool)) / config.rollout.prompts_per_epoch), _FIRST_EPOCHS)


def _step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    state: State,
    rows: Rows,
    whole: Whole,
    rule: Rule,
    prior: Tensor,
    config: Config,
    live: Live,
) -> State:
    """One optimiser step: the balanced gradient, clipped; skipped if it is not finite.

    The last thing that can fail for another process's sake comes before anything has changed.
    """
    every, at = rule.refresh_every, state.step
    step = Step(
        refresh=refresh_due(at, every),
        collect=any(refresh_due(at + ahead, every) for ahead in range(1, rule.accumulate)),
        uniform=state.epoch >= config.epochs - config.solve.uniform_tail,
        prior=prior,
        metric=_inverse_metric(optimizer, policy) if rule.metric == "adam" else None,
        previous=state.previous,
    )
    size = config.optim.micro_batch
    result = step_gradient(policy, rows, state.balance, rule, config.loss, step, micro_batch=size, whole=whole)
    finite, applied = is_finite(result.gradient), applied_coefficients(rule, result.balance, prior)
    if result.refresh is not None:
        norms = torch.stack([x.norm() for x in result.gradient.values()])
        check_equal({"coefficients": applied, "gradients": norms}, whole.world)
    metrics = dict(result.metrics)
    if finite:
        trained = parameters(policy)
        for name, p in trained.items():
            p.grad = result.gradient[name].clone()
        metrics["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(trained.values(), config.optim.clip))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = eval_ema_decay(state.step, config.optim.ema_cap)
        state = state._replace(ema=ema_tree(state.ema, parameters(policy), decay), balance=result.balance)
    names = config.rewards
    where = {"epoch": state.epoch, "step": state.step + 1}
    applied = applied_coefficients(rule, state.balance, prior)  # a step that was skipped changed nothing
    coefficients = dict(zip(names, applied.tolist(), strict=True))
    record = {"refresh": step.refresh, "skipped": not finite, **metrics, "coefficients": coefficients}
    live.log({"kind": "step", **where, **record})
    if result.refresh is not None:
        record = {k: dict(zip(names, v, strict=True)) if isinstance(v, list) else v for k, v in result.refresh.items()}
        live.log({"kind": "refresh", **where, **record})
    keep = result.gradient if finite and refresh_due(at + 1, every) else None
    return state._replace(step=state.step + 1, skipped=0 if finite else state.skipped + 1, previous=keep)


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


def _log_epoch(
    state: State,
    scores: Scores,
    gains: Tensor,
    names: tuple[str, ...],
    clock: list[float],
    cpu: float,
    notes: list[str],
    live: Live,
) -> None:
    """Record an epoch's rewards on its training prompts, its times and its warnings."""
    summary = {}
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


def _evaluate(
    policy: Policy,
    base: Base,
    state: State,
    inputs: Inputs,
    config: Config,
    live: Live,
    world: World,
    name: str,
) -> None:
    """Score held-out prompts with the averaged weights, record the means, and save a grid of the first images."""
    live.phase(state.epoch, "evaluating")
    log = config.log
    scores, images = evaluate(
        policy,
        base,
        state.ema,
        inputs.held_out,
        inputs.watched,
        images=log.eval_images,
        sampler=config.rollout.sampler,
        steps=log.eval_steps,
        batch=config.rollout.batch,
        seed=0,
        world=world,
    )
    means, rewards = prompt_means(scores, log.eval_images), inputs.watched.rewards
    summary = {k: interval(column)._asdict() for k, column in zip(rewards, means.unbind(1), strict=True)}
    per_prompt = {k: column.tolist() for k, column in zip(rewards, means.unbind(1), strict=True)}
    spread = dict(zip(rewards, within_std(scores, log.eval_images).tolist(), strict=True))
    where = {"step": state.step, "epoch": state.epoch}
    live.log({"kind": "eval", **where, "rewards": summary, "within_std": spread, "per_prompt": per_prompt})
    shown = first_images(images, len(inputs.held_out), log.eval_images, 40, world)
    if world.rank == 0:
        path, scale = config.run / "grids" / f"{name}.png", max(1, 96 // shown.shape[-1])
        save_grid(shown, path, columns=10, scale=scale, largest=256)


def _seed_everything(seed: int, epoch: int, world: World) -> None:
    """Seed the global generators, for rewards that use them, differently on each process."""
    purpose = ("global", epoch, world.rank)[: 3 if world.rank else 2]
    value = int(torch.randint(2**31, (), generator=generator(seed, *purpose)))
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
