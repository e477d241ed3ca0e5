"""All K gradients of an affine loss from one backward pass: the cotangent is shared, only a weight per row differs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from marble_core._check import describe, require, require_float
from marble_core._patched_layers import REENTRANT, State, patched, retainable, some
from marble_core._verify_rows import require_equal

_Fallback = Literal["error", "unsupported", "all"]
_LOCK = threading.RLock()  # a call changes classes of layers, which threads share
_OTHER_MODULE = "Pass the module that forward() runs, not a copy of it."
_NO_GRADIENT = f"It was detached, or computed under torch.no_grad(). {REENTRANT}"


class SharedRows(NamedTuple):
    """K gradients and, if asked for, one more, keyed by the names of the trainable parameters.

    Attributes:
        rows: ``[K, *shape]`` each: ``sum_b weights_bk d signal_b``.
        shared: ``[*shape]`` each, the gradient of the shared loss; empty without one.
        signal: ``[B]``, detached.
        shared_loss: ``[]``, detached, or None.
        unreached: names of the parameters that ``signal`` does not depend on; their rows are 0.
    """

    rows: dict[str, Tensor]
    shared: dict[str, Tensor]
    signal: Tensor
    shared_loss: Tensor | None
    unreached: tuple[str, ...] = ()


def shared_cotangent_rows(
    forward: Callable[[], Tensor | tuple[Tensor, Tensor]],
    module: nn.Module,
    weights: Tensor,
    *,
    fallback: _Fallback = "error",
    verify: bool = False,
) -> SharedRows:
    """K weighted gradients from one forward and one backward: ``rows_k = sum_b weights_bk d signal_b / d theta``.

    With ``signal`` of ``affine_terms`` and ``weights = (r - 1/2) / B`` these are the reward parts ``h_k`` of the K
    gradients. The output gradient ``delta_b`` that reaches a linear layer is the same for every reward, so the layer
    itself forms ``sum_b weights_bk delta_b^T x_b`` for all K while the one backward goes by. A ``shared`` loss (the
    prox and KL terms, which no weight touches) costs a second backward through the same graph.

    Serves ``nn.Linear`` layers whose input starts with the B rows, LoRA's among them; a layer may be used several
    times and parameters may be tied. For other trainable parameters (a norm's scale, a convolution, a weight also used
    outside its layer, a parameter with a gradient hook) choose a ``fallback``. Rows must neither move nor mix inside
    the model: no sequence-first layers, no sorting or routing of rows, no batch statistics. Shapes do not show that
    where another dimension is as large as B: ``verify`` a new model once, and one with routing at every call.

    Autocast and non-reentrant checkpointing work as usual (though not a call inside of a checkpointed part, which
    computes layers again in the middle of it), and so do modules compiled as a whole or in parts: their
    layers collect rows inside a graph of their own, compiled once for all calls with B rows, whatever K. Rows of
    several micro-batches add up: the caller sums them, then takes the Gram matrix. Nothing is left behind: classes,
    hooks, ``.grad``, flags and modes are as before, also after an error. Calls of several threads wait for each other;
    another thread may run the (uncompiled) module meanwhile.

    Args:
        forward: runs ``module`` and returns ``signal [B]``, entry b depending on row b alone, or ``(signal, shared)``
            with a scalar ``shared``.
        module: holds the trainable parameters (``requires_grad``).
        weights: ``[B, K]``, constants.
        fallback: what to do about parameters it cannot serve: ``"error"``; ``"unsupported"`` takes K ordinary
            backward passes for those alone; ``"all"`` takes K passes for everything (the reference).
        verify: compare ``sum_k r_k rows_k`` for one random ``r`` with the gradient that autograd gives for the same
            weights of the rows. One more backward pass; rows that are wrong agree with probability 0.

    Returns:
        ``SharedRows``, gradients in the dtype of the parameter (summed over rows in float32 at least).

    Raises:
        ValueError: shapes are off, a parameter cannot be served or its rows are wrong (named), ``signal`` depends on no
            parameter of ``module``, or something ran without gradients, as under reentrant checkpointing.

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
    params = _trainable(module)
    verify = verify and fallback != "all"
    with _LOCK, retainable():
        hooked = {name for name, p in params.items() if p._backward_hooks}
        state = State(weights.detach(), {id(p): name for name, p in params.items()}, hooked)
        with patched(module, state, serve=fallback != "all"):
            return _shared_rows(forward, module, params, state, fallback=fallback, verify=verify)


def _shared_rows(
    forward: Callable[[], Tensor | tuple[Tensor, Tensor]],
    module: nn.Module,
    params: dict[str, nn.Parameter],
    state: State,
    *,
    fallback: _Fallback,
    verify: bool,
) -> SharedRows:
    """The forward and the backward passes of a call, on the patched module."""
    signal, shared = _split(forward(), state.weights)
    state.check(signal, shared, retain=shared is not None or verify or fallback != "error")
    keep = shared is not None or verify
    grads: dict[str, Tensor] = {}
    with ExitStack() as stack:  # the way back is in the dtypes of the way there, whatever is around the call
        for kind in sorted({x.device.type for x in (signal, *params.values())}):
            stack.enter_context(torch.autocast(kind, enabled=False))
        rows, unreached = _rows(signal, params, state, retain=keep, fallback=fallback)
        if verify:
            autocast = any(layer.autocast for layer in state.layers)
            require_equal(rows, signal, module, state.weights, autocast=autocast, retain=shared is not None)
        if shared is not None:
            found = torch.autograd.grad(shared, list(params.values()), allow_unused=True)
            named = zip(params.items(), found, strict=True)
            grads = {name: torch.zeros_like(p, requires_grad=False) if g is None else g for (name, p), g in named}
    return SharedRows(rows, grads, signal.detach(), None if shared is None else shared.detach(), unreached)


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that rows are taken of, checked."""
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    require(len(params) > 0, "module", "at least one parameter with requires_grad", "none")
    fix = "Call it outside of torch.no_grad() and torch.inference_mode()."
    require(torch.is_grad_enabled(), "shared_cotangent_rows", "gradients enabled", "a call without them", fix)
    sharded = [name for name, p in params.items() if hasattr(p, "device_mesh")]
    fix = "Keep what is trained (LoRA) whole on each device, and shard the frozen rest alone."
    require(not sharded, "module", "trainable parameters that are plain tensors", f"DTensor {some(sharded)}", fix)
    scripted = [name or "module" for name, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    fix = "Pass the module it was made from; torch.compile is served."
    require(not scripted, "module", "Python modules", f"TorchScript {some(scripted)}", fix)
    return params


def _split(out: object, weights: Tensor) -> tuple[Tensor, Tensor | None]:
    """``forward``'s result as ``(signal [B], shared or None)``, checked."""
    if isinstance(out, tuple):
        require(len(out) == 2, "forward()", "signal or (signal, shared)", f"a tuple of {len(out)}")
    signal, shared = out if isinstance(out, tuple) else (out, None)
    B = weights.shape[0]
    ok = isinstance(signal, Tensor) and signal.is_floating_point() and signal.shape == torch.Size([B])
    require(ok, "forward()", f"signal of shape [B] = [{B}], as weights has rows", describe(signal))
    expected = "a signal that depends on a trainable parameter"
    require(signal.requires_grad, "forward()", expected, "one without gradients", _NO_GRADIENT)
    if shared is not None:
        ok = isinstance(shared, Tensor) and shared.is_floating_point() and shared.ndim == 0
        require(ok, "forward()", "a scalar shared loss", describe(shared))
        expected = "a shared loss that depends on a trainable parameter"
        require(shared.requires_grad, "forward()", expected, "one without gradients", _NO_GRADIENT)
    return signal, shared


def _rows(
    signal: Tensor, params: dict[str, nn.Parameter], state: State, *, retain: bool, fallback: _Fallback
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The one backward for all K, then K passes for what it could not serve, if the caller wants them; and the names of
    parameters that no backward reached."""
    K, missing, found = state.weights.shape[1], list(params), set[str]()
    if fallback != "all":
        state.mode, keep = "rows", retain or fallback == "unsupported"
        found = _by_itself(signal, params, state.hooked, keep=keep)
        missing = [name for name in params if name in found or name in state.hooked]
        if fallback == "error":
            state.require_served(missing)
    reached = {*state.rows, *found}
    rows = {
        name: state.rows[name].to(p.dtype) if name in state.rows else p.new_zeros((K, *p.shape), requires_grad=False)
        for name, p in params.items()
    }
    state.mode = "silent"
    for k in range(K if missing else 0):
        last = k == K - 1 and not retain
        w = state.weights[:, k].to(signal)
        grads = torch.autograd.grad(signal, [params[n] for n in missing], w, retain_graph=not last, allow_unused=True)
        for name, g in zip(missing, grads, strict=True):
            if g is not None:
                rows[name][k] += g
                reached.add(name)
    state.mode = "plain"
    require(len(reached) > 0, "module", "parameters that forward() uses", "none of them used", _OTHER_MODULE)
    return rows, tuple(name for name in params if name not in reached)


def _by_itself(signal: Tensor, params: dict[str, nn.Parameter], hooked: set[str], *, keep: bool) -> set[str]:
    """Names of parameters whose gradient arrives from autograd: it took a way that no patched layer saw."""
    asked = {name: p for name, p in params.items() if name not in hooked}
    inputs = [*asked.values(), signal] if not asked else list(asked.values())
    found = torch.autograd.grad(signal, inputs, torch.ones_like(signal), retain_graph=keep, allow_unused=True)
    return {name for name, g in zip(asked, found, strict=False) if g is not None}
