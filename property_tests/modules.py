"""Modules whose rows are easy, hard or impossible to tell apart, alone and in trees, for ``shared_cotangent_rows``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from marble_core import shared_cotangent_rows

WIDTH = 3


def clip(m: nn.Module, dx: Any, dy: Any) -> Any:
    """A backward hook that is not linear."""
    return tuple(g.clamp(-0.01, 0.01) for g in dx)


class Scaled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


OTHERS: dict[str, Callable[[], nn.Module]] = {  # what a kind has beside its layer
    "norm": lambda: nn.LayerNorm(WIDTH),
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "attention": lambda: nn.MultiheadAttention(WIDTH, 1, batch_first=True),
    "convolution": lambda: nn.Conv1d(WIDTH, WIDTH, 1),
    "low rank": lambda: nn.Sequential(nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)),
    "experts": lambda: nn.Linear(WIDTH, WIDTH),
}


class Node(nn.Module):
    """One layer that does one thing; ``kind`` names it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layer = (Scaled if kind == "own forward" else nn.Linear)(WIDTH, WIDTH)
        if kind == "weight norm":
            parametrizations.weight_norm(self.layer)
        if kind == "orthogonal":
            parametrizations.orthogonal(self.layer)
        if kind in OTHERS:
            self.other = OTHERS[kind]()
        if kind == "linear hook":
            self.layer.weight.register_hook(lambda g: 0.5 * g)
        if kind == "hook that is not linear":
            self.layer.weight.register_hook(torch.sign)
        if kind == "backward hook that is not linear":
            self.layer.register_full_backward_hook(clip)
        if kind in ("frozen", "low rank"):
            self.layer.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:  # [B, WIDTH, WIDTH]
        y = getattr(self, "_" + self.kind.replace(" ", "_"), self._plain)(x)
        return x + torch.tanh(y)

    def _plain(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def _keyword(self, x: Tensor) -> Tensor:
        return self.layer(input=x)

    def _low_rank(self, x: Tensor) -> Tensor:
        return self.layer(x) + 2 * self.other(x)

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
        return self.layer(self.other(x))

    def _norm(self, x: Tensor) -> Tensor:
        return self.layer(self.other(x))

    def _attention(self, x: Tensor) -> Tensor:
        return self.layer(self.other(x, x, x, need_weights=False)[0])

    def _convolution(self, x: Tensor) -> Tensor:
        return self.layer(self.other(x))

    def _checkpoint(self, x: Tensor) -> Tensor:
        # torch deadlocks where two threads save the state of its generator and one of them collects garbage meanwhile
        return checkpoint(self.layer, x, use_reentrant=False, preserve_rng_state=False)

    def _autocast(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.layer(x).to(x.dtype)

    def _dropout(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.layer(x), 0.5)

    def _twice(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))

    def _outside(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.layer.weight

    def _functional_call(self, x: Tensor) -> Tensor:
        doubled = {name: 2 * p for name, p in self.layer.named_parameters()}
        return torch.func.functional_call(self.layer, doubled, (x,))

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

    # Not within a checkpoint, which computes layers again in the middle of the call.
    def _nested_in_itself(self, x: Tensor) -> Tensor:
        if self.layer.weight.requires_grad:
            weights = torch.ones(x.shape[0], 2).to(x)
            shared_cotangent_rows(lambda: self.layer(x.detach()).flatten(1).sum(1), self.layer, weights)
        return self.layer(x)


FINE = ("plain", "keyword", "low rank", "checkpoint", "dropout", "twice", "frozen", "unused", "nested")
KINDS = (
    *FINE,
    *("sequence first", "rolled", "sorted", "mixed", "batch norm", "norm", "attention", "convolution"),
    *("weight norm", "orthogonal", "own forward", "functional call", "linear hook", "hook that is not linear"),
    *("backward hook that is not linear", "outside", "vmap", "flattened", "experts"),
)


class Tree(nn.Module):
    """Modules one after the other, side by side, twice, or computed again on the way back."""

    def __init__(self, how: str, parts: list[nn.Module]) -> None:
        super().__init__()
        self.how, self.parts = how, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:  # [B, WIDTH, WIDTH]
        if self.how == "sum":
            return torch.stack([part(x) for part in self.parts]).mean(0)
        if self.how == "again":
            return checkpoint(self._chain, x, use_reentrant=False)
        return self._chain(self._chain(x)) if self.how == "loop" else self._chain(x)

    def _chain(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


class Case(NamedTuple):
    """A module whose signal for row b depends on row b alone, if its layers keep rows apart."""

    module: nn.Module
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

    def agrees(self, rows: dict[str, Tensor], tolerance: float) -> bool:
        """Whether rows are those of K passes, to rounding."""
        expected = self.passes()
        scale = max(1.0, *(float(x.abs().max()) for x in expected.values()))
        return all(float((rows[name] - x).abs().max()) <= tolerance * scale for name, x in expected.items())


def case_of(module: nn.Module, tied: bool, B: int, K: int, seed: int) -> Case:
    """In float64, with the first and the last plain layer's parameters shared if ``tied``."""
    torch.manual_seed(seed)
    for m in module.modules():
        if isinstance(m, nn.Linear | nn.Conv1d):
            m.reset_parameters()
        if isinstance(m, nn.BatchNorm1d):
            m.track_running_stats = False
    layers = [m.layer for m in module.modules() if isinstance(m, Node) and "weight" in m.layer._parameters]
    if tied and layers and not layers[0].weight._backward_hooks:
        layers[0].weight, layers[0].bias = layers[-1].weight, layers[-1].bias
    x = torch.randn(B, WIDTH, WIDTH, dtype=torch.float64, requires_grad=True)
    return Case(module.double(), x, torch.randn(B, K, dtype=torch.float64), seed)


def chain(kinds: list[str]) -> nn.Module:
    """Nodes one after the other; the last one is plain."""
    return nn.Sequential(*[Node(kind) for kind in (*kinds, "plain")])


def chains(kinds: tuple[str, ...] = KINDS) -> st.SearchStrategy[nn.Module]:
    """One to three nodes before a plain one."""
    return st.builds(chain, st.lists(st.sampled_from(kinds), min_size=1, max_size=3))


def _tree(how: str, parts: list[nn.Module], twice: bool) -> nn.Module:
    return Tree(how, [*parts, parts[0]] if twice else parts)


def trees(kinds: tuple[str, ...] = KINDS) -> st.SearchStrategy[nn.Module]:
    """Nodes nested in trees, some of them used in several places, with a plain node at the end."""
    leaves = st.builds(Node, st.sampled_from(kinds))
    hows = st.sampled_from(["chain", "sum", "loop", "again"])
    inner = st.recursive(
        leaves, lambda t: st.builds(_tree, hows, st.lists(t, min_size=1, max_size=3), st.booleans()), max_leaves=6
    )
    return st.builds(lambda tree: nn.Sequential(tree, Node("plain")), inner)


def cases(modules: st.SearchStrategy[nn.Module]) -> st.SearchStrategy[Case]:
    """With B rows, which may be as many as another dimension has, and K rewards."""
    B = st.sampled_from([WIDTH, WIDTH, 1, 2, 5])
    return st.builds(case_of, modules, st.booleans(), B, st.integers(1, 4), st.integers(0, 2**20))


def traces(module: nn.Module) -> list[tuple[Any, ...]]:
    """What a call must leave as it was."""
    keys = ("_backward_hooks", "_forward_hooks", "_forward_pre_hooks", "_backward_pre_hooks")
    return [
        (type(m), sorted(m.__dict__), m.training, *(len(getattr(m, key)) for key in keys)) for m in module.modules()
    ] + [(p.requires_grad, p.grad) for p in module.parameters()]
