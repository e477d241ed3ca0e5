"""Whole rules: by hand, and as pure functions."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from marble_core import Coefficients, cone_weights, harmonize, psd_part, soft_min_weights, upgrad_weights
from marble_core.rules import (
    Evidence,
    Rule,
    Smoothed,
    catch_up,
    cone,
    init_smoothed,
    marble,
    marble_paper,
    noise_aware,
    soft_min,
    uniform,
    upgrad,
    weighted_sum,
)

K = 4
RULES: dict[str, Rule] = {
    "uniform": uniform(K),
    "weighted-sum": weighted_sum(torch.tensor([1.0, 2.0, 0.0, 4.0])),
    "marble": marble(K),
    "marble-paper": marble_paper(K),
    "soft-min": soft_min(K),
    "cone": cone(K),
    "noise-aware": noise_aware(K),
    "catch-up": catch_up(K),
    "upgrad": upgrad(K),
}


def grams(seed: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Gram matrix of a batch, and cross-Gram matrix of its halves."""
    g = torch.Generator().manual_seed(seed)
    signal = torch.randn(K, 30, generator=g, dtype=torch.float64) * torch.tensor([[1.0], [3.0], [0.3], [1.0]])
    a, b = (signal + noise * torch.randn(K, 30, generator=g, dtype=torch.float64) for _ in range(2))
    mean = (a + b) / 2
    return mean @ mean.T, a @ b.T


def evidence(seed: int) -> Evidence:
    gram, cross = grams(seed)
    gains = torch.randn(K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Evidence(gram, cross, gains)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_pure_and_a_step_without_evidence_goes_on(name: str) -> None:
    rule = RULES[name]
    state = rule.init()
    for seed in range(5):
        seen = evidence(seed)
        copies = [x.clone() for x in seen if x is not None]
        state, c = rule.update(state, seen)
        d = rule.update(rule.init(), Evidence())[1]
        assert c.dtype == torch.float64
        assert c.shape == d.shape == (K,)
        assert all(torch.equal(x, y) for x, y in zip(copies, (x for x in seen if x is not None), strict=True))
        kept, same = rule.update(state, Evidence())
        if name != "marble-paper":  # which goes along the fresh solution at a solve
            assert torch.equal(same, c)
        file = io.BytesIO()
        torch.save(kept, file)
        file.seek(0)
        with torch.serialization.safe_globals([Smoothed, Coefficients]):  # as docs/cookbook.md says
            restored = torch.load(file, weights_only=True)
        assert torch.equal(rule.update(restored, evidence(7))[1], rule.update(kept, evidence(7))[1])


@pytest.mark.parametrize("name", RULES)
def test_coefficients_and_evidence_are_the_callers_own(name: str) -> None:
    """Changed in place, they change neither the state nor the rule."""
    rule = RULES[name]
    state = rule.init()
    for seen in (Evidence(), evidence(0), Evidence(), Evidence(gram=torch.zeros(K, K))):
        state, c = rule.update(state, seen)
        before = [x.clone() for x in pytree.tree_leaves(state)]
        expected = rule.update(state, evidence(7))[1]
        for x in (c, *(x for x in seen if x is not None)):
            x.fill_(9.0)
        for x, y in zip(before, pytree.tree_leaves(state), strict=True):
            assert torch.equal(x.nan_to_num(), y.nan_to_num())  # a norm that is not known is NaN
        assert torch.equal(rule.update(state, evidence(7))[1], expected)


@pytest.mark.parametrize("make", [soft_min, cone, noise_aware, catch_up, upgrad, lambda K, prior: weighted_sum(prior)])
def test_a_prior_is_copied(make: Any) -> None:
    prior = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    rule = make(K, prior=prior)
    first, solved = (rule.update(rule.init(), seen)[1] for seen in (Evidence(), evidence(1)))
    prior.fill_(1.0)
    assert torch.equal(rule.update(rule.init(), Evidence())[1], first)
    assert torch.equal(rule.update(rule.init(), evidence(1))[1], solved)


@pytest.mark.parametrize("make", [soft_min, noise_aware, catch_up])
def test_the_sum_of_a_prior_does_not_matter_before_the_first_solve_either(make: Any) -> None:
    prior = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    for seen in (Evidence(), evidence(1)):
        one, large = (rule.update(rule.init(), seen)[1] for rule in (make(K, prior=prior / 10), make(K, prior=prior)))
        torch.testing.assert_close(one, large)


def test_what_the_formulas_say() -> None:
    gram, gains = evidence(1).gram, evidence(1).gains
    assert gram is not None
    assert gains is not None
    equal = torch.full((K,), 0.25, dtype=torch.float64)
    first = {name: rule.update(rule.init(), evidence(1))[1] for name, rule in RULES.items()}
    assert torch.equal(first["uniform"], equal)
    assert first["weighted-sum"].tolist() == [1.0, 2.0, 0.0, 4.0]
    assert torch.equal(first["soft-min"], soft_min_weights(gains, equal, 4.0, keep=0.5))
    assert torch.equal(cone(K).update(equal, Evidence(gram))[1], cone_weights(gram, equal))
    assert torch.equal(first["upgrad"], upgrad_weights(gram, equal))
    assert torch.equal(first["marble-paper"], harmonize(gram).coefficients)
    # the first solve has nothing to be smoothed with
    exact = marble(K, rho=0.0, guard=0.0)
    assert torch.allclose(exact.update(exact.init(), evidence(1))[1], harmonize(gram).coefficients, rtol=1e-12)


def test_the_cone_of_the_signals_where_they_are_known() -> None:
    gram, cross = grams(3)
    found = cone(K).update(cone(K).init(), Evidence(gram, cross))[1]
    equal = torch.full((K,), 1 / K, dtype=torch.float64)
    assert torch.equal(found, cone_weights(psd_part(cross), equal, step_gram=gram))
    with pytest.raises(ValueError, match=r"evidence\.gram: expected a matrix beside evidence\.cross"):
        cone(K).update(equal, Evidence(cross=cross))


def test_catching_up_asks_for_what_lags() -> None:
    """Independent signals: every reward's gain is its own, in proportion to how far it is behind."""
    S = torch.diag(torch.tensor([4.0, 1.0, 9.0, 1.0], dtype=torch.float64))
    gains = torch.tensor([0.0, 0.1, 0.2, 1.0], dtype=torch.float64)
    rule = catch_up(K, ahead=0.4)
    c = rule.update(rule.init(), Evidence(gram=S, cross=S, gains=gains))[1]
    reached = S @ c / S.diagonal().sqrt()  # in each reward's own unit
    torch.testing.assert_close(reached / reached[0], torch.tensor([1.0, 0.75, 0.5, 0.0], dtype=torch.float64))
    # nobody in front, or nothing known: all are wanted alike
    for gains_so_far in (None, torch.full((K,), 0.3), torch.full((K,), torch.nan)):
        same = rule.update(rule.init(), Evidence(gram=S, cross=S, gains=gains_so_far))[1]
        aware = noise_aware(K).update(noise_aware(K).init(), Evidence(gram=S, cross=S))[1]
        torch.testing.assert_close(same, aware)


def test_a_reward_in_front_does_not_hold_up_the_others() -> None:
    """Two opposed rewards and one beside them: the one in front may give something back, the last one never does."""
    rows = torch.tensor([[1.0, 0.0], [-0.8, 0.6], [0.0, 1.0]], dtype=torch.float64)
    S, rule = rows @ rows.T, catch_up(3)
    for in_front, last in ((0, 1), (1, 0)):
        gains = torch.full((3,), 0.05, dtype=torch.float64)
        gains[in_front], gains[last] = 1.0, 0.0
        c = rule.update(rule.init(), Evidence(gram=S, cross=S, gains=gains))[1]
        change = S @ c
        assert float(change[in_front]) < 0 < float(change[last])
        aware = noise_aware(3).update(noise_aware(3).init(), Evidence(gram=S, cross=S))[1]
        assert float((S @ aware).min()) > 0


def test_gradients_that_leave_no_direction_change_nothing() -> None:
    opposed = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    for rule in (marble(2), marble_paper(2)):
        state, _ = rule.update(rule.init(), Evidence(gram=torch.diag(torch.tensor([1.0, 4.0]))))
        between = rule.update(state, Evidence())[1]
        after, c = rule.update(state, Evidence(gram=opposed))
        assert torch.equal(c, between)
        assert after is state


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniform(0), "num_rewards: expected an integer of at least 1, got int 0"),
        (lambda: marble(2, rho=2.0), r"rho: expected a number in \[0, 1\]"),
        (lambda: marble(2, guard=1.0), r"guard: expected a number in \[0, 1\), got float 1\.0"),
        (lambda: init_smoothed(0), "num_rewards: expected an integer of at least 1, got int 0"),
        (lambda: soft_min(2, strength=-1.0), "strength: expected"),
        (lambda: weighted_sum([1.0, 3.0]), r"weights: expected a floating-point tensor of shape \[K\]"),  # type: ignore[arg-type]
        (lambda: weighted_sum(torch.zeros(0)), "weights: expected at least one weight"),
        (lambda: cone(2, prior=torch.ones(3)), "prior: expected K = 2 entries"),
        (lambda: weighted_sum(torch.tensor([1, 2])), "weights: expected a floating-point tensor"),
        (lambda: marble(2).update(marble(2).init(), Evidence(gram=torch.eye(3))), r"evidence.gram: expected \[K, K\]"),
        (
            lambda: noise_aware(2).update(noise_aware(2).init(), Evidence(cross=torch.eye(2))),
            "evidence.gram: expected a matrix beside evidence.cross",
        ),
    ],
)
def test_what_cannot_be_used_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("make", [soft_min, cone, noise_aware, catch_up, upgrad])
def test_a_prior_that_cannot_be_used_is_named_at_once(make: Any) -> None:
    for prior in ([1.0, -1.0], [1.0, torch.nan], [1.0, torch.inf], [0.0, 0.0]):
        with pytest.raises(ValueError, match=r"prior: expected (finite entries of at least 0|an entry above 0), got"):
            make(2, prior=torch.tensor(prior))
    assert weighted_sum(torch.tensor([1.0, -1.0])).update((), Evidence())[1].tolist() == [1.0, -1.0]


SHAPES = {"gram": (K, K), "cross": (K, K), "gains": (K,)}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("field", SHAPES)
def test_evidence_of_another_shape_or_dtype_is_named(name: str, field: str) -> None:
    """By every rule that looks at it; the others do not mind."""
    rule, shape = RULES[name], SHAPES[field]
    good: dict[str, Any] = {key: torch.eye(K) if len(s) == 2 else torch.zeros(K) for key, s in SHAPES.items()}
    wrong = [torch.ones(*(n + 1 for n in shape)), torch.ones(1, *shape), torch.ones(shape).long(), [0.0] * K]
    looks = {"soft-min": ("gains",), "catch-up": tuple(SHAPES), "cone": ("gram", "cross")}
    looks |= dict.fromkeys(("marble", "marble-paper", "upgrad"), ("gram",)) | {"noise-aware": ("gram", "cross")}
    for x in wrong:
        evidence = Evidence(**{**good, field: x})
        if field in looks.get(name, ()):
            with pytest.raises(ValueError, match=rf"evidence\.{field}: expected "):
                rule.update(rule.init(), evidence)
        else:
            rule.update(rule.init(), evidence)
