"""Candidates are rules, and do what they are for."""

from __future__ import annotations

import pytest
import torch

from marble_core import min_norm_weights, psd_part
from marble_core.rules import Evidence
from reference.experiments.candidates import (
    CANDIDATES,
    min_norm_halves,
    raw_min_norm_shrunk,
    soft_min_cone,
)


def halves(seed: int) -> Evidence:
    """Evidence of five rewards, of which the last is noise alone."""
    g = torch.Generator().manual_seed(seed)
    signal = torch.randn(5, 30, generator=g, dtype=torch.float64) * torch.tensor([[1.0], [3.0], [0.3], [1.0], [0.0]])
    a, b = (signal + torch.randn(5, 30, generator=g, dtype=torch.float64) for _ in range(2))
    z, gains = torch.tensor([5.0, 9.0, 1.5, 5.0, -0.3]), torch.tensor([0.1, 0.3, 0.0, 0.2, torch.nan])
    mean = (a + b) / 2
    return Evidence(mean @ mean.mT, a @ b.mT, gains, z)


@pytest.mark.parametrize("label", CANDIDATES)
def test_every_candidate_is_a_rule(label: str) -> None:
    rule = CANDIDATES[label](5)
    state, c = rule.update(rule.init(), halves(0))
    assert c.shape == (5,)
    assert c.dtype == torch.float64
    assert bool(c.isfinite().all())
    if label != "marble-paper":  # which goes along the fresh solution at a solve alone
        assert torch.equal(rule.update(state, Evidence())[1], c)


def test_a_change_of_the_coefficients_is_none_of_the_state() -> None:
    rule = CANDIDATES["upgrad"](5)
    state, c = rule.update(rule.init(), halves(0))
    before = state.clone()
    c.zero_()
    assert torch.equal(state, before)


def test_what_cannot_be_told_from_noise_has_its_equal_share() -> None:
    unknown = halves(1)._replace(certainty=torch.full((5,), torch.nan))
    raw, unit = raw_min_norm_shrunk(5), min_norm_halves(5)
    assert raw.update(raw.init(), unknown)[1].tolist() == pytest.approx([0.2] * 5)
    assert unknown.cross is not None
    norms = psd_part(unknown.cross).diagonal().sqrt()
    assert (unit.update(unit.init(), unknown)[1] * norms / norms.mean()).tolist() == pytest.approx([0.2] * 5)
    sure = halves(1)._replace(certainty=torch.full((5,), torch.inf))
    w = min_norm_weights(psd_part(unknown.cross))
    assert raw.update(raw.init(), sure)[1].tolist() == pytest.approx(w.tolist())


def test_candidates_need_both_matrices() -> None:
    rule = soft_min_cone(5)
    with pytest.raises(ValueError, match="expected a Gram matrix and a cross-Gram matrix"):
        rule.update(rule.init(), Evidence(gram=torch.eye(5)))
