"""What the trainer's benchmark times: steps, cycles and epochs of several rules, and a plain DiffusionNFT step."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.trainer_models import Setup
from marble_core import ema_tree, shared_cotangent_rows
from reference.config.settings import Config, LossConfig
from reference.policy.adapters import Policy, active, merged, parameters, velocity
from reference.processes.peers import ALONE
from reference.step import gradients
from reference.step.balance import Step, init_balance, step_gradient
from reference.step.gradients import Rows, Whole
from reference.step.method import Method, method_of
from reference.step.rollout import sample, times

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations at import
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

LOSS = LossConfig(form="x0", beta=0.1, a_max=5.0, kl_weight=1e-4)
CLIP, CYCLE, SAMPLING_STEPS = 1.0, 10, 10


class Kind(NamedTuple):
    """Something that is timed.

    Attributes:
        group: kinds of one group are timed in turns and compared with its ``weighted-sum``.
        name: within the group.
        K: rewards.
        rule: None for the transcription.
        every: steps from one refresh to the next, 0 for none.
        steps: optimiser steps of one call; its time is divided by them.
    """

    group: str
    name: str
    K: int
    rule: Method | None
    every: int
    steps: int = 1


def kinds() -> list[Kind]:
    """All that can be timed, the important first."""
    weighted = _rule("weighted-sum")
    found = [Kind("step", "weighted-sum", 5, weighted, 0), Kind("step", "transcription", 5, None, 0)]
    found += [Kind("step", f"shared K={K}", K, _rule("marble", K), 1) for K in (5, 16, 64)]
    found += [Kind("cycle", "weighted-sum", 5, weighted, 0, CYCLE)]
    found += [Kind("cycle", "soft-min", 5, _rule("soft-min"), 0, CYCLE)]
    for name in ("marble-paper", "marble", "soft-min"):
        found.append(Kind("cycle", f"{name} N={CYCLE}", 5, _rule(name), CYCLE, CYCLE))
    found += [
        Kind("epochs", "weighted-sum", 5, weighted, 0, CYCLE),
        Kind("epochs", "soft-min", 5, _rule("soft-min"), 0, CYCLE),
    ]
    for name in ("marble-paper", "marble", "soft-min"):
        found.append(Kind("epochs", f"{name} N={CYCLE}", 5, _rule(name), CYCLE, CYCLE))
    found += [Kind("epoch", "weighted-sum", 5, weighted, 0), Kind("epoch", "shared K=5", 5, _rule("marble"), 1)]
    found += [Kind("epoch", "transcription", 5, None, 0), Kind("k-pass", "weighted-sum", 5, weighted, 0)]
    return found + [Kind("k-pass", f"k-pass K={K}", K, _rule("marble", K), 1) for K in (5, 16, 64)]


def _rule(name: str, K: int = 5) -> Method:
    """A rule of the trainer by name, for K rewards."""
    return method_of(Config(balance=name, rewards=tuple(map(str, range(K)))))


def transcription(policy: Policy, rows: Rows, loss: LossConfig, micro_batch: int) -> dict[str, Tensor]:
    """DiffusionNFT's training step for one scalar advantage, from its paper's equations (arXiv 2509.16117): velocities
    of the old policy, of the base and of the new one, the two branches, one backward pass."""
    model, trained, B = policy.model, parameters(policy), rows.x0.shape[0]
    for start in range(0, B, micro_batch):
        part = slice(start, start + micro_batch)
        x0, noise, t, advantage = (x[part] for x in (rows.x0, rows.noise, rows.t, rows.A_sum))
        time = t.view(-1, 1, 1, 1)
        x_t = (1 - time) * x0 + time * noise
        condition = rows.embeds[rows.prompt[part]], rows.pooled[rows.prompt[part]]
        with torch.no_grad():
            model.set_adapter("old")
            v_old = velocity(policy, x_t, t, condition)
            with model.disable_adapter():
                v_ref = velocity(policy, x_t, t, condition)
        model.set_adapter("default")
        v = velocity(policy, x_t, t, condition)
        branches = []
        for v_branch in ((1 - loss.beta) * v_old + loss.beta * v, (1 + loss.beta) * v_old - loss.beta * v):
            error = x_t - time * v_branch - x0
            with torch.no_grad():
                scale = error.abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-5)
            branches.append((error.square() / scale).mean(dim=(1, 2, 3)))
        r = (advantage / loss.a_max).clamp(-1, 1) / 2 + 0.5
        policy_loss = (r * branches[0] + (1 - r) * branches[1]) * loss.a_max / loss.beta
        kl = (v - v_ref).square().mean(dim=(1, 2, 3))
        ((policy_loss + loss.kl_weight * kl).sum() / B).backward()  # type: ignore[no-untyped-call]
    gradient = {name: p.grad for name, p in trained.items() if p.grad is not None}
    for p in trained.values():
        p.grad = None
    return gradient


def training(policy: Policy, rows: Rows, kind: Kind, setup: Setup) -> Callable[[], None]:
    """``kind.steps`` optimiser steps, ready to be called."""
    step = one_step(policy, rows, kind, setup)

    def run() -> None:
        for i in range(kind.steps):
            step(i)

    return run


def one_step(policy: Policy, rows: Rows, kind: Kind, setup: Setup) -> Callable[[int], None]:
    """An optimiser step, ready to be called with its number, from 0, where the balance begins anew."""
    trained = parameters(policy)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-6)
    start = None if kind.rule is None else init_balance(kind.K, kind.rule, trained)
    nothing, B = torch.full((kind.K,), torch.nan, dtype=torch.float64), rows.x0.shape[0]
    whole = Whole(ALONE, int((rows.half == 0).sum()), B)
    separate = functools.partial(shared_cotangent_rows, fallback="all") if kind.group == "k-pass" else None
    average = {name: p.detach().clone() for name, p in trained.items()}
    balance = start

    def run(i: int) -> None:
        nonlocal average, balance
        balance = start if i == 0 else balance
        if kind.rule is None or balance is None:
            with torch.compiler.set_stance("force_eager"):
                gradient = transcription(policy, rows, LOSS, setup.batch)
        else:
            refresh = kind.every > 0 and i % kind.every == 0
            step = Step(refresh, nothing, rows.A, rows.A_sum, None, setup.batch, whole)
            patch = mock.patch.object(gradients, "shared_cotangent_rows", separate or shared_cotangent_rows)
            with patch:  # K passes in place of the shared one
                result = step_gradient(policy, rows, balance, kind.rule, LOSS, step)
            gradient, balance = result.gradient, result.balance
        for name, p in trained.items():
            p.grad = gradient[name]
        torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average = ema_tree(average, trained, 0.9)

    return run


def epoch(policy: Policy, rows: Rows, kind: Kind, setup: Setup, device: torch.device) -> Callable[[], None]:
    """``kind.steps`` times: sampling of ``2 batch`` images, then one step on each of them at 9 of its 10 timesteps."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    J, N = int(0.99 * SAMPLING_STEPS), 2 * setup.batch
    schedule = times(scheduler, SAMPLING_STEPS)[:J].to(device)
    image = torch.arange(N, device=device).repeat_interleave(J)
    many = Rows(*(x[image] for x in rows))._replace(embeds=rows.embeds, pooled=rows.pooled, t=schedule.repeat(N))
    train = one_step(policy, many, kind, setup)

    def sampled() -> None:
        stance = "force_eager" if kind.rule is None else "default"
        switch = active if kind.rule is None else merged
        with torch.no_grad(), torch.compiler.set_stance(stance), switch(policy, "old"):
            for part in range(0, N, setup.batch):
                condition = tuple(x[part : part + setup.batch] for x in (rows.embeds, rows.pooled))
                flow = lambda x, t, condition=condition: velocity(policy, x, t, condition)  # noqa: E731
                noise = torch.randn_like(rows.x0[part : part + setup.batch])
                many.x0[part * J : (part + setup.batch) * J] = sample(
                    flow, noise, scheduler, sampler="dpm2", steps=SAMPLING_STEPS
                ).repeat_interleave(J, dim=0)

    def run() -> None:
        for i in range(kind.steps):
            sampled()
            train(i)

    return run
