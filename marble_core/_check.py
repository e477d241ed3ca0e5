"""Guards for static facts: rank, shape, dtype and Python scalars. They never look at tensor values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def require(ok: bool, name: str, expected: str, got: object, fix: str = "") -> None:
    """Raise ``ValueError`` naming the argument, what it must be, what it got and, where known, the fix."""
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got}." + (f" {fix}" if fix else ""))


def describe(x: object) -> str:
    """A tensor as ``float32[3, 4]``, anything else as its type and value."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
    return f"{type(x).__name__} {x!r}"


def require_float(name: str, x: Tensor, shape: str, ranks: Sequence[int]) -> None:
    """``x`` is a real floating-point tensor whose rank is one of ``ranks``; ``shape`` is how the docs write it."""
    if not (isinstance(x, Tensor) and x.is_floating_point() and x.ndim in ranks):
        require(False, name, f"a floating-point tensor of shape {shape}", describe(x))


def require_gram(name: str, gram: Tensor) -> None:
    """``gram`` is a floating-point tensor of square matrices, ``[..., K, K]`` with K at least 1."""
    ok = isinstance(gram, Tensor) and gram.is_floating_point() and gram.ndim >= 2
    if not (ok and gram.shape[-1] == gram.shape[-2] >= 1):
        require(False, name, "a floating-point Gram matrix of shape [..., K, K]", describe(gram))


def require_range(name: str, x: float, low: float, high: float, *, open_low: bool = False) -> None:
    """``x`` is a Python number in ``[low, high]`` (``(low, high]`` with ``open_low``)."""
    number = isinstance(x, (int, float)) and not isinstance(x, bool)
    if not (number and (low < x if open_low else low <= x) and x <= high):
        require(False, name, f"a number in {'(' if open_low else '['}{low:g}, {high:g}]", describe(x))


def require_same_shape(name: str, x: Tensor, other: str, y: Tensor) -> None:
    """``x`` and ``y`` have the same shape."""
    if x.shape != y.shape:
        require(False, name, f"the shape of {other}, {list(y.shape)}", describe(x))


def require_vector(name: str, x: Tensor, length: int, letter: str) -> None:
    """``x`` is a floating-point vector with ``length`` entries, written ``[letter]``."""
    if not (isinstance(x, Tensor) and x.is_floating_point() and x.shape == torch.Size([length])):
        require(False, name, f"a floating-point tensor of shape [{letter}] = [{length}]", describe(x))


def require_same_trees(name: str, x: Any, other: str, y: Any) -> None:
    """Same structure, and the same shape leaf by leaf."""
    (leaves, spec), (other_leaves, other_spec) = pytree.tree_flatten(x), pytree.tree_flatten(y)
    require(spec == other_spec, name, f"the structure of {other}, {other_spec}", spec)
    for a, b in zip(leaves, other_leaves, strict=True):
        require(a.shape == b.shape, name, f"a leaf of shape {list(b.shape)} as in {other}", describe(a))


def require_stacked(name: str, rows: Any) -> None:
    """``rows`` is no list of vectors, which could be meant as K gradients and would be read as blocks of entries."""
    vectors = isinstance(rows, list | tuple) and len(rows) > 0
    if vectors and all(isinstance(x, Tensor) and x.ndim == 1 for x in rows):
        expected = "[K, P], a pytree with leaves [K, ...] or an iterator over blocks"
        got = f"a {type(rows).__name__} of {len(rows)} vectors, the first {describe(rows[0])}"
        fix = f"For K gradients use torch.stack({name}); for blocks [K] of scalar parameters, iter({name}) or a dict."
        require(False, name, expected, got, fix)


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32 for halves, the dtype itself otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def has_readable_values(x: Tensor) -> bool:
    """Whether ``x`` is an ordinary tensor whose values can be read: not traced, vmapped, fake or meta."""
    if type(x) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return False
    return not (torch._C._functorch.is_functorch_wrapped_tensor(x) or x.is_meta)


def require_prior(prior: Tensor, K: int) -> None:
    """Raise unless ``prior`` has K non-negative entries."""
    require_float("prior", prior, "[..., K]", range(1, 65))
    require(prior.shape[-1] == K, "prior", f"K = {K} entries, one a reward", describe(prior))
    if has_readable_values(prior):
        ok = bool(((prior >= 0) & prior.isfinite()).all())
        require(ok, "prior", "finite entries of at least 0", prior.tolist(), "0 is a reward without a say.")
