"""One optimiser step of the reference trainer: its gradient against plain autograd, for every rule and switch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
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
)
from reference.config.settings import BUILT_IN_RULES, Config, LossConfig, Rule, SolveConfig, rule_of
from reference.config.toml import from_toml
from reference.errors import TrainingError
from reference.policy.adapters import Policy, active, adapter_state, add_lora, load_adapter, parameters, velocity
from reference.processes.peers import World
from reference.step import balance as balance_module
from reference.step import gradients as rows_module
from reference.step.balance import (
    Balance,
    Step,
    StepResult,
    applied_coefficients,
    init_balance,
    is_finite,
    solve,
    step_gradient,
)
from reference.step.estimate import Signal, Tree
from reference.step.gradients import Rows, Whole, micro_batches

K, B = 3, 7
LOSS = LossConfig(beta=0.5, kl_weight=0.0)


def tiny_policy() -> Policy:
    """One SD3 block with an adapter that has drifted from the one that sampled, in float64."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=16,
        pooled_projection_dim=5,
        pos_embed_max_size=4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).double()
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
    return Rows(x0, noise, t, embeds, pooled, A, A_sum, half, torch.arange(B))


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
    rule: Rule,
    *,
    balance: Balance | None = None,
    loss: LossConfig = LOSS,
    refresh: bool = True,
    micro_batch: int = 3,
    previous: Tree | None = None,
    prior: Tensor | None = None,
    metric: Tree | None = None,
) -> StepResult:
    prior = torch.full((K,), 1 / K, dtype=torch.float64) if prior is None else prior
    balance = balance or init_balance(K, rule, parameters(policy))
    step = Step(refresh, prior, metric, previous)
    return step_gradient(policy, rows, balance, rule, loss, step, micro_batch=micro_batch)


def rule(balance: str = "marble", solve: SolveConfig | None = None) -> Rule:
    return rule_of(Config(balance=balance, solve=solve or SolveConfig()))


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
    torch.testing.assert_close(found.balance.coefficients.weights, smoothed, rtol=0, atol=1e-6)


def test_marble_paper_between_refreshes_combines_advantages(policy: Policy, rows: Rows) -> None:
    first = take(policy, rows, rule("marble-paper"))
    alpha = first.balance.coefficients.weights
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
    for switches in (SolveConfig(), SolveConfig(gradients="full"), SolveConfig(normalize=False, guard=0.0)):
        first = take(policy, rows, rule("marble", switches))
        again = take(policy, rows, rule("marble", switches), balance=first.balance, refresh=False)
        assert_trees(again.gradient, first.gradient)


def test_without_normalization_the_weights_are_the_min_norm_point_of_the_raw_gradients(
    policy: Policy, rows: Rows
) -> None:
    matrix = torch.stack([flat(x) for x in signal_gradients(policy, rows)[0]])
    found = take(policy, rows, rule("marble", SolveConfig(normalize=False, guard=0.0, rho=0.0)))
    w = min_norm_weights(matrix @ matrix.mT)
    torch.testing.assert_close(found.balance.applied, w, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["soft-min", "marble", "marble-paper", "uniform"])
@pytest.mark.parametrize("form", ["x0", "velocity"])
def test_the_shared_pass_equals_k_passes(policy: Policy, rows: Rows, name: str, form: Any) -> None:
    loss = dataclasses.replace(LOSS, form=form, kl_weight=0.1)
    routes: tuple[Literal["shared", "k_pass"], ...] = ("shared", "k_pass")
    shared, separate = (take(policy, rows, rule(name, SolveConfig(rows=route)), loss=loss) for route in routes)
    assert_trees(shared.gradient, separate.gradient)


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
    assert second.balance.norms[1] == first.balance.norms[1]
    torch.testing.assert_close(second.balance.coefficients.weights[1], first.balance.coefficients.weights[1])
    assert is_finite(second.gradient)


def test_rewards_that_are_all_silent_change_nothing(policy: Policy, rows: Rows) -> None:
    first = take(policy, rows, rule())
    silent = rows._replace(A=0 * rows.A)
    second = take(policy, silent, rule(), balance=first.balance)
    assert torch.equal(second.balance.applied, first.balance.applied)
    assert_trees(second.gradient, plain_gradient(policy, rows, torch.full((B,), 0.5, dtype=torch.float64)))


def only_the_first(gram: Tensor) -> Tensor:
    """A rule of somebody's own."""
    return torch.eye(gram.shape[0], dtype=gram.dtype)[0]


def test_a_rule_of_ones_own(policy: Policy, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    found: Callable[..., Tensor] = only_the_first
    monkeypatch.setattr("reference.step.balance.load_callable", lambda path, argument: found)
    own = rule("somebody.rules:only_the_first", SolveConfig(rho=0.0))
    result = take(policy, rows, own)
    assert result.balance.coefficients.weights.tolist() == [1.0, 0.0, 0.0]


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
    assert torch.equal(state.applied, init_balance(K, rule(), parameters(policy)).applied)


def test_combining_in_r_is_exact_with_clamping(policy: Policy) -> None:
    rows = some_rows(A_scale=4.0)
    w = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    state = init_balance(K, rule(), parameters(policy))._replace(applied=w)
    found = take(policy, rows, rule(), balance=state, refresh=False).gradient
    assert_trees(found, plain_gradient(policy, rows, combine_interpolation(w, interpolation(rows.A))))


def gram_of(trees: list[Tree]) -> Tensor:
    matrix = torch.stack([flat(x) for x in trees])
    return matrix @ matrix.mT


@pytest.mark.parametrize("refresh", [True, False])
def test_the_prior_alone_is_a_weighted_mean_of_signals(policy: Policy, rows: Rows, refresh: bool) -> None:
    prior = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    found = take(policy, rows, rule("soft-min"), prior=prior, refresh=refresh)
    assert_trees(found.gradient, plain_gradient(policy, rows, combine_interpolation(prior, interpolation(rows.A))))
    assert found.balance.applied.tolist() == [0.0] * K
    assert applied_coefficients(rule("soft-min"), found.balance, prior).tolist() == prior.tolist()


def test_the_cone_is_the_projection_of_the_priors_direction(policy: Policy, rows: Rows) -> None:
    prior = torch.tensor([0.1, 0.8, 0.1], dtype=torch.float64)
    opposed = rows._replace(A=torch.stack([rows.A[:, 0], rows.A[:, 1], -rows.A[:, 1] + 0.3 * rows.A[:, 2]], 1))
    cone = rule("soft-min", SolveConfig(solver="cone"))
    first = take(policy, opposed, cone, prior=prior)
    h, prox = signal_gradients(policy, opposed)
    c = cone_weights(gram_of(h), prior)
    assert (c > prior).any()  # the prior's direction lowers the third
    torch.testing.assert_close(first.balance.applied, c - prior, rtol=0, atol=1e-4)
    expected = {n: prox[n] + sum(float(c[k]) * h[k][n] for k in range(K)) for n in prox}
    assert_trees(first.gradient, expected, tol=1e-4)
    later = take(policy, opposed, cone, prior=prior, balance=first.balance, refresh=False)
    assert_trees(later.gradient, expected, tol=1e-4)
    for k in range(K):
        d = flat(first.gradient) - flat(prox)
        assert float(d @ flat(h[k])) > -1e-5 * float(d.norm() * flat(h[k]).norm())


def test_between_refreshes_the_cone_follows_the_prior(policy: Policy, rows: Rows) -> None:
    cone = rule("soft-min", SolveConfig(solver="cone"))
    state = take(policy, rows, cone).balance
    other = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    torch.testing.assert_close(applied_coefficients(cone, state, other), other + state.applied)


def test_one_refresh_shrinks_everything_to_the_prior(policy: Policy, rows: Rows) -> None:
    """With one refresh no error is known, so that no signal can be told from zero."""
    prior = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    found = take(policy, rows, rule("marble", SolveConfig(shrink=True, rho=0.0)), prior=prior)
    torch.testing.assert_close(found.balance.coefficients.weights, prior)
    h, _ = signal_gradients(policy, rows)
    norms = torch.stack([flat(x).norm() for x in h])
    torch.testing.assert_close(found.balance.applied, norms.mean() * prior / norms, rtol=1e-5, atol=0)


def test_a_step_along_moments(policy: Policy, rows: Rows) -> None:
    smooth = rule("marble", SolveConfig(gram="moments", step="moments", decay=0.5, rho=0.0, guard=0.0))
    others = some_rows()._replace(A=rows.A.flip(0))
    first = take(policy, others, smooth)
    second = take(policy, rows, smooth, balance=first.balance)
    (h, prox), (g, _) = signal_gradients(policy, rows), signal_gradients(policy, others)
    m = [{n: (0.5 * x[n] + 0.25 * y[n]) / 0.75 for n in x} for x, y in zip(h, g, strict=True)]
    c = harmonize(gram_of(m)).coefficients
    assert_trees(second.gradient, {n: prox[n] + sum(float(c[k]) * m[k][n] for k in range(K)) for n in prox}, tol=1e-4)


def test_the_metric_of_the_optimizer(policy: Policy, rows: Rows) -> None:
    metric = {n: torch.linspace(0.1, 3.0, p.numel()).reshape(p.shape).double() for n, p in parameters(policy).items()}
    found = take(policy, rows, rule("marble", SolveConfig(metric="adam", rho=0.0, guard=0.0)), metric=metric)
    h, _ = signal_gradients(policy, rows)
    c = harmonize(gram_of([{n: x[n] * metric[n].sqrt() for n in x} for x in h])).coefficients
    torch.testing.assert_close(found.balance.applied, c, rtol=1e-4, atol=1e-6)


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
    parts = [part for part, counts in micro_batches(rows, 3) if counts]
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
    balance, prior = init_balance(K, r, parameters(policy)), torch.full((K,), 1 / K, dtype=torch.float64)
    step = Step(refresh, prior, None, None)
    alone = step_gradient(policy, rows, balance, r, loss, step, micro_batch=3)
    per_row = [field for field in Rows._fields if field not in ("embeds", "pooled")]
    whole = Whole(World(0, 3), int((rows.half == 0).sum()), B)
    given: list[object] = []

    class Given(Exception):
        pass

    def give(tree: object, world: World) -> object:
        given.append(tree)
        raise Given

    for module in (balance_module, rows_module):
        monkeypatch.setattr(module, "all_reduce", give)
    for index in ([0, B - 1], [], list(range(1, B - 1))):
        own = rows._replace(**{field: getattr(rows, field)[index] for field in per_row})
        with pytest.raises(Given):
            step_gradient(policy, own, balance, r, loss, step, micro_batch=3, whole=whole)
    total = pytree.tree_map(lambda *xs: torch.stack(xs).sum(0), *given)
    for module in (balance_module, rows_module):
        monkeypatch.setattr(module, "all_reduce", lambda tree, world: total)
    result = step_gradient(policy, own, balance, r, loss, step, micro_batch=3, whole=whole)
    assert_trees(result.gradient, alone.gradient, 1e-9)
    assert result.metrics == pytest.approx(alone.metrics, rel=1e-9, nan_ok=True)
    assert result.balance.applied.tolist() == pytest.approx(alone.balance.applied.tolist(), rel=1e-8)
    if refresh:
        assert result.refresh is not None
        assert alone.refresh is not None
        for key in ("weights", "coefficients", "norms", "cosines"):
            assert result.refresh[key] == pytest.approx(alone.refresh[key], rel=1e-8), key


# --- what is logged is what was applied

RULE_FILES = sorted((Path(__file__).parents[1] / "reference" / "experiments" / "rules").glob("*.toml"))
EVERY_RULE = [*BUILT_IN_RULES, *(path.stem for path in RULE_FILES)]


def named_rule(name: str) -> Rule:
    files = {path.stem: path for path in RULE_FILES}
    return rule_of(from_toml(files[name], Config()) if name in files else Config(balance=name))


@pytest.mark.parametrize("name", EVERY_RULE)
def test_the_coefficients_that_are_logged_made_the_gradient(policy: Policy, rows: Rows, name: str) -> None:
    """At a refresh and between two: the logged coefficients, times K gradients by brute force, and the shared part."""
    r = dataclasses.replace(named_rule(name), refresh_every=2)
    if r.kind == "weighted-sum":  # its advantages are a weighted sum of the others
        rows = rows._replace(A_sum=rows.A @ torch.tensor([0.5, 0.3, 0.2], dtype=rows.A.dtype))
    h, prox = signal_gradients(policy, rows)
    prior = torch.tensor([1.0, 1.0, 1.0] if r.kind == "uniform" else [1.5, 0.9, 0.6], dtype=torch.float64) / 3
    state = init_balance(K, r, parameters(policy))
    for refresh in (True, False):
        found = take(policy, rows, r, balance=state, refresh=refresh, prior=prior)
        state, c = found.balance, found.coefficients
        full = r.gradients == "full" and r.kind == "solve"
        scale = float(c.sum()) if full and (refresh or r.amortize == "norm_corrected") else 1.0
        expected = {n: scale * prox[n] + sum(float(c[k]) * h[k][n] for k in range(K)) for n in prox}
        assert_trees(found.gradient, expected, tol=1e-4)
        if found.refresh is not None:
            assert found.refresh["coefficients"] == pytest.approx(c.tolist())


def own_shape(gram: Tensor) -> Tensor:
    return torch.ones(1)


def own_list(gram: Tensor) -> Any:
    return [1.0, 1.0, 1.0]


def own_nan(gram: Tensor) -> Tensor:
    return torch.full_like(gram[0], torch.nan)


def own_error(gram: Tensor) -> Tensor:
    raise KeyError("weights")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_shape", r"expected a float tensor of K = 3 weights, got torch\.float32 \[1\]"),
        ("own_list", r"expected a float tensor of K = 3 weights, got list"),
        ("own_nan", r"expected finite weights, got \[nan, nan, nan\]"),
        ("own_error", r"raised KeyError: 'weights' \(test_balance\.py, line \d+\)"),
    ],
)
def test_a_rule_of_one_s_own_that_fails_says_how(name: str, message: str) -> None:
    rule = rule_of(Config(balance=f"{__name__}:{name}"))
    gram, ones = torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    signal = Signal(gram, ones, ones, ones, ones, None, gram, gram)
    with pytest.raises(TrainingError, match=f"balance '.*:{name}':? {message}"):
        solve(rule, signal, ones / 3)
