"""The training loop, top to bottom: sample, score, weigh, step, follow."""

from __future__ import annotations

import contextlib
import random
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from marble_core import (
    SLOW_DECAY,
    STANDARD_DECAY,
    ema_tree,
    eval_ema_decay,
    group_advantages,
    old_policy_decay,
    refresh_due,
)
from reference import checkpoint
from reference.balance import Rows, init_balance, is_finite, step_gradient
from reference.base import Base, load_base
from reference.config import Config, Rule, rule_of, training_times
from reference.errors import Interrupted, RewardError, TrainingError
from reference.evaluate import evaluate, generate, generator, interval, prompt_means
from reference.live import Live, save_grid
from reference.policy import Policy, adapter_state, add_lora, load_adapter, parameters
from reference.prompts import prompts_of_epoch, training_prompts, world_prompts
from reference.report import write_report
from reference.rollout import times
from reference.scoring import Reward, Scores, load_callable, score
from reference.state import State, open_run, restore_state, save_state
from reference.validation import validate
from reference.world.rewards import REWARDS as WORLD

_MAX_SKIPPED = 10  # steps in a row without a finite gradient


def load_rewards(names: tuple[str, ...]) -> dict[str, Reward]:
    """The rewards of a run by name: the world's, or callables by dotted path."""
    return {name: WORLD.get(name) or load_callable(name, "rewards") for name in names}


def prepare(config: Config) -> tuple[dict[str, Reward], dict[str, Reward], list[str]]:
    """The rewards trained, those evaluated, and the prompts: all that a user may have named wrongly.

    Raises:
        ConfigError: one of them cannot be used.
    """
    if rule_of(config).solver != "min-norm":
        load_callable(config.balance, "balance")
    rewards = load_rewards(config.rewards)
    pool = training_prompts(config.rollout.prompts, config.rollout.pool, config.seed)
    return rewards, rewards | load_rewards(config.log.watch), pool


def train(config: Config, *, resume: bool = False) -> Path:
    """Train, and write everything to ``config.run``; returns the path of the report.

    Raises:
        ConfigError: the configuration, the prompts or the run folder cannot be used; nothing has been done.
        TrainingError, RewardError: the run stopped; its last state is saved.
        Interrupted: Ctrl-C; its last state is saved.
    """
    validate(config)
    rewards, watched, pool = prepare(config)
    held_out = world_prompts(config.log.eval_prompts, 0, held_out=True)
    if config.threads:
        torch.set_num_threads(config.threads)
    base = load_base(config.model.base)
    policy = add_lora(
        base.transformer,
        rank=config.model.lora_rank,
        alpha=config.model.lora_alpha,
        targets=config.model.lora_targets,
        seed=config.seed,
    )
    o = config.optim
    optimizer = torch.optim.AdamW(
        parameters(policy).values(), lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, eps=o.eps
    )
    open_run(config, resume)
    state = State(0, 0, 0, 0, adapter_state(policy, "default"), init_balance(len(rewards)), None)
    saved = checkpoint.latest(config.run / "checkpoints") if resume else None
    if saved is not None:
        state = restore_state(saved, policy, optimizer, state, config)
    else:
        (config.run / "metrics.jsonl").write_text("", encoding="utf-8")  # of a run that ended before it saved anything
    live = Live(config.run, config.log.trackers, config.epochs, state.epoch)
    try:
        with _stop_on_interrupt() as stop:
            if saved is None:
                _evaluate(policy, base, state, watched, held_out, config, live, "before")
            rng = saved["rng"] if saved is not None and state.part > 0 else None
            while state.epoch < config.epochs:
                state = _epoch(policy, base, optimizer, state, rewards, pool, config, live, stop, rng)
                rng = None
                last = state.epoch == config.epochs
                if last or _due(state.epoch, config.log.eval_every):
                    name = "after" if last else f"epoch-{state.epoch:04d}"
                    _evaluate(policy, base, state, watched, held_out, config, live, name)
                if last or _due(state.epoch, config.log.save_every):
                    save_state(policy, optimizer, state, config, live, last=last)
    finally:
        live.close()
    return write_report(config.run)


def _due(epoch: int, every: int) -> bool:
    """Whether something that happens every so many epochs, 0 for never, happens after this one."""
    return every > 0 and epoch % every == 0


def _epoch(
    policy: Policy,
    base: Base,
    optimizer: torch.optim.Optimizer,
    state: State,
    rewards: Mapping[str, Reward],
    pool: list[str],
    config: Config,
    live: Live,
    stop: list[bool],
    rng: dict[str, Any] | None,
) -> State:
    """One epoch, or what is left of it: its rollout depends on the seed, the epoch and the old policy alone."""
    r, rule, clock = config.rollout, rule_of(config), [time.monotonic()]
    _seed_everything(config.seed, state.epoch)

    live.phase(state.epoch, "sampling")
    chosen = prompts_of_epoch(pool, r.prompts_per_epoch, config.seed, state.epoch)
    prompts = [prompt for prompt in chosen for _ in range(r.images_per_prompt)]
    noise = torch.randn(len(prompts), *base.latent_shape, generator=generator(config.seed, "rollout", state.epoch))
    x0, images = generate(policy, base, prompts, noise, adapter="old", sampler=r.sampler, steps=r.steps, batch=r.batch)
    clock.append(time.monotonic())

    live.phase(state.epoch, "scoring")
    try:
        scores = score(rewards, images, prompts, [None] * len(prompts))
    except RewardError:
        save_state(policy, optimizer, state, config, live)
        raise
    clock.append(time.monotonic())

    live.phase(state.epoch, "training")
    A, A_sum = _advantages(scores, config)
    notes = _constant_rewards(A, scores, tuple(rewards))
    order = torch.randperm(len(prompts), generator=generator(config.seed, "order", state.epoch))
    parts = order.tensor_split(config.optim.steps_per_epoch)
    if rng is not None:
        checkpoint.set_rng_state(rng)
    while state.part < len(parts):
        if stop[0]:
            save_state(policy, optimizer, state, config, live)
            raise Interrupted(f"stopped after step {state.step}; go on with --resume")
        index = parts[state.part]
        rows = _rows(base, x0, prompts, A, A_sum, index, config, state)
        state = _step(policy, optimizer, state, rows, rule, config, live)
        state = state._replace(part=state.part + 1)
        if state.skipped >= _MAX_SKIPPED:
            save_state(policy, optimizer, state._replace(skipped=0), config, live)
            raise TrainingError(
                f"the gradient was not finite {_MAX_SKIPPED} steps in a row (last at step {state.step}). The weights "
                "of the last good step are saved; try a lower optim.lr, a lower optim.clip, or look at the rewards."
            )

    decay = old_policy_decay(state.step, SLOW_DECAY if config.optim.old_decay == "slow" else STANDARD_DECAY)
    load_adapter(policy, "old", ema_tree(parameters(policy, "old"), parameters(policy), decay))
    clock.append(time.monotonic())
    _log_epoch(state, scores, tuple(rewards), clock, notes, live)
    return state._replace(epoch=state.epoch + 1, part=0)


def _step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    state: State,
    rows: Rows,
    rule: Rule,
    config: Config,
    live: Live,
) -> State:
    """One optimiser step: the balanced gradient, clipped; skipped if it is not finite."""
    tail = state.epoch >= config.epochs - config.solve.uniform_tail
    refresh = refresh_due(state.step, rule.refresh_every)
    result = step_gradient(
        policy,
        rows,
        state.balance,
        rule,
        config.loss,
        refresh=refresh,
        uniform=tail,
        micro_batch=config.optim.micro_batch,
        previous=state.previous,
    )
    finite = is_finite(result.gradient)
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
    coefficients = dict(zip(names, state.balance.applied.tolist(), strict=True))
    live.log(
        {"kind": "step", **where, "refresh": refresh, "skipped": not finite, **metrics, "coefficients": coefficients}
    )
    if result.refresh is not None:
        record = {k: dict(zip(names, v, strict=True)) if isinstance(v, list) else v for k, v in result.refresh.items()}
        live.log({"kind": "refresh", **where, **record})
    keep = result.gradient if finite and refresh_due(state.step + 1, rule.refresh_every) else None
    return state._replace(step=state.step + 1, skipped=0 if finite else state.skipped + 1, previous=keep)


def _rows(
    base: Base, x0: Tensor, prompts: list[str], A: Tensor, A_sum: Tensor, index: Tensor, config: Config, state: State
) -> Rows:
    """Rows of one step: each of its images at some of the sampler's own times, with fresh noise."""
    random_ = generator(config.seed, "rows", state.epoch, state.part)
    schedule = times(base.scheduler, config.rollout.steps)[: training_times(config)]
    J = config.loss.timesteps_per_image or len(schedule)
    chosen = torch.rand(len(index), len(schedule), generator=random_).argsort(1)[:, :J]
    image = index.repeat_interleave(J)
    embeds, pooled = base.encode([prompts[i] for i in image.tolist()])
    clean = x0[image]
    noise = torch.randn(clean.shape, generator=random_)
    return Rows(clean, noise, schedule[chosen.flatten()], embeds, pooled, A[image], A_sum[image])


def _advantages(scores: Scores, config: Config) -> tuple[Tensor, Tensor]:
    """Advantages of every reward ``[N, K]``, and those of the weighted sum of raw rewards ``[N]``, in float32."""
    N = scores.values.shape[0]
    groups = torch.arange(N) // config.rollout.images_per_prompt
    A = group_advantages(scores.values, groups, applicable=scores.applicable, std=config.loss.std)
    weights = torch.tensor(config.reward_weights or [1.0] * len(config.rewards), dtype=torch.float64)
    total = (scores.values * weights).sum(1, keepdim=True)
    A_sum = group_advantages(total, groups, std=config.loss.std).squeeze(1)
    return A.float(), A_sum.float()


def _constant_rewards(A: Tensor, scores: Scores, names: tuple[str, ...]) -> list[str]:
    """A warning for each reward that says nothing about this epoch's images."""
    silent = (A == 0).all(0) & scores.applicable.any(0)
    return [
        f"reward {name!r} was constant within every group; its coefficient is carried over"
        for name, quiet in zip(names, silent.tolist(), strict=True)
        if quiet
    ]


def _log_epoch(
    state: State, scores: Scores, names: tuple[str, ...], clock: list[float], notes: list[str], live: Live
) -> None:
    """Record an epoch's rewards on its training prompts, its times and its warnings."""
    summary = {}
    for name, values, on in zip(names, scores.values.T, scores.applicable.T, strict=True):
        x = values[on]
        std = float(x.std()) if len(x) > 1 else None
        summary[name] = {"mean": float(x.mean()) if len(x) else None, "std": std, "n": len(x)}
    seconds = {k: b - a for k, a, b in zip(("sample", "score", "train"), clock, clock[1:], strict=False)}
    record = {"epoch": state.epoch, "step": state.step, "images": len(scores.values), "seconds": seconds}
    live.log({"kind": "epoch", **record, "rewards": summary, "warnings": notes})
    for note in notes:
        live.say(f"warning, epoch {state.epoch}: {note}")
    live.show(state.epoch, {k: v["mean"] for k, v in summary.items() if v["mean"] is not None})


def _evaluate(
    policy: Policy,
    base: Base,
    state: State,
    rewards: Mapping[str, Reward],
    prompts: list[str],
    config: Config,
    live: Live,
    name: str,
) -> None:
    """Score held-out prompts with the averaged weights, record the means, and save a grid of the first images."""
    live.phase(state.epoch, "evaluating")
    log = config.log
    scores, images = evaluate(
        policy,
        base,
        state.ema,
        prompts,
        rewards,
        images=log.eval_images,
        sampler=config.rollout.sampler,
        steps=log.eval_steps,
        batch=config.rollout.batch,
        seed=0,
    )
    means = prompt_means(scores, log.eval_images)
    summary = {k: interval(column)._asdict() for k, column in zip(rewards, means.unbind(1), strict=True)}
    per_prompt = {k: column.tolist() for k, column in zip(rewards, means.unbind(1), strict=True)}
    live.log({"kind": "eval", "step": state.step, "epoch": state.epoch, "rewards": summary, "per_prompt": per_prompt})
    save_grid(images[:: log.eval_images][:40], config.run / "grids" / f"{name}.png", columns=10, scale=3)


def _seed_everything(seed: int, epoch: int) -> None:
    """Seed the global generators, for rewards that use them."""
    value = int(torch.randint(2**31, (), generator=generator(seed, "global", epoch)))
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


@contextlib.contextmanager
def _stop_on_interrupt() -> Iterator[list[bool]]:
    """Turn the first Ctrl-C into a flag that the loop reads between steps; the second one interrupts at once."""
    stop = [False]

    def handle(number: int, frame: FrameType | None) -> None:
        stop[0] = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        warnings.warn("stopping after this step; press Ctrl-C again to stop at once", stacklevel=1)

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not in the main thread: nothing to catch
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
