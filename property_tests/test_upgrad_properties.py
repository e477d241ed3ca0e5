"""UPGrad: what a sum of projections onto the cone promises, against an independent solver, and under symmetries."""

from __future__ import annotations

from functools import partial

import numpy as np
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from marble_core import cone_weights, upgrad_weights
from property_tests.strategies import CLASSES, REGULAR
from property_tests.test_cone_properties import EPS, draw, problems, reach

exact = partial(upgrad_weights, precision=2.0**-53)  # for float64 rows
exact_cone = partial(cone_weights, precision=2.0**-53)


def test_most_classes_have_conflicts_that_the_cone_solves_otherwise() -> None:
    """Else the properties below would be those of the identity, or of ``cone_weights``."""
    for kind in set(CLASSES) - {"all zero"}:
        drawn = [draw(kind, K, 50 * K, "flipped") for K in range(4, 9)]
        changed = [not torch.equal(exact(g @ g.T, prior), prior) for g, prior in drawn]
        assert sum(changed) >= 3, kind
    g, prior = draw("random", 6, 300, "flipped")
    assert not torch.allclose(exact(g @ g.T, prior), cone_weights(g @ g.T, prior))


@given(problems(max_K=8))
def test_no_reward_falls(problem: tuple[Tensor, Tensor]) -> None:
    g, prior = problem
    c = exact(g @ g.T, prior)
    bound = 64 * EPS * reach(g, c) * g.norm(dim=1)
    assert (c >= prior).all()
    assert (g @ g.T @ c >= -bound).all()
    assert float((c @ g).norm()) <= (1 + 1e-9) * reach(g, prior) + 64 * EPS * reach(g, c)


@given(problems(max_K=8))
def test_every_reward_rises_by_what_is_left_of_its_own_gradient(problem: tuple[Tensor, Tensor]) -> None:
    g, prior = problem
    G = g @ g.T
    c, own = exact(G, prior), exact_cone(G.expand(len(g), -1, -1), torch.eye(len(g), dtype=torch.float64))
    left = ((own @ g).square()).sum(1)
    bound = 64 * EPS * (reach(g, c) * g.norm(dim=1) + prior * (own @ g.norm(dim=1)) * g.norm(dim=1))
    assert (G @ c >= prior * left - bound).all()


@given(problems(kinds=REGULAR, max_K=6))
def test_it_is_the_sum_of_projections(problem: tuple[Tensor, Tensor]) -> None:
    """Each by non-negative least squares on the vectors themselves."""
    g, prior = problem
    A = g.numpy().T
    expected = sum(float(p) * (x + A @ scipy.optimize.nnls(A, -x)[0]) for p, x in zip(prior, A.T, strict=True))
    c = exact(g @ g.T, prior)
    found = (c @ g).numpy()
    assert np.linalg.norm(found - expected) <= 1e-7 * reach(g, c) + 1e-300


@given(problems(max_K=8), st.floats(-20, 20))
def test_labels_and_scales(problem: tuple[Tensor, Tensor], log_scale: float) -> None:
    g, prior = problem
    c, scale = exact(g @ g.T, prior), 2.0 ** round(log_scale)
    order = torch.randperm(len(g), generator=torch.Generator().manual_seed(len(g)))
    other = exact(scale * (g[order] @ g[order].T), 3 * prior[order])
    assert float(((other / 3 - c[order]) @ g[order]).norm()) <= 1e-7 * reach(g, c) + 1e-300


@given(problems(max_K=8))
def test_without_reading_a_value_and_in_batches(problem: tuple[Tensor, Tensor]) -> None:
    g, prior = problem
    G = (g @ g.T).expand(2, -1, -1)
    c = exact(g @ g.T, prior)
    assert torch.equal(exact(G, prior)[1], c)
    hidden = torch.func.vmap(exact, in_dims=(0, None))(G, prior)[0]
    assert float(((hidden - c) @ g).norm()) <= 1e-7 * reach(g, c + hidden) + 1e-300
