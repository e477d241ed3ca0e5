"""The policy's adapters and the samplers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from reference.interfaces import plain_prompts
from reference.policy.adapters import (
    ATTENTION,
    Adapter,
    Policy,
    active,
    adapter_state,
    add_lora,
    load_adapter,
    merged,
    parameters,
    velocity,
    weights_of,
)
from reference.policy.base import load_base
from reference.rewards.scorer import Scorer
from reference.step.evaluation import Judging, evaluate
from reference.step.rollout import Sampler, Sampling, sample, times
from tests.conftest import tiny_transformer

INPUT = (torch.randn(2, 3, 4, 4), torch.tensor([0.3, 0.9]), (torch.randn(2, 2, 6), torch.randn(2, 5)))


def run(policy: Policy) -> Tensor:
    with torch.no_grad():
        return velocity(policy, *INPUT)


@pytest.fixture
def policy() -> Policy:
    policy = add_lora(tiny_transformer(), rank=2, alpha=4.0, targets="linear", seed=0)
    for i, adapter in enumerate(("default", "old")):
        g = torch.Generator().manual_seed(i)
        state = {k: 0.2 * torch.randn(v.shape, generator=g) for k, v in adapter_state(policy, "default").items()}
        load_adapter(policy, adapter, state)  # type: ignore[arg-type]
    return policy


def test_a_fresh_adapter_changes_nothing() -> None:
    plain = tiny_transformer()
    x, t, (embeds, pooled) = INPUT
    with torch.no_grad():
        expected = plain(
            hidden_states=x, timestep=1000 * t, encoder_hidden_states=embeds, pooled_projections=pooled
        ).sample
    fresh = add_lora(plain, rank=2, alpha=4.0, targets="linear", seed=0)
    torch.testing.assert_close(run(fresh), expected, rtol=0, atol=1e-6)
    with active(fresh, "old"):
        torch.testing.assert_close(run(fresh), expected, rtol=0, atol=1e-6)
    trained, old = parameters(fresh), parameters(fresh, "old")
    assert all(torch.equal(trained[name], old[name]) for name in parameters(fresh))


def test_each_adapter_is_itself_and_base_is_the_base(policy: Policy) -> None:
    default = run(policy)
    with active(policy, "old"):
        old = run(policy)
    with active(policy, "base"):
        base = run(policy)
    assert not torch.allclose(default, old, atol=1e-3)
    assert not torch.allclose(default, base, atol=1e-3)
    zero = {name: torch.zeros_like(x) for name, x in adapter_state(policy, "default").items()}
    with weights_of(policy, zero):
        torch.testing.assert_close(run(policy), base, rtol=0, atol=1e-6)
    assert torch.equal(run(policy), default)


@pytest.mark.parametrize("adapter", ["default", "old", "base"])
def test_switching_leaves_gradients_and_modes_as_they_were(policy: Policy, adapter: str) -> None:
    trainable = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert trainable == set(parameters(policy))
    modes = [m.training for m in policy.model.modules()]
    with pytest.raises(KeyError, match="inside"), active(policy, adapter):  # type: ignore[arg-type]
        raise KeyError("inside")
    assert {n for n, p in policy.model.named_parameters() if p.requires_grad} == trainable
    assert [m.training for m in policy.model.modules()] == modes
    grads = torch.autograd.grad(velocity(policy, *INPUT).sum(), list(parameters(policy).values()))
    assert all(g is not None and g.isfinite().all() for g in grads)


def test_only_the_adapter_is_trained(policy: Policy) -> None:
    assert all(".default." in name and "lora_" in name for name in parameters(policy))


def test_targets() -> None:
    attention = add_lora(tiny_transformer(), rank=2, alpha=4.0, targets="attention", seed=0)
    linear = add_lora(tiny_transformer(), rank=2, alpha=4.0, targets="linear", seed=0)
    layers = {name.split(".transformer_blocks.")[1].split(".lora_")[0] for name in parameters(attention)}
    assert {layer.split(".attn.")[1] for layer in layers} == set(ATTENTION)
    assert all(".attn." in f".{layer}" for layer in layers)
    assert set(parameters(attention)) < set(parameters(linear))
    assert any(".ff." in name for name in parameters(linear))
    assert any(".attn2." in name for name in parameters(linear))


def test_the_adapter_depends_on_its_seed_alone() -> None:
    torch.manual_seed(123)
    first = adapter_state(add_lora(tiny_transformer(), rank=2, alpha=4.0, targets="linear", seed=3), "default")
    before = torch.get_rng_state()
    torch.manual_seed(77)
    second = adapter_state(add_lora(tiny_transformer(), rank=2, alpha=4.0, targets="linear", seed=3), "default")
    other = adapter_state(add_lora(tiny_transformer(), rank=2, alpha=4.0, targets="linear", seed=4), "default")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(before, before.clone())


@pytest.mark.parametrize("sampler", ["euler", "dpm2"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_samplers_are_exact_on_a_straight_flow(sampler: str, shift: float) -> None:
    x0, noise = torch.randn(2, 4, 3, 2, 2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    straight = lambda x, t: noise - x0  # noqa: E731
    found = sample(straight, noise, scheduler, sampler=sampler, steps=5)  # type: ignore[arg-type]
    torch.testing.assert_close(found, x0, rtol=0, atol=2e-5)


def test_the_samplers_orders() -> None:
    # Data N(0, 1/4): the exact velocity field, whose flow maps noise z to z / 2.
    def v(x: Tensor, t: Tensor) -> Tensor:
        s = t.reshape(-1, 1, 1, 1)
        return x * (s - 0.25 * (1 - s)) / (0.25 * (1 - s).square() + s.square())

    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)

    def error(sampler: str, steps: int) -> float:
        one = torch.ones(1, 1, 1, 1)
        return abs(float(sample(v, one, scheduler, sampler=sampler, steps=steps)) - 0.5)  # type: ignore[arg-type]

    assert error("euler", 40) / error("euler", 80) == pytest.approx(2.0, abs=0.2)
    assert error("dpm2", 40) / error("dpm2", 80) > 3.5
    assert error("dpm2", 80) < 0.3 * error("euler", 80)


def test_the_model_is_asked_at_the_schedulers_own_times() -> None:
    asked: list[float] = []

    def v(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t[0]))
        return torch.zeros_like(x)

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    samplers: tuple[Sampler, ...] = ("euler", "dpm2")
    for sampler in samplers:
        asked.clear()
        sample(v, torch.zeros(1, 1, 2, 2), scheduler, sampler=sampler, steps=4)
        assert asked == pytest.approx(times(scheduler, 4).tolist())
    sigma = torch.tensor([1.0, 0.75, 0.5, 0.25])
    assert times(FlowMatchEulerDiscreteScheduler(shift=1.0), 4)[0] == 1.0
    assert len(times(scheduler, 4)) == len(sigma)
    assert (times(scheduler, 4).diff() < 0).all()
    assert (times(scheduler, 4) > 0).all()


@pytest.mark.parametrize("adapter", ["default", "old", "base"])
def test_merged_weights_are_the_adapter_to_rounding(policy: Policy, adapter: Adapter) -> None:
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in policy.model.named_parameters()}
    flags = {name: p.requires_grad for name, p in policy.model.named_parameters()}
    with active(policy, adapter):
        expected = run(policy)
    with merged(policy, adapter):
        found = run(policy)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert {name: p.requires_grad for name, p in policy.model.named_parameters()} == flags
    for name, p in policy.model.named_parameters():
        same, pointer, value = before[name]
        assert p is same
        assert p.data_ptr() == pointer
        assert torch.equal(p, value)


def test_merged_weights_are_put_back_after_an_error(policy: Policy) -> None:
    before = run(policy)
    with pytest.raises(KeyError, match="inside"), merged(policy, "old"):
        raise KeyError("inside")
    assert torch.equal(run(policy), before)


def test_weights_of_low_precision_are_not_merged(policy: Policy) -> None:
    """Adding a small update to a bfloat16 weight would round most of it away."""
    policy.model.bfloat16()
    x_t, t, (embeds, pooled) = INPUT
    found = []
    for context in (active, merged):
        with context(policy, "old"), torch.no_grad():
            found.append(velocity(policy, x_t.bfloat16(), t.bfloat16(), (embeds.bfloat16(), pooled.bfloat16())))
    assert torch.equal(*found)


def test_rewards_that_use_random_numbers_say_the_same_at_every_evaluation() -> None:
    base = load_base("world")
    drifted = add_lora(base.transformer, rank=2, alpha=4.0, targets="linear", seed=0)

    def by_chance(images: Tensor, *_: object) -> Tensor:
        return torch.rand(len(images)) + random.random() + float(np.random.random())

    def scores(seed: int) -> Tensor:
        scorer, judging = Scorer({"chance": by_chance}, torch.device("cpu")), Judging(2, seed, Sampling("euler", 1, 2))
        prompts = plain_prompts(["a red circle"])
        return evaluate(drifted, base, adapter_state(drifted, "default"), prompts, scorer, judging)[0].values

    first = scores(0)
    torch.rand(3)
    assert torch.equal(scores(0), first)
    assert not torch.equal(scores(1), first)
