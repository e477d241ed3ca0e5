"""Rows are linear in their weights, whatever the model; every route agrees, and rows of parts of a batch add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from marble_core import combine_rows, flatten_rows, gradient_rows, shared_cotangent_rows, unflatten_like

KINDS = (
    "plain",
    "tokens",
    "two token dimensions",
    "one token",
    "no bias",
    "frozen weight",
    "twice",
    "tied",
    "lora",
    "checkpoint",
    "norm",
    "outside use",
    "unused",
)
UNSERVED = ("norm", "outside use")
ROUTES = ("shared", "fallback")


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Model(nn.Module):
    """A small model with one difficulty."""

    def __init__(self, kind: str, width: int, hidden: int, rank: int) -> None:
        super().__init__()
        self.kind = kind
        bias = kind != "no bias"
        self.first, self.second = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, width, bias=bias)
        self.third = nn.Linear(width, hidden)
        if kind == "tied":
            self.third.weight = self.first.weight
        if kind == "lora":
            self.requires_grad_(False)
            self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, hidden, bias=False)
        if kind == "norm":
            self.norm = nn.LayerNorm(width)
        if kind == "unused":
            self.unused = nn.Linear(2, 3)
        if kind == "frozen weight":
            self.first.weight.requires_grad_(False)

    def body(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.kind == "lora":
            y = y + self.up(self.down(x))
        return self.second(torch.tanh(y))

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.body, x, use_reentrant=False) if self.kind == "checkpoint" else self.body(x)
        if self.kind == "twice":
            x = self.body(torch.tanh(x))
        if self.kind == "norm":
            x = self.norm(x)
        x = self.third(torch.tanh(x))
        return F.linear(x, self.third.weight.mT) if self.kind == "outside use" else x


class Case(NamedTuple):
    """A model, an input, and weights of K rewards."""

    model: Model
    x: Tensor  # [B, ..., width]
    weights: Tensor  # [B, K]

    def signal(self, rows: slice = slice(None)) -> Callable[[], Tensor]:
        """The forward of some of the rows."""
        return lambda: self.model(self.x[rows]).sin().flatten(1).sum(1)

    def rows(self, weights: Tensor, route: str = "shared", part: slice = slice(None)) -> dict[str, Tensor]:
        """The shared route; K passes for what it cannot serve, or for everything."""
        fallback: Any = "all" if route == "fallback" else "unsupported" if self.model.kind in UNSERVED else "error"
        return shared_cotangent_rows(self.signal(part), self.model, weights, fallback=fallback).rows


def build(kind: str, sizes: tuple[int, int, int], B: int, K: int, T: int, seed: int) -> Case:
    torch.manual_seed(seed)
    tokens = {"tokens": (T,), "two token dimensions": (T, 2), "one token": (1,), "lora": (T,), "checkpoint": (T,)}
    x = randn(B, *tokens.get(kind, ()), sizes[0], seed=seed)
    return Case(Model(kind, *sizes).double(), x, randn(B, K, seed=seed + 1))


def cases(min_K: int = 1, min_B: int = 1) -> st.SearchStrategy[Case]:
    sizes = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))
    B, K, T = st.integers(min_B, 6), st.integers(min_K, 5), st.integers(2, 4)
    return st.builds(build, st.sampled_from(KINDS), sizes, B, K, T, st.integers(0, 2**20))


def assert_equal(rows: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To rounding, beside the size of the whole gradient."""
    assert rows.keys() == expected.keys()
    scale = max(1.0, *(float(x.abs().max()) for x in expected.values()))
    for name, x in expected.items():
        assert rows[name].shape == x.shape
        assert float((rows[name] - x).abs().max()) <= 1e-12 * scale, name


@given(cases())
def test_all_routes_agree(case: Case) -> None:
    params = {name: p for name, p in case.model.named_parameters() if p.requires_grad}

    def losses(params: dict[str, Tensor]) -> Tensor:
        y = torch.func.functional_call(case.model, params, (case.x,), tie_weights=True)
        return y.sin().flatten(1).sum(1) @ case.weights

    passes = [
        torch.autograd.grad(case.signal()(), list(params.values()), w, allow_unused=True, materialize_grads=True)
        for w in case.weights.unbind(1)
    ]
    expected = {name: torch.stack(column) for name, column in zip(params, zip(*passes, strict=True), strict=True)}
    for route in ROUTES:
        assert_equal(case.rows(case.weights, route), expected)
    if case.model.kind != "checkpoint":  # which torch.func does not take
        assert_equal(gradient_rows(losses, {name: p.detach() for name, p in params.items()}), expected)


def test_every_kind_is_drawn_and_is_what_it_says() -> None:
    for kind in KINDS:
        case = build(kind, (3, 4, 2), B=5, K=2, T=3, seed=0)
        rows = case.rows(case.weights)
        zero = {name for name, row in rows.items() if not row.any()}
        assert zero == ({"unused.weight", "unused.bias"} if kind == "unused" else set())
        assert ("third.weight" in rows) == (kind not in ("lora", "tied"))
        assert ("first.weight" in rows) == (kind not in ("lora", "frozen weight"))


@given(cases(), st.sampled_from(ROUTES), st.integers(1, 4), st.integers(0, 2**20))
def test_rows_are_linear_in_the_weights(case: Case, route: str, M: int, seed: int) -> None:
    mix = randn(case.weights.shape[1], M, seed=seed)
    rows = case.rows(case.weights, route)
    mixed = {name: torch.einsum("km,k...->m...", mix, row) for name, row in rows.items()}
    assert_equal(case.rows(case.weights @ mix, route), mixed)


@given(cases(), st.integers(0, 2**20))
def test_one_backward_of_the_combined_weights_is_the_combined_rows(case: Case, seed: int) -> None:
    """What a training step between refreshes relies on."""
    c = randn(case.weights.shape[1], seed=seed)
    params = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
    loss = (case.weights @ c) @ case.signal()()
    found = torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True)
    combined = combine_rows(case.rows(case.weights), c)
    assert_equal(combined, dict(zip(params, found, strict=True)))


@given(cases(), st.data())
def test_a_zero_column_gives_a_zero_row_and_leaves_the_others(case: Case, data: st.DataObject) -> None:
    K = case.weights.shape[1]
    k = data.draw(st.integers(0, K - 1))
    weights = case.weights.clone()
    weights[:, k] = 0
    found, full = case.rows(weights), case.rows(case.weights)
    others = [i for i in range(K) if i != k]
    for name, row in found.items():
        assert not row[k].any()  # exactly
        torch.testing.assert_close(row[others], full[name][others], rtol=1e-10, atol=1e-12)


@given(cases(min_K=2), st.randoms(use_true_random=False))
def test_relabelling_the_rewards_relabels_the_rows(case: Case, random: Any) -> None:
    order = list(range(case.weights.shape[1]))
    random.shuffle(order)
    rows = case.rows(case.weights)
    assert_equal(case.rows(case.weights[:, order]), {name: row[order] for name, row in rows.items()})


@given(cases(min_B=2), st.data())
def test_rows_of_parts_of_the_batch_add_up(case: Case, data: st.DataObject) -> None:
    B = case.weights.shape[0]
    cut = data.draw(st.integers(1, B - 1))
    parts = [case.rows(case.weights[part], part=part) for part in (slice(0, cut), slice(cut, B))]
    assert_equal({name: parts[0][name] + parts[1][name] for name in parts[0]}, case.rows(case.weights))


@given(cases(min_B=2), st.data())
def test_a_row_of_weight_zero_has_no_say(case: Case, data: st.DataObject) -> None:
    """Its input may be anything."""
    b = data.draw(st.integers(0, case.weights.shape[0] - 1))
    weights, x = case.weights.clone(), case.x.clone()
    weights[b], x[b] = 0, 3 * x[b] + 1
    assert_equal(case._replace(x=x).rows(weights), case.rows(weights))


@given(cases())
def test_the_shared_loss_changes_no_row_and_gets_its_own_gradient(case: Case) -> None:
    def forward() -> tuple[Tensor, Tensor]:
        y = case.model(case.x)
        return y.sin().flatten(1).sum(1), (y - 0.5).square().mean()

    fallback: Any = "unsupported" if case.model.kind in UNSERVED else "error"
    result = shared_cotangent_rows(forward, case.model, case.weights, fallback=fallback)
    assert_equal(result.rows, case.rows(case.weights))
    params = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(forward()[1], list(params.values()), allow_unused=True, materialize_grads=True)
    assert_equal(result.shared, dict(zip(params, found, strict=True)))


SHAPES = st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=4)


@given(SHAPES, st.integers(1, 4), st.integers(0, 2**20))
@example([(0,)], 1, 0)
@example([()], 3, 0)
def test_flattening_has_an_inverse_and_commutes_with_combining(shapes: list[Any], K: int, seed: int) -> None:
    like = [{"leaf": torch.zeros(shape)} for shape in shapes]
    rows = [{"leaf": randn(K, *shape, seed=seed + i)} for i, shape in enumerate(shapes)]
    flat, weights = flatten_rows(rows), randn(K, seed=seed)
    assert flat.shape == (K, sum(leaf["leaf"].numel() for leaf in like))
    torch.testing.assert_close(unflatten_like(flat, like), rows, rtol=0, atol=0)
    torch.testing.assert_close(flatten_rows(unflatten_like(flat, like)), flat, rtol=0, atol=0)
    torch.testing.assert_close(unflatten_like(weights @ flat, like), combine_rows(rows, weights))
