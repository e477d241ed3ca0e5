"""The trainer's rules are those of ``marble_core.rules``, by name."""

from __future__ import annotations

import pytest
import torch

from marble_core.rules import (
    Evidence,
    Rule,
    catch_up,
    cone,
    marble,
    marble_paper,
    noise_aware,
    soft_min,
    uniform,
    upgrad,
)
from reference.config.settings import Config
from reference.step.method import method_of, refreshes_at, to_raw_sum

K = 4
RULES: dict[str, Rule] = {
    "soft-gdpo": soft_min(K),
    "soft-min": soft_min(K),
    "marble": marble(K),
    "marble-paper": marble_paper(K),
    "noise-aware": noise_aware(K),
    "catch-up": catch_up(K),
    "cone": cone(K),
    "upgrad": upgrad(K),
    "uniform": uniform(K),
    "gdpo": uniform(K),
}


def evidence(seed: int) -> Evidence:
    g = torch.Generator().manual_seed(seed)
    signal = torch.randn(K, 30, generator=g, dtype=torch.float64)
    a, b = (signal + torch.randn(K, 30, generator=g, dtype=torch.float64) for _ in range(2))
    mean = (a + b) / 2
    return Evidence(mean @ mean.T, a @ b.T, torch.randn(K, generator=g, dtype=torch.float64))


@pytest.mark.parametrize("name", RULES)
def test_a_name_is_the_rule_of_the_core(name: str) -> None:
    mine, rule = method_of(Config(balance=name, rewards=tuple("abcd"))).rule, RULES[name]
    state, own = rule.init(), mine.init()
    for seed in range(6):
        for seen in (evidence(seed), Evidence(gains=evidence(seed).gains)):
            state, c = rule.update(state, seen)
            own, found = mine.update(own, seen)
            assert torch.allclose(c, found, rtol=1e-12, atol=1e-15)


def test_refreshes() -> None:
    method = method_of(Config(balance="marble"))
    assert [step for step in range(25) if refreshes_at(method, step)] == [0, 10, 20]
    assert not any(refreshes_at(method._replace(every=0), step) for step in range(25))


def test_the_raw_sum_in_the_rewards_own_advantages() -> None:
    A = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    c = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(to_raw_sum(c, A, (A.double() @ c).float()), c, rtol=1e-5, atol=1e-6)
