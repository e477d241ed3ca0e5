"""Smoothed coefficients, averaged trees, schedules: hand values against the method's constants."""

from __future__ import annotations

import pytest
import torch

from marble_core import (
    SLOW_DECAY,
    Coefficients,
    DecaySchedule,
    Guard,
    ema_tree,
    eval_ema_decay,
    gram_matrix,
    harmonize,
    init_coefficients,
    old_policy_decay,
    refresh_due,
    update_coefficients,
)


def state(*weights: float) -> Coefficients:
    return init_coefficients(len(weights))._replace(weights=torch.tensor(weights, dtype=torch.float64))


def test_the_papers_ema() -> None:
    h = harmonize(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64)), solver=lambda G: torch.tensor([1.0, 0.0]))
    first, rho_used = update_coefficients(init_coefficients(2), h)
    assert first.weights.tolist() == pytest.approx([0.65, 0.35])  # 0.7 * 0.5 + 0.3 * (1, 0)
    assert rho_used == 0.7
    assert first.step == 1
    assert update_coefficients(state(0.2, 0.8), h, rho=0.0)[0].weights.tolist() == [1.0, 0.0]
    assert update_coefficients(state(0.2, 0.8), h, rho=1.0)[0].weights.tolist() == pytest.approx([0.2, 0.8])


def test_a_silent_reward_keeps_its_share() -> None:
    h = harmonize(torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)))
    after, _ = update_coefficients(state(0.1, 0.5, 0.4), h, rho=0.5)
    assert after.weights.tolist() == pytest.approx([0.2, 0.4, 0.4])  # halfway to (0.3, 0.3, 0.4)
    assert after.steps_since_signal.tolist() == [0, 0, 1]
    again, _ = update_coefficients(after, harmonize(torch.zeros(3, 3)), rho=0.5)
    assert again.weights.tolist() == after.weights.tolist()
    assert again.steps_since_signal.tolist() == [1, 1, 2]
    back, _ = update_coefficients(again, harmonize(torch.eye(3)), rho=0.0)
    assert back.weights.tolist() == pytest.approx([1 / 3] * 3)
    assert back.steps_since_signal.tolist() == [0, 0, 0]


def test_a_reward_with_all_the_share_can_fall_silent_and_another_one_return() -> None:
    h = harmonize(torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)))
    after, rho_used = update_coefficients(state(0.0, 1.0), h, guard=Guard(torch.diag(torch.tensor([1.0, 0.0]))))
    assert after.weights.tolist() == [0.0, 1.0]
    assert rho_used == 0.7


def test_guard_by_hand() -> None:
    # unit gradients at cosine -0.8: d* = (1/2, 1/2), |d*|^2 = 0.1; all weight on the first gives <d, g_2> = -0.8
    G = torch.tensor([[1.0, -0.8], [-0.8, 1.0]], dtype=torch.float64)
    h = harmonize(G)
    assert float(h.direction_norm) ** 2 == pytest.approx(0.1)
    _, rho_used = update_coefficients(state(1.0, 0.0), h, rho=0.7, guard=Guard(G, 0.5))
    assert float(rho_used) == pytest.approx((0.1 - 0.05) / (0.1 + 0.8))  # 0.1 + rho (-0.8 - 0.1) = 0.05
    after, _ = update_coefficients(state(1.0, 0.0), h, rho=0.7, guard=Guard(G, 0.5))
    assert float((G @ after.weights).min()) == pytest.approx(0.05)
    scaled = G * torch.tensor([[9.0, 30.0], [30.0, 100.0]])  # raw gradients of norm 3 and 10: the guard normalizes
    _, same = update_coefficients(state(1.0, 0.0), harmonize(scaled), rho=0.7, guard=Guard(scaled, 0.5))
    torch.testing.assert_close(same, rho_used)
    _, free = update_coefficients(state(0.5, 0.5), h, rho=0.7, guard=Guard(G, 0.5))
    assert free == 0.7
    plain, _ = update_coefficients(state(1.0, 0.0), h, rho=0.7)
    assert (G @ plain.weights).min() < 0  # what the guard is for


def test_guard_looks_at_the_active_share_alone() -> None:
    G = torch.tensor([[1.0, 0.0, -0.8], [0.0, 0.0, 0.0], [-0.8, 0.0, 1.0]], dtype=torch.float64)
    _, rho_used = update_coefficients(state(0.4, 0.6, 0.0), harmonize(G), rho=0.7, guard=Guard(G, 0.5))
    assert float(rho_used) == pytest.approx(0.05 / 0.9)


def test_ema_tree() -> None:
    old = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    new = {"w": torch.tensor([3.0, 4.0]), "n": torch.tensor(7)}
    mixed = ema_tree(old, new, 0.75)
    assert mixed["w"].tolist() == [1.5, 2.5]
    assert mixed["n"] == 7
    copied = ema_tree(old, new, 0.0)
    copied["w"] += 1
    assert new["w"].tolist() == [3.0, 4.0]
    assert ema_tree(old, new, torch.tensor(1.0))["w"].tolist() == [1.0, 2.0]


def test_no_gradient_flows_into_the_state() -> None:
    w, G = torch.tensor([0.2, 0.8]).requires_grad_(), torch.eye(2).requires_grad_()
    h = harmonize(torch.eye(2))._replace(weights=w)
    after, rho_used = update_coefficients(state(0.5, 0.5), h, guard=Guard(G))
    mixed = ema_tree(torch.ones(1), w[:1], torch.tensor(0.5, requires_grad=True))
    assert not any(x.requires_grad for x in (*after, rho_used, mixed))


def test_an_average_of_bf16_weights_is_kept_in_float32() -> None:
    """In bf16 an EMA of decay 0.999 does not move at all; in float32 it arrives."""
    new = torch.full((1,), 2.0, dtype=torch.bfloat16)
    narrow, wide = torch.ones(1, dtype=torch.bfloat16), torch.ones(1)
    for _ in range(5000):
        narrow, wide = ema_tree(narrow, new, 0.999), ema_tree(wide, new, 0.999)
    assert narrow.item() == 1.0
    assert wide.dtype == torch.float32
    assert wide.item() == pytest.approx(2 - 0.999**5000, rel=1e-3)


def test_schedules_are_those_of_the_method() -> None:
    assert [old_policy_decay(step) for step in (0, 100, 500, 10_000)] == [0.0, 0.1, 0.5, 0.5]
    slow = [old_policy_decay(step, SLOW_DECAY) for step in (0, 75, 76, 175, 10_000)]
    assert slow == pytest.approx([0, 0, 0.0075, 0.75, 0.999])
    assert old_policy_decay(5, DecaySchedule(3, 0.1, 0.15)) == 0.15
    assert [eval_ema_decay(s) for s in (0, 8, 80, 81)] == pytest.approx([0.1, 0.5, 0.9, 0.9])
    assert eval_ema_decay(1000, cap=0.999) == pytest.approx(1001 / 1010)
    assert [step for step in range(25) if refresh_due(step, 10)] == [0, 10, 20]
    assert all(refresh_due(step, 1) for step in range(5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: init_coefficients(0), "K: expected a positive integer"),
        (lambda: update_coefficients(state(1.0), harmonize(torch.eye(2))), r"harmonization.weights: .* \[K\] = \[1\]"),
        (lambda: update_coefficients(state(1.0), harmonize(torch.eye(1)), rho=1.5), "rho: expected a number"),
        (
            lambda: update_coefficients(state(1.0), harmonize(torch.eye(1)), guard=Guard(torch.eye(2))),
            r"guard.gram: expected \[K, K\] = \[1, 1\], got float32\[2, 2\]",
        ),
        (
            lambda: update_coefficients(state(1.0), harmonize(torch.eye(1)), guard=Guard(torch.eye(1), 1.0)),
            r"guard.margin: expected a number in \(0, 1\), got float 1\.0",
        ),
        (lambda: ema_tree({"a": 3}, {"a": 4}, 0.5), "new: expected tensors as leaves, got int 4"),
        (lambda: ema_tree({"a": 3}, {"a": torch.ones(1)}, 0.5), "old: expected tensors as leaves, got int 3"),
        (lambda: ema_tree({"a": torch.ones(1)}, {"b": torch.ones(1)}, 0.5), "new: expected the structure of old"),
        (lambda: ema_tree(torch.ones(1), torch.ones(2), 0.5), "new: expected a leaf of shape"),
        (lambda: ema_tree(torch.ones(1), torch.ones(1), 1.5), "decay: expected a number"),
        (lambda: old_policy_decay(-1), "step: expected an integer >= 0, got int -1"),
        (lambda: old_policy_decay(1, DecaySchedule(0, 0.1, 1.5)), "schedule.cap"),
        (lambda: eval_ema_decay(1, cap=2.0), "cap: expected a number"),
        (lambda: refresh_due(3, 0), "every: expected an integer >= 1"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_gram_of_the_refresh_is_the_guard() -> None:
    """The pieces fit: rows to Gram, harmonization, guarded update, positive cosines."""
    g = torch.randn(5, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    G = gram_matrix(g)
    after, rho_used = update_coefficients(state(1.0, 0.0, 0.0, 0.0, 0.0), harmonize(G), rho=0.9, guard=Guard(G))
    assert rho_used < 0.9
    d = (after.weights / g.norm(dim=1)) @ g
    assert (g @ d > 0).all()
