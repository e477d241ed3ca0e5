"""K gradients, one per reward: the general torch.func route, and the pytrees of rows that every route returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from marble_core._check import CHUNK, common_K, describe, require, require_float, require_vector

_NOT_VECTORIZED = ("vmap", "atching rule", "expected scalar type")  # what torch's own errors of that kind contain


def gradient_rows(losses_fn: Callable[..., Tensor], params: Any, *args: Any, chunk_size: int | None = None) -> Any:
    """Gradients of K losses with respect to a pytree of parameters, by one forward and K vectorized backwards.

    ``rows_k = d losses_fn(params, *args)_k / d params``, as ``torch.func.vjp`` with ``vmap`` over the K unit
    cotangents. Works for any function that torch.func can differentiate and composes with its transforms; for a
    model with many rewards ``shared_cotangent_rows`` costs far less. Rows of parameters that require gradients carry
    a graph of their own, as with any torch.func transform: pass detached ones unless you differentiate again.

    Args:
        losses_fn: ``losses_fn(params, *args) -> losses [K]``, pure.
        params: pytree of floating-point tensors.
        *args: passed on, not differentiated.
        chunk_size: cotangents taken at a time; less memory, more passes. None takes all K; 1 takes ordinary backward
            passes, one after another, for functions that torch cannot vectorize.

    Returns:
        A pytree like ``params`` whose leaves are ``[K, *leaf.shape]``, in the dtype of the leaf. The rows of several
        micro-batches add up leaf by leaf.

    Raises:
        ValueError: a leaf of ``params`` is not a floating-point tensor, ``losses_fn`` does not return a floating-point
            vector of at least one loss, ``chunk_size`` is not positive, or torch says that it cannot vectorize the
            backward pass (a LayerNorm under bfloat16 autocast, a backward that reads a value).

    Example:
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> gradient_rows(lambda p: torch.stack([p["w"].sum(), p["w"].prod()]), params)
        {'w': tensor([[1., 1.],
                [2., 1.]])}

    Reference: MARBLE (Zhao et al., arXiv 2605.06507), eq. 4.
    """
    ok = chunk_size is None or (isinstance(chunk_size, int) and chunk_size >= 1)
    require(ok, "chunk_size", "None or an integer >= 1", describe(chunk_size))
    for leaf in pytree.tree_leaves(params):
        require_float("params", leaf, "[...]", range(65))

    def checked(params: Any) -> Tensor:
        losses = losses_fn(params, *args)
        require_float("losses_fn(params, *args)", losses, "[K]", (1,))
        require(len(losses) >= 1, "losses_fn(params, *args)", "at least one loss, K >= 1", describe(losses))
        return losses

    losses, pullback, *_ = torch.func.vjp(checked, params)
    eye = torch.eye(losses.shape[0], dtype=losses.dtype, device=losses.device)
    if chunk_size == 1:
        one_by_one = [pullback(cotangent)[0] for cotangent in eye]
        return pytree.tree_map(lambda *leaves: torch.stack(leaves), *one_by_one)
    try:
        (rows,) = torch.func.vmap(pullback, chunk_size=chunk_size)(eye)
    except RuntimeError as error:
        if not any(words in str(error) for words in _NOT_VECTORIZED):  # the caller's own
            raise
        expected, fix = "a backward pass that torch can vectorize", "Pass chunk_size=1, or use shared_cotangent_rows."
        raise ValueError(f"losses_fn: expected {expected}, got the error: {error}. {fix}") from error
    return rows


def combine_rows(rows: Any, weights: Tensor) -> Any:
    """Weighted sum of K gradients, ``sum_k weights_k rows_k``, leaf by leaf.

    With ``Harmonization.coefficients`` this is the balanced direction: a *gradient*, which the optimizer subtracts.
    Any sign and any sum of the weights will do. Products and sums are in float64, a few MiB at a time, and rounded once
    to the dtype of the rows: large weights that cancel, and those of very short rows (1e8 for a norm of 1e-8), lose
    nothing. A NaN row makes the sum NaN even with weight 0: nothing is silently dropped. Differentiable in both
    arguments.

    Args:
        rows: pytree with leaves ``[K, ...]``, or ``[K, P]``.
        weights: ``[K]``.

    Returns:
        A pytree with leaves ``[...]``, in the dtype of the rows.

    Raises:
        ValueError: a leaf does not start with K, or ``weights`` is not a floating-point ``[K]``.

    Example:
        >>> combine_rows({"w": torch.tensor([[1.0, 0.0], [0.0, 2.0]])}, torch.tensor([0.5, 0.25]))
        {'w': tensor([0.5000, 0.5000])}

    Reference: MARBLE (Zhao et al., arXiv 2605.06507), eqs. 7-8.
    """
    K = common_K(rows)
    require_vector("weights", weights, K, "K")

    def combine(x: Tensor) -> Tensor:
        w = weights.to(device=x.device, dtype=torch.float64)
        columns = torch.split(x.reshape(K, -1), max(CHUNK // K, 1), dim=1)
        return torch.cat([(w @ part.double()).to(x.dtype) for part in columns]).reshape(x.shape[1:])

    return pytree.tree_map(combine, rows)


def flatten_rows(rows: Any) -> Tensor:
    """The K gradients as a matrix, leaves side by side in the order of the pytree.

    Copies all K x P numbers; ``gram_matrix`` and ``combine_rows`` take the pytree itself.

    Args:
        rows: pytree with leaves ``[K, ...]``.

    Returns:
        ``[K, P]`` in the common (promoted) dtype.

    Raises:
        ValueError: no leaf, or leaves without a common K.

    Example:
        >>> flatten_rows({"a": torch.ones(2, 1, 2), "b": torch.zeros(2, 1)})
        tensor([[1., 1., 0.],
                [1., 1., 0.]])

    Reference: docs/theory.md, section 1.
    """
    K = common_K(rows)
    return torch.cat([x.reshape(K, -1) for x in pytree.tree_leaves(rows)], dim=1)


def unflatten_like(flat: Tensor, like: Any) -> Any:
    """The inverse of ``flatten_rows``: cut a vector, or K of them, into the leaves of ``like``.

    Args:
        flat: ``[..., P]``: ``[P]`` for a direction, ``[K, P]`` for rows.
        like: pytree of the parameters, P entries in all.

    Returns:
        A pytree like ``like`` with leaves ``[..., *leaf.shape]`` in the dtype of ``flat``; they share its memory.

    Raises:
        ValueError: ``flat`` does not have P entries in its last dimension.

    Example:
        >>> unflatten_like(torch.arange(3.0), {"a": torch.zeros(1, 2), "b": torch.zeros(1)})
        {'a': tensor([[0., 1.]]), 'b': tensor([2.])}

    Reference: docs/theory.md, section 1.
    """
    require_float("flat", flat, "[..., P]", range(1, 65))
    leaves, spec = pytree.tree_flatten(like)
    for leaf in leaves:
        require(isinstance(leaf, Tensor), "like", "tensors as leaves", describe(leaf))
    sizes = [leaf.numel() for leaf in leaves]
    require(flat.shape[-1] == sum(sizes), "flat", f"P = {sum(sizes)} entries in the last dimension", describe(flat))
    parts = torch.split(flat, sizes, dim=-1)
    cut = [x.reshape((*flat.shape[:-1], *leaf.shape)) for x, leaf in zip(parts, leaves, strict=True)]
    return pytree.tree_unflatten(cut, spec)
