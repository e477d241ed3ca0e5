"""Gradients of a step's rows, accumulated over micro-batches: one, or all K with the shared part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from marble_core import affine_terms, branch_losses, interpolation, shared_cotangent_rows
from reference.config.settings import LossConfig, pulls
from reference.policy.adapters import Policy, active, merged, parameters, velocity
from reference.processes.alive import begin_pass
from reference.processes.peers import ALONE, Peers
from reference.processes.sums import all_reduce
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
        weight: ``[B]``, 1, or 0 for a row that only keeps this process in step with others.
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
    weight: Tensor


PER_ROW = tuple(name for name in Rows._fields if name not in ("embeds", "pooled"))


class Whole(NamedTuple):
    """A step over all processes, each of which has some of its rows, or none.

    Attributes:
        peers: the processes.
        first: rows of the step's first half.
        total: rows of the step.
    """

    peers: Peers
    first: int
    total: int


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
    return rows._replace(**{name: getattr(rows, name)[part] for name in PER_ROW})


def micro_batches(rows: Rows, size: int, peers: Peers = ALONE) -> Iterator[Rows]:
    """The rows, ``size`` at a time, where the model is; not to the end if another process has failed meanwhile."""
    for start in range(0, rows.x0.shape[0], size):
        begin_pass(peers)
        yield Rows(*(x.to(rows.embeds.device) for x in part_of(rows, slice(start, start + size))))


def one_gradient(
    policy: Policy,
    rows: Rows,
    loss: LossConfig,
    weigh: Weigh,
    micro_batch: int,
    whole: Whole,
) -> tuple[Tree, dict[str, float]]:
    """One gradient, from one backward pass a micro-batch, and means over all rows of the step to log.

    The reward part of each row as ``weigh`` says, the shared part, and the pull to the base.
    """
    B, trained = whole.total, parameters(policy)
    total, sums = _zeros(trained), _no_sums(rows)
    for part in micro_batches(rows, micro_batch, whole.peers):
        prox, signal, pulled, log = _terms(policy, part, loss)
        objective = (part.weight * (prox + weigh(part.A, part.A_sum) * signal + pulled)).sum() / B
        found = torch.autograd.grad(objective, list(trained.values()))
        for x, g in zip(total.values(), found, strict=True):
            x += g
        _add(sums, log | {"loss": objective.detach() * B})
    total, sums = all_reduce((total, sums), whole.peers)
    return total, {name: float(x) / B for name, x in sums.items()}


class Asked(NamedTuple):
    """What is wanted of some rows.

    Attributes:
        weigh: one gradient more, of the reward part weighed so; or None.
        full: the rule balances full gradients, and scales the shared part but never the pull: they are then apart.
        micro_batch: rows at a time.
        verify: compare the gradients of the first micro-batch with autograd's, by one more backward pass.
    """

    weigh: Weigh | None
    full: bool
    micro_batch: int
    verify: bool = False


def all_rows(policy: Policy, rows: Rows, loss: LossConfig, asked: Asked, total: int, peers: Peers = ALONE) -> Part:
    """All K gradients of the reward part, those of the shared part and of the pull to the base, over the rows.

    Args:
        total: the number of rows over which means are taken, where other processes have some of them.
        peers: these processes; what they have is not added here.
    """
    B, K, trained = total, rows.A.shape[1], parameters(policy)
    h: Tree = {}
    shared, sums = _zeros(trained), _no_sums(rows)
    pull = _zeros(trained) if asked.full and pulls(loss) else {}
    verify = asked.verify
    for part in micro_batches(rows, asked.micro_batch, peers):
        columns = interpolation(part.A, a_max=loss.a_max) - 0.5
        if asked.weigh is not None:
            columns = torch.cat([columns, asked.weigh(part.A, part.A_sum).unsqueeze(-1)], dim=-1)
        columns = columns * part.weight.unsqueeze(-1)
        log: dict[str, Tensor] = {}

        def forward(part: Rows = part, log: dict[str, Tensor] = log) -> tuple[Tensor, Tensor]:
            prox, signal, pulled, seen = _terms(policy, part, loss)
            log.update(seen)
            mean = (part.weight * pulled).sum() / B
            if not pull:
                return signal, (part.weight * prox).sum() / B + mean
            found = torch.autograd.grad(mean, list(trained.values()), retain_graph=True)
            _add(pull, dict(zip(trained, found, strict=True)))
            return signal, (part.weight * prox).sum() / B

        result = shared_cotangent_rows(forward, policy.model, columns / B, verify=verify)
        verify = False
        _add(h, result.rows)
        _add(shared, result.shared)
        assert result.shared_loss is not None
        _add(sums, log | {"loss": result.shared_loss * B})
    if not h:  # no rows of this process
        h = {name: p.new_zeros(K + (asked.weigh is not None), *p.shape) for name, p in shared.items()}
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
    each = {
        "kl": kl.detach(),
        "drift": _mean_square((v - v_old).detach()),
        "v_norm": _mean_square(v.detach()).sqrt(),
        "v_norm_base": base_length,
        "x0_abs": rows.x0.abs().flatten(1).mean(1),
    }
    return prox, signal, pulled, {name: (rows.weight * x).sum() for name, x in each.items()}


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
