"""Warnings of training that comes apart."""

from __future__ import annotations

import math

from reference.run.watch import Health, end_epoch, init_health, observe_step


def epochs(lengths: list[tuple[float, float, float]], health: Health | None = None) -> list[list[str]]:
    """Warnings of epochs with two equal steps each, from (gradient, velocity, base model's velocity)."""
    health, found = health or init_health(), []
    for epoch, values in enumerate(lengths):
        for _ in range(2):
            health = observe_step(health, dict(zip(("grad_norm", "v_norm", "v_norm_base"), values, strict=True)))
        health, warnings = end_epoch(health, epoch)
        found.append(warnings)
    return found


def test_steady_training_says_nothing() -> None:
    assert epochs([(0.03, 1.16, 1.15)] * 30) == [[]] * 30


def test_a_velocity_that_is_six_per_cent_longer_is_said_every_ten_epochs() -> None:
    found = epochs([(0.03, 1.0, 1.0)] * 2 + [(0.03, 1.06, 1.0)] * 20)
    assert [bool(w) for w in found] == [False] * 2 + [True] + [False] * 9 + [True] + [False] * 9
    assert found[2][0].startswith("the velocity is 1.06 times as long as the base model's.")
    assert "loss.kl_weight" in found[2][0]
    assert epochs([(0.03, 1.049, 1.0)] * 20) == [[]] * 20


def test_without_the_base_the_start_is_the_measure() -> None:
    found = epochs([(0.03, 1.2, math.nan)] * 3 + [(0.03, 1.3, math.nan)])
    assert found[:3] == [[]] * 3
    assert found[3][0].startswith("the velocity is 1.08 times as long as at the start.")


def test_gradients_that_grow_sixfold_are_said() -> None:
    found = epochs([(0.01, 1, 1), (0.02, 1, 1), (0.03, 1, 1), (0.099, 1, 1), (0.12, 1, 1)])
    assert found[:4] == [[]] * 4  # 0.099 is below five times the median of the first three, 0.02
    assert len(found[4]) == 1
    assert found[4][0].startswith("gradients are 6.0 times as long as in the first epochs.")


def test_skipped_steps_are_not_measured() -> None:
    assert epochs([(0.03, 1.0, 1.0), (math.nan, math.nan, math.nan), (0.03, 1.0, 1.0)]) == [[]] * 3
