"""Configurations as TOML files; what is wrong with one is said before anything loads."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

from reference.config.settings import Config
from reference.errors import ConfigError, did_you_mean
from reference.text_files import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def from_toml(path: Path, base: Config) -> Config:
    """``base`` with the values of a TOML file: top-level keys and one table a group, as ``to_toml`` writes them.

    Raises:
        ConfigError: the file cannot be read, a key is unknown (with the nearest valid one), or a type is wrong.
    """
    text = read_text(path, "config")
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # no TOML, a number of too many digits, nested too deeply
        raise ConfigError(f"config: cannot read {path}: {error}") from error
    updated: Config = _updated(base, values, "")
    return updated


def _updated(base: Any, values: dict[str, Any], prefix: str) -> Any:
    """A dataclass with some fields replaced, every key and type checked."""
    hints = typing.get_type_hints(type(base))
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            hint = did_you_mean(key, hints, prefix).replace("'", "") or f" Valid keys: {', '.join(sorted(hints))}."
            raise ConfigError(f"config: unknown key {prefix}{key}.{hint}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"config: expected {prefix}{key} to be a table, got {value!r}.")
            changes[key] = _updated(getattr(base, key), value, f"{prefix}{key}.")
        else:
            changes[key] = _converted(value, hints[key], prefix + key)
    return dataclasses.replace(base, **changes)


def _converted(value: Any, hint: Any, key: str) -> Any:
    """A TOML value as the type of its field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _converted(value, next(a for a in arguments if a is not type(None)), key)
    if origin is Literal:
        if value not in arguments:
            near = did_you_mean(str(value), map(str, arguments))
            raise ConfigError(f"config: expected {key} to be one of {list(arguments)}, got {value!r}.{near}")
        return value
    if origin is tuple:
        length = None if arguments[-1] is ... else len(arguments)
        if not isinstance(value, list) or length not in (None, len(value)):
            wanted = "a list" if length is None else f"a list of {length}"
            raise ConfigError(f"config: expected {key} to be {wanted}, got {value!r}.")
        return tuple(_converted(item, arguments[0], key) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not hint:
        got = f"{value!r} ({type(value).__name__})"
        wanted = "a string" if hint is Path else hint.__name__
        raise ConfigError(f"config: expected {key} to be {wanted}, got {got}.")
    return value


def to_toml(config: Config) -> str:
    """The configuration as TOML, which ``from_toml`` reads back; switches that are None are left out."""
    lines, tables = [], []
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            items = [f"{k} = {_literal(v)}" for k, v in vars(value).items() if v is not None]
            tables += ["", f"[{name}]", *items]
        else:
            lines.append(f"{name} = {_literal(value)}")
    return "\n".join([*lines, *tables]) + "\n"


def _literal(value: Any) -> str:
    """A value in TOML: JSON, but for infinity, and for strings, in which TOML escapes no surrogates."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, float):
        return repr(value)
    text = str(value) if isinstance(value, Path) else value
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
