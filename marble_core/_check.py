"""Guards for static facts: rank, shape, dtype and Python scalars. They never look at tensor values."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

LOWERED = -1e-6  # cosines between this and 0 may be rounding
CHUNK = 2**22  # entries of a leaf turned into float64 at a time: 32 MiB
UNREADABLE = "where values cannot be read (inside torch.func or torch.compile, or of some tensor subclasses)"


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


def require_range(
    name: str, x: float, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> None:
    """``x`` is a Python number from ``low`` to ``high``, without an end that is open; it is always finite."""
    number = isinstance(x, (int, float)) and not isinstance(x, bool)
    above = number and (low < x if open_low else low <= x)
    if not (above and (x < high if open_high else x <= high) and x <= sys.float_info.max):
        ends = "(" if open_low else "[", ")" if open_high else "]"
        require(False, name, f"a number in {ends[0]}{low:g}, {high:g}{ends[1]}", describe(x))


def require_bool(name: str, x: Tensor, shape: Sequence[int], letters: str) -> None:
    """``x`` is a bool tensor of ``shape``, written ``letters``."""
    ok = isinstance(x, Tensor) and x.dtype == torch.bool and x.shape == torch.Size(shape)
    require(ok, name, f"a bool tensor of shape {letters} = {list(shape)}", describe(x))


def require_labels(groups: Tensor, rewards: Tensor, applicable: Tensor | None) -> Tensor:
    """``rewards [N, K]`` with a label ``[N]`` for each row; ``applicable``, all true where none is given."""
    require_float("rewards", rewards, "[N, K]", (2,))
    whole = isinstance(groups, Tensor) and not (groups.is_floating_point() or groups.is_complex())
    ok = whole and groups.dtype != torch.bool and groups.shape == rewards.shape[:1]
    require(ok, "groups", f"an integer tensor of shape [N] = {list(rewards.shape[:1])}", describe(groups))
    if applicable is None:
        return torch.ones_like(rewards, dtype=torch.bool)
    require_bool("applicable", applicable, rewards.shape, "[N, K]")
    return applicable


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
        for tree, leaf in ((name, a), (other, b)):
            require(isinstance(leaf, Tensor), tree, "tensors as leaves", describe(leaf))
        require(a.shape == b.shape, name, f"a leaf of shape {list(b.shape)} as in {other}", describe(a))


def require_stacked(name: str, rows: Any, *, streams: bool = False) -> None:
    """``rows`` is no list of vectors, which could be meant as K gradients and would be read as blocks of entries.

    With ``streams`` the function also takes an iterator over blocks, which is then the way to say so.
    """
    vectors = isinstance(rows, list | tuple) and len(rows) > 0
    if vectors and all(isinstance(x, Tensor) and x.ndim == 1 for x in rows):
        expected = "[K, P], a pytree with leaves [K, ...]" + (" or an iterator over blocks" if streams else "")
        got = f"a {type(rows).__name__} of {len(rows)} vectors, the first {describe(rows[0])}"
        blocks = f"iter({name}) or a dict" if streams else f"dict(enumerate({name}))"
        fix = f"For K gradients use torch.stack({name}); for blocks [K] of scalar parameters, {blocks}."
        require(False, name, expected, got, fix)


def common_K(rows: Any) -> int:
    """The leading K that all leaves of ``rows``, a pytree, have."""
    require_stacked("rows", rows)
    K: int | None = None
    for leaf in pytree.tree_leaves(rows):
        require_block("rows", leaf, K)
        K = int(leaf.shape[0])
    if K is None:
        raise ValueError("rows: expected at least one leaf [K, ...], got none.")
    return K


def require_block(name: str, x: Tensor, K: int | None) -> None:
    """``x`` is a floating-point ``[K, ...]``; where K is not known yet, it is at least 1."""
    require_float(name, x, "[K, ...]", range(1, 65))
    require(x.shape[0] >= 1, name, "at least one gradient, K >= 1", describe(x))
    require(K is None or x.shape[0] == K, name, f"the same leading K in every leaf, {K} in the first", describe(x))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of ``dtype`` are added up: float32 at least."""
    return dtype if dtype in (torch.float64, torch.complex64, torch.complex128) else torch.float32


def has_readable_values(x: Tensor) -> bool:
    """Whether the values of ``x`` can be read: not traced, not inside ``torch.func``, neither fake nor meta."""
    if torch.compiler.is_compiling():
        return False
    if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # a subclass that may hold its values elsewhere
        return False
    return not (torch._C._functorch.is_functorch_wrapped_tensor(x) or x.is_meta)


def require_prior(prior: Tensor, K: int) -> None:
    """Raise unless ``prior`` has K non-negative entries."""
    require_float("prior", prior, "[..., K]", range(1, 65))
    require(K >= 1, "prior", "at least one reward, K >= 1", describe(prior))
    require(prior.shape[-1] == K, "prior", f"K = {K} entries, one a reward", describe(prior))
    if has_readable_values(prior):
        ok = bool(((prior >= 0) & prior.isfinite()).all())
        require(ok, "prior", "finite entries of at least 0", prior.tolist(), "0 is a reward without a say.")
