"""All K gradients of an affine loss from one backward pass: the cotangent is shared, only a weight per row differs."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from marble_core._check import describe, require, require_float
from marble_core._linear_rows import Keys, PerRow, SharedLinear, traced
from marble_core._verify_rows import require_equal

_Fallback = Literal["error", "unsupported", "all"]
_ATTRIBUTE = "_marble_layer"
_LOCK = threading.RLock()  # a call changes classes of layers, which threads share
_REENTRANT = "Use torch.utils.checkpoint with use_reentrant=False, and run the layer with gradients enabled."
_OTHER_MODULE = "Pass the module that forward() runs, not a copy of it."
_NO_GRADIENT = f"It was detached, or computed under torch.no_grad(). {_REENTRANT}"


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

    Autocast and non-reentrant checkpointing work as usual, and so do modules compiled as a whole or in parts: their
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
    with _LOCK, _retainable():
        hooked = {name for name, p in params.items() if p._backward_hooks}
        state = _State(weights.detach(), {id(p): name for name, p in params.items()}, hooked)
        with _patched(module, state, serve=fallback != "all"):
            return _shared_rows(forward, module, params, state, fallback=fallback, verify=verify)


def _shared_rows(
    forward: Callable[[], Tensor | tuple[Tensor, Tensor]],
    module: nn.Module,
    params: dict[str, nn.Parameter],
    state: _State,
    *,
    fallback: _Fallback,
    verify: bool,
) -> SharedRows:
    """The forward and the backward passes of a call, on the patched module."""
    signal, shared = _split(forward(), state.weights)
    state.check(signal, shared, retain=shared is not None or verify or fallback != "error")
    keep = shared is not None or verify
    rows, unreached = _rows(signal, params, state, retain=keep, fallback=fallback)
    if verify:
        autocast = any(layer.autocast for layer in state.layers)
        require_equal(rows, signal, module, state.weights, autocast=autocast, retain=shared is not None)
    grads: dict[str, Tensor] = {}
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
    require(not sharded, "module", "trainable parameters that are plain tensors", f"DTensor {_some(sharded)}", fix)
    scripted = [name or "module" for name, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    fix = "Pass the module it was made from; torch.compile is served."
    require(not scripted, "module", "Python modules", f"TorchScript {_some(scripted)}", fix)
    return params


def _some(names: list[str]) -> str:
    """At most five of them."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


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
    signal: Tensor, params: dict[str, nn.Parameter], state: _State, *, retain: bool, fallback: _Fallback
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


@dataclass
class _State:
    """What the layers of one call share."""

    weights: Tensor
    names: dict[int, str]  # of the trainable parameters, by identity
    hooked: set[str]  # those with gradient hooks, which one backward pass cannot apply to K gradients
    mode: Literal["plain", "rows", "silent"] = "plain"
    rows: dict[str, Tensor] = field(default_factory=dict)
    layers: list[_Layer] = field(default_factory=list)
    thread: int = field(default_factory=threading.get_ident)

    def is_here(self, x: Tensor) -> bool:
        """Whether the call's own thread runs, or a device's backward pass, which recomputes checkpointed layers."""
        on_device = x.device.type != "cpu" and torch._C._current_graph_task_id() != -1
        return threading.get_ident() == self.thread or on_device

    def add(self, name: str, row: Tensor) -> None:
        """Add to the rows of a parameter, which may be used more than once."""
        self.rows[name] = self.rows[name] + row if name in self.rows else row

    def check(self, signal: Tensor, shared: Tensor | None, *, retain: bool) -> None:
        """Reentrant checkpointing runs its layers without gradients at first and would lose them here; a graph that was
        compiled to be walked once would give wrong gradients the second time."""
        never = ", ".join(sorted(layer.name for layer in self.layers if layer.blind and not layer.seen))
        require(not never, "forward()", "trainable layers run with gradients", f"{never} without", _REENTRANT)
        nodes = list(_graph(signal, shared))
        reentrant = any(node.name().startswith("CheckpointFunction") for node in nodes)
        require(not reentrant, "forward()", "no reentrant checkpointing", "CheckpointFunction", _REENTRANT)
        once = retain and any(map(_is_walked_once, nodes))
        fix = "Set torch._functorch.config.donated_buffer = False before it is compiled."
        require(not once, "forward()", "no compiled code without trainable layers of module", "some", fix)

    def require_served(self, missing: list[str]) -> None:
        """No parameter is missing, or an error that says which and why."""
        hooked = [name for name in missing if name in self.hooked]
        fix = 'Remove them and change the rows, or pass fallback="unsupported".'
        require(not hooked, "module", "parameters without gradient hooks", f"hooks of {_some(hooked)}", fix)
        misfits = {key: layer for layer in self.layers if layer.misfit for key in layer.keys if key}
        for layer in (misfits[name] for name in missing if name in misfits):
            expected = f"an input [B, ..., in] with B = {self.weights.shape[0]} rows"
            fix = 'Keep the rows in the first dimension, or pass fallback="unsupported".'
            require(False, layer.name, expected, layer.misfit, fix)
        fix = 'Freeze them, or pass fallback="unsupported" for K backward passes of their own.'
        require(not missing, "module", "trainable parameters of nn.Linear layers alone", ", ".join(missing), fix)


@dataclass
class _Layer:
    """A module with trainable parameters during a call: in its ``__dict__``, where compiled code finds it as well.

    Traced code may read and set what is here, but not ``state`` and the names: graphs are used again in later calls and
    for other layers, and values they were traced with must not differ.
    """

    state: _State
    name: str
    keys: Keys
    rows: int  # B
    weight: Tensor | None = None  # the parameters that rows are collected for
    bias: Tensor | None = None
    weight_rows: Tensor | None = None  # where compiled code sends the gradients of single rows, `PerRow`
    bias_rows: Tensor | None = None
    seen: bool = False  # run with gradients, and without
    blind: bool = False
    autocast: bool = False
    misfit: str = ""  # the shape of an input without rows

    def watch(self) -> None:
        """Note whether the module runs with gradients."""
        if torch.is_grad_enabled():
            self.seen = True
        else:
            self.blind = True


def _watch(m: nn.Module, args: object) -> None:
    """Forward pre-hook of a module that is not served."""
    layer = m.__dict__.get(_ATTRIBUTE)
    if layer is not None:  # else another thread runs it, and the call has just ended
        layer.watch()


def _graph(*outputs: Tensor | None) -> Iterator[Any]:
    """Nodes of the autograd graph behind ``outputs``."""
    seen, todo = set(), [x.grad_fn for x in outputs if x is not None]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            todo.extend(parent for parent, _ in node.next_functions)


def _is_walked_once(node: Any) -> bool:
    """A compiled graph whose backward may overwrite what its forward saved: PyTorch's default, not ``_retainable``."""
    metadata = getattr(getattr(node, "_forward_cls", None), "metadata", None)
    return bool(getattr(metadata, "bw_donated_idxs", None))


def _retainable() -> AbstractContextManager[None]:
    """Graphs compiled inside can be walked several times."""
    if "torch._dynamo" not in sys.modules:  # it takes a second to import
        return nullcontext()
    from torch._functorch import config

    return config.patch(donated_buffer=False)  # type: ignore[no-any-return]


@contextmanager
def _patched(module: nn.Module, state: _State, *, serve: bool) -> Iterator[None]:
    """Watch every module with a trainable parameter; plain linear layers also collect rows. Undone on the way out."""
    hooks: list[RemovableHandle] = []
    before: list[tuple[nn.Module, type, _Layer | None]] = []
    per_row = _per_row(module, state) if serve and "torch._dynamo" in sys.modules else {}
    try:
        for name, m in module.named_modules():
            if not any(id(p) in state.names for p in m.parameters(recurse=False)):
                continue
            before.append((m, type(m), m.__dict__.get(_ATTRIBUTE)))
            m.__dict__[_ATTRIBUTE] = _layer(name or "module", m, state, per_row, serve=serve)
            # Not served, too, a class of its own: graphs compiled without it are not `_retainable`.
            if _is_plain_linear(m):
                m.__class__ = _serving(type(m))  # type: ignore[arg-type]
            else:
                hooks.append(m.register_forward_pre_hook(_watch))
        yield
    finally:
        state.mode = "plain"
        for m, cls, outer in before:
            m.__class__ = cls
            del m.__dict__[_ATTRIBUTE]
            if outer is not None:
                m.__dict__[_ATTRIBUTE] = outer
        for handle in hooks:
            handle.remove()


def _layer(name: str, m: nn.Module, state: _State, per_row: dict[str, Tensor], *, serve: bool) -> _Layer:
    """What a module needs during a call, known to the state as well."""
    weight, bias = m._parameters.get("weight"), m._parameters.get("bias")
    names = [state.names.get(id(p)) if serve else None for p in (weight, bias)]
    keys = (None if names[0] in state.hooked else names[0], None if names[1] in state.hooked else names[1])
    layer = _Layer(state, name, keys, state.weights.shape[0])
    if keys[0] is not None:
        layer.weight, layer.weight_rows = weight, per_row.get(keys[0])
    if keys[1] is not None:
        layer.bias, layer.bias_rows = bias, per_row.get(keys[1])
    state.layers.append(layer)
    return layer


def _is_plain_linear(m: nn.Module) -> bool:
    """A linear layer that runs nn.Linear's own forward, or that of a call around this one, on a plain parameter."""
    own = type(m).forward in (nn.Linear.forward, _Serving.forward) and "forward" not in m.__dict__
    return own and isinstance(m, nn.Linear) and "weight" in m._parameters


class _Serving(nn.Linear):
    """``nn.Linear`` that collects rows on the way back, for the parameters the layer was patched with."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``."""
        layer: _Layer | None = self.__dict__.get(_ATTRIBUTE)
        W, b = self.weight, self.bias
        if layer is None or not (torch.compiler.is_compiling() or layer.state.is_here(input)):
            return F.linear(input, W, b)
        layer.watch()
        if torch.is_autocast_enabled(input.device.type):
            layer.autocast = True
        of_weight = W is layer.weight and W.requires_grad
        of_bias = b is not None and b is layer.bias and b.requires_grad
        if torch.is_grad_enabled() and (of_weight or of_bias):
            compiled = torch.compiler.is_compiling()
            if not compiled and torch._C._functorch.peek_interpreter_stack() is not None:
                layer.misfit = "a call inside vmap or another transform of torch.func"
            elif input.ndim < 2 or input.shape[0] != layer.rows:
                layer.misfit = describe(input)
            elif compiled:
                rows = layer.weight_rows if of_weight else None, layer.bias_rows if of_bias else None
                return traced(input, W, b, *rows)
            else:
                keys = layer.keys[0] if of_weight else None, layer.keys[1] if of_bias else None
                return SharedLinear.apply(input, W, b, keys, layer.state)  # type: ignore[no-any-return,no-untyped-call]
        return F.linear(input, W, b)


@functools.lru_cache(maxsize=64)
def _serving(cls: type[nn.Linear]) -> type[nn.Linear]:
    """The class that a layer has during a call: always the same one, for graphs compiled in earlier calls hold then."""
    if issubclass(cls, _Serving):
        return cls
    return type(cls.__name__, (_Serving, cls), {})


def _per_row(module: nn.Module, state: _State) -> dict[str, Tensor]:
    """``[B, *shape]`` of every trainable parameter: what compiled layers seem to depend on, in place of the parameter.

    A compiled graph computes the same gradients whatever the mode, and knows no names. So it sends every row's gradient
    here, outside of the graph, where the mode says what becomes of it.
    """
    with torch.enable_grad():
        return {
            state.names[id(p)]: PerRow.apply(p, state)  # type: ignore[no-untyped-call]
            for p in module.parameters()
            if id(p) in state.names
        }
