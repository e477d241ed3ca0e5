"""Damaged arguments of every public function: a value or a ``ValueError``, never another exception.

``FUZZ=10000 pytest tests/faults/test_fuzz.py`` takes more cases of each; ``make faults`` does.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.core.test_contracts import CASES

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


@pytest.mark.filterwarnings("ignore")  # of torch about what it is given
@pytest.mark.parametrize("name", sorted(set(CASES) - set(OWN)))
def test_a_value_or_a_value_error(name: str) -> None:
    rng, case = random.Random(name), CASES[name]
    for _ in range(N):
        leaves, spec = pytree.tree_flatten(case.args(torch.float64, rng.randrange(5)))
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        if not places:
            return
        for i in rng.choices(places, k=rng.choice((1, 1, 2))):
            leaves[i] = damaged(leaves[i], rng)
        args: Any = pytree.tree_unflatten(leaves, spec)
        try:
            case.call(*args)
        except ValueError:
            continue
