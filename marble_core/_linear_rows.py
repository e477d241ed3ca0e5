"""Linear layers whose way back gives the gradients of K weighted sums of rows: what ``shared_cotangent`` patches in."""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from marble_core._check import wide

Keys = tuple[str | None, str | None]  # names of a layer's weight and bias; None where not trainable


class Collector(Protocol):
    """Where rows go: the state of a call.

    Attributes:
        weights: ``[B, K]``.
        names: of the trainable parameters, by identity.
        mode: what a served layer does on the way back: ordinary gradients, as the caller's function itself may take
            some, or the rows and none for its parameters, or no more than the gradient of its input.
    """

    weights: Tensor
    names: dict[int, str]
    mode: Literal["plain", "rows", "silent"]

    def add(self, name: str, row: Tensor) -> None:
        """Add to the rows of a parameter, which may be used more than once."""


class SharedLinear(torch.autograd.Function):
    """``F.linear`` whose backward gives the gradient of its input and hands K weighted ones to the state."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, keys: Keys, state: Collector) -> Tensor:
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
                per_row = _tokens(delta).sum(1, dtype=wide(delta.dtype))
                state.add(bias_key, state.weights.to(per_row).mT @ per_row)
            elif ctx.needs_input_grad[2] and (state.mode == "plain" or not bias_key):
                grad_b = _tokens(delta).sum((0, 1), dtype=wide(delta.dtype))
        return grad_x, grad_W, grad_b, None, None


class PerRow(torch.autograd.Function):
    """One copy of a parameter for each row, as far as gradients are concerned; its values are never read."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, state: Collector) -> Tensor:
        """``[B, *shape]`` in the dtype in which rows are summed, without memory of its own."""
        ctx.key, ctx.state, ctx.dtype = state.names[id(p)], state, p.dtype
        return p.new_empty((), dtype=wide(p.dtype)).expand(state.weights.shape[0], *p.shape)

    @staticmethod
    def backward(ctx: Any, per_row: Tensor) -> tuple[Tensor | None, None]:
        """The rows, or the ordinary gradient, or nothing."""
        state: Collector = ctx.state
        if state.mode == "rows":
            w = state.weights.to(per_row).mT
            state.add(ctx.key, (w @ per_row.flatten(1)).reshape(-1, *per_row.shape[1:]))
        return per_row.sum(0).to(ctx.dtype) if state.mode == "plain" else None, None


def traced(x: Tensor, W: Tensor, b: Tensor | None, weight_rows: Tensor | None, bias_rows: Tensor | None) -> Tensor:
    """A layer in compiled code: served, or with ordinary gradients where a row has no copy of its own."""
    if all(p is None or not p.requires_grad or rows is not None for p, rows in ((W, weight_rows), (b, bias_rows))):
        return _TracedLinear.apply(x, W, b, weight_rows, bias_rows)  # type: ignore[no-any-return,no-untyped-call]
    return F.linear(x, W, b)


class _TracedLinear(torch.autograd.Function):
    """``F.linear`` whose backward gives the gradients of its input and, for every row, of its parameters."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, weight_rows: Tensor | None, bias_rows: Tensor | None
    ) -> Tensor:
        """As ``F.linear``, autocast included."""
        ctx.save_for_backward(x, W)
        ctx.dtypes = [None if rows is None else rows.dtype for rows in (weight_rows, bias_rows)]
        return F.linear(x, W, b)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None, None, Tensor | None, Tensor | None]:
        """What nobody needs is never computed: the compiler drops it."""
        x, W = ctx.saved_tensors
        of_weight, of_bias = ctx.dtypes
        rows_W = rows_b = None
        with torch.autocast(delta.device.type, enabled=False):
            grad_x = delta @ W.to(delta.dtype)
            delta, x = _tokens(delta), _tokens(x.to(delta.dtype))
            if of_weight is not None:
                rows_W = torch.bmm(delta.mT, x).to(of_weight)
            if of_bias is not None:
                rows_b = delta.sum(1, dtype=wide(delta.dtype)).to(of_bias)
        return grad_x, None, None, rows_W, rows_b


def _tokens(x: Tensor) -> Tensor:
    """``[B, ..., n]`` as ``[B, T, n]``."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def _weight_rows(weights: Tensor, delta: Tensor, x: Tensor) -> Tensor:
    """``sum_b weights_bk delta_b^T x_b``: ``[K, out, in]`` from ``[B, K]``, ``[B, ..., out]``, ``[B, ..., in]``."""
    (B, K), n_out, n_in = weights.shape, delta.shape[-1], x.shape[-1]
    dtype = wide(delta.dtype)
    w = weights.to(device=x.device, dtype=dtype)
    delta, x = _tokens(delta), _tokens(x)
    if delta.shape[1] != 1:  # many tokens a row: each row's own gradient first, then K sums that no token enters
        per_row = torch.bmm(delta.mT, x).to(dtype)
        return (w.mT @ per_row.reshape(B, n_out * n_in)).reshape(K, n_out, n_in)
    d, x = delta[:, 0].to(dtype), x[:, 0].to(dtype)
    if n_out <= n_in:  # one product, the K weights folded into the thinner side
        return ((w.unsqueeze(-1) * d.unsqueeze(1)).reshape(B, K * n_out).mT @ x).reshape(K, n_out, n_in)
    return (d.mT @ (w.unsqueeze(-1) * x.unsqueeze(1)).reshape(B, K * n_in)).reshape(n_out, K, n_in).transpose(0, 1)
