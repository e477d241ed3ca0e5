"""The cone of directions that lower no reward, and the one of them that is nearest to a fixed weighting's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from marble_core._check import (
    UNREADABLE,
    has_readable_values,
    require,
    require_gram,
    require_prior,
    require_range,
    require_same_shape,
)
from marble_core._min_norm import _EPS, ENUMERATED, _active_set, _flat


def cone_weights(
    gram: Tensor,
    prior: Tensor,
    *,
    precision: float = 2.0**-24,
    error: float = 0.0,
    step_gram: Tensor | None = None,
) -> Tensor:
    """Coefficients of the direction nearest to the prior's that lowers no reward, exact to rounding.

    With ``v = sum_k prior_k g_k``, solves ``argmin_d |d - v|^2`` subject to ``<d, g_k> >= 0`` for every k: the
    projection of v onto a cone, so ``<d, v> = |d|^2`` and ``|d| <= |v|``. By Moreau ``d = v + sum_k nu_k g_k`` with
    ``nu = argmin |v + sum_k nu_k g_k|^2`` over ``nu >= 0``; ``c = prior + nu`` is returned. The certificate needs no
    solver: ``(G c)_k >= 0`` and ``c_k >= prior_k``, one of the two with equality.

    Where v lowers nothing, to rounding, c is the prior itself. At a Pareto-stationary point d may be 0: ``G c = 0``.
    A zero gradient keeps its prior. The scale of the Gram does not matter, that of the prior is that of c. d is unique;
    of all nu the one with the least ``sum_k (nu_k |g_k|)^2`` is taken, so equal gradients get equal nu and
    relabelling the gradients relabels c. NaN or an infinity in a Gram makes its own item NaN. Solved in float64 on the
    host, item by item; no gradient flows through c. Where values cannot be read (inside ``torch.func`` or
    ``torch.compile``, or of some tensor subclasses) K <= 8 is solved without looking at any, to rounding unless
    gradients are parallel to within 1e-7.

    *Rounding.* Gradients that oppose each other up to rounding could ask for coefficients of 1e8 that cancel, and their
    product with the rows would be rounding. Where ``sum_k nu_k |g_k|`` exceeds ``1 / sqrt(K precision)`` times
    ``sum_k prior_k |g_k|``, the problem is solved again for rows that are known to ``precision`` alone: the unit Gram
    plus ``K precision`` on its diagonal. The first sum is then at most ``1 / (2 sqrt(precision))`` times the second,
    ``|d| <= |v|`` holds still, and ``<d, g_k>`` is at least ``-sqrt(K precision) |g_k| sum_l prior_l |g_l|``, also
    with c and d rounded to float32 (``combine_rows``).

    *Estimates.* A Gram matrix that was estimated (``psd_part`` of an averaged ``cross_gram``) has directions that seem
    to cost nothing. Give its ``error``, and for the length of the step, which it does not know, ``step_gram``.

    Args:
        gram: ``[..., K, K]``, symmetric PSD at any scale of the gradients; of another one (rounded to few digits) the
            PSD part is taken.
        prior: ``[..., K]`` or ``[K]``, non-negative; need not sum to 1. Leading dimensions broadcast.
        precision: relative rounding of the rows that c will multiply: 2**-24 for float32, 2**-53 for float64, 2**-8
            for bfloat16.
        error: standard error of the entries of ``gram``, as a share of ``|g_k| |g_l|``: ``sqrt(K) error`` is added to
            the diagonal of the unit Gram, the size of its largest spurious eigenvalue. 0 for an exact Gram.
        step_gram: ``[..., K, K]``, Gram of the rows that c will multiply, noise included: c is scaled down so that d
            is not longer than v in it. None where ``gram`` is that matrix.

    Returns:
        ``[..., K]`` in the dtype of ``gram``.

    Raises:
        ValueError: ``gram`` is not square, ``prior`` has another K or an entry that is negative or not finite (not
            seen where values cannot be read), ``precision`` or ``error`` is out of range, ``step_gram`` has another
            shape, or K > 8 where values cannot be read.

    Example:
        >>> cone_weights(torch.tensor([[4.0, -1.0], [-1.0, 1.0]]), torch.tensor([0.5, 0.5]))
        tensor([0.5000, 0.5000])
        >>> cone_weights(torch.tensor([[4.0, -1.0], [-1.0, 1.0]]), torch.tensor([0.8, 0.2]))
        tensor([0.8000, 0.8000])

    Reference: Lopez-Paz and Ranzato (2017), gradient episodic memory, section 3; Quinton and Rey (arXiv 2406.16232),
    who project each gradient and average; Lawson and Hanson (1974), ch. 23; docs/theory.md, section 12.
    """
    require_gram("gram", gram)
    K = gram.shape[-1]
    require_prior(prior, K)
    require_range("precision", precision, 0.0, 1.0, open_low=True)
    require_range("error", error, 0.0, 1e9)
    G, p = gram.detach().double(), prior.detach().double()
    p = p + torch.zeros_like(G[..., 0])  # broadcast
    G = G.expand(*p.shape, K)
    if has_readable_values(p):
        items = zip(G.cpu().reshape(-1, K, K), p.cpu().reshape(-1, K), strict=True)
        solved = [_solve(*item, precision, error) for item in items]
        c = torch.stack(solved).reshape(p.shape).to(p.device) if solved else p
    else:
        fix = "Call it outside the transform: batches are handled directly."
        require(K <= ENUMERATED, "gram", f"K <= {ENUMERATED} {UNREADABLE}", f"K = {K}", fix)
        c = _solve(G, p, precision, error)
    if step_gram is not None:
        require_gram("step_gram", step_gram)
        require_same_shape("step_gram", step_gram, "gram", gram)
        c = _no_longer(c, p, step_gram.detach().double())
    return c.to(gram)


def _no_longer(c: Tensor, p: Tensor, G: Tensor) -> Tensor:
    """``c`` scaled down to a direction no longer than that of ``p``."""
    c2, p2 = ((x * (G @ x.unsqueeze(-1)).squeeze(-1)).sum(-1, keepdim=True).clamp(min=0) for x in (c, p))
    return torch.where(c2 > p2, c * (p2 / torch.where(c2 > 0, c2, 1.0)).sqrt(), c)


def _solve(G: Tensor, p: Tensor, precision: float, error: float) -> Tensor:
    """Scale to ``mu_k = nu_k |g_k|`` and ``sum_k x_k = 1`` with ``x_k ~ prior_k |g_k|``: unit gradients."""
    bad = ~(G.isfinite().all(-1).all(-1) & p.isfinite().all(-1)).unsqueeze(-1)
    G = torch.where(bad.unsqueeze(-1), 0.0, (G + G.mT) / 2)
    s = G.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    inverse = torch.where(s > 0, 1.0 / s, 0.0)  # a zero gradient constrains nothing
    G_hat = G * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    eigenvalues, Q = torch.linalg.eigh(G_hat)
    psd = (Q * eigenvalues.clamp(min=0).unsqueeze(-2)) @ Q.mT  # else the problem might have no solution
    G_hat = torch.where((eigenvalues[..., :1] < -_flat(eigenvalues)).unsqueeze(-1), psd, G_hat)
    x = p * s
    total = x.sum(-1, keepdim=True)
    x = x / torch.where(total > 0, total, 1.0)
    K, on = x.shape[-1], torch.diag_embed((s > 0).to(G))
    solve = _descend if has_readable_values(x) else _enumerate
    G_hat = G_hat + K**0.5 * error * on
    mu = solve(G_hat, x)
    long = mu.sum(-1, keepdim=True) > (K * precision) ** -0.5
    if not has_readable_values(x) or bool(long):
        mu = torch.where(long, solve(G_hat + K * precision * on, x), mu)
    return torch.where(bad, math.nan, p + total * mu * inverse)


def _excess(G_hat: Tensor, x: Tensor, mu: Tensor) -> Tensor:
    """How far ``mu [..., K]`` is from optimal, in units of what rounding of the Gram and of the sums leaves."""
    g = ((x + mu).unsqueeze(-2) @ G_hat).squeeze(-2)
    return torch.where(mu > 0, g.abs(), -g).amax(-1) / (8.0 * _EPS * (x + mu).sum(-1).clamp(min=1.0))


def _enumerate(G_hat: Tensor, x: Tensor) -> Tensor:
    """All 2^K supports at once, without a look at any value: the shortest optimal ``mu`` is one of the candidates."""
    K = x.shape[-1]
    bits = torch.arange(2**K, device=x.device).unsqueeze(-1) >> torch.arange(K, device=x.device)
    m = (bits & 1).to(x.dtype)  # [2^K, K], one support a row
    G, x = G_hat.unsqueeze(-3), x.unsqueeze(-2)
    M = G * m.unsqueeze(-1) * m.unsqueeze(-2)
    eigenvalues, Q = torch.linalg.eigh(M)
    inverse = torch.where(eigenvalues > _flat(eigenvalues), 1.0 / eigenvalues, 0.0)
    mu = torch.zeros_like(x)
    for _ in range(3):  # all but the first pass refine
        r = -(((x + mu).unsqueeze(-2) @ G).squeeze(-2) * m).unsqueeze(-1)
        mu = mu + (Q @ (inverse.unsqueeze(-1) * (Q.mT @ r))).squeeze(-1) * m
    mu = mu.clamp(min=0)
    excess = _excess(G, x, mu)
    length = torch.where(excess <= 1.0, mu.square().sum(-1), math.inf)
    best = torch.where((excess <= 1.0).any(-1), length.argmin(-1), excess.argmin(-1))
    return mu.gather(-2, best[..., None, None].expand(*best.shape, 1, K)).squeeze(-2)


def _descend(G_hat: Tensor, x: Tensor) -> Tensor:
    """One item by the active set of the min-norm problem, with v as one more gradient, the only one of fixed weight."""
    zero, tiny = torch.zeros_like(x), 2.0**-10  # a short v, so that tolerances relative to |d|^2 are below rounding
    if _excess(G_hat, x, zero) <= 1.0:
        return zero
    q = tiny * (G_hat @ x)
    E = torch.cat([torch.cat([tiny * (x @ q).reshape(1), q]).unsqueeze(0), torch.cat([q.unsqueeze(-1), G_hat], 1)])
    e = torch.cat([torch.ones_like(x[:1]), zero])
    mu = _active_set(E, e, torch.ones_like(e), e)[1:] / tiny
    return _shortest(G_hat, x, mu)


def _shortest(G_hat: Tensor, x: Tensor, mu: Tensor) -> Tensor:
    """Of all ``mu >= 0`` with the same ``G_hat mu`` the shortest: least distance programming, as for the min norm."""
    i = ((G_hat @ (x + mu) <= 1e-9 * (x + mu).sum()) | (mu > 0)).nonzero().squeeze(-1)
    eigenvalues, Q = torch.linalg.eigh(G_hat[i][:, i])
    Z = Q[:, eigenvalues <= _flat(eigenvalues)]
    if Z.shape[1] == 0:
        return mu
    p = mu[i] - Z @ (Z.mT @ mu[i])
    if p.min() < 0:
        ZZ = Z @ Z.mT
        y = _active_set(ZZ, -p, torch.ones_like(p), (p == p.min()).to(p))
        p = p - ZZ @ y * (p @ y) / (y @ ZZ @ y)
    keep = p > 1e-10 * p.max()
    j, found = i[keep], torch.zeros_like(mu).index_copy(0, i[keep], p[keep])
    for _ in range(3):  # take back the projection's rounding, in all the rows that are to be 0
        r = -(G_hat @ (x + found))[i]
        p = torch.linalg.lstsq(G_hat[i][:, j], r, rcond=64.0 * _EPS, driver="gelsd").solution
        found = found.index_add(0, j, p).clamp(min=0)
    return found if _excess(G_hat, x, found) <= _excess(G_hat, x, mu).clamp(min=1.0) else mu
