"""The probability simplex: projection, and the min-norm point of K gradients given their Gram matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from marble_core._check import UNREADABLE, has_readable_values, require, require_float, require_gram, require_range
from marble_core._min_norm import ENUMERATED, apply_floor, enumerate_supports, solve, solve_batch


def project_simplex(x: Tensor) -> Tensor:
    """Euclidean projection onto the probability simplex, along the last dimension.

    Solves ``argmin_w |w - x|^2`` subject to ``w >= 0`` and ``sum(w) = 1``: ``w = max(x - theta, 0)`` with the one
    threshold ``theta`` that makes the sum 1, found by sorting. Ties keep equal weights; an item with a NaN or an
    infinity becomes NaN and leaves the other items alone.

    Args:
        x: ``[..., K]``, any floating-point dtype (halves are projected in float32).

    Returns:
        ``[..., K]`` in the dtype of ``x``.

    Raises:
        ValueError: ``x`` is not a floating-point tensor with at least one dimension and K >= 1.

    Example:
        >>> project_simplex(torch.tensor([0.5, 2.0, 1.5]))
        tensor([0.0000, 0.7500, 0.2500])

    Reference: Held, Wolfe and Crowder (1974), Validation of subgradient optimization.
    """
    require_float("x", x, "[..., K]", range(1, 65))
    require(x.shape[-1] >= 1, "x", "at least one entry in the last dimension", list(x.shape))
    y = x if x.dtype == torch.float64 else x.float()
    y = y - y.amax(-1, keepdim=True)  # a shift moves theta alone, and keeps large inputs from losing digits
    descending = y.sort(dim=-1, descending=True).values
    rank = torch.arange(1, y.shape[-1] + 1, dtype=y.dtype, device=y.device)
    theta = (descending.cumsum(-1) - 1) / rank
    count = (descending > theta).sum(-1, keepdim=True).clamp(min=1)
    w = (y - theta.gather(-1, count - 1)).clamp(min=0)
    return torch.where(y.isfinite().all(-1, keepdim=True), w, math.nan).to(x.dtype)


def min_norm_gap(gram: Tensor, w: Tensor) -> Tensor:
    """The certificate of a min-norm solution: 0 at the optimum, positive elsewhere, no solver needed.

    ``gap = w^T G w - min_k (G w)_k`` bounds the suboptimality, ``w^T G w - |d*|^2 <= 2 gap``, and says by how much
    the guarantee of positive alignment fails: with ``d = sum_k w_k g_k``, ``<d, g_k> >= |d|^2 - gap`` for every k.
    It is evaluated in float64; halves and float32 in, the same dtype out.

    Args:
        gram: ``[..., K, K]``, symmetric PSD.
        w: ``[..., K]``, on the simplex. Leading dimensions broadcast.

    Returns:
        ``[...]`` in the dtype of ``gram``. NaN in one item stays there.

    Raises:
        ValueError: ``gram`` is not square, or the last dimension of ``w`` is not K.

    Example:
        >>> gram = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> min_norm_gap(gram, torch.tensor([0.5, 0.5])), min_norm_gap(gram, torch.tensor([1.0, 0.0]))
        (tensor(0.), tensor(1.))

    Reference: Wolfe (1976), Finding the nearest point in a polytope; docs/theory.md, section 4.
    """
    require_gram("gram", gram)
    require_float("w", w, "[..., K]", range(1, 65))
    require(w.shape[-1] == gram.shape[-1], "w", f"K = {gram.shape[-1]} weights, as gram has", list(w.shape))
    w64 = w.double()
    Gw = (gram.double() @ w64.unsqueeze(-1)).squeeze(-1)
    return ((w64 * Gw).sum(-1) - Gw.amin(-1)).to(gram.dtype)


def min_norm_weights(gram: Tensor, *, floor: float = 0.0) -> Tensor:
    """Weights of the shortest vector in the convex hull of K gradients, exact to rounding.

    Solves ``argmin_w w^T G w`` subject to ``w >= floor``, ``sum(w) = 1``. By its KKT conditions
    ``d = sum_k w_k g_k`` has ``<d, g_k> >= |d|^2`` for every k, with equality where ``w_k > 0`` (``floor = 0``). Of two
    or more unit gradients none gets more than 1/2.

    Ties are canonical: of all minimizers the one with the least ``sum_k (w_k |g_k|)^2`` is returned, so equal
    gradients share their weight equally and relabelling the gradients relabels the weights. Zero gradients are
    minimizers on their own and share all the weight. NaN or an infinity makes its own item NaN. Solved in float64;
    weights are constants (no gradient flows through them).

    Solved on the host, which from an accelerator costs one transfer of K^2 numbers and is still far quicker than any
    way that avoids it. Where values cannot be read (inside ``torch.func`` or ``torch.compile``, or of some tensor
    subclasses) K <= 8 is solved where it is, without looking at any.

    Args:
        gram: ``[..., K, K]``, symmetric PSD up to rounding. Exact for K up to 256 at any scale of the gradients.
        floor: least weight, ``0 <= floor <= 1 / K``. With a floor the KKT bound above holds no longer.

    Returns:
        ``[..., K]`` in the dtype of ``gram``, on the simplex.

    Raises:
        ValueError: ``gram`` is not square, ``floor`` is out of range, or K > 8 where values
            cannot be read.

    Example:
        >>> min_norm_weights(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        tensor([0.7500, 0.2500])

    Reference: MARBLE (Zhao et al., arXiv 2605.06507), eq. 6; Desideri (2012), MGDA; docs/theory.md, section 4.
    """
    require_gram("gram", gram)
    K = gram.shape[-1]
    require_range("floor", floor, 0.0, 1.0 / K)
    G = gram.detach().double()
    c = max(1.0 - K * floor, 0.0)
    if floor:
        G = apply_floor(G, floor, c)
    if has_readable_values(G):
        host = G if G.is_cpu else G.cpu()
        v = solve(host) if G.ndim == 2 else solve_batch(host)
    else:
        require(
            K <= ENUMERATED,
            "gram",
            f"K <= {ENUMERATED} {UNREADABLE}",
            f"K = {K}",
            "Call it outside the transform: batches are handled directly.",
        )
        v = enumerate_supports(G)
    return (floor + c * v if floor else v).to(gram)
