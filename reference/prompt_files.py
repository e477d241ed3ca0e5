"""Prompts with what is known about them: the files of the field, and mixtures of several."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from reference.errors import ConfigError
from reference.geneval_prompts import check_row

T = TypeVar("T")
FORMATS = ("text", "ocr", "geneval")
_QUOTED = re.compile(r'"([^"]*)"')


class Prompt(NamedTuple):
    """A prompt; what its source knows about it; and the names of the rewards that apply to it, None for all.

    ``metadata["ocr"]`` is the text to be seen in the image, ``metadata["geneval"]`` a row of a GenEval file.
    """

    text: str
    metadata: Mapping[str, Any] = MappingProxyType({})
    rewards: tuple[str, ...] | None = None


class Spec(NamedTuple):
    """A source's parts: ``[format:]path[#reward,reward]``."""

    path: Path
    format: str | None
    rewards: tuple[str, ...] | None


def parse_spec(spec: str | Path) -> Spec:
    """The parts of a source.

    Raises:
        ConfigError: there is no path, or ``#`` without names after it.

    Example:
        >>> parse_spec("ocr:prompts/train.txt#ocr,pickscore")
        Spec(path=...('prompts/train.txt'), format='ocr', rewards=('ocr', 'pickscore'))
    """
    path, mark, names = str(spec).partition("#")
    kind, colon, rest = path.partition(":")
    format = kind if colon and kind in FORMATS else None  # `C:\prompts.txt` has none
    path = rest if format else path
    rewards = tuple(name.strip() for name in names.split(",")) if mark else None
    if not path or (rewards is not None and not all(rewards)):
        raise ConfigError(f"rollout.prompts: expected [format:]path[#reward,reward], got {str(spec)!r}.")
    return Spec(Path(path), format, rewards)


def read_source(spec: str | Path) -> list[Prompt]:
    """The prompts of a file, in its order, repeated ones as often as they are there.

    ``text``: one prompt a line. ``ocr``: one prompt a line, with the text to be seen between straight double quotes,
    the first such pair. ``geneval``: one JSON object a line, see ``geneval_prompts.check_row``. Without a format before
    the path, a file of JSON objects (or one named .jsonl) is ``geneval``, one in which most lines have a quoted text is
    ``ocr``, any other is ``text``.

    Args:
        spec: ``[format:]path[#reward,reward]``; after ``#`` the rewards that apply to these prompts, else all.

    Raises:
        ConfigError: the file cannot be read, is empty, or has lines that cannot be used, blank ones among them: all
            are named by number.
    """
    path, format, rewards = parse_spec(spec)
    lines = _lines(path)
    format = format or _guess(path, lines)
    prompts, faults = [], []
    for number, line in enumerate(lines, start=1):
        try:
            text, metadata = _READERS[format](line)
            prompts.append(Prompt(text, metadata, rewards))
        except ValueError as error:
            faults.append(f"  line {number}: {error}" if line.strip() else f"  line {number}: empty")
    if faults:
        raise ConfigError(f"rollout.prompts: cannot use these lines of {path}, read as {format}:\n" + "\n".join(faults))
    return prompts


def read_mixture(specs: Sequence[str | Path]) -> list[list[Prompt]]:
    """The prompts of each source.

    Raises:
        ConfigError: some sources cannot be used; the faults of all are in one error.
    """
    sources, faults = [], []
    for spec in specs:
        try:
            sources.append(read_source(spec))
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(faults))
    return sources


def mixture_of_epoch(
    sources: Sequence[Sequence[Prompt]], weights: Sequence[float], count: int, seed: int, epoch: int
) -> list[Prompt]:
    """The ``count`` prompts of an epoch, of each source its share.

    The j-th prompt of a source with share ``w`` of the weights is due at ``(j + 1/2) / w``; prompts come in the order
    in which they are due. So after any number ``P`` of prompts a source has given ``w P`` of them, within
    ``(1 + K w) / 2`` for ``K`` sources, over all epochs. Each source is gone through as by ``passes``.

    A function of seed and epoch alone: a resumed run continues where the other stopped, on any number of processes.

    Args:
        sources: the prompts of each.
        weights: relative to each other, positive; empty for equal shares.

    Raises:
        ConfigError: no source, an empty one, or weights that are not as above.
    """
    shares = _shares(sources, weights)
    start, stop = epoch * count, (epoch + 1) * count
    K = len(sources)
    given = [max(0, math.floor(start * w - (1 + K * w) / 2)) for w in shares]  # surely, before this epoch
    due = sorted(
        ((j + 0.5) / w, i, j)
        for i, w in enumerate(shares)
        for j in range(given[i], math.ceil(stop * w + (1 + K * w) / 2) + 1)
    )
    chosen = [(i, j) for _, i, j in due[start - sum(given) : stop - sum(given)]]
    streams = []
    for i, source in enumerate(sources):
        places = [j for k, j in chosen if k == i]
        first, last = (places[0], places[-1] + 1) if places else (0, 0)
        streams.append(iter(passes(source, first, last, f"{seed} {i}")))
    return [next(streams[i]) for i, _ in chosen]


def passes(items: Sequence[T], start: int, stop: int, seed: int | str) -> list[T]:
    """Positions ``start`` to ``stop`` of an endless row: pass after pass through the items, each in a new order.

    Example:
        >>> "".join(passes("abc", 0, 6, seed=0))
        'cabbac'
        >>> "".join(passes("abc", 2, 4, seed=0))
        'bb'
    """
    chosen: list[T] = []
    while start < stop:
        turn, place = divmod(start, len(items))
        order = list(range(len(items)))
        random.Random(f"order {seed} {turn}").shuffle(order)
        part = order[place : place + stop - start]
        chosen += [items[i] for i in part]
        start += len(part)
    return chosen


def _shares(sources: Sequence[Sequence[Prompt]], weights: Sequence[float]) -> list[float]:
    """The weights, of sum 1."""
    if not sources or not all(sources):
        raise ConfigError("rollout.prompts: expected at least one source, and a prompt in each.")
    weights = weights or [1.0] * len(sources)
    if len(weights) != len(sources) or not all(0 < w < math.inf for w in weights):
        raise ConfigError(
            f"rollout.weights: expected {len(sources)} positive numbers, one for each source, got {list(weights)}. "
            "Leave out a source that should give no prompts."
        )
    return [w / math.fsum(weights) for w in weights]


def _lines(path: Path) -> list[str]:
    """The lines of a file that has some."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"rollout.prompts: cannot read {path}: {error}") from error
    if not text:
        raise ConfigError(f"rollout.prompts: expected at least one prompt, got an empty file {path}.")
    return text.removesuffix("\n").split("\n")  # not splitlines: it also breaks lines where editors do not


def _guess(path: Path, lines: Sequence[str]) -> str:
    """The format of a file by its name and lines."""
    if path.suffix == ".jsonl" or lines[0].lstrip().startswith("{"):
        return "geneval"
    return "ocr" if 2 * sum(bool(_QUOTED.search(line)) for line in lines) > len(lines) else "text"


def _text(line: str) -> tuple[str, dict[str, Any]]:
    """A line of a text file."""
    if not line.strip():
        raise ValueError("empty")
    return line.strip(), {}


def _ocr(line: str) -> tuple[str, dict[str, Any]]:
    """A line of an OCR file."""
    found = _QUOTED.search(line)
    if found is None:
        raise ValueError('expected a text between straight double quotes ("text:" before the path reads plain prompts)')
    if not found[1].strip():
        raise ValueError("expected a text between the first double quotes, got nothing")
    return line.strip(), {"ocr": found[1].strip()}


def _geneval(line: str) -> tuple[str, dict[str, Any]]:
    """A line of a GenEval file."""
    row = json.loads(line)  # its error is a ValueError
    check_row(row)
    return row["prompt"], {"geneval": row}


_READERS: Mapping[str, Callable[[str], tuple[str, dict[str, Any]]]] = {"text": _text, "ocr": _ocr, "geneval": _geneval}
