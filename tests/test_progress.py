"""Gains since the start, by hand and in simulation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from reference.progress import Progress, gains_of, init_progress, update_progress
from reference.scoring import Scores


def scores(*columns: list[float], on: list[list[bool]] | None = None) -> Scores:
    values = torch.tensor(columns, dtype=torch.float64).mT
    applicable = torch.ones_like(values, dtype=torch.bool) if on is None else torch.tensor(on).mT
    return Scores(values, applicable)


def after(state: Progress, prompts: str, x: Scores, *, learning: bool) -> Progress:
    return update_progress(state, [p for p in prompts for _ in range(2)], x, 2, learning=learning)


def test_gains_by_hand() -> None:
    """Groups of two, deviations +-1 and +-1: a variance of 2 within groups, two degrees of freedom, std sqrt(2)."""
    state = after(init_progress(1), "ab", scores([0.0, 2.0, 4.0, 6.0]), learning=True)
    assert gains_of(state).isnan().all()
    state = after(state, "a", scores([2.0, 4.0]), learning=False)  # 3 instead of 1
    assert gains_of(state).tolist() == pytest.approx([2 / math.sqrt(2)])
    state = after(state, "b", scores([5.0, 5.0]), learning=False)  # no change
    assert gains_of(state).tolist() == pytest.approx([0.8 * math.sqrt(2) / 1.8])


def test_a_new_prompt_is_compared_with_the_mean_of_the_others() -> None:
    state = after(init_progress(1), "ab", scores([0.0, 2.0, 4.0, 6.0]), learning=True)
    state = after(state, "c", scores([4.0, 6.0]), learning=False)
    assert gains_of(state).tolist() == pytest.approx([(5 - 3) / math.sqrt(2)])
    assert "c" not in state.first


def test_a_prompt_again_in_the_first_epochs_is_a_gain_already() -> None:
    state = after(init_progress(1), "a", scores([0.0, 2.0]), learning=True)
    state = after(state, "a", scores([2.0, 4.0]), learning=True)
    assert gains_of(state).tolist() == pytest.approx([2 / math.sqrt(2)])
    assert state.first["a"].tolist() == [1.0]


def test_rewards_that_do_not_apply_are_left_out() -> None:
    on = [[True, True, False, False], [True] * 4]
    state = after(init_progress(2), "ab", scores([0.0, 2.0, 0.0, 0.0], [0.0, 2.0, 4.0, 6.0], on=on), learning=True)
    assert state.freedom.tolist() == [1.0, 2.0]
    on = [[False, False], [True, True]]
    state = after(state, "b", scores([0.0, 0.0], [6.0, 8.0], on=on), learning=False)
    gains = gains_of(state)
    assert math.isnan(gains[0])
    assert float(gains[1]) == pytest.approx(2 / math.sqrt(2))


def test_a_constant_reward_has_no_gain() -> None:
    state = after(init_progress(1), "a", scores([1.0, 1.0]), learning=True)
    state = after(state, "a", scores([1.0, 2.0]), learning=False)
    assert gains_of(state).isnan().all()


def test_nothing_seen_in_the_first_epochs_is_no_error() -> None:
    state = after(init_progress(1), "a", scores([1.0, 2.0]), learning=False)
    assert gains_of(state).isnan().all()


def test_scale_and_offset_do_not_matter_and_the_estimate_is_right_on_average() -> None:
    def final(scale: float, offset: float) -> Tensor:
        g = torch.Generator().manual_seed(0)
        difficulty, state = torch.randn(40, generator=g).double(), init_progress(1)
        for epoch in range(40):
            prompts = [f"{(8 * epoch + i) % 40}" for i in range(8) for _ in range(24)]
            level = torch.tensor([float(difficulty[int(p)]) for p in prompts]).double() + (0.5 if epoch >= 5 else 0.0)
            values = offset + scale * (level + torch.randn(len(prompts), generator=g).double())
            state = update_progress(
                state, prompts, Scores(values[:, None], torch.ones(len(prompts), 1).bool()), 24, learning=epoch < 5
            )
        return gains_of(state)

    torch.testing.assert_close(final(1.0, 0.0), final(1e4, -7.0))
    assert float(final(1.0, 0.0)) == pytest.approx(0.5, abs=0.1)


def test_the_state_before_is_untouched() -> None:
    state = after(init_progress(1), "a", scores([0.0, 2.0]), learning=True)
    after(state, "b", scores([0.0, 2.0]), learning=True)
    assert list(state.first) == ["a"]
