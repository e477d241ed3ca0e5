"""Prompts with what is known about them: the files of the field, and mixtures of several."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from reference.errors import ConfigError
from reference.interfaces import Prompt
from reference.prompts.geneval import check_row
from reference.text_files import parse_json, prompt_lines

T = TypeVar("T")
FORMATS = ("text", "ocr", "geneval")
# Pairs of quotes; a single closing quote within a word is an apostrophe, and straight single ones always are.
_QUOTED = re.compile(
    '"([^"]*)"|\u201c([^\u201c\u201d]*)[\u201c\u201d]|\u201e([^\u201c\u201d]*)[\u201c\u201d]|\u201d([^\u201d]*)\u201d|'
    "\u00ab([^\u00bb]*)\u00bb|\u00bb([^\u00ab]*)\u00ab|\u2039([^\u203a]*)\u203a|\u300c([^\u300d]*)\u300d|\u300e([^\u300f]*)\u300f|"
    r"\u2018((?:[^\u2018\u2019]|\u2019(?=\w))*)\u2019(?!\w)|\uff02([^\uff02]*)\uff02"
)


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

    ``text``: one prompt a line. ``ocr``: one prompt a line, with the text to be seen between quotes of any kind, the
    first such pair; apostrophes are none. ``geneval``: one JSON object a line, see ``prompts.geneval.check_row``.
    Without a format before the path, a file of GenEval's objects is ``geneval``, one in which most lines have a quoted
    text is ``ocr``, any other is ``text``. Blank lines are skipped, and their number is told.

    Args:
        spec: ``[format:]path[#reward,reward]``; after ``#`` the rewards that apply to these prompts, else all.

    Raises:
        ConfigError: the file cannot be read, has no prompt, or has lines that cannot be used: all are named by number.
    """
    path, format, rewards = parse_spec(spec)
    kind = path.stem.removesuffix("-test")
    if not path.exists() and kind in ("general", "ocr", "geneval"):
        made = f"python -m reference make-prompts {kind}{'' if path.parent == Path('prompts') else f' --out {path}'}"
        raise ConfigError(f"rollout.prompts: there is no file {path}. Make it with: {made}")
    numbered = prompt_lines(path)
    format = format or _guess(path, [line for _, line in numbered])
    prompts, faults = [], []
    for number, line in numbered:
        try:
            text, metadata = _READERS[format](line)
            text.encode()  # half of a surrogate pair, as JSON can write it, is no text
            prompts.append(Prompt(text, metadata, rewards))
        except ValueError as error:
            faults.append(f"  line {number}: {error}")
    if faults:
        raise ConfigError(f"rollout.prompts: cannot use these lines of {path}, read as {format}:\n" + "\n".join(faults))
    return prompts


def read_mixture(
    specs: Sequence[str | Path], read: Callable[[str | Path], list[Prompt]] = read_source
) -> list[list[Prompt]]:
    """The prompts of each source.

    Raises:
        ConfigError: some sources cannot be used; the faults of all are in one error.
    """
    sources, faults = [], []
    for spec in specs:
        try:
            sources.append(read(spec))
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


def _guess(path: Path, lines: Sequence[str]) -> str:
    """The format of a file by its name and lines."""
    if lines[0].startswith("{"):
        return "geneval"
    return "ocr" if 2 * sum(bool(_QUOTED.search(line)) for line in lines) > len(lines) else "text"


def _text(line: str) -> tuple[str, dict[str, Any]]:
    """A line of a text file."""
    return line, {}


def _ocr(line: str) -> tuple[str, dict[str, Any]]:
    """A line of an OCR file."""
    found = _QUOTED.search(line)
    if found is None:
        raise ValueError('expected a text between quotes ("text:" before the path reads plain prompts)')
    target = next(group for group in found.groups() if group is not None).strip()
    if not target:
        raise ValueError("expected a text between the first quotes, got nothing")
    return line, {"ocr": target}


def _geneval(line: str) -> tuple[str, dict[str, Any]]:
    """A line of a GenEval file."""
    row = parse_json(line)  # its error is a ValueError
    check_row(row)
    return row["prompt"], {"geneval": row}


_READERS: Mapping[str, Callable[[str], tuple[str, dict[str, Any]]]] = {"text": _text, "ocr": _ocr, "geneval": _geneval}
