"""The help of ``train`` on two screens: a line a flag, with its values, its default and what there is room to say."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from reference.config.flags import Train
from reference.config.settings import BUILT_IN_RULES, Preset

_FLAG, _VALUES = 28, 17  # columns


class Flag(NamedTuple):
    """A flag: its name without dashes, the values that it takes, its default, and what it does."""

    name: str
    values: str
    default: str
    about: str


def train_help(defaults: Train) -> str:
    """All flags of ``train``, with the values of a preset and a file as defaults."""
    width = min(max(shutil.get_terminal_size((120, 40)).columns, 80), 160)
    lines = ["usage: python -m reference train [flags]    (--help-all for every word about each)", ""]
    lines += [(inspect.getdoc(Train) or "").replace("\n\n", " "), ""]
    lines += [f"presets: {', '.join(typing.get_args(Preset))}", f"rules: {', '.join(BUILT_IN_RULES)}", ""]
    lines += [_line(flag, width) for flag in (*_flags(defaults), *_flags(defaults.settings))]
    for group in dataclasses.fields(defaults.settings):
        value = getattr(defaults.settings, group.name)
        if dataclasses.is_dataclass(value):
            lines.append(f"{group.name}: {(inspect.getdoc(type(value)) or '').splitlines()[0]}")
            lines += [_line(flag, width) for flag in _flags(value, f"{group.name}.")]
    return "\n".join(lines)


def _line(flag: Flag, width: int) -> str:
    """A flag in columns."""
    head = f"  --{flag.name:<{_FLAG}} {flag.values:<{_VALUES}}"
    default = f" [{flag.default}]" if flag.default else ""
    room = width - len(head) - len(default) - 1
    return f"{head} {textwrap.shorten(flag.about, max(room, 20), placeholder=' ...')}{default}"


def _flags(instance: Any, prefix: str = "") -> Iterator[Flag]:
    """The flags of a dataclass's own values."""
    about, hints = _docs(type(instance)), typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if not dataclasses.is_dataclass(value):
            name = prefix + field.name.replace("_", "-")
            yield Flag(name, _values(hints[field.name]), _default(value), about.get(field.name, ""))


def _docs(kind: type[Any]) -> dict[str, str]:
    """What stands under each field of a dataclass, in one line."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for field, text in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _values(hint: Any) -> str:
    """What a flag takes, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _values(next(a for a in arguments if a is not type(None)))
    if origin is Literal:
        values = "|".join(map(str, arguments))
        return values if len(values) <= _VALUES else "NAME"
    if origin is tuple:
        return f"{_values(arguments[0])}..." if arguments[-1] is ... else " ".join(map(_values, arguments))
    return {bool: "", int: "N", float: "X", str: "TEXT", Path: "PATH"}[hint]


def _default(value: Any) -> str:
    """A default as one would type it; nothing where there is none."""
    if value is None or value is False or value == ():
        return ""
    if isinstance(value, tuple):
        text = " ".join(map(str, value))
        return text if len(text) <= 40 else f"{len(value)} values"
    return f"{value:g}" if isinstance(value, float) else str(value)
