"""On any tree of modules ``shared_cotangent_rows(verify=True)`` equals K autograd passes, or says which parameter."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from marble_core import shared_cotangent_rows

WIDTH = 3


def clip(m: nn.Module, dx: Any, dy: Any) -> Any:
    """A backward hook that is not linear."""
    return tuple(g.clamp(-0.01, 0.01) for g in dx)


class Node(nn.Module):
    """One layer that does one thing; ``kind`` names it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layer = nn.Linear(WIDTH, WIDTH)
        if kind == "parametrization":
            parametrizations.weight_norm(self.layer)
        if kind == "norm":
            self.norm: nn.Module = nn.LayerNorm(WIDTH)
        if kind == "batch norm":
            self.norm = nn.BatchNorm1d(WIDTH)
        if kind == "linear hook":
            self.layer.weight.register_hook(lambda g: 0.5 * g)
        if kind == "hook that is not linear":
            self.layer.weight.register_hook(torch.sign)
        if kind == "backward hook that is not linear":
            self.layer.register_full_backward_hook(clip)
        if kind == "frozen":
            self.layer.requires_grad_(False)
        if kind == "experts":
            self.other = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # [B, WIDTH, WIDTH]
        y = getattr(self, "_" + self.kind.replace(" ", "_"), self._plain)(x)
        return x + torch.tanh(y)

    def _plain(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def _sequence_first(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1)

    def _rolled(self, x: Tensor) -> Tensor:
        return self.layer(x.roll(1, 0)).roll(-1, 0)

    def _sorted(self, x: Tensor) -> Tensor:
        order = x.flatten(1).sum(1).argsort()
        return self.layer(x[order])[order.argsort()]

    def _mixed(self, x: Tensor) -> Tensor:
        return self.layer(x - x.mean(0))

    def _batch_norm(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x))

    def _norm(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x))

    def _checkpoint(self, x: Tensor) -> Tensor:
        # torch deadlocks where two threads save the state of its generator and one of them collects garbage meanwhile
        return checkpoint(self.layer, x, use_reentrant=False, preserve_rng_state=False)

    def _autocast(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.layer(x.float()).to(x.dtype)

    def _dropout(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.layer(x), 0.5)

    def _twice(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))

    def _outside(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.layer.weight

    def _vmap(self, x: Tensor) -> Tensor:
        return torch.func.vmap(self.layer)(x)

    def _flattened(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def _experts(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        first = tokens.sum(1) > 0
        out = torch.zeros_like(tokens)
        out[first], out[~first] = self.layer(tokens[first]), self.other(tokens[~first])
        return out.unflatten(0, x.shape[:2])

    def _unused(self, x: Tensor) -> Tensor:
        return torch.sin(x)

    def _nested(self, x: Tensor) -> Tensor:
        inner = nn.Linear(WIDTH, 1).to(x.dtype)
        shared_cotangent_rows(lambda: inner(x.detach()).flatten(1).sum(1), inner, torch.ones(x.shape[0], 2).to(x))
        return self.layer(x)


FINE = ("plain", "checkpoint", "dropout", "twice", "frozen", "unused", "nested")
KINDS = (
    *FINE,
    *("sequence first", "rolled", "sorted", "mixed", "batch norm", "norm", "parametrization", "linear hook"),
    *("hook that is not linear", "backward hook that is not linear", "outside", "vmap", "flattened", "experts"),
)


class Case(NamedTuple):
    """A chain of nodes, two of which may share a layer, with a norm at its end that needs no gradient."""

    module: nn.Sequential
    x: Tensor  # [B, WIDTH, WIDTH]; B may be WIDTH
    weights: Tensor  # [B, K]
    seed: int

    def forward(self) -> Tensor:
        """The signal ``[B]``, dropout drawn alike in every call."""
        torch.manual_seed(self.seed)
        return self.module(self.x).sin().flatten(1).sum(1)

    def passes(self) -> dict[str, Tensor]:
        """K ordinary backward passes, one graph each."""
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        rows = []
        for w in self.weights.unbind(1):
            found = torch.autograd.grad(self.forward(), list(named.values()), w, allow_unused=True)
            rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), found, strict=True)])
        return {name: torch.stack(column) for name, column in zip(named, zip(*rows, strict=True), strict=True)}


def build(kinds: list[str], tied: bool, B: int, K: int, seed: int) -> Case:
    torch.manual_seed(seed)
    nodes = [Node(kind) for kind in (*kinds, "plain")]
    if tied and "parametrization" not in kinds:
        nodes[0].layer.weight = nodes[-1].layer.weight
    module = nn.Sequential(*nodes).double()
    for m in module.modules():
        if isinstance(m, nn.BatchNorm1d):
            m.track_running_stats = False
    x = torch.randn(B, WIDTH, WIDTH, dtype=torch.float64, requires_grad=True)
    return Case(module, x, torch.randn(B, K, dtype=torch.float64), seed)


def cases(kinds: tuple[str, ...] = KINDS) -> st.SearchStrategy[Case]:
    B = st.sampled_from([WIDTH, WIDTH, 1, 2, 5])
    several = st.lists(st.sampled_from(kinds), min_size=1, max_size=3)
    return st.builds(build, several, st.booleans(), B, st.integers(1, 4), st.integers(0, 2**20))


def traces(module: nn.Module) -> list[tuple[Any, ...]]:
    """What a call must leave as it was."""
    keys = ("_backward_hooks", "_forward_hooks", "_forward_pre_hooks", "_backward_pre_hooks")
    return [
        (type(m), sorted(m.__dict__), m.training, *(len(getattr(m, key)) for key in keys)) for m in module.modules()
    ] + [(p.requires_grad, p.grad) for p in module.parameters()]


@given(cases(), st.sampled_from(["error", "unsupported"]))
def test_k_passes_or_an_error_that_names_a_parameter(case: Case, fallback: Any) -> None:
    before = traces(case.module)
    names = [name for name, _ in case.module.named_parameters()]
    try:
        found = shared_cotangent_rows(case.forward, case.module, case.weights, fallback=fallback, verify=True)
    except ValueError as error:
        message = str(error)
        assert any(name.rpartition(".")[0] in message for name in names)
    else:
        expected = case.passes()
        scale = max(1.0, *(float(x.abs().max()) for x in expected.values()))
        for name, x in expected.items():
            assert float((found.rows[name] - x).abs().max()) <= 1e-10 * scale, name
        assert all(not expected[name].any() for name in found.unreached)
    assert traces(case.module) == before


@given(cases(FINE), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_what_is_served_is_never_refused(case: Case, dtype: torch.dtype) -> None:
    case = case._replace(module=case.module.to(dtype), x=case.x.detach().to(dtype))
    shared_cotangent_rows(case.forward, case.module, case.weights, verify=True)


@pytest.mark.parametrize("kind", ["sequence first", "rolled", "sorted", "mixed", "batch norm", "experts"])
def test_rows_that_move_are_found(kind: str) -> None:
    wrong = 0
    for seed in range(20):
        case = build(["plain", kind], False, WIDTH, 2, seed)
        expected = case.passes()
        found = shared_cotangent_rows(case.forward, case.module, case.weights, fallback="unsupported").rows
        agrees = all(torch.allclose(found[name], x, atol=1e-10) for name, x in expected.items())
        wrong += not agrees
        refused = pytest.raises(ValueError, match=r"module: expected rows that agree .* [01]\.(layer|other|norm)")
        with nullcontext() if agrees else refused:
            shared_cotangent_rows(case.forward, case.module, case.weights, fallback="unsupported", verify=True)
    assert wrong > 0  # the difficulty is there


@pytest.mark.parametrize("kind", ["linear hook", "hook that is not linear"])
def test_gradient_hooks_take_k_passes(kind: str) -> None:
    case = build([kind], False, 4, 3, seed=1)
    with pytest.raises(ValueError, match=r"hooks of 0\.layer\.weight"):
        shared_cotangent_rows(case.forward, case.module, case.weights)
    found = shared_cotangent_rows(case.forward, case.module, case.weights, fallback="unsupported").rows
    for name, x in case.passes().items():
        assert torch.allclose(found[name], x, rtol=1e-12)


def test_threads_get_what_one_gets() -> None:
    case = build(["plain", "twice", "checkpoint"], True, 4, 3, seed=2)
    expected = case.passes()
    errors: list[BaseException] = []

    def forward() -> Tensor:
        return case.module(case.x).sin().flatten(1).sum(1)

    def collect() -> None:
        try:
            for _ in range(20):
                found = shared_cotangent_rows(forward, case.module, case.weights, verify=True).rows
                assert all(torch.allclose(found[name], x, rtol=1e-10) for name, x in expected.items())
        except BaseException as error:
            errors.append(error)

    def train() -> None:
        try:
            plain = torch.autograd.grad(forward().sum(), list(case.module.parameters()))
            for _ in range(40):
                again = torch.autograd.grad(forward().sum(), list(case.module.parameters()))
                assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(plain, again, strict=True))
        except BaseException as error:
            errors.append(error)

    before = traces(case.module)
    threads = [threading.Thread(target=work, daemon=True) for work in (collect, collect, collect, train)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert not errors
    assert traces(case.module) == before
