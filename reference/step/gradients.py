"""Gradients of a step's rows, accumulated over micro-batches: one, or all K with the shared part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from marble_core import affine_terms, branch_losses, interpolation, shared_cotangent_rows
from reference.config.settings import LossConfig, Rule, pulls
from reference.policy.adapters import Policy, active, merged, parameters, velocity
from reference.processes.peers import ALONE, World, all_reduce, check_peers, meet
from reference.step.estimate import Tree

# From advantages [B, K] and those of the weighted sum [B] to the weight of each row's reward part [B].
Weigh = Callable[[Tensor, Tensor], Tensor]
_LOGGED = ("kl", "drift", "v_norm", "v_norm_base", "x0_abs", "loss")  # means over the rows of a step


class Rows(NamedTuple):
    """The rows of one optimiser step, ``B`` pairs of an image and a timestep, or a micro-batch of them.

    Attributes:
        x0: ``[B, C, H, W]``, clean latents.
        noise: ``[B, C, H, W]``.
        t: ``[B]``.
        embeds: ``[P, L, D]``, embeddings of the prompts, where the model is; the rest may be elsewhere.
        pooled: ``[P, D']``, pooled ones.
        A: ``[B, K]``, advantages, one column a reward.
        A_sum: ``[B]``, advantages of the weighted sum of the raw rewards.
        half: ``[B]``, 0 and then 1: the two halves share no prompt.
        prompt: ``[B]``, which of the P prompts is a row's.
    """

    x0: Tensor
    noise: Tensor
    t: Tensor
    embeds: Tensor
    pooled: Tensor
    A: Tensor
    A_sum: Tensor
    half: Tensor
    prompt: Tensor


_PER_ROW = tuple(name for name in Rows._fields if name not in ("embeds", "pooled"))


class Whole(NamedTuple):
    """A step over all processes, each of which has some of its rows, or none.

    Attributes:
        world: the processes.
        first: rows of the step's first half.
        total: rows of the step.
        most: where processes share the base, the most rows that any of them has in the first half, in the second, and
            in both: so many they all run.
    """

    world: World
    first: int
    total: int
    most: tuple[int, int, int] = (0, 0, 0)


class Part(NamedTuple):
    """Gradients of some of a step's rows by parameter name, and sums over those rows of what is logged.

    Attributes:
        h: ``[K, *shape]``, or one more: of the reward part.
        shared: ``[*shape]``, of the shared part.
        pull: ``[*shape]``, of the pull to the base, where it is not in the shared part; else empty.
        sums: ``[]`` each.
    """

    h: Tree
    shared: Tree
    pull: Tree
    sums: dict[str, Tensor]


def part_of(rows: Rows, part: slice) -> Rows:
    """Some of the rows, with the embeddings of all prompts."""
    return rows._replace(**{name: getattr(rows, name)[part] for name in _PER_ROW})


def micro_batches(rows: Rows, size: int, world: World = ALONE, most: int = 0) -> Iterator[tuple[Rows, bool]]:
    """The rows, ``size`` at a time, where the model is; not to the end if another process has failed meanwhile.

    Yields:
        ``(rows, True)``, and then, for the sake of processes with ``most`` rows, ``(rows, False)``: to be computed, for
        the others wait in every pass, and thrown away.
    """
    B = rows.x0.shape[0]
    for start in range(0, max(B, most), size):
        meet(world) if most else check_peers(world)
        part = part_of(rows, slice(start, start + size)) if start < B else _idle(rows, size)
        yield Rows(*(x.to(rows.embeds.device) for x in part)), start < B


def _idle(rows: Rows, size: int) -> Rows:
    """Rows of nothing, of the shape of a micro-batch."""
    blank = {name: (x := getattr(rows, name)).new_zeros(size, *x.shape[1:]) for name in _PER_ROW}
    return rows._replace(**blank | {"t": torch.full_like(blank["t"], 0.5)})


def one_gradient(
    policy: Policy,
    rows: Rows,
    loss: LossConfig,
    weigh: Weigh,
    prox_scale: float,
    micro_batch: int,
    whole: Whole,
) -> tuple[Tree, dict[str, float]]:
    """One gradient, from one backward pass a micro-batch, and means over all rows of the step to log.

    The reward part of each row as ``weigh`` says, the shared part times ``prox_scale``, and the pull to the base.
    """
    B, trained = whole.total, parameters(policy)
    total, sums = _zeros(trained), _no_sums(rows)
    for part, counts in micro_batches(rows, micro_batch, whole.world, whole.most[2]):
        prox, signal, pulled, log = _terms(policy, part, loss)
        objective = (prox_scale * prox + weigh(part.A, part.A_sum) * signal + pulled).sum() / B
        found = torch.autograd.grad(objective, list(trained.values()))
        if not counts:
            continue
        for x, g in zip(total.values(), found, strict=True):
            x += g
        _add(sums, log | {"loss": objective.detach() * B})
    total, sums = all_reduce((total, sums), whole.world)
    return total, {name: float(x) / B for name, x in sums.items()}


def halves(rows: Rows, whole: Whole) -> list[tuple[Rows, int, int]]:
    """This process's rows of either half, how many all processes have, and the most that one has; undivided where one
    half is empty."""
    if whole.first in (0, whole.total):  # a single image: nothing to compare it with
        return [(rows, whole.total, whole.most[2])]
    own, end = int((rows.half == 0).sum()), rows.x0.shape[0]
    first, second, _ = whole.most
    return [
        (part_of(rows, slice(own)), whole.first, first),
        (part_of(rows, slice(own, end)), whole.total - whole.first, second),
    ]


def joined(parts: list[Part], whole: Whole, K: int) -> tuple[Tree, Tree, Tree, Tree, Tree, dict[str, float]]:
    """All K gradients of the reward part, as means over either half of the rows; the last row of each (what the
    coefficients at hand make of them, if that was asked for), the shared part and the pull, over all rows; and what
    to log."""
    B, first = whole.total, whole.first
    if len(parts) == 1:
        h, shared, pull, sums = parts[0]
        rows, own = {name: x[:K] for name, x in h.items()}, {name: x[-1] for name, x in h.items()}
        return rows, rows, own, shared, pull, {name: float(x) / B for name, x in sums.items()}
    (h_a, shared_a, pull_a, sums_a), (h_b, shared_b, pull_b, sums_b) = parts
    p, q = first / B, 1 - first / B
    a, b = ({name: 2 * share * x[:K] for name, x in h.items()} for share, h in ((p, h_a), (q, h_b)))
    own = {name: p * x[-1] + q * h_b[name][-1] for name, x in h_a.items()}
    shared, pull = (
        {name: p * x + q * other[name] for name, x in tree.items()}
        for tree, other in ((shared_a, shared_b), (pull_a, pull_b))
    )
    means = {name: p * (float(x) / first) + q * (float(sums_b[name]) / (B - first)) for name, x in sums_a.items()}
    return a, b, own, shared, pull, means


def all_rows(
    policy: Policy,
    rows: Rows,
    rule: Rule,
    loss: LossConfig,
    weigh: Weigh | None,
    micro_batch: int,
    total: int | None = None,
    world: World = ALONE,
    most: int = 0,
    *,
    verify: bool = False,
) -> Part:
    """All K gradients of the reward part (with one more for ``weigh``), and those of the shared part and of the pull to
    the base, over the rows. A rule that balances full gradients scales the shared part, and never the pull: only then
    they are apart.

    Args:
        total: the number of rows over which means are taken, where other processes have some of them.
        world: these processes; what they have is not added here.
        most: rows that each of them computes where they share the base, its own ones or none's.
        verify: compare the gradients of the first micro-batch with autograd's, by one more backward pass.
    """
    B, K, trained = total or rows.x0.shape[0], rows.A.shape[1], parameters(policy)
    h: Tree = {}
    shared: Tree = {}
    apart = rule.gradients == "full" and pulls(loss)
    pull = _zeros(trained) if apart else {}
    sums = _no_sums(rows)
    for part, counts in micro_batches(rows, micro_batch, world, most):
        columns = interpolation(part.A, a_max=loss.a_max) - 0.5
        if weigh is not None:
            columns = torch.cat([columns, weigh(part.A, part.A_sum).unsqueeze(-1)], dim=-1)
        log: dict[str, Tensor] = {}

        def forward(part: Rows = part, log: dict[str, Tensor] = log, counts: bool = counts) -> tuple[Tensor, Tensor]:
            prox, signal, pulled, seen = _terms(policy, part, loss)
            log.update(seen)
            mean = pulled.sum() / B
            if not apart:
                return signal, prox.sum() / B + mean
            found = torch.autograd.grad(mean, list(trained.values()), retain_graph=True)
            if counts:
                _add(pull, dict(zip(trained, found, strict=True)))
            return signal, prox.sum() / B

        fallback = "all" if rule.rows == "k_pass" else "error"
        result = shared_cotangent_rows(forward, policy.model, columns / B, fallback=fallback, verify=verify)  # type: ignore[arg-type]
        verify = False
        if not counts:
            continue
        _add(h, result.rows)
        _add(shared, result.shared)
        assert result.shared_loss is not None
        _add(sums, log | {"loss": result.shared_loss * B})
    if not h:  # no rows of this process
        shared = _zeros(trained)
        h = {name: p.new_zeros(K + (weigh is not None), *p.shape) for name, p in shared.items()}
    return Part(h, shared, pull, sums)


def _terms(policy: Policy, rows: Rows, loss: LossConfig) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """``prox``, ``signal`` and the pull to the base of every row ``[B]``, and sums over rows to log.

    The pull is ``kl_weight mean((v - v_ref)^2) + norm_guard max(0, |v| - |v_ref|)^2``, lengths as root mean squares: a
    hinge on the velocity's length as NormGuard's (arXiv 2606.27771).
    """
    t = rows.t.reshape(-1, 1, 1, 1)
    x_t = (1 - t) * rows.x0 + t * rows.noise
    condition = (rows.embeds[rows.prompt], rows.pooled[rows.prompt])
    with torch.no_grad():
        with merged(policy, "old"):
            v_old = velocity(policy, x_t, rows.t, condition)
        if pulls(loss):
            with active(policy, "base"):
                v_ref = velocity(policy, x_t, rows.t, condition)
    v = velocity(policy, x_t, rows.t, condition)
    l_pos, l_neg = branch_losses(v, v_old, x0=rows.x0, noise=rows.noise, t=rows.t, beta=loss.beta, form=loss.form)
    scale = loss.a_max / loss.beta if loss.form == "x0" else 1.0
    prox, signal = affine_terms(scale * l_pos, scale * l_neg)
    kl = pulled = torch.zeros_like(prox)
    base_length = torch.full_like(prox, torch.nan)
    if pulls(loss):
        kl, base_length = _mean_square(v - v_ref), _mean_square(v_ref).sqrt()
        excess = (_mean_square(v).sqrt() - base_length).clamp(min=0)
        pulled = loss.kl_weight * kl + loss.norm_guard * excess.square()
    log = {
        "kl": kl.detach().sum(),
        "drift": _mean_square((v - v_old).detach()).sum(),
        "v_norm": _mean_square(v.detach()).sqrt().sum(),
        "v_norm_base": base_length.sum(),
        "x0_abs": rows.x0.abs().flatten(1).mean(1).sum(),
    }
    return prox, signal, pulled, log


def _mean_square(x: Tensor) -> Tensor:
    """Mean square of each row ``[B]``."""
    return x.square().flatten(1).mean(1)


def _zeros(trained: Mapping[str, Tensor]) -> Tree:
    """A gradient of nothing."""
    return {name: torch.zeros_like(p, requires_grad=False) for name, p in trained.items()}


def _no_sums(rows: Rows) -> dict[str, Tensor]:
    """Sums over no rows of what is logged."""
    return {name: rows.embeds.new_zeros((), dtype=rows.x0.dtype) for name in _LOGGED}


def _add(total: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    """Add tensors by name, in place in ``total``."""
    for name, x in more.items():
        total[name] = total[name] + x if name in total else x
