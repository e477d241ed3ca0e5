"""Rules of other work agree with their published implementations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from marble_core import gram_matrix
from reference.config.checks import validate
from reference.config.settings import Config, rule_of
from reference.config.toml import from_toml
from reference.experiments.peers import upgrad


def test_upgrad_by_hand() -> None:
    """Two gradients (2, 0) and (-1/2, s): the first projects onto the second's normal, the second onto the first's."""
    G = torch.tensor([[4.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    # g_1 + 1 g_2 is orthogonal to g_2; g_2 + g_1 / 4 to g_1; half of each
    expected = torch.tensor([(1 + 1 / 4) / 2, (1 + 1) / 2], dtype=torch.float64)
    torch.testing.assert_close(upgrad(G), expected)


def test_upgrad_without_conflict_is_the_mean() -> None:
    G = torch.tensor([[4.0, 1.0, 0.0], [1.0, 1.0, 0.5], [0.0, 0.5, 9.0]], dtype=torch.float64)
    assert upgrad(G).tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("seed", range(10))
def test_upgrad_is_torchjd_s(seed: int) -> None:
    aggregation, dual_cone = (pytest.importorskip(f"torchjd.{name}") for name in ("aggregation", "_linalg._dual_cone"))
    pytest.importorskip("qpsolvers")
    rows = torch.randn(5, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows[1] -= 2 * rows[0]
    rows[4] -= rows[2] + rows[3]
    projector = dual_cone.QuadprogProjector(norm_eps=0.0, reg_eps=1e-10)
    expected = aggregation.UPGradWeighting(projector=projector)(rows @ rows.mT)
    torch.testing.assert_close(upgrad(gram_matrix(rows)), expected, rtol=0, atol=1e-6)


def test_its_rule_is_valid_and_keeps_raw_coefficients() -> None:
    config = from_toml(Path("reference/experiments/rules/upgrad.toml"), Config())
    validate(config)
    assert not rule_of(config).normalize
