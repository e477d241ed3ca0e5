"""All K gradients of an affine loss from one backward pass: the cotangent is shared, only a weight per row differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from marble_core._check import describe, require, require_float

_Keys = tuple[str | None, str | None]  # names of a layer's weight and bias; None where not trainable
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
    fallback: Literal["error", "unsupported", "all"] = "error",
) -> SharedRows:
    """K weighted gradients from one forward and one backward: ``rows_k = sum_b weights_bk d signal_b / d theta``.

    With ``signal`` of ``affine_terms`` and ``weights = (r - 1/2) / B`` these are the reward parts ``h_k`` of the K
    gradients. The output gradient ``delta_b`` that reaches a linear layer is the same for every reward, so the layer
    itself forms ``sum_b weights_bk delta_b^T x_b`` for all K while the one backward goes by. A ``shared`` loss (the
    prox and KL terms, which no weight touches) costs a second backward through the same graph.

    Serves ``nn.Linear`` layers whose input starts with the B rows, LoRA's among them; a layer may be used several
    times and parameters may be tied. For other trainable parameters (a norm's scale, a convolution, a weight also used
    outside its layer) choose a ``fallback``. Autocast and non-reentrant checkpointing work as usual. Rows of several
    micro-batches add up. Nothing is left behind: hooks, ``.grad``, flags and modes are as before, also after an error.

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
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    require(len(params) > 0, "module", "at least one parameter with requires_grad", "none")
    state = _State(weights.detach(), strict=fallback == "error")
    with _patched(module, params, state) if fallback != "all" else nullcontext():
        signal, shared = _split(forward(), weights)
        state.check(signal)
        rows = _rows(signal, params, state, retain=shared is not None, fallback=fallback)
        state.mode = "plain"
        grads: dict[str, Tensor] = {}
        if shared is not None:
            require(shared.requires_grad, "forward()", "a shared loss that depends on a trainable parameter", "none")
            found = torch.autograd.grad(shared, list(params.values()), allow_unused=True)
            named = zip(params.items(), found, strict=True)
            grads = {name: torch.zeros_like(p) if g is None else g for (name, p), g in named}
    return SharedRows(rows, grads, signal.detach(), None if shared is None else shared.detach())


def _split(out: Tensor | tuple[Tensor, Tensor], weights: Tensor) -> tuple[Tensor, Tensor | None]:
    """``forward``'s result as ``(signal [B], shared or None)``, checked."""
    signal, shared = out if isinstance(out, tuple) else (out, None)
    B = weights.shape[0]
    ok = isinstance(signal, Tensor) and signal.is_floating_point() and signal.shape == torch.Size([B])
    require(ok, "forward()", f"signal of shape [B] = [{B}], as weights has rows", describe(signal))
    require(shared is None or shared.ndim == 0, "forward()", "a scalar shared loss", describe(shared))
    require(signal.requires_grad, "forward()", "a signal that depends on a trainable parameter", "none", _REENTRANT)
    return signal, shared


def _rows(
    signal: Tensor, params: dict[str, nn.Parameter], state: _State, *, retain: bool, fallback: str
) -> dict[str, Tensor]:
    """The one backward for all K, then K passes for what it could not serve, if the caller wants them."""
    K = state.weights.shape[1]
    rows = {name: torch.zeros(K, *p.shape, dtype=p.dtype, device=p.device) for name, p in params.items()}
    missing = list(params)
    if fallback != "all":
        keep = retain or fallback == "unsupported"
        ones = torch.ones_like(signal)
        found = torch.autograd.grad(signal, list(params.values()), ones, retain_graph=keep, allow_unused=True)
        rows |= {name: row.to(params[name].dtype) for name, row in state.rows.items()}
        missing = [name for name, g in zip(params, found, strict=True) if g is not None]
        fix = 'Freeze them, or pass fallback="unsupported" for K backward passes of their own.'
        ok, expected = fallback != "error" or not missing, "trainable parameters of nn.Linear layers alone"
        require(ok, "module", expected, ", ".join(missing), fix)
    state.mode = "silent"
    for k in range(K if missing else 0):
        last = k == K - 1 and not retain
        w = state.weights[:, k].to(signal)
        found = torch.autograd.grad(signal, [params[n] for n in missing], w, retain_graph=not last, allow_unused=True)
        for name, g in zip(missing, found, strict=True):
            if g is not None:
                rows[name][k] += g
    return rows


@dataclass
class _State:
    """What the patched layers of one call share."""

    weights: Tensor
    strict: bool
    mode: Literal["rows", "silent", "plain"] = "rows"
    rows: dict[str, Tensor] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    blind: set[str] = field(default_factory=set)

    def add(self, name: str, row: Tensor) -> None:
        """Add to the rows of a parameter, which may be used more than once."""
        self.rows[name] = self.rows[name] + row if name in self.rows else row

    def check(self, signal: Tensor) -> None:
        """Reentrant checkpointing runs its layers without gradients at first and would lose them here."""
        never = ", ".join(sorted(self.blind - self.seen))
        require(not never, "forward()", "trainable layers run with gradients", f"{never} without", _REENTRANT)
        if self.blind:
            reentrant = any(node.name().startswith("CheckpointFunction") for node in _graph(signal))
            require(not reentrant, "forward()", "no reentrant checkpointing", "CheckpointFunction", _REENTRANT)


def _graph(x: Tensor) -> Iterator[Any]:
    """Nodes of the autograd graph behind ``x``."""
    seen, todo = set(), [x.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            todo.extend(parent for parent, _ in node.next_functions)


@contextmanager
def _patched(module: nn.Module, params: dict[str, nn.Parameter], state: _State) -> Iterator[None]:
    """Every plain linear layer with a trainable parameter collects rows; undone on the way out."""
    names = {id(p): name for name, p in params.items()}
    layers = [(name, m) for name, m in module.named_modules() if _served(m)]
    try:
        for name, m in layers:
            m.forward = _forward(name or "module", m, names, state)
        yield
    finally:
        for _, m in layers:
            m.__dict__.pop("forward", None)


def _served(m: nn.Module) -> bool:
    """A linear layer whose forward is nn.Linear's own and whose weight is a plain parameter, one of them trainable."""
    own = isinstance(m, nn.Linear) and type(m).forward is nn.Linear.forward and "forward" not in m.__dict__
    return own and "weight" in m._parameters and any(p.requires_grad for p in m.parameters(recurse=False))


def _forward(name: str, m: nn.Module, names: dict[int, str], state: _State) -> Callable[[Tensor], Tensor]:
    """The forward of a linear layer that collects rows on the way back."""
    W, b = m.weight, m.bias
    keys = (names.get(id(W)), names.get(id(b)))

    def forward(input: Tensor) -> Tensor:
        B = state.weights.shape[0]
        rows_lead = input.ndim >= 2 and input.shape[0] == B
        if not torch.is_grad_enabled():
            state.blind.add(name)
        else:
            state.seen.add(name)
            fix = 'Keep the rows in the first dimension, or pass fallback="unsupported".'
            ok = rows_lead or not state.strict
            require(ok, name, f"an input [B, ..., in] with B = {B} rows", describe(input), fix)
            if rows_lead:
                return _SharedLinear.apply(input, W, b, keys, state)  # type: ignore[no-any-return,no-untyped-call]
        return F.linear(input, W, b)  # type: ignore[arg-type]

    return forward


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
        """Input gradient; then the rows, or the ordinary gradients, or nothing more."""
        x, W = ctx.saved_tensors
        state, (weight_key, bias_key) = ctx.state, ctx.keys
        with torch.autocast(delta.device.type, enabled=False):
            grad_x = (delta @ W.to(delta.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
            grad_W = grad_b = None
            x = x.to(delta.dtype)
            if state.mode == "rows":
                if weight_key:
                    state.add(weight_key, _weight_rows(state.weights, delta, x))
                if bias_key:
                    per_row = delta.reshape(len(delta), -1, delta.shape[-1]).sum(1, dtype=_wide(delta))
                    state.add(bias_key, state.weights.to(per_row).mT @ per_row)
            elif state.mode == "plain":
                flat = delta.reshape(-1, delta.shape[-1])
                if weight_key:
                    grad_W = (flat.mT @ x.reshape(-1, x.shape[-1])).to(W.dtype)
                if bias_key:
                    grad_b = flat.sum(0, dtype=_wide(flat)).to(W.dtype)
        return grad_x, grad_W, grad_b, None, None


def _wide(x: Tensor) -> torch.dtype:
    """The dtype in which rows are summed: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def _weight_rows(weights: Tensor, delta: Tensor, x: Tensor) -> Tensor:
    """``sum_b weights_bk delta_b^T x_b``: ``[K, out, in]`` from ``[B, K]``, ``[B, ..., out]``, ``[B, ..., in]``."""
    (B, K), n_out, n_in = weights.shape, delta.shape[-1], x.shape[-1]
    wide = _wide(delta)
    w = weights.to(device=x.device, dtype=wide)
    delta, x = delta.reshape(B, -1, n_out), x.reshape(B, -1, n_in)
    if delta.shape[1] > 1:  # many tokens a row: each row's own gradient first, then K sums that no token enters
        per_row = torch.bmm(delta.mT, x).to(wide)
        return (w.mT @ per_row.reshape(B, -1)).reshape(K, n_out, n_in)
    d, x = delta[:, 0].to(wide), x[:, 0].to(wide)
    if n_out <= n_in:  # one product, the K weights folded into the thinner side
        return ((w.unsqueeze(-1) * d.unsqueeze(1)).reshape(B, -1).mT @ x).reshape(K, n_out, n_in)
    return (d.mT @ (w.unsqueeze(-1) * x.unsqueeze(1)).reshape(B, -1)).reshape(n_out, K, n_in).transpose(0, 1)
