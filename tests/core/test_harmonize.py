"""Harmonization: hand values, silent and broken rewards, other solvers, transforms."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from marble_core import gram_matrix, harmonize, min_norm_weights, rescale
from marble_core._check import has_readable_values

H = math.sqrt(3) / 2


def test_hand_values() -> None:
    # |g_1| = 1, |g_2| = 2 at 120 degrees: d* is half of the bisector
    h = harmonize(gram_matrix(torch.tensor([[1.0, 0.0], [-1.0, 2 * H]], dtype=torch.float64)))
    torch.testing.assert_close(h.weights, torch.tensor([0.5, 0.5]).double())
    torch.testing.assert_close(h.norms, torch.tensor([1.0, 2.0]).double())
    torch.testing.assert_close(h.coefficients, torch.tensor([0.75, 0.375]).double())  # n_bar = 1.5
    torch.testing.assert_close(h.direction_norm, torch.tensor(0.5).double())
    torch.testing.assert_close(h.cosines, torch.tensor([0.5, 0.5]).double())
    assert abs(h.gap) < 1e-15
    assert h.active.tolist() == [True, True]
    assert not h.stationary


def test_k_1_is_plain_training() -> None:
    h = harmonize(torch.tensor([[9.0]]))
    assert h.weights.tolist() == h.coefficients.tolist() == h.cosines.tolist() == [1.0]
    assert h.norms.tolist() == [3.0]


@pytest.mark.parametrize("rows", [[[1.0, 0.0], [-5.0, 0.0]], [[1.0, 0.0], [-0.5, H], [-0.5, -H]]])
def test_stationary_gradients(rows: list[list[float]]) -> None:
    h = harmonize(gram_matrix(torch.tensor(rows)))
    assert h.stationary
    assert h.direction_norm < 1e-6
    assert not h.cosines.any()
    torch.testing.assert_close(h.weights, torch.full_like(h.weights, 1 / len(rows)), rtol=0, atol=1e-6)


def test_silent_rewards_take_no_part() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0], [math.nan, 1.0], [math.inf, 0.0]], dtype=torch.float64)
    h = harmonize(gram_matrix(rows))
    assert h.active.tolist() == [True, False, True, False, False]
    assert h.weights.tolist() == pytest.approx([0.5, 0, 0.5, 0, 0])
    assert (h.weights[[1, 3, 4]] == 0).all()
    assert h.coefficients.tolist() == pytest.approx([0.75, 0, 0.375, 0, 0])  # n_bar over the active: 1.5
    assert h.cosines.tolist() == pytest.approx([math.sqrt(0.5), 0, math.sqrt(0.5), 0, 0])
    assert h.norms[:3].tolist() == [1, 0, 2]
    assert h.norms[3].isnan()
    nothing = harmonize(torch.zeros(3, 3))
    assert nothing.stationary
    assert not nothing.active.any()
    assert not nothing.coefficients.any()
    assert float(nothing.gap) == 0.0


def test_signal_tol_is_relative_to_the_longest() -> None:
    G = torch.diag(torch.tensor([4.0, 1e-14, 1.0], dtype=torch.float64))
    assert harmonize(G).active.all()
    assert harmonize(G, signal_tol=1e-6).active.tolist() == [True, False, True]
    assert harmonize(1e12 * G, signal_tol=1e-6).active.tolist() == [True, False, True]
    assert harmonize(G, signal_tol=0.5).active.tolist() == [True, False, False]


def test_floor_counts_the_active_rewards_alone() -> None:
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.1, 0.0], [-1.0, 0.3, 0.2]])
    G = gram_matrix(rows)
    free, floored = harmonize(G), harmonize(G, floor=0.2)
    assert free.weights[2] < 0.2
    assert floored.weights[1] == 0
    assert (floored.weights[[0, 2, 3]] >= 0.2 - 1e-12).all()
    assert abs(float(floored.weights.sum()) - 1) < 1e-12
    assert floored.gap > 0  # the price: no longer optimal


def pcgrad(G: Tensor) -> Tensor:
    """Projects each gradient off those it conflicts with, in order, and averages: on Gram matrices alone."""
    K = len(G)
    W = torch.eye(K, dtype=G.dtype)
    for i in range(K):
        for j in range(K):
            inner = W[i] @ G[:, j]
            if j != i and inner < 0:
                W[i, j] = W[i, j] - inner / G[j, j]
    return W.mean(0)


def uniform(G: Tensor) -> Tensor:
    return torch.full((len(G),), 1 / len(G), dtype=G.dtype)


@pytest.mark.parametrize("solver", [uniform, pcgrad])
def test_other_solvers_see_the_active_unit_gradients(solver: Callable[[Tensor], Tensor]) -> None:
    rows = torch.tensor([[10.0, 0.0], [0.0, 0.0], [-0.6, 0.8]], dtype=torch.float64)
    unit = torch.tensor([[1.0, 0.0], [-0.6, 0.8]], dtype=torch.float64)
    h = harmonize(gram_matrix(rows), solver=solver)
    expected = solver(unit @ unit.T)
    torch.testing.assert_close(h.weights[[0, 2]], expected)
    assert h.weights[1] == 0
    d = expected @ unit
    torch.testing.assert_close(h.direction_norm, d.norm())
    torch.testing.assert_close(h.cosines[[0, 2]], unit @ d / d.norm())
    torch.testing.assert_close(h.gap, d @ d - (unit @ d).min())
    torch.testing.assert_close(h.coefficients @ rows, 5.5 * d)  # n_bar = (10 + 1) / 2


def test_weightings_of_torchjd() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    rows = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for weighting in (aggregation.MGDAWeighting(), aggregation.IMTLGWeighting(), aggregation.MeanWeighting()):
        h = harmonize(gram_matrix(rows), solver=weighting)
        assert h.weights.isfinite().all()
        assert h.gap >= harmonize(gram_matrix(rows)).gap - 1e-12


def test_batches_vmap_and_compile() -> None:
    rows = torch.randn(5, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[1, 2] = 0
    rows[3] = 0
    G = rows @ rows.mT
    loop = [harmonize(item) for item in G]
    for result in (harmonize(G), torch.func.vmap(harmonize)(G)):
        for name in loop[0]._fields:
            expected = torch.stack([getattr(item, name) for item in loop])
            torch.testing.assert_close(getattr(result, name), expected, rtol=0, atol=1e-9)
    compiled = torch.compile(harmonize, backend="aot_eager", fullgraph=True)(G)
    torch.testing.assert_close(compiled.coefficients, harmonize(G).coefficients, rtol=0, atol=1e-9)
    assert harmonize(torch.zeros(0, 3, 3)).weights.shape == (0, 3)


class Sub(Tensor):
    """A subclass that holds its values itself."""


def test_values_of_a_plain_subclass_are_read() -> None:
    """So that neither K nor the solver is limited, as they are inside of a transform."""
    G = gram_matrix(torch.randn(12, 40, generator=torch.Generator().manual_seed(0)))
    for solver in (min_norm_weights, uniform):
        found = harmonize(G.as_subclass(Sub), solver=solver)
        assert torch.equal(found.coefficients.as_subclass(Tensor), harmonize(G, solver=solver).coefficients)
    with FakeTensorMode():
        assert not has_readable_values(torch.ones(2))
    assert not has_readable_values(torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match=r"solver: expected min_norm_weights .*torch\.func"):
        torch.func.grad(lambda G: harmonize(G, solver=uniform).coefficients.sum())(G)


def test_narrow_dtypes() -> None:
    G = torch.tensor([[1.0, -1.0], [-1.0, 4.0]], dtype=torch.bfloat16)
    h = harmonize(G)
    assert {x.dtype for x in h} == {torch.bfloat16, torch.bool}
    assert h.coefficients.tolist() == [0.75, 0.375]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: harmonize(torch.ones(2, 3)), "gram: expected a floating-point Gram matrix"),
        (lambda: harmonize(torch.eye(2), signal_tol=2.0), r"signal_tol: expected a number in \[0, 1\]"),
        (lambda: harmonize(torch.eye(2), floor=0.6), "floor: expected a number"),
        (lambda: harmonize(torch.eye(2), floor=0.1, solver=uniform), "floor: expected 0 with a solver of your own"),
        (
            lambda: harmonize(torch.eye(2), solver=lambda G: G),
            r"solver: expected a callable .* \[2\], got float64\[2, 2\]",
        ),
        (
            lambda: torch.func.vmap(lambda G: harmonize(G, solver=uniform))(torch.eye(2)[None]),
            "solver: expected min_norm",
        ),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_default_solver_is_the_public_one() -> None:
    G = gram_matrix(torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    spied = harmonize(G, solver=lambda item: min_norm_weights(item))
    torch.testing.assert_close(spied.weights, harmonize(G).weights, rtol=0, atol=0)


def test_rescaled_weights_reproduce_the_direction_and_an_unknown_length_is_the_mean() -> None:
    gram = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 4.0, 0.0], [0.0, 0.0, 9.0]], dtype=torch.float64)
    h = harmonize(gram)
    torch.testing.assert_close(rescale(h.weights, h.norms, h.active), h.coefficients)
    w, norms = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([1.0, 3.0, torch.nan])
    found = rescale(w, norms, torch.tensor([True, True, False]))
    torch.testing.assert_close(found, torch.tensor([0.4, 0.2, 0.5]))  # the mean of 1 and 3 is 2
    none = rescale(w, torch.zeros(3), torch.zeros(3, dtype=torch.bool))
    assert none.tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"active: expected a bool tensor of shape \[..., K\] = \[3\], got"):
        rescale(w, norms, torch.ones(3))
