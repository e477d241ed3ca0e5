"""Gains since the start: by hand, against the joint Gaussian that the model says, and in simulation."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from marble_core import GainState, gains, gains_since_start, init_gains, update_gains
from marble_core.gains import _STEP, _last_gain

Scores = tuple[Tensor, Tensor]


def scores(*columns: list[float], on: list[list[bool]] | None = None) -> Scores:
    values = torch.tensor(columns, dtype=torch.float64).mT
    return values, torch.ones_like(values, dtype=torch.bool) if on is None else torch.tensor(on).mT


def after(state: GainState, prompts: str, x: Scores, *, learning: bool) -> GainState:
    groups = torch.tensor(["abc".index(p) for p in prompts for _ in range(2)])
    return update_gains(state, x[0], groups, applicable=x[1], learning=learning)


def test_groups_by_hand() -> None:
    """Groups of two: means 1 and 5, deviations +-1 and +-1, two degrees of freedom."""
    state = after(init_gains(1), "ab", scores([0.0, 2.0, 4.0, 6.0]), learning=True)
    state = after(state, "ca", scores([1.0, 3.0, 2.0, 2.0]), learning=False)
    assert state.mean.flatten().tolist() == [1.0, 5.0, 2.0, 2.0]
    assert state.prompt.tolist() == [0, 1, 0, 2]
    assert state.epoch.tolist() == [0, 0, 1, 1]
    assert (state.squares.tolist(), state.freedom.tolist()) == ([4.0], [2.0])


def test_one_prompt_by_hand() -> None:
    """One prompt twice: the difference, weighted by the variance of the walk over that plus both means' noise."""
    y, v = torch.tensor([1.0, 3.0]).double(), torch.tensor([0.02, 0.03]).double()
    gain, error = _last_gain(y, v, torch.tensor([0, 0]), torch.tensor([0, 1]), torch.arange(2))
    assert gain == pytest.approx(2.0 * _STEP**2 / (_STEP**2 + 0.05))
    assert error == pytest.approx((_STEP**2 * 0.05 / (_STEP**2 + 0.05)) ** 0.5)


def test_the_posterior_of_the_joint_gaussian() -> None:
    """The same as conditioning the covariance of everything at once, with a mean of which nothing is known."""
    g, T, n = torch.Generator().manual_seed(0), 12, 40
    prompt, epoch = torch.randint(0, 9, (n,), generator=g), torch.arange(n) % T
    y, v = torch.randn(n, generator=g).double(), torch.rand(n, generator=g).double() / 10 + 0.02
    means = torch.stack([y[epoch == t].mean() for t in range(T)])
    between = float((y - means[epoch]).square().sum() / (n - T) - v.mean())
    time = torch.arange(T).double()
    walk = _STEP**2 * torch.minimum(time[:, None], time[None, :])
    covariance = 1e7 + walk[epoch][:, epoch] + between * (prompt[:, None] == prompt[None, :]) + torch.diag(v)
    c = walk[-1][epoch]
    expected = c @ torch.linalg.solve(covariance, y), (walk[-1, -1] - c @ torch.linalg.solve(covariance, c)).sqrt()
    assert _last_gain(y, v, prompt, epoch, torch.arange(T)) == pytest.approx(
        [float(x) for x in expected], rel=1e-5, abs=1e-6
    )


def test_the_first_epoch_has_no_gain() -> None:
    state = after(init_gains(1), "ab", scores([0.0, 2.0, 4.0, 6.0]), learning=True)
    assert gains_since_start(state).tolist() == [0.0]


def test_rewards_that_do_not_apply_are_left_out() -> None:
    on = [[True, True, False, False], [True] * 4]
    state = after(init_gains(2), "ab", scores([0.0, 2.0, 0.0, 0.0], [0.0, 2.0, 4.0, 6.0], on=on), learning=True)
    assert state.freedom.tolist() == [1.0, 2.0]
    on = [[False, False], [True, True]]
    state = after(state, "b", scores([9.0, 9.0], [6.0, 8.0], on=on), learning=False)
    only = after(init_gains(1), "ab", scores([0.0, 2.0, 4.0, 6.0]), learning=True)
    only = after(only, "b", scores([6.0, 8.0]), learning=False)
    found = gains_since_start(state)
    assert float(found[0]) == pytest.approx(0.0, abs=1e-9)  # nothing since the first epoch
    assert float(found[1]) == pytest.approx(float(gains_since_start(only)))


def test_a_reward_that_never_applies_or_never_varies_has_no_gain() -> None:
    on = [[False, False], [True, True]]
    state = after(init_gains(2), "a", scores([1.0, 2.0], [1.0, 1.0], on=on), learning=True)
    state = after(state, "a", scores([1.0, 2.0], [1.0, 2.0], on=on), learning=False)
    assert gains_since_start(state).isnan().all()


def simulated(scale: float, offset: float, seed: int) -> float:
    """40 epochs of 12 of 64 prompts; every reward gains 0.6 in all, most of it before a prompt comes again."""
    g, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    difficulty, state, order = torch.randn(64, generator=g).double(), init_gains(1), list[int]()
    for epoch in range(40):
        order += rng.sample(range(64), 64) if len(order) < 12 else []
        chosen, order = order[:12], order[12:]
        level = difficulty[chosen].repeat_interleave(24) + 0.6 * (1 - 2.718 ** (-epoch / 8))
        values = offset + scale * (level + torch.randn(288, generator=g).double())
        groups = torch.tensor(chosen).repeat_interleave(24)
        state = update_gains(state, values[:, None], groups, learning=epoch < 5)
    return float(gains_since_start(state))


def test_scale_and_offset_do_not_matter() -> None:
    assert simulated(1.0, 0.0, 0) == pytest.approx(simulated(1e4, -7.0, 0))


def test_what_was_gained_before_prompts_come_again_is_not_missed() -> None:
    found: Tensor = torch.tensor([simulated(1.0, 0.0, seed) for seed in range(5)])
    assert float(found.mean()) == pytest.approx(0.6, abs=0.1)


def test_the_state_before_is_untouched() -> None:
    state = after(init_gains(1), "a", scores([0.0, 2.0]), learning=True)
    after(state, "b", scores([0.0, 2.0]), learning=True)
    assert state.prompt.tolist() == [0]
    assert state.mean.shape == (1, 1)


def test_a_constant_reward_has_no_gain_whatever_its_rounding() -> None:
    """24 copies of 0.1 in float32 have a mean that is 0.1 up to rounding: no spread, no unit, no gain."""
    state = init_gains(1)
    for epoch in range(4):
        values = torch.full((48, 1), 0.1 * (1 + 1e-8 * epoch)).double() + 1e-9 * torch.rand(48, 1).double()
        state = update_gains(state, values, torch.tensor([0] * 24 + [1] * 24), learning=epoch < 2)
    assert gains_since_start(state).isnan().all()


def long_run(epochs: int, prompts: int, seed: int = 0) -> GainState:
    """Rewards that gain a hundredth of a standard deviation an epoch; the second one applies to every other image."""
    generator = torch.Generator().manual_seed(seed)
    state = init_gains(2)
    for epoch in range(epochs):
        groups = torch.tensor([(8 * epoch + i) % prompts for i in range(8) for _ in range(4)])
        level = (groups % 7 / 7).double()
        values = (level + 0.01 * epoch).unsqueeze(1) + torch.randn(32, 2, generator=generator, dtype=torch.float64)
        on = torch.ones(32, 2, dtype=torch.bool)
        on[::2, 1] = False
        state = update_gains(state, values, groups, applicable=on, learning=epoch < 10)
    return state


def test_a_long_run_stays_small_and_tells_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    state = long_run(200, prompts=40)
    assert len(state.epoch.unique()) <= 64
    assert len(state.epoch) <= 64 * 40
    assert int(state.images[:, 0].sum()) == 200 * 32
    assert int(state.images[:, 1].sum()) == 200 * 16
    assert state.epoch.unique()[-32:].tolist() == list(range(168, 200))
    short = gains_since_start(state)
    monkeypatch.setattr(gains, "_EPOCHS", 10**6)
    exact = gains_since_start(long_run(200, prompts=40))
    assert torch.allclose(short, exact, atol=0.2)  # of gains of 2, known to 0.2
    assert 1.5 < float(exact.mean()) < 2.3


def test_joined_epochs_keep_means_and_what_never_applied() -> None:
    state = init_gains(2)
    on = torch.tensor([[True, False]] * 2)
    for epoch in range(100):
        values = torch.tensor([[float(epoch), 0.0], [epoch + 2.0, 0.0]], dtype=torch.float64)
        state = update_gains(state, values, torch.tensor([0, 0]), applicable=on)
    assert state.mean[:, 1].isnan().all()
    assert float((state.images[:, 0] * state.mean[:, 0]).sum()) == pytest.approx(2 * sum(e + 1 for e in range(100)))
    assert gains_since_start(state)[1].isnan()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("bad", [5, 60])
def test_a_reward_that_is_not_finite_is_not_forgotten_when_its_epoch_is_joined(bad: int, value: float) -> None:
    """Joined with others, a mean of NaN must not become a mean of 0."""
    state, sound = init_gains(2), init_gains(1)
    for epoch in range(110):
        values = torch.tensor([[0.0, 0.0], [2.0, 2.0]]) + 0.5 * epoch
        sound = update_gains(sound, values[:, :1], torch.tensor([3, 3]), learning=epoch < 2)
        values[0, 1] = value if epoch == bad else values[0, 1]
        state = update_gains(state, values, torch.tensor([3, 3]), learning=epoch < 2)
        found = gains_since_start(state)
        assert bool(found[1].isnan()) == (epoch >= bad), epoch
    assert len(state.epoch) < 110
    assert found[0] == gains_since_start(sound)[0]


@pytest.mark.parametrize("labels", [[-2, -1], [2**58, 2**58 + 1], [-(2**63), 2**63 - 1]])
def test_labels_may_be_any_integers_however_long_a_run_is(labels: list[int]) -> None:
    """Hashes, for instance; what is found is that of labels 0 and 1."""
    here = there = init_gains(1)
    g, groups = torch.Generator().manual_seed(0), torch.tensor([0, 0, 1, 1])
    for epoch in range(70):
        values = torch.randn(4, 1, generator=g) + 0.1 * epoch
        here = update_gains(here, values, torch.tensor(labels)[groups], learning=epoch < 3)
        there = update_gains(there, values, groups, learning=epoch < 3)
    assert here.prompt.tolist() == [labels[i] for i in there.prompt.tolist()]
    assert torch.equal(here.mean, there.mean)
    assert torch.equal(gains_since_start(here), gains_since_start(there))


def test_the_order_of_the_images_and_of_the_labels_does_not_matter() -> None:
    g = torch.Generator().manual_seed(0)
    here = there = init_gains(2)
    for epoch in range(6):
        groups, values = torch.randint(0, 5, (40,), generator=g), torch.randn(40, 2, generator=g).double() + 0.1 * epoch
        order = torch.randperm(40, generator=g)
        here = update_gains(here, values, groups, learning=epoch < 3)
        there = update_gains(there, values[order], 1000 - 7 * groups[order], learning=epoch < 3)
    torch.testing.assert_close(gains_since_start(here), gains_since_start(there))


def test_low_precision_and_inapplicable_values_that_are_not_finite() -> None:
    values = torch.tensor([[0.0, 1.0], [2.0, torch.nan], [1.0, 3.0], [3.0, torch.inf]])
    on = torch.tensor([[True, True], [True, False], [True, True], [True, False]])
    groups, states = torch.tensor([0, 0, 0, 0]), []
    for dtype in (torch.float64, torch.bfloat16):
        state = init_gains(2)
        for epoch in range(3):
            state = update_gains(state, (values + epoch).to(dtype), groups, applicable=on)
        states.append(gains_since_start(state))
    assert torch.equal(states[0], states[1])
    assert bool(states[0].isfinite().all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": torch.zeros(4)}, r"rewards: expected a floating-point tensor of shape \[N, K\]"),
        ({"rewards": torch.zeros(4, 3)}, "rewards: expected K = 2 columns, as the state has"),
        ({"groups": torch.zeros(4)}, r"groups: expected an integer tensor of shape \[N\] = \[4\]"),
        ({"groups": torch.zeros(3).long()}, r"groups: expected an integer tensor of shape \[N\] = \[4\]"),
        ({"applicable": [[True, True]] * 4}, r"applicable: expected a bool tensor of shape \[N, K\] = \[4, 2\]"),
        ({"applicable": torch.ones(4, 2)}, r"applicable: expected a bool tensor of shape \[N, K\] = \[4, 2\]"),
    ],
)
def test_what_cannot_be_used_is_named(change: dict[str, Any], message: str) -> None:
    given = {"rewards": torch.zeros(4, 2), "groups": torch.zeros(4).long(), "applicable": None, **change}
    with pytest.raises(ValueError, match=message):
        update_gains(init_gains(2), **given)


def test_a_number_of_rewards() -> None:
    with pytest.raises(ValueError, match="num_rewards: expected an integer of at least 1, got int 0"):
        init_gains(0)
