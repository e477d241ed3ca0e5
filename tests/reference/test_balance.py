"""One optimiser step of the reference trainer: its gradient against plain autograd, for every rule and switch."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from marble_core import (
    branch_losses,
    combine_interpolation,
    cone_weights,
    harmonize,
    interpolation,
    min_norm_weights,
    nft_loss,
    shared_cotangent_rows,
    soft_min_weights,
)
from marble_core.rules import Evidence, soft_min
from reference.config.settings import BUILT_IN_RULES, Config, LossConfig, SolveConfig
from reference.errors import ConfigError, TrainingError
from reference.policy.adapters import Policy, active, adapter_state, add_lora, load_adapter, parameters, velocity
from reference.processes.peers import ALONE, Peers
from reference.step import balance as balance_module
from reference.step import gradients as rows_module
from reference.step.balance import Balance, Step, StepResult, init_balance, is_finite, step_gradient
from reference.step.estimate import Tree
from reference.step.filling import filled_up
from reference.step.gradients import PER_ROW, Rows, Whole, micro_batches
from reference.step.method import Method, by_raw_sum, method_of
from tests.conftest import tiny_transformer

K, B = 3, 7
LOSS = LossConfig(beta=0.5, kl_weight=0.0)


def tiny_policy() -> Policy:
    """One SD3 block with an adapter that has drifted from the one that sampled, in float64."""
    transformer = tiny_transformer().double()
    policy = add_lora(transformer, rank=2, alpha=4.0, targets="linear", seed=0)
    generator = torch.Generator().manual_seed(1)
    for adapter, size in (("old", 0.1), ("default", 0.12)):
        noise = {k: size * torch.randn(v.shape, generator=generator) for k, v in adapter_state(policy, "old").items()}
        load_adapter(policy, adapter, noise)  # type: ignore[arg-type]
    policy.model.double()
    return policy


def some_rows(A_scale: float = 1.0) -> Rows:
    g = torch.Generator().manual_seed(2)
    x0, noise = torch.randn(2, B, 3, 4, 4, generator=g, dtype=torch.float64)
    t = torch.rand(B, generator=g, dtype=torch.float64)
    embeds = torch.randn(B, 2, 6, generator=g, dtype=torch.float64)
    pooled = torch.randn(B, 5, generator=g, dtype=torch.float64)
    A = A_scale * torch.randn(B, K, generator=g, dtype=torch.float64)
    A_sum = A_scale * torch.randn(B, generator=g, dtype=torch.float64)
    half = (torch.arange(B) >= B // 2).long()
    return Rows(x0, noise, t, embeds, pooled, A, A_sum, half, torch.arange(B), torch.ones(B))


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy()


@pytest.fixture(scope="module")
def rows() -> Rows:
    return some_rows()


def plain_gradient(policy: Policy, rows: Rows, r: Tensor, loss: LossConfig = LOSS) -> Tree:
    """Gradient of the mean NFT loss with interpolation ``r [B]``, by nothing but autograd."""
    t = rows.t.reshape(-1, 1, 1, 1)
    x_t = (1 - t) * rows.x0 + t * rows.noise
    with torch.no_grad(), active(policy, "old"):
        v_old = velocity(policy, x_t, rows.t, (rows.embeds, rows.pooled))
    v = velocity(policy, x_t, rows.t, (rows.embeds, rows.pooled))
    l_pos, l_neg = branch_losses(v, v_old, x0=rows.x0, noise=rows.noise, t=rows.t, beta=loss.beta, form=loss.form)
    scale = loss.a_max / loss.beta if loss.form == "x0" else 1.0
    objective = scale * nft_loss(r, l_pos, l_neg).mean()
    if loss.kl_weight:
        with torch.no_grad(), active(policy, "base"):
            v_ref = velocity(policy, x_t, rows.t, (rows.embeds, rows.pooled))
        objective = objective + loss.kl_weight * (v - v_ref).square().mean()
    trained = parameters(policy)
    return dict(zip(trained, torch.autograd.grad(objective, list(trained.values())), strict=True))


def take(
    policy: Policy,
    rows: Rows,
    method: Method,
    *,
    balance: Balance | None = None,
    loss: LossConfig = LOSS,
    refresh: bool = True,
    micro_batch: int = 3,
    previous: Tree | None = None,
    gains: Tensor | None = None,
    whole: Whole | None = None,
    epoch: Rows | None = None,
) -> StepResult:
    unknown = torch.full((K,), torch.nan, dtype=torch.float64)
    balance = balance or init_balance(K, method, parameters(policy))
    whole = whole or Whole(ALONE, int((rows.half == 0).sum()), len(rows.half))
    gains, epoch = unknown if gains is None else gains, epoch or rows
    step = Step(refresh, gains, epoch.A, epoch.A_sum, previous, micro_batch, whole)
    return step_gradient(policy, rows, balance, method, loss, step)


def rule(balance: str = "marble", solve: SolveConfig | None = None) -> Method:
    return method_of(Config(balance=balance, solve=solve or SolveConfig(), rewards=("a", "b", "c")))


def assert_trees(found: Tree, expected: Tree, tol: float = 1e-6) -> None:
    """Equal to rounding: a diffusers norm computes in float32, whatever the model's dtype."""
    scale = max(float(x.abs().max()) for x in expected.values())
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=tol * scale)


def flat(tree: Tree) -> Tensor:
    return torch.cat([x.flatten() for x in tree.values()])


def full_gradients(policy: Policy, rows: Rows) -> list[Tree]:
    """The paper's ``g_k``, one plain pass each."""
    r = interpolation(rows.A)
    return [plain_gradient(policy, rows, r[:, k]) for k in range(K)]


def signal_gradients(policy: Policy, rows: Rows) -> tuple[list[Tree], Tree]:
    """``h_k = g_k - g_prox``, and ``g_prox``."""
    prox = plain_gradient(policy, rows, torch.full((B,), 0.5, dtype=torch.float64))
    return [{n: g[n] - prox[n] for n in g} for g in full_gradients(policy, rows)], prox


@pytest.mark.parametrize("name", ["weighted-sum", "uniform"])
@pytest.mark.parametrize("refresh", [True, False])
def test_rules_without_a_solve_are_one_nft_loss(policy: Policy, rows: Rows, name: str, refresh: bool) -> None:
    A = rows.A_sum if name == "weighted-sum" else rows.A.mean(1)
    found = take(policy, rows, rule(name), refresh=refresh).gradient
    assert_trees(found, plain_gradient(policy, rows, interpolation(A)))


def test_marble_paper_at_a_refresh_is_equations_4_to_8(policy: Policy, rows: Rows) -> None:
    g = full_gradients(policy, rows)
    norms = torch.stack([flat(x).norm() for x in g])
    unit = torch.stack([flat(x) / n for x, n in zip(g, norms, strict=True)])
    alpha = min_norm_weights(unit @ unit.mT)
    expected = norms.mean() * (alpha @ unit)
    found = take(policy, rows, rule("marble-paper"))
    torch.testing.assert_close(flat(found.gradient), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    smoothed = 0.7 / K + 0.3 * alpha
    torch.testing.assert_close(found.balance.rule.coefficients.weights, smoothed, rtol=0, atol=1e-6)


def test_marble_paper_between_refreshes_combines_advantages(policy: Policy, rows: Rows) -> None:
    first = take(policy, rows, rule("marble-paper"))
    alpha = first.balance.rule.coefficients.weights
    found = take(policy, rows, rule("marble-paper"), balance=first.balance, refresh=False)
    assert_trees(found.gradient, plain_gradient(policy, rows, interpolation(rows.A @ alpha)))


def test_the_kl_of_the_papers_rule_is_not_scaled_by_the_solve(policy: Policy, rows: Rows) -> None:
    loss = dataclasses.replace(LOSS, kl_weight=0.3)
    half = torch.full((B,), 0.5, dtype=torch.float64)
    without = plain_gradient(policy, rows, half)
    pull = {n: x - without[n] for n, x in plain_gradient(policy, rows, half, loss).items()}
    for name in ("marble-paper", "marble", "uniform"):
        plain, pulled = (take(policy, rows, rule(name), loss=which).gradient for which in (LOSS, loss))
        assert_trees({n: pulled[n] - plain[n] for n in plain}, pull, 1e-5)


def test_min_norm_balances_the_signal_and_adds_the_shared_part_once(policy: Policy, rows: Rows) -> None:
    h, prox = signal_gradients(policy, rows)
    matrix = torch.stack([flat(x) for x in h])
    solution = harmonize(matrix @ matrix.mT)
    sharp = rule("marble", SolveConfig(rho=0.0))  # no memory: the fresh solution itself
    expected = solution.coefficients @ matrix + flat(prox)
    found = take(policy, rows, sharp)
    torch.testing.assert_close(flat(found.gradient), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_norm_corrected_coefficients_reproduce_the_refresh_in_one_pass(policy: Policy) -> None:
    rows = some_rows(A_scale=4.0)  # some advantages are clamped
    assert (rows.A.abs() > 5).any()
    for name in ("marble", "noise-aware", "cone", "upgrad"):
        first = take(policy, rows, rule(name))
        again = take(policy, rows, rule(name), balance=first.balance, refresh=False)
        assert_trees(again.gradient, first.gradient)


@pytest.mark.parametrize("name", ["soft-min", "marble", "marble-paper", "uniform"])
@pytest.mark.parametrize("form", ["x0", "velocity"])
def test_the_shared_pass_equals_k_passes(
    policy: Policy, rows: Rows, name: str, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = dataclasses.replace(LOSS, form=form, kl_weight=0.1)
    shared = take(policy, rows, rule(name), loss=loss)
    monkeypatch.setattr(rows_module, "shared_cotangent_rows", functools.partial(shared_cotangent_rows, fallback="all"))
    assert_trees(take(policy, rows, rule(name), loss=loss).gradient, shared.gradient)


@pytest.mark.parametrize("name", ["soft-min", "marble", "marble-paper", "weighted-sum"])
@pytest.mark.parametrize("refresh", [True, False])
def test_micro_batches_only_save_memory(policy: Policy, rows: Rows, name: str, refresh: bool) -> None:
    whole, parts = (take(policy, rows, rule(name), refresh=refresh, micro_batch=n) for n in (B, 2))
    assert_trees(parts.gradient, whole.gradient)
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-6, nan_ok=True)


def test_a_reward_without_signal_keeps_its_coefficient_and_moves_nobody(policy: Policy, rows: Rows) -> None:
    first = take(policy, rows, rule())
    silent = rows._replace(A=rows.A * torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    second = take(policy, silent, rule(), balance=first.balance)
    assert second.refresh is not None
    assert second.refresh["active"] == [True, False, True]
    assert second.balance.rule.norms[1] == first.balance.rule.norms[1]
    w, before = second.balance.rule.coefficients.weights, first.balance.rule.coefficients.weights
    torch.testing.assert_close(w[1], before[1])
    assert is_finite(second.gradient)


def test_rewards_that_are_all_silent_change_nothing(policy: Policy, rows: Rows) -> None:
    first = take(policy, rows, rule())
    silent = rows._replace(A=0 * rows.A)
    second = take(policy, silent, rule(), balance=first.balance)
    assert torch.equal(second.balance.rule.applied, first.balance.rule.applied)
    assert torch.equal(second.coefficients, first.balance.rule.applied)
    assert_trees(second.gradient, plain_gradient(policy, rows, torch.full((B,), 0.5, dtype=torch.float64)))


def only_the_first(gram: Tensor) -> Tensor:
    """A rule of somebody's own."""
    return torch.eye(gram.shape[0], dtype=gram.dtype)[0]


def test_a_solver_of_ones_own_takes_the_place_of_the_min_norm_point(policy: Policy, rows: Rows) -> None:
    own = rule(f"{__name__}:only_the_first", SolveConfig(rho=0.0))
    result = take(policy, rows, own)
    assert result.balance.rule.coefficients.weights.tolist() == [1.0, 0.0, 0.0]


def test_a_whole_rule_of_ones_own(policy: Policy, rows: Rows) -> None:
    """Every constructor with ``num_rewards`` will do, those of the core included."""
    gains = torch.tensor([0.4, 0.0, 0.1], dtype=torch.float64)
    own, named = (take(policy, rows, rule(name), gains=gains) for name in ("marble_core.rules:soft_min", "soft-min"))
    torch.testing.assert_close(own.coefficients, named.coefficients)
    assert torch.equal(own.coefficients, soft_min(K).update(soft_min(K).init(), Evidence(gains=gains))[1])
    assert_trees(own.gradient, named.gradient)


def test_cosines_of_this_batch_and_of_the_step_before(policy: Policy, rows: Rows) -> None:
    previous = plain_gradient(policy, rows, interpolation(rows.A[:, 0]))
    record = take(policy, rows, rule(), previous=previous).refresh
    assert record is not None
    h, _ = signal_gradients(policy, rows)
    cosines = [float(torch.cosine_similarity(flat(previous), flat(x), dim=0)) for x in h]
    assert record["next_cosines"] == pytest.approx(cosines, abs=1e-5)
    assert record["next_min_cosine"] == pytest.approx(min(cosines), abs=1e-5)
    assert record["null"] == pytest.approx(3**-0.5)
    assert take(policy, rows, rule()).refresh["next_cosines"] is None  # type: ignore[index]


def test_nothing_is_left_behind(policy: Policy, rows: Rows) -> None:
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    flags = {n: p.requires_grad for n, p in policy.model.named_parameters()}
    state = init_balance(K, rule(), parameters(policy))
    take(policy, rows, rule(), balance=state, loss=dataclasses.replace(LOSS, kl_weight=0.1))
    assert {n: p.requires_grad for n, p in policy.model.named_parameters()} == flags
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in policy.model.named_parameters())
    assert torch.equal(state.rule.applied, init_balance(K, rule(), parameters(policy)).rule.applied)


def test_combining_in_r_is_exact_with_clamping(policy: Policy) -> None:
    rows = some_rows(A_scale=4.0)
    w = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    state = init_balance(K, rule(), parameters(policy))
    state = state._replace(rule=state.rule._replace(applied=w))
    found = take(policy, rows, rule(), balance=state, refresh=False).gradient
    assert_trees(found, plain_gradient(policy, rows, combine_interpolation(w, interpolation(rows.A))))


@pytest.mark.parametrize("refresh", [True, False])
def test_soft_min_is_a_weighted_mean_of_signals(policy: Policy, rows: Rows, refresh: bool) -> None:
    gains, prior = torch.tensor([0.2, 0.0, 0.5], dtype=torch.float64), (0.6, 0.3, 0.1)
    method = rule("soft-min", SolveConfig(prior=prior, strength=3.0, keep=0.2))
    found = take(policy, rows, method, gains=gains, refresh=refresh)
    w = soft_min_weights(gains, torch.tensor(prior, dtype=torch.float64), 3.0, keep=0.2)
    assert_trees(found.gradient, plain_gradient(policy, rows, combine_interpolation(w, interpolation(rows.A))))
    torch.testing.assert_close(found.coefficients, w)


@pytest.mark.parametrize("refresh", [True, False])
def test_gdpo_makes_one_advantage_with_the_spread_of_its_parts(policy: Policy, rows: Rows, refresh: bool) -> None:
    """Spreads are those of the epoch, not of the step; soft-gdpo differs in its weights alone."""
    gains, epoch = torch.tensor([0.2, 0.0, 0.5], dtype=torch.float64), some_rows(A_scale=2.0)
    equal = torch.full((K,), 1 / K, dtype=torch.float64)
    for name, w in (("gdpo", equal), ("soft-gdpo", soft_min_weights(gains, equal, 4.0, keep=0.5))):
        found = take(policy, rows, rule(name), gains=gains, refresh=refresh, epoch=epoch)
        spread = epoch.A.square().mean(0).sqrt()
        c = w * (w @ spread) / (epoch.A @ w).square().mean().sqrt()
        torch.testing.assert_close(found.coefficients, c)
        assert_trees(found.gradient, plain_gradient(policy, rows, interpolation(rows.A @ c)))


def test_the_cone_is_the_projection_of_the_priors_direction(policy: Policy, rows: Rows) -> None:
    """Of the signals as the moments of both halves tell them: with halves that are alike, of this batch."""
    prior = torch.tensor([0.1, 0.8, 0.1], dtype=torch.float64)
    opposed = rows._replace(A=torch.stack([rows.A[:, 0], rows.A[:, 1], -rows.A[:, 1] + 0.3 * rows.A[:, 2]], 1))
    twice = Rows(*(torch.cat([x, x]) for x in opposed))._replace(embeds=rows.embeds, pooled=rows.pooled)
    twice = twice._replace(half=(torch.arange(2 * B) >= B).long())
    cone = rule("cone", SolveConfig(prior=(0.1, 0.8, 0.1)))
    first = take(policy, twice, cone)
    h, prox = signal_gradients(policy, opposed)
    c = cone_weights(gram_of(h), prior)
    assert (c > prior).any()  # the prior's direction lowers the third
    torch.testing.assert_close(first.coefficients, c, rtol=0, atol=1e-4)
    expected = {n: prox[n] + sum(float(c[k]) * h[k][n] for k in range(K)) for n in prox}
    assert_trees(first.gradient, expected, tol=1e-4)
    assert_trees(take(policy, twice, cone, balance=first.balance, refresh=False).gradient, expected, tol=1e-4)
    for k in range(K):
        d = flat(first.gradient) - flat(prox)
        assert float(d @ flat(h[k])) > -1e-5 * float(d.norm() * flat(h[k]).norm())


def gram_of(trees: list[Tree]) -> Tensor:
    matrix = torch.stack([flat(x) for x in trees])
    return matrix @ matrix.mT


@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize("name", ["marble-paper", "marble", "uniform"])
def test_rows_of_weight_0_count_for_nothing(policy: Policy, rows: Rows, name: str, refresh: bool) -> None:
    loss = dataclasses.replace(LOSS, kl_weight=0.3)
    more = filled_up(rows, 5, 6)
    assert more.half.tolist() == [0] * 5 + [1] * 6
    assert more.weight.tolist() == [1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0]
    whole = Whole(ALONE, B // 2, B)
    plain, filled = (take(policy, x, rule(name), loss=loss, refresh=refresh, whole=whole) for x in (rows, more))
    assert_trees(filled.gradient, plain.gradient, 1e-9)
    assert filled.metrics == pytest.approx(plain.metrics, rel=1e-9)


def test_halves_with_one_image_are_the_whole(policy: Policy, rows: Rows) -> None:
    alone = rows._replace(half=torch.zeros(B, dtype=torch.long))
    assert_trees(take(policy, alone, rule()).gradient, take(policy, rows, rule()).gradient)


def test_signal_shares_are_of_independent_halves(policy: Policy, rows: Rows) -> None:
    record = take(policy, rows, rule()).refresh
    assert record is not None
    n = int((rows.half == 0).sum())
    parts = [Rows(*(x[part] for x in rows)) for part in (slice(0, n), slice(n, B))]
    r = [interpolation(part.A) for part in parts]
    prox = [plain_gradient(policy, part, torch.full((len(part.t),), 0.5, dtype=torch.float64)) for part in parts]
    for k in range(K):
        a, b = (
            2 * len(part.t) / B * (flat(plain_gradient(policy, part, r[i][:, k])) - flat(prox[i]))
            for i, part in enumerate(parts)
        )
        assert record["signal_share"][k] == pytest.approx(float(a @ b / ((a + b) / 2).square().sum()), abs=1e-4)


def test_micro_batches_cover_every_row_once(rows: Rows) -> None:
    parts = list(micro_batches(rows, 3))
    assert [len(part.t) for part in parts] == [3, 3, 1]
    for name in set(Rows._fields) - {"embeds", "pooled"}:
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(rows, name))
    assert all(torch.equal(part.embeds, rows.embeds) and torch.equal(part.pooled, rows.pooled) for part in parts)


@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize("name", ["marble-paper", "marble", "soft-min", "weighted-sum"])
def test_shares_of_the_rows_that_are_added_up_make_the_same_step(
    policy: Policy, rows: Rows, monkeypatch: pytest.MonkeyPatch, name: str, refresh: bool
) -> None:
    """What each of three processes, one of them without rows, gives to the all-reduce is added up and given back."""
    loss, r = dataclasses.replace(LOSS, kl_weight=0.3), rule(name)
    balance = init_balance(K, r, parameters(policy))
    alone = take(policy, rows, r, balance=balance, loss=loss, refresh=refresh)
    whole = Whole(Peers(0, 3), int((rows.half == 0).sum()), B)
    given: list[object] = []

    class Given(Exception):
        pass

    def give(tree: object, peers: Peers) -> object:
        given.append(tree)
        raise Given

    for module in (balance_module, rows_module):
        monkeypatch.setattr(module, "all_reduce", give)
    for index in ([0, B - 1], [], list(range(1, B - 1))):
        own = rows._replace(**{field: getattr(rows, field)[index] for field in PER_ROW})
        with pytest.raises(Given):
            take(policy, own, r, balance=balance, loss=loss, refresh=refresh, whole=whole, epoch=rows)
    total = pytree.tree_map(lambda *xs: torch.stack(xs).sum(0), *given)
    for module in (balance_module, rows_module):
        monkeypatch.setattr(module, "all_reduce", lambda tree, peers: total)
    result = take(policy, own, r, balance=balance, loss=loss, refresh=refresh, whole=whole, epoch=rows)
    assert_trees(result.gradient, alone.gradient, 1e-9)
    assert result.metrics == pytest.approx(alone.metrics, rel=1e-9, nan_ok=True)
    for x, y in zip(pytree.tree_leaves(result.balance), pytree.tree_leaves(alone.balance), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-12, equal_nan=True)
    if refresh:
        assert result.refresh is not None
        assert alone.refresh is not None
        for key in ("weights", "coefficients", "norms", "cosines"):
            assert result.refresh[key] == pytest.approx(alone.refresh[key], rel=1e-8), key


# --- what is logged is what was applied

CANDIDATES = ("upgrad", "upgrad_halves", "min_norm_halves", "raw_min_norm_shrunk", "soft_min_cone", "noise_aware_soft")
EVERY_RULE = [*BUILT_IN_RULES, *(f"reference.experiments.candidates:{name}" for name in CANDIDATES)]


@pytest.mark.parametrize("name", EVERY_RULE)
def test_the_coefficients_that_are_logged_made_the_gradient(policy: Policy, rows: Rows, name: str) -> None:
    """At a refresh and between two: the logged coefficients, times K gradients by brute force, and the shared part."""
    method = rule(name)
    if method.weigh is by_raw_sum:  # its advantages are a weighted sum of the others
        rows = rows._replace(A_sum=rows.A @ torch.tensor([0.5, 0.3, 0.2], dtype=rows.A.dtype))
    h, prox = signal_gradients(policy, rows)
    gains = torch.tensor([0.0, 0.3, 0.5], dtype=torch.float64)
    state = init_balance(K, method, parameters(policy))
    for refresh in (True, False):
        found = take(policy, rows, method, balance=state, refresh=refresh, gains=gains)
        state, c = found.balance, found.coefficients
        scale = float(c.sum()) if method.full and refresh else 1.0
        expected = {n: scale * prox[n] + sum(float(c[k]) * h[k][n] for k in range(K)) for n in prox}
        assert_trees(found.gradient, expected, tol=1e-4)
        if found.refresh is not None:
            assert found.refresh["coefficients"] == pytest.approx(c.tolist())


WEIGHTS = torch.full((K,), 1 / K, dtype=torch.float64)


def own_shape(gram: Tensor) -> Tensor:
    return torch.ones(1)


def own_list(gram: Tensor) -> Any:
    return [1.0, 1.0, 1.0]


def own_nan(gram: Tensor) -> Tensor:
    return torch.full_like(gram[0], torch.nan)


def own_error(gram: Tensor) -> Tensor:
    raise KeyError("weights")


def rule_shape(num_rewards: int) -> Any:
    return soft_min(num_rewards + 1)._replace(update=lambda state, evidence: (state, torch.ones(num_rewards + 1)))


def rule_error(num_rewards: int) -> Any:
    def update(state: Any, evidence: Evidence) -> Any:
        raise KeyError("weights")

    return soft_min(num_rewards)._replace(update=update)


def rule_count(num_rewards: int) -> Any:
    return soft_min(num_rewards)._replace(init=lambda: torch.tensor(0), update=lambda n, e: (int(n) + 1, WEIGHTS))


def rule_grows(num_rewards: int) -> Any:
    return soft_min(num_rewards)._replace(init=lambda: (WEIGHTS,), update=lambda seen, e: ((*seen, WEIGHTS), WEIGHTS))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "rule_count",
            r"expected the state after an update to be tensors, .* got int\. Write a number as torch\.tensor",
        ),
        ("rule_grows", r"expected the state after an update to be 1 tensors in the places of .*, got 2"),
        ("own_shape", r"expected a float tensor of K = 3 weights, got torch\.float32 \[1\]"),
        ("own_list", r"expected a float tensor of K = 3 weights, got list"),
        ("own_nan", r"expected finite weights, got \[nan, nan, nan\]"),
        ("own_error", r"raised KeyError: 'weights' \(test_balance\.py, line \d+\)"),
        ("rule_shape", r"expected a float tensor of K = 3 weights, got torch\.float32 \[4\]"),
        ("rule_error", r"raised KeyError: 'weights' \(test_balance\.py, line \d+\)"),
    ],
)
def test_a_rule_of_one_s_own_that_fails_says_how(policy: Policy, rows: Rows, name: str, message: str) -> None:
    with pytest.raises(TrainingError, match=f"balance '.*:{name}':? {message}"):
        take(policy, rows, rule(f"{__name__}:{name}"))


def no_rule(num_rewards: int) -> Any:
    return [1.0] * num_rewards


def raises(num_rewards: int) -> Any:
    raise ValueError("no")


def starts_with_a_number(num_rewards: int) -> Any:
    return soft_min(num_rewards)._replace(init=lambda: 0)


def starts_badly(num_rewards: int) -> Any:
    return soft_min(num_rewards)._replace(init=lambda: raises(num_rewards))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_rule", r"expected a marble_core\.rules\.Rule for num_rewards = 3, got list"),
        ("raises", r"raised ValueError: no \(test_balance\.py, line \d+\)"),
        ("starts_badly", r"raised ValueError: no \(test_balance\.py, line \d+\)"),
        ("starts_with_a_number", r"expected init\(\) to return tensors, .* got int\. Write a number as torch\.tensor"),
        ("nobody", "nobody"),
    ],
)
def test_a_constructor_that_makes_no_rule_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rule(f"{__name__}:{name}")


def test_what_a_rule_of_ones_own_would_ignore_or_does_not_say_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"solve\.rho: expected none with balance 'marble_core\.rules:noise_aware'"):
        rule("marble_core.rules:noise_aware", SolveConfig(rho=0.1))
    with pytest.raises(ConfigError, match=r"balance 'torch:add': expected a function that takes num_rewards .*Wrap it"):
        rule("torch:add")
