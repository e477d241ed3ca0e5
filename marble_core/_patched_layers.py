"""Layers of a module during a call of ``shared_cotangent``: watched, and linear ones made to collect rows."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from marble_core._check import describe, require
from marble_core._linear_rows import Keys, PerRow, SharedLinear, traced

_ATTRIBUTE = "_marble_layer"
REENTRANT = "Use torch.utils.checkpoint with use_reentrant=False, and run the layer with gradients enabled."


def some(names: list[str]) -> str:
    """At most five of them."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@dataclass
class State:
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
        require(not never, "forward()", "trainable layers run with gradients", f"{never} without", REENTRANT)
        nodes = list(_graph(signal, shared))
        reentrant = any(node.name().startswith("CheckpointFunction") for node in nodes)
        require(not reentrant, "forward()", "no reentrant checkpointing", "CheckpointFunction", REENTRANT)
        once = retain and any(map(_is_walked_once, nodes))
        fix = "Set torch._functorch.config.donated_buffer = False before it is compiled."
        require(not once, "forward()", "no compiled code without trainable layers of module", "some", fix)

    def require_served(self, missing: list[str]) -> None:
        """No parameter is missing, or an error that says which and why."""
        hooked = [name for name in missing if name in self.hooked]
        fix = 'Remove them and change the rows, or pass fallback="unsupported".'
        require(not hooked, "module", "parameters without gradient hooks", f"hooks of {some(hooked)}", fix)
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

    state: State
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
    """A compiled graph whose backward may overwrite what its forward saved: PyTorch's default, not ``retainable``."""
    metadata = getattr(getattr(node, "_forward_cls", None), "metadata", None)
    return bool(getattr(metadata, "bw_donated_idxs", None))


def retainable() -> AbstractContextManager[None]:
    """Graphs compiled inside can be walked several times."""
    if "torch._dynamo" not in sys.modules:  # it takes a second to import
        return nullcontext()
    from torch._functorch import config

    return config.patch(donated_buffer=False)  # type: ignore[no-any-return]


@contextmanager
def patched(module: nn.Module, state: State, *, serve: bool) -> Iterator[None]:
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
            # Not served, too, a class of its own: graphs compiled without it are not `retainable`.
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


def _layer(name: str, m: nn.Module, state: State, per_row: dict[str, Tensor], *, serve: bool) -> _Layer:
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


def _per_row(module: nn.Module, state: State) -> dict[str, Tensor]:
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
