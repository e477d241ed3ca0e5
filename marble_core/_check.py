"""Guards for static facts: rank, shape, dtype and Python scalars. They never look at tensor values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    ok = isinstance(x, Tensor) and x.is_floating_point() and x.ndim in ranks
    require(ok, name, f"a floating-point tensor of shape {shape}", describe(x))


def require_gram(name: str, gram: Tensor) -> None:
    """``gram`` is a floating-point tensor of square matrices, ``[..., K, K]`` with K at least 1."""
    ok = isinstance(gram, Tensor) and gram.is_floating_point() and gram.ndim >= 2
    ok = ok and gram.shape[-1] == gram.shape[-2] >= 1
    require(ok, name, "a floating-point Gram matrix of shape [..., K, K]", describe(gram))


def require_range(name: str, x: float, low: float, high: float, *, open_low: bool = False) -> None:
    """``x`` is a Python number in ``[low, high]`` (``(low, high]`` with ``open_low``)."""
    number = isinstance(x, int | float) and not isinstance(x, bool)
    ok = number and (low < x if open_low else low <= x) and x <= high
    require(ok, name, f"a number in {'(' if open_low else '['}{low:g}, {high:g}]", describe(x))


def require_same_shape(name: str, x: Tensor, other: str, y: Tensor) -> None:
    """``x`` and ``y`` have the same shape."""
    require(x.shape == y.shape, name, f"the shape of {other}, {list(y.shape)}", describe(x))


def require_vector(name: str, x: Tensor, length: int, letter: str) -> None:
    """``x`` is a floating-point vector with ``length`` entries, written ``[letter]``."""
    ok = isinstance(x, Tensor) and x.is_floating_point() and x.shape == torch.Size([length])
    require(ok, name, f"a floating-point tensor of shape [{letter}] = [{length}]", describe(x))
