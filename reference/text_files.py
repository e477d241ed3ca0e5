"""Lines of prompt files as the field writes them; other formats are read as what they are, or refused by name."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reference.errors import ConfigError

_MAGIC = {
    b"PAR1": "a Parquet file",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip file",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
    b"%PDF": "a PDF",
}
_REFUSED = {".yaml": "YAML", ".yml": "YAML", ".toml": "TOML", ".parquet": "Parquet", ".xml": "XML", ".html": "HTML"}
_HINT = "Write one prompt a line in UTF-8, a JSON array of prompts, or one JSON object a line."


def read_text(path: Path, argument: str) -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Raises:
        ConfigError: it cannot be read, or is plainly no UTF-8 text, which is named.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{argument}: cannot read {path}: {error}") from error
    kind = next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)
    if kind is None and b"\0" in data:
        kind = "a binary file"
    if kind is not None:
        raise ConfigError(f"{argument}: cannot read {path}: it is {kind}, expected text in UTF-8.")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{argument}: cannot read {path}: {error}. Save it as UTF-8.") from error


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file that is to be there whole or not at all: what was there before stays if it fails."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def names_missing_folder(source: str) -> bool:
    """Whether a source is a path, where an id on the hub may stand as well, of a folder that is not there."""
    path = source.startswith(("/", ".", "~")) or source.count("/") > 1
    return path and not Path(source).expanduser().is_dir()


def make_folder(folder: Path, argument: str = "--folder") -> None:
    """Make a folder for results and try to write there: before the work, as that may take hours.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{argument}: cannot write to {folder}: {error}. Choose another.") from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        OSError: it could not be written.
    """
    with whole(path) as temporary:
        temporary.write_bytes(data)


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is none, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def prompt_lines(path: Path) -> list[tuple[int, str]]:
    """The prompts of a file with their line numbers, a row of GenEval as its text; blank ones are skipped and counted.

    Read are plain lines, JSON objects a line, a JSON array of texts or of objects, and tables (.csv, .tsv) with a
    column named prompt.

    Raises:
        ConfigError: it cannot be read, is of another format, or has no prompt.
    """
    text, argument = read_text(path, "rollout.prompts"), "rollout.prompts"
    if path.suffix.lower() in _REFUSED:
        raise ConfigError(f"{argument}: cannot use {path}: it is {_REFUSED[path.suffix.lower()]}. {_HINT}")
    if path.suffix.lower() in (".csv", ".tsv"):
        found = _table(path, text)
    elif text.lstrip().startswith("[") and text.rstrip().endswith("]"):
        found = _array(path, text)
    else:
        found = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
        _refuse_other(path, text)
    found = [(number, _bare(line)) for number, line in found]
    kept = [(number, line) for number, line in found if line]
    if not kept:
        raise ConfigError(f"{argument}: expected at least one prompt, got an empty file {path}.")
    blank = len(found) - len(kept) - (found[-1][1] == "" and text.endswith("\n"))  # the last line's end is no line
    if blank > 0:
        print(f"{path}: {blank} blank line{'s are' if blank > 1 else ' is'} skipped", file=sys.stderr)
    return kept


def _bare(line: str) -> str:
    """The prompt of a JSON object that has one and nothing of GenEval's; any other line as it is."""
    if line.startswith("{"):
        with contextlib.suppress(ValueError):
            row = parse_json(line)
            if isinstance(row.get("prompt"), str) and not {"tag", "include", "exclude"} & row.keys():
                return " ".join(row["prompt"].split())
    return line


def _array(path: Path, text: str) -> list[tuple[int, str]]:
    """A JSON array of texts or objects; the numbers are those of its entries."""
    try:
        rows = parse_json(text)
    except ValueError as error:
        if text.strip().count("\n") == 0:  # one prompt that begins and ends with a bracket
            return [(1, text.strip())]
        raise ConfigError(f"rollout.prompts: cannot read {path} as a JSON array: {error}. {_HINT}") from error
    return [(number, _entry(path, number, row)) for number, row in enumerate(rows, start=1)]


def _entry(path: Path, number: int, row: Any) -> str:
    """An entry of an array as a line."""
    if isinstance(row, str):
        return " ".join(row.split())
    if isinstance(row, dict):
        return json.dumps(row)
    raise ConfigError(f"rollout.prompts: {path}, entry {number}: expected a text or an object, got {row!r}. {_HINT}")


def _table(path: Path, text: str) -> list[tuple[int, str]]:
    """The column named prompt of a table."""
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        return _column(path, reader)
    except csv.Error as error:
        raise ConfigError(f"rollout.prompts: cannot read {path}, line {reader.line_num}: {error}. {_HINT}") from error


def _column(path: Path, reader: csv.DictReader[str]) -> list[tuple[int, str]]:
    """The prompts of a table."""
    column = next((name for name in reader.fieldnames or () if name.strip().lower() == "prompt"), None)
    if column is None:
        names = ", ".join(reader.fieldnames or ()) or "none"
        raise ConfigError(f"rollout.prompts: {path}: expected a column named prompt, got {names}. {_HINT}")
    return [(reader.line_num, " ".join((row[column] or "").split())) for row in reader]


def _refuse_other(path: Path, text: str) -> None:
    """Raise for a JSON document over several lines, and for a list in YAML or Markdown."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and lines[0] == "{":
        raise ConfigError(f"rollout.prompts: cannot use {path}: it is one JSON document over several lines. {_HINT}")
    if len(lines) > 1 and all(re.match(r"[-*] ", line) for line in lines):
        raise ConfigError(f"rollout.prompts: cannot use {path}: it is a list, every line begins with a dash. {_HINT}")
