"""K gradients as a K x K matrix: the Gram matrix, its normalization, the cross-Gram of two batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from marble_core._check import (
    CHUNK,
    describe,
    require,
    require_block,
    require_float,
    require_gram,
    require_same_shape,
    require_stacked,
)


def gram_matrix(rows: Any, *, inv_metric: Any = None) -> Tensor:
    """Inner products of K gradients, ``G_kl = <g_k, g_l>``, or ``<g_k, P^-1 g_l>`` in a diagonal metric.

    Products and sums over all leaves are taken in float64, a few MiB at a time, whatever the dtype of the rows (and
    whatever the TF32 setting), so G is PSD to float64 rounding. Rows must be complete: a Gram matrix averaged over
    micro-batches or ranks is not the Gram matrix of the averaged gradients. A NaN in one gradient stays in its row
    and column.

    With AdamW's ``P = sqrt(v_hat) + eps`` as metric, min-norm weights of G give ``<P^-1 d, g_k> > 0``: the guarantee
    then holds for the step that the optimizer takes (momentum aside).

    Args:
        rows: ``[K, P]``, a pytree whose leaves are ``[K, ...]``, or an iterator over such blocks, of which one at a
            time is held.
        inv_metric: ``1 / diag(P)`` in the shapes of the parameters, non-negative: ``[P]``, a pytree like that of the
            rows without the leading K, or an iterator over blocks. None is the identity.

    Returns:
        ``[K, K]``, float64, exactly symmetric, on the device of the rows.

    Raises:
        ValueError: leaves without a common leading K, not floating point, or not matching ``inv_metric``; a list of
            vectors, which could be K gradients or blocks.

    Example:
        >>> gram_matrix(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        tensor([[25.,  3.],
                [ 3.,  1.]], dtype=torch.float64)

    Reference: MARBLE (Zhao et al., arXiv 2605.06507), eq. 6; the metric: docs/theory.md, section 11.
    """
    require_stacked("rows", rows, streams=True)
    total: Tensor | None = None
    for x, inv in _leaf_pairs(("rows", rows), ("inv_metric", inv_metric)):
        require_block("rows", x, None if total is None else total.shape[0])
        if inv is not None:
            require_float("inv_metric", inv, "[...]", range(65))
            require(inv.shape == x.shape[1:], "inv_metric", f"a leaf of shape {list(x.shape[1:])}", describe(inv))
        total = _add_product(total, x, x, inv)
    if total is None:
        raise ValueError("rows: expected at least one leaf [K, ...], got none.")
    return (total + total.mT) / 2


def cross_gram(rows_a: Any, rows_b: Any) -> Tensor:
    """Inner products between the gradients of two independent batches, ``C_kl = <a_k, b_l>``: free of noise bias.

    With ``a_k = s_k + n_k``, ``b_k = s_k + n'_k`` and independent zero-mean noise, ``E[C] = <s_k, s_l>``, diagonal
    included, whereas ``E[G_kk] = |s_k|^2 + E|n_k|^2``. C itself is neither symmetric nor PSD: see ``psd_part``.

    Args:
        rows_a: ``[K, P]``, a pytree with leaves ``[K, ...]``, or an iterator over blocks, as for ``gram_matrix``.
        rows_b: the same structure and shapes, from other data.

    Returns:
        ``[K, K]``, float64.

    Raises:
        ValueError: the two do not match, or a leaf is not floating point.

    Example:
        >>> cross_gram(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 1.0], [0.0, 1.0]]))
        tensor([[2., 0.],
                [1., 1.]], dtype=torch.float64)

    Reference: this project, docs/theory.md, section 12.
    """
    require_stacked("rows_a", rows_a, streams=True)
    require_stacked("rows_b", rows_b, streams=True)
    total: Tensor | None = None
    for a, b in _leaf_pairs(("rows_a", rows_a), ("rows_b", rows_b)):
        require_block("rows_a", a, None if total is None else total.shape[0])
        require_float("rows_b", b, "[K, ...]", range(1, 65))
        require_same_shape("rows_b", b, "rows_a", a)
        total = _add_product(total, a, b, None)
    if total is None:
        raise ValueError("rows_a: expected at least one leaf [K, ...], got none.")
    return total


def _leaf_pairs(named_rows: tuple[str, Any], named_other: tuple[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Matching leaves of two pytrees, or of two iterators over pytrees, each with its name; the other may be None."""
    (name, rows), (other_name, other) = named_rows, named_other
    if isinstance(rows, Iterator):
        streams = other is None or isinstance(other, Iterator | list | tuple)
        require(streams, other_name, f"an iterator, as {name}", describe(other))
        missing = object()
        others = iter(other) if other is not None else None
        for block in rows:
            block_other = None if others is None else next(others, missing)
            require(block_other is not missing, other_name, f"as many blocks as {name}", "fewer")
            yield from _leaf_pairs((name, block), (other_name, block_other))
        ended = others is None or next(others, missing) is missing
        require(ended, other_name, f"as many blocks as {name}", "more")
        return
    leaves, spec = pytree.tree_flatten(rows)
    if other is None:
        yield from ((leaf, None) for leaf in leaves)
        return
    other_leaves, other_spec = pytree.tree_flatten(other)
    require(spec == other_spec, other_name, f"the structure of {name}, {spec}", other_spec)
    yield from zip(leaves, other_leaves, strict=True)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, inv: Tensor | None) -> Tensor:
    """``total + a diag(inv) b^T`` over flattened trailing dimensions, in float64 chunks."""
    K = a.shape[0]
    a, b = a.detach().reshape(K, -1), b.detach().reshape(K, -1)
    root = None if inv is None else inv.detach().reshape(-1)
    width = max(CHUNK // K, 1)
    result = total if total is not None else torch.zeros(K, K, dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[1], width):
        x = a[:, start : start + width].double()
        y = x if a is b else b[:, start : start + width].double()
        if root is not None:  # the root on both sides keeps the product PSD
            x = y = x * root[start : start + width].double().sqrt()
        result = result + x @ y.mT
    return result


def normalize_gram(G: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrix of the unit gradients ``g_k / |g_k|``, and the norms.

    A gradient without length (``G_kk <= 0``) has norm 0 and a zero row and column, never NaN; the diagonal of the
    others is exactly 1. Scales from 1e-150 to 1e150 are safe in float64.

    Args:
        G: ``[..., K, K]``, symmetric PSD.

    Returns:
        ``(G_hat [..., K, K], norms [..., K])`` in the dtype of ``G``.

    Raises:
        ValueError: ``G`` is not a square floating-point matrix.

    Example:
        >>> normalize_gram(torch.tensor([[4.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 0.0]]))
        (tensor([[1.0000, 0.5000, 0.0000],
                [0.5000, 1.0000, 0.0000],
                [0.0000, 0.0000, 0.0000]]), tensor([2., 2., 0.]))

    Reference: MARBLE (Zhao et al., arXiv 2605.06507), eq. 5.
    """
    require_gram("G", G)
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    short = diagonal <= 0
    norms = torch.where(short, 0.0, diagonal).sqrt()
    s = torch.where(short, torch.inf, norms)
    G_hat = torch.where(short.unsqueeze(-1) | short.unsqueeze(-2), 0.0, G / s.unsqueeze(-1) / s.unsqueeze(-2))
    eye = torch.eye(G.shape[-1], dtype=torch.bool, device=G.device)
    return torch.where(eye & (diagonal > 0).unsqueeze(-1), 1.0, G_hat).to(G.dtype), norms.to(G.dtype)


def psd_part(gram: Tensor) -> Tensor:
    """The PSD matrix nearest to ``gram`` in Frobenius norm: symmetrized, negative eigenvalues set to 0.

    Makes a ``cross_gram`` (or an average of them) fit for a solver. The projection is biased where noise dominates:
    eigenvalues that should be 0 scatter on both sides, and only the positive half survives, so average first.
    NaN makes its own item NaN.

    Args:
        gram: ``[..., K, K]``.

    Returns:
        ``[..., K, K]`` in the dtype of ``gram``, symmetric (computed in float64).

    Raises:
        ValueError: ``gram`` is not a square floating-point matrix.

    Example:
        >>> psd_part(torch.tensor([[1.0, 0.0], [0.0, -2.0]]))
        tensor([[1., 0.],
                [0., 0.]])

    Reference: Higham (1988), Computing a nearest symmetric positive semidefinite matrix; docs/theory.md, section 12.
    """
    require_gram("gram", gram)
    G = gram.double()
    bad = ~G.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    G = torch.where(bad, 0.0, (G + G.mT) / 2)
    eigenvalues, Q = torch.linalg.eigh(G)
    G = (Q * eigenvalues.clamp(min=0).unsqueeze(-2)) @ Q.mT
    return torch.where(bad, torch.nan, (G + G.mT) / 2).to(gram.dtype)
