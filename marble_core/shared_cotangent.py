"""All K gradients of an affine loss from one backward pass: the cotangent is shared, only a weight per row differs."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from marble_core._check import describe, require, require_float

_Keys = tuple[str | None, str | None]  # names of a layer's weight and bias; None where not trainable
_Fallback = Literal["error", "unsupported", "all"]
_REENTRANT = "Use torch.utils.checkpoint with use_reentrant=False, and run the layer with gradients enabled."


class SharedRows(NamedTuple):
    """K gradients and, if asked for, one more, keyed by the names of the trainable parameters.

    Attributes:
        rows: ``[K, *shape]`` each: ``sum_b weights_bk d signal_b``.
        shared: ``[*shape]`` each, the gradient of the shared loss; empty without one.
        signal: ``[B]``, detached.
        shared_loss: ``[]``, detached, or None.
    """

    rows: dict[str, Tensor]
    shared: dict[str, Tensor]
    signal: Tensor
    shared_loss: Tensor | None


def shared_cotangent_rows(
    forward: Callable[[], Tensor | tuple[Tensor, Tensor]],
    module: nn.Module,
    weights: Tensor,
    *,
    fallback: _Fallback = "error",
) -> SharedRows:
    """K weighted gradients from one forward and one backward: ``rows_k = sum_b weights_bk d signal_b / d theta``.

    With ``signal`` of ``affine_terms`` and ``weights = (r - 1/2) / B`` these are the reward parts ``h_k`` of the K
    gradients. The output gradient ``delta_b`` that reaches a linear layer is the same for every reward, so the layer
    itself forms ``sum_b weights_bk delta_b^T x_b`` for all K while the one backward goes by. A ``shared`` loss (the
    prox and KL terms, which no weight touches) costs a second backward through the same graph.

    Serves ``nn.Linear`` layers whose input starts with the B rows, LoRA's among them; a layer may be used several
    times and parameters may be tied. For other trainable parameters (a norm's scale, a convolution, a weight also used
    outside its layer) choose a ``fallback``. Rows must not mix inside the model (no batch statistics, no other
    dimension of size B in front): no check can see that. Autocast and non-reentrant checkpointing work as usual.
    Rows of several micro-batches add up: the caller sums them, then takes the Gram matrix. Nothing is left behind:
    forwards, hooks, ``.grad``, flags and modes are as before, also after an error.

    Args:
        forward: runs ``module`` and returns ``signal [B]``, entry b depending on row b alone, or ``(signal, shared)``
            with a scalar ``shared``.
        module: holds the trainable parameters (``requires_grad``).
        weights: ``[B, K]``, constants.
        fallback: what to do about parameters it cannot serve: ``"error"``; ``"unsupported"`` takes K ordinary
            backward passes for those alone; ``"all"`` takes K passes for everything (the reference).

    Returns:
        ``SharedRows``, gradients in the dtype of the parameter (summed over rows in float32 at least).

    Raises:
        ValueError: shapes are off, a parameter cannot be served (named), or a layer ran without gradients, as under
            reentrant checkpointing.

    Example:
        >>> layer, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> result = shared_cotangent_rows(lambda: layer(x).squeeze(-1), layer, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> result.rows["weight"]
        tensor([[[1., 3.]],
        <BLANKLINE>
                [[2., 4.]]])

    Reference: this project, docs/theory.md, section 8.
    """
    ok = fallback in ("error", "unsupported", "all")
    require(ok, "fallback", '"error", "unsupported" or "all"', describe(fallback))
    require_float("weights", weights, "[B, K]", (2,))
    require(min(weights.shape) > 0, "weights", "at least one row and one reward", describe(weights))
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    require(len(params) > 0, "module", "at least one parameter with requires_grad", "none")
    state = _State(weights.detach(), {id(p): name for name, p in params.items()})
    with _patched(module, state, serve=fallback != "all"):
        signal, shared = _split(forward(), weights)
        state.check(signal, shared)
        rows = _rows(signal, params, state, retain=shared is not None, fallback=fallback)
        grads: dict[str, Tensor] = {}
        if shared is not None:
            found = torch.autograd.grad(shared, list(params.values()), allow_unused=True)
            named = zip(params.items(), found, strict=True)
            grads = {name: torch.zeros_like(p) if g is None else g for (name, p), g in named}
    return SharedRows(rows, grads, signal.detach(), None if shared is None else shared.detach())


def _split(out: object, weights: Tensor) -> tuple[Tensor, Tensor | None]:
    """``forward``'s result as ``(signal [B], shared or None)``, checked."""
    if isinstance(out, tuple):
        require(len(out) == 2, "forward()", "signal or (signal, shared)", f"a tuple of {len(out)}")
    signal, shared = out if isinstance(out, tuple) else (out, None)
    B = weights.shape[0]
    ok = isinstance(signal, Tensor) and signal.is_floating_point() and signal.shape == torch.Size([B])
    require(ok, "forward()", f"signal of shape [B] = [{B}], as weights has rows", describe(signal))
    require(signal.requires_grad, "forward()", "a signal that depends on a trainable parameter", "none", _REENTRANT)
    if shared is not None:
        ok = isinstance(shared, Tensor) and shared.is_floating_point() and shared.ndim == 0
        require(ok, "forward()", "a scalar shared loss", describe(shared))
        expected = "a shared loss that depends on a trainable parameter"
        require(shared.requires_grad, "forward()", expected, "none", _REENTRANT)
    return signal, shared


def _rows(
    signal: Tensor, params: dict[str, nn.Parameter], state: _State, *, retain: bool, fallback: _Fallback
) -> dict[str, Tensor]:
    """The one backward for all K, then K passes for what it could not serve, if the caller wants them."""
    K, missing = state.weights.shape[1], list(params)
    if fallback != "all":
        state.mode, keep = "rows", retain or fallback == "unsupported"
        ones = torch.ones_like(signal)
        found = torch.autograd.grad(signal, list(params.values()), ones, retain_graph=keep, allow_unused=True)
        # A gradient that arrives by itself took a way that no patched layer saw.
        missing = [name for name, g in zip(params, found, strict=True) if g is not None]
        if fallback == "error":
            state.require_served(missing)
    rows = {
        name: state.rows[name].to(p.dtype) if name in state.rows else p.new_zeros((K, *p.shape), requires_grad=False)
        for name, p in params.items()
    }
    state.mode = "silent"
    for k in range(K if missing else 0):
        last = k == K - 1 and not retain
        w = state.weights[:, k].to(signal)
        found = torch.autograd.grad(signal, [params[n] for n in missing], w, retain_graph=not last, allow_unused=True)
        for name, g in zip(missing, found, strict=True):
            if g is not None:
                rows[name][k] += g
    state.mode = "plain"
    return rows


@dataclass
class _State:
    """What the patched layers of one call share."""

    weights: Tensor
    names: dict[int, str]  # of the trainable parameters, by identity
    # What a served layer does on the way back: ordinary gradients, as `forward` itself may take some, or the rows and
    # none for its parameters, or no more than the gradient of its input.
    mode: Literal["plain", "rows", "silent"] = "plain"
    rows: dict[str, Tensor] = field(default_factory=dict)
    misfits: dict[str, tuple[str, str]] = field(default_factory=dict)  # parameter: its layer, the input's shape
    seen: set[str] = field(default_factory=set)  # modules run with gradients, and without
    blind: set[str] = field(default_factory=set)

    def add(self, name: str, row: Tensor) -> None:
        """Add to the rows of a parameter, which may be used more than once."""
        self.rows[name] = self.rows[name] + row if name in self.rows else row

    def watch(self, name: str, m: nn.Module, args: object) -> None:
        """Forward pre-hook: whether a module with trainable parameters runs with gradients."""
        (self.seen if torch.is_grad_enabled() else self.blind).add(name)

    def check(self, signal: Tensor, shared: Tensor | None) -> None:
        """Reentrant checkpointing runs its layers without gradients at first and would lose them here."""
        never = ", ".join(sorted(self.blind - self.seen))
        require(not never, "forward()", "trainable layers run with gradients", f"{never} without", _REENTRANT)
        reentrant = any(node.name().startswith("CheckpointFunction") for node in _graph(signal, shared))
        require(not reentrant, "forward()", "no reentrant checkpointing", "CheckpointFunction", _REENTRANT)

    def require_served(self, missing: list[str]) -> None:
        """No parameter is missing, or an error that says which and why."""
        for layer, got in (self.misfits[name] for name in missing if name in self.misfits):
            expected = f"an input [B, ..., in] with B = {self.weights.shape[0]} rows"
            fix = 'Keep the rows in the first dimension, or pass fallback="unsupported".'
            require(False, layer, expected, got, fix)
        fix = 'Freeze them, or pass fallback="unsupported" for K backward passes of their own.'
        require(not missing, "module", "trainable parameters of nn.Linear layers alone", ", ".join(missing), fix)


def _graph(*outputs: Tensor | None) -> Iterator[Any]:
    """Nodes of the autograd graph behind ``outputs``."""
    seen, todo = set(), [x.grad_fn for x in outputs if x is not None]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            todo.extend(parent for parent, _ in node.next_functions)


@contextmanager
def _patched(module: nn.Module, state: _State, *, serve: bool) -> Iterator[None]:
    """Watch every module with a trainable parameter; plain linear layers collect rows. Undone on the way out."""
    watched, before = [], []
    try:
        for name, m in module.named_modules():
            if any(id(p) in state.names for p in m.parameters(recurse=False)):
                hook = functools.partial(state.watch, name or "module")
                watched.append(m.register_forward_pre_hook(hook))
                if serve and _is_plain_linear(m):
                    before.append((m, m.__dict__.get("forward")))
                    m.__dict__["forward"] = _forward(state, name or "module", m)
        yield
    finally:
        state.mode = "plain"
        for m, forward in before:
            del m.__dict__["forward"]
            if forward is not None:
                m.__dict__["forward"] = forward
        for handle in watched:
            handle.remove()


def _is_plain_linear(m: nn.Module) -> TypeGuard[nn.Linear]:
    """A linear layer that runs nn.Linear's own forward, or that of a call around this one, on a plain parameter."""
    forward = m.__dict__.get("forward")
    own = forward is None or getattr(forward, "__module__", None) == __name__
    return own and isinstance(m, nn.Linear) and type(m).forward is nn.Linear.forward and "weight" in m._parameters


def _forward(state: _State, name: str, m: nn.Linear) -> Callable[[Tensor], Tensor]:
    """``nn.Linear.forward`` that collects rows on the way back, for the parameters the layer was patched with."""
    weight, bias = m._parameters["weight"], m._parameters.get("bias")
    names = state.names.get(id(weight)), state.names.get(id(bias))

    def forward(input: Tensor) -> Tensor:
        W, b = m.weight, m.bias
        weight_key = names[0] if W is weight and W.requires_grad else None
        bias_key = names[1] if b is bias and b is not None and b.requires_grad else None
        keys = weight_key, bias_key
        if torch.is_grad_enabled() and (weight_key or bias_key):
            if input.ndim >= 2 and input.shape[0] == state.weights.shape[0]:
                return _SharedLinear.apply(input, W, b, keys, state)  # type: ignore[no-any-return,no-untyped-call]
            state.misfits.update({key: (name, describe(input)) for key in keys if key})
        return F.linear(input, W, b)

    # A compiled graph would keep the mode it was traced in. Dynamo takes a second to import, so not just for this.
    return torch.compiler.disable(forward) if "torch._dynamo" in sys.modules else forward  # type: ignore[no-untyped-call]


class _SharedLinear(torch.autograd.Function):
    """``F.linear`` whose backward gives the gradient of its input and hands K weighted ones to the state."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, keys: _Keys, state: _State) -> Tensor:
        """As ``F.linear``, autocast included."""
        ctx.save_for_backward(x, W)
        ctx.keys, ctx.state = keys, state
        return F.linear(x, W, b)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Input gradient; then the rows, or the ordinary gradients, or nothing more. Autograd casts them."""
        x, W = ctx.saved_tensors
        state, (weight_key, bias_key) = ctx.state, ctx.keys
        grad_x = grad_W = grad_b = None
        with torch.autocast(delta.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = delta @ W.to(delta.dtype)
            x = x.to(delta.dtype)
            # Tensors that stand in for parameters (functional_call, a parametrization) have no key: autograd leads on.
            if state.mode == "rows" and weight_key:
                state.add(weight_key, _weight_rows(state.weights, delta, x))
            elif ctx.needs_input_grad[1] and (state.mode == "plain" or not weight_key):
                grad_W = _tokens(delta).flatten(0, 1).mT @ _tokens(x).flatten(0, 1)
            if state.mode == "rows" and bias_key:
                per_row = _tokens(delta).sum(1, dtype=_wide(delta))
                state.add(bias_key, state.weights.to(per_row).mT @ per_row)
            elif ctx.needs_input_grad[2] and (state.mode == "plain" or not bias_key):
                grad_b = _tokens(delta).sum((0, 1), dtype=_wide(delta))
        return grad_x, grad_W, grad_b, None, None


def _wide(x: Tensor) -> torch.dtype:
    """The dtype in which rows are summed: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def _tokens(x: Tensor) -> Tensor:
    """``[B, ..., n]`` as ``[B, T, n]``."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def _weight_rows(weights: Tensor, delta: Tensor, x: Tensor) -> Tensor:
    """``sum_b weights_bk delta_b^T x_b``: ``[K, out, in]`` from ``[B, K]``, ``[B, ..., out]``, ``[B, ..., in]``."""
    (B, K), n_out, n_in = weights.shape, delta.shape[-1], x.shape[-1]
    wide = _wide(delta)
    w = weights.to(device=x.device, dtype=wide)
    delta, x = _tokens(delta), _tokens(x)
    if delta.shape[1] != 1:  # many tokens a row: each row's own gradient first, then K sums that no token enters
        per_row = torch.bmm(delta.mT, x).to(wide)
        return (w.mT @ per_row.reshape(B, n_out * n_in)).reshape(K, n_out, n_in)
    d, x = delta[:, 0].to(wide), x[:, 0].to(wide)
    if n_out <= n_in:  # one product, the K weights folded into the thinner side
        return ((w.unsqueeze(-1) * d.unsqueeze(1)).reshape(B, K * n_out).mT @ x).reshape(K, n_out, n_in)
    return (d.mT @ (w.unsqueeze(-1) * x.unsqueeze(1)).reshape(B, K * n_in)).reshape(n_out, K, n_in).transpose(0, 1)
