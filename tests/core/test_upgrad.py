"""UPGrad by hand, beside its published implementation, and where it ends."""

from __future__ import annotations

import pytest
import torch

from marble_core import cone_weights, gram_matrix, upgrad_weights
from marble_core.rules import Evidence, upgrad

HALF = torch.tensor([0.5, 0.5], dtype=torch.float64)


def test_by_hand() -> None:
    """Two gradients (2, 0) and (-1/2, s): the first projects onto the second's normal, the second onto the first's."""
    G = torch.tensor([[4.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    # g_1 + 1 g_2 is orthogonal to g_2; g_2 + g_1 / 4 to g_1
    torch.testing.assert_close(upgrad_weights(G, HALF), torch.tensor([(1 + 1 / 4) / 2, (1 + 1) / 2]).double())
    prior = torch.tensor([2.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(upgrad_weights(G, prior), torch.tensor([2 * 1 + 1 / 4, 2 * 1 + 1]).double())


def test_one_that_the_sum_lowers_gains_where_the_cone_stands_still() -> None:
    """A long gradient (3, 0) and a short one (-3/5, 4/5) against it."""
    G = torch.tensor([[9.0, -1.8], [-1.8, 1.0]], dtype=torch.float64)
    assert float((G @ cone_weights(G, HALF))[1]) == pytest.approx(0.0, abs=1e-15)
    assert float((G @ upgrad_weights(G, HALF))[1]) == pytest.approx(0.32)  # half of (0, 4/5) against (-3/5, 4/5)


def test_without_conflict_it_is_the_prior() -> None:
    G = torch.tensor([[4.0, 1.0, 0.0], [1.0, 1.0, 0.5], [0.0, 0.5, 9.0]], dtype=torch.float64)
    prior = torch.tensor([0.2, 0.7, 3.0], dtype=torch.float64)
    assert torch.equal(upgrad_weights(G, prior), prior)


def test_opposite_gradients_stand_still() -> None:
    rows = torch.tensor([[1.0, 2.0], [-2.0, -4.0]], dtype=torch.float64)
    assert (upgrad_weights(rows @ rows.mT, HALF) @ rows).abs().max() < 1e-14


def test_a_zero_gradient_changes_nothing() -> None:
    G = torch.tensor([[4.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    found = upgrad_weights(G, torch.tensor([0.5, 0.5, 0.7], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([0.625, 1.0, 0.7]).double())


def test_nan_stays_in_its_own_item() -> None:
    G = torch.stack([torch.eye(2), torch.full((2, 2), torch.nan)])
    found = upgrad_weights(G, HALF)
    assert found[0].tolist() == [0.5, 0.5]
    assert bool(found[1].isnan().all())
    assert found.dtype == torch.float32


@pytest.mark.parametrize("seed", range(10))
def test_it_is_torchjd_s(seed: int) -> None:
    aggregation, dual_cone = (pytest.importorskip(f"torchjd.{name}") for name in ("aggregation", "_linalg._dual_cone"))
    pytest.importorskip("qpsolvers")
    rows = torch.randn(5, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows[1] -= 2 * rows[0]
    rows[4] -= rows[2] + rows[3]
    projector = dual_cone.QuadprogProjector(norm_eps=0.0, reg_eps=1e-10)
    expected = aggregation.UPGradWeighting(projector=projector)(rows @ rows.mT)
    found = upgrad_weights(gram_matrix(rows), torch.full((5,), 0.2, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_rule_reads_the_gram_alone_and_goes_on_without() -> None:
    G, cross = torch.tensor([[4.0, -1.0], [-1.0, 1.0]]), -torch.eye(2)
    rule = upgrad(2, prior=torch.tensor([2.0, 1.0]))
    assert rule.update(rule.init(), Evidence())[1].tolist() == [2.0, 1.0]
    state, c = rule.update(rule.init(), Evidence(G, cross))
    assert c.tolist() == pytest.approx([2.25, 3.0])
    assert torch.equal(rule.update(state, Evidence(cross=cross))[1], c)


@pytest.mark.parametrize(
    ("gram", "prior", "message"),
    [
        (torch.ones(2, 3), HALF, "gram: expected"),
        (torch.eye(2), torch.ones(3), "prior: expected"),
        (torch.eye(2), torch.tensor([1.0, -1.0]), "prior: expected finite entries of at least 0"),
    ],
)
def test_what_cannot_be_used_is_named(gram: torch.Tensor, prior: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upgrad_weights(gram, prior)
