"""Damaged arguments of every public function: a value or a ``ValueError``, never another exception.

``FUZZ=10000 pytest tests/faults/test_fuzz.py`` takes more cases of each; ``make faults`` does.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.core.test_contracts import CASES, Case

N = int(os.environ.get("FUZZ", "60"))
# They run the caller's own function on what they are given: its exceptions are the caller's.
OWN = ("gradient_rows", "shared_cotangent_rows")
VALUES = (float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 1e-42, 0.0)


def damaged(x: Tensor, rng: random.Random) -> Tensor:
    """A tensor of another dtype, shape or value, or the same."""
    kind = rng.randrange(9)
    if kind == 0:
        narrow = (torch.bfloat16, torch.float16, torch.float32)
        return x.to(rng.choice(narrow) if x.is_floating_point() else torch.int32)
    if kind == 1:
        return x.to(rng.choice((torch.complex64, torch.int64, torch.bool, torch.int8)))
    if kind == 2:
        return x[..., : max(0, x.shape[-1] - 1)] if x.ndim else x
    if kind == 3:
        return x.unsqueeze(rng.randrange(x.ndim + 1))
    if kind == 4:
        return x.new_zeros([0 if rng.random() < 0.5 else size for size in x.shape])
    if kind == 5:
        return x.any() if x.dtype == torch.bool else x.sum()
    if kind == 6:
        return x.mT if x.ndim > 1 else x
    if not x.is_floating_point() or not x.numel():
        return x
    value = torch.tensor(rng.choice(VALUES)).to(x)
    if rng.random() < 0.5:
        return value.expand(x.shape).clone()
    flat = x.flatten().clone()
    flat[rng.randrange(x.numel())] = value
    return flat.reshape(x.shape)


class Sub(Tensor):
    """A subclass, as quantized, masked and distributed tensors are."""


def plain(case: Case, args: Any) -> None:
    case.call(*args)


def without_gradients(case: Case, args: Any) -> None:
    with torch.inference_mode():
        case.call(*args)


def of_a_subclass(case: Case, args: Any) -> None:
    case.call(*pytree.tree_map_only(Tensor, lambda x: x.as_subclass(Sub), args))


def with_gradients(case: Case, args: Any) -> None:
    def tracked(x: Tensor) -> Tensor:
        return x.clone().requires_grad_() if x.is_floating_point() else x

    case.call(*pytree.tree_map_only(Tensor, tracked, args))


def strided(case: Case, args: Any) -> None:
    """Every tensor is a part of a larger one, with other steps in memory."""

    def part(x: Tensor) -> Tensor:
        larger = x.new_zeros([2 * size for size in x.shape])
        places = tuple(slice(None, None, 2) for _ in x.shape)
        larger[places] = x
        return larger[places]

    case.call(*pytree.tree_map_only(Tensor, part, args))


def batched(case: Case, args: Any) -> None:
    if case.batched:
        leaves, spec = pytree.tree_flatten(args)
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]

        def run(*tensors: Tensor) -> Any:
            for i, x in zip(places, tensors, strict=True):
                leaves[i] = x
            return case.call(*pytree.tree_unflatten(leaves, spec))

        torch.func.vmap(run)(*(torch.stack([leaves[i]] * 2) for i in places))


def on_meta(case: Case, args: Any) -> None:
    if case.blind:
        case.call(*pytree.tree_map_only(Tensor, lambda x: x.to("meta"), args))


MODES = (plain, plain, without_gradients, of_a_subclass, with_gradients, strided, batched, on_meta)


def cases(name: str) -> Iterator[tuple[Case, Any, random.Random]]:
    """A public function, damaged arguments, and a source of further choices."""
    rng, case = random.Random(name), CASES[name]
    while True:
        leaves, spec = pytree.tree_flatten(case.args(torch.float64, rng.randrange(5)))
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        if not places:
            return
        for i in rng.choices(places, k=rng.choice((1, 1, 2))):
            leaves[i] = damaged(leaves[i], rng)
        yield case, pytree.tree_unflatten(leaves, spec), rng


@pytest.mark.filterwarnings("ignore")  # of torch about what it is given
@pytest.mark.parametrize("name", sorted(set(CASES) - set(OWN)))
def test_a_value_or_a_value_error(name: str) -> None:
    for case, args, rng in itertools.islice(cases(name), N):
        mode = rng.choice(MODES)
        try:
            mode(case, args)
        except ValueError:
            continue
        except Exception as error:
            raise AssertionError(f"{mode.__name__}: {type(error).__name__}: {error}") from error


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(set(CASES) - set(OWN)))
def test_compiled_it_gives_the_same_values_and_errors(name: str) -> None:
    """Compiled without kernels: the same values, and the same errors about damaged shapes and dtypes. What is wrong
    with values alone cannot be seen there, as the docstrings say: a value comes out."""
    torch._dynamo.reset()
    case = CASES[name]
    compiled = torch.compile(case.call, backend="eager")
    args = case.args(torch.float64, 0)
    for a, b in zip(pytree.tree_leaves(case.call(*args)), pytree.tree_leaves(compiled(*args)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    for _, damaged_ones, _ in itertools.islice(cases(name), 2 if N < 1000 else 20):
        torch._dynamo.reset()
        plainly, here = outcome(case.call, damaged_ones), outcome(compiled, damaged_ones)
        assert not isinstance(here, Exception) or type(here) is type(plainly), (plainly, here)
        about_values = isinstance(plainly, ValueError) and " finite " in str(plainly)
        assert isinstance(plainly, Exception) == isinstance(here, Exception) or about_values, (plainly, here)


def outcome(call: Any, args: Any) -> Any:
    """What a call returns, or its exception."""
    try:
        return call(*args)
    except Exception as error:
        return error
