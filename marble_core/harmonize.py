"""From a Gram matrix to the coefficients of one direction that improves every reward, with its certificate."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from marble_core._check import (
    UNREADABLE,
    describe,
    has_readable_values,
    require,
    require_bool,
    require_float,
    require_gram,
    require_range,
    require_same_shape,
)
from marble_core._min_norm import apply_floor
from marble_core.gram import normalize_gram
from marble_core.simplex import min_norm_weights

_STATIONARY = 1e-6  # a shorter direction of unit gradients is what rounding of float32 gradients leaves of 0


class Harmonization(NamedTuple):
    """A balanced direction ``d = sum_k coefficients_k g_k`` and what is known about it.

    Attributes:
        weights: ``[..., K]`` on the simplex, for the unit gradients; 0 where not active.
        coefficients: ``[..., K]``, ``c_k = n_bar w_k / |g_k|`` for the raw gradients, ``n_bar`` the mean active norm.
        norms: ``[..., K]``, ``|g_k|``.
        direction_norm: ``[...]``, ``|d*|`` of ``d* = sum_k w_k g_k / |g_k|``, in [0, 1].
        cosines: ``[..., K]``, ``cos(d, g_k)`` on this batch; 0 where not active or stationary.
        gap: ``[...]``, ``|d*|^2 - min_k <d*, g_k / |g_k|>`` over the active rewards: 0 if every reward is served.
        active: ``[..., K]`` bool, rewards with signal.
        stationary: ``[...]`` bool, ``|d*|`` is 0 to rounding (or nothing is active): no direction improves all.
    """

    weights: Tensor
    coefficients: Tensor
    norms: Tensor
    direction_norm: Tensor
    cosines: Tensor
    gap: Tensor
    active: Tensor
    stationary: Tensor


def harmonize(
    gram: Tensor,
    *,
    signal_tol: float = 0.0,
    floor: float = 0.0,
    solver: Callable[[Tensor], Tensor] = min_norm_weights,
) -> Harmonization:
    """Balance K gradients: coefficients of a direction that has a positive inner product with each of them.

    Unit gradients ``g_k / |g_k|``, their min-norm weights ``w``, ``d* = sum_k w_k g_k / |g_k|``, and the step
    direction ``d = n_bar d* = sum_k c_k g_k``. By the KKT conditions ``cos(d, g_k) >= |d*|`` for every active k, with
    equality for the smallest. If ``|d*|`` is 0 the gradients are Pareto-stationary; then ``stationary`` says so and
    ``d`` is 0 to rounding. The guarantee is about the gradients given: see ``cross_alignment`` for another batch.

    A reward is inactive, with weight and coefficient exactly 0 and no influence on the others, if its norm is 0, not
    finite, or at most ``signal_tol`` times the largest. Without any active reward all coefficients are 0.

    Args:
        gram: ``[..., K, K]``, symmetric PSD, of the raw gradients.
        signal_tol: norms up to this share of the largest count as no signal. 1e-6 suits float32 gradients whose
            signal may cancel to rounding; the default takes every non-zero gradient seriously.
        floor: least weight of an active reward. With a floor above 0 every active reward gets some weight, but the
            direction may lower one of them.
        solver: any callable from the Gram ``[A, A]`` of the A active unit gradients (float64) to weights ``[A]``:
            PCGrad-, CAGrad-, Nash- or uniform-style balancing, or a weighting of TorchJD.

    Returns:
        ``Harmonization``, tensors in the dtype of ``gram`` (solved in float64).

    Raises:
        ValueError: ``gram`` is not square, an option is out of range, or ``solver`` returns another shape; where values
            cannot be read (inside ``torch.func`` or ``torch.compile``), K > 8 or a ``solver`` other than the default.

    Example:
        >>> h = harmonize(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))  # |g_1| = 1, |g_2| = 2, cosine -1/2
        >>> h.weights, h.coefficients, h.cosines
        (tensor([0.5000, 0.5000]), tensor([0.7500, 0.3750]), tensor([0.5000, 0.5000]))

    Reference: MARBLE (Zhao et al., arXiv 2605.06507), eqs. 4-8; inactive rewards: docs/theory.md, section 7.
    """
    require_gram("gram", gram)
    require_range("signal_tol", signal_tol, 0.0, 1.0)
    require_range("floor", floor, 0.0, 1.0 / gram.shape[-1])
    G = gram.detach().double()
    norms = torch.where(G.diagonal(dim1=-2, dim2=-1) < 0, 0.0, G.diagonal(dim1=-2, dim2=-1)).sqrt()
    finite = G.diagonal(dim1=-2, dim2=-1).isfinite()
    longest = torch.where(finite, norms, 0.0).amax(-1, keepdim=True)
    active = finite & (norms > 0) & (norms > signal_tol * longest)
    both = active.unsqueeze(-1) & active.unsqueeze(-2)
    G_hat, _ = normalize_gram(torch.where(both, G, 0.0))
    w = _active_weights(G_hat, active, floor, solver)
    G_w = (G_hat @ w.unsqueeze(-1)).squeeze(-1)
    direction_norm = (w * G_w).sum(-1).clamp(min=0).sqrt()
    any_active = active.any(-1)
    stationary = (direction_norm <= _STATIONARY) | ~any_active
    length = direction_norm.unsqueeze(-1)
    cosines = torch.where(active & ~stationary.unsqueeze(-1), G_w / torch.where(length > 0, length, 1.0), 0.0)
    gap = torch.where(any_active, direction_norm.square() - torch.where(active, G_w, torch.inf).amin(-1), 0.0)
    c = torch.where(active, rescale(w, norms, active), 0.0)
    w, c, norms, cosines = (x.to(gram.dtype) for x in (w, c, norms, cosines))
    direction_norm, gap = direction_norm.to(gram.dtype), gap.to(gram.dtype)
    return Harmonization(w, c, norms, direction_norm, cosines, gap, active, stationary)


def rescale(weights: Tensor, norms: Tensor, active: Tensor) -> Tensor:
    """Turn weights of unit gradients into coefficients of the raw ones: ``c_k = n_bar w_k / |g_k|``.

    ``n_bar`` is the mean length of the active gradients, so that the direction is as long as they are. A gradient whose
    length is not known counts as one of mean length.

    Args:
        weights: ``[..., K]``, of the unit gradients.
        norms: ``[..., K]``, lengths of the raw gradients; 0 or NaN where not known.
        active: ``[..., K]``, bool: whose lengths make the mean.

    Returns:
        ``[..., K]``, in the dtype of ``weights``.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Example:
        >>> rescale(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 2.0]), torch.tensor([True, True]))
        tensor([0.7500, 0.3750])

    Reference: MARBLE (Zhao et al., arXiv 2605.06507), eqs. 7-8.
    """
    require_float("weights", weights, "[..., K]", range(1, 65))
    require_float("norms", norms, "[..., K]", range(1, 65))
    require_same_shape("norms", norms, "weights", weights)
    require_bool("active", active, weights.shape, "[..., K]")
    w, n = weights.detach().double(), norms.detach().double()
    n_bar = torch.where(active, n, 0.0).sum(-1, keepdim=True) / active.sum(-1, keepdim=True).clamp(min=1)
    c = n_bar * w / torch.where(n > 0, n, torch.where(n_bar > 0, n_bar, 1.0))
    return c.to(weights.dtype)


def _active_weights(G_hat: Tensor, active: Tensor, floor: float, solver: Callable[[Tensor], Tensor]) -> Tensor:
    """Weights of the active rewards from their own sub-Gram; exactly 0 for the others."""
    default = solver is min_norm_weights
    require(default or floor == 0.0, "floor", "0 with a solver of your own", floor, "Apply the floor in the solver.")
    if not has_readable_values(G_hat):
        fix = "Call it outside: batches are handled directly."
        require(default, "solver", f"min_norm_weights {UNREADABLE}", describe(solver), fix)
        return _masked_weights(G_hat, active, floor)
    K = G_hat.shape[-1]
    w = G_hat.new_zeros(active.shape).reshape(-1, K)
    for w_item, G in zip(w, G_hat.cpu().reshape(-1, K, K), strict=True):
        i = (G.diagonal() > 0).nonzero().squeeze(-1)
        if len(i):
            part = min_norm_weights(G[i][:, i], floor=floor) if default else solver(G[i][:, i])
            ok = isinstance(part, Tensor) and part.shape == i.shape
            require(ok, "solver", f"a callable returning weights of shape [{len(i)}]", describe(part))
            w_item[i] = part.to(w)
    return w.reshape(active.shape).to(G_hat.device)


def _masked_weights(G_hat: Tensor, active: Tensor, floor: float) -> Tensor:
    """Min-norm weights without reading a value: a unit gradient orthogonal to all others leaves their shares alone."""
    on = active.to(G_hat.dtype)
    c = 1.0 - floor * on.sum(-1, keepdim=True)
    G = apply_floor(G_hat, floor, c.unsqueeze(-1)) * on.unsqueeze(-1) * on.unsqueeze(-2)
    v = min_norm_weights(G + torch.diag_embed(1.0 - on)) * on
    v = v / torch.where(active.any(-1, keepdim=True), v.sum(-1, keepdim=True), 1.0)
    return (floor + c * v) * on
