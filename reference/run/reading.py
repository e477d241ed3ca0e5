"""The records of a run folder, as numbers, and the pens that tell runs and rewards apart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from reference.errors import ConfigError
from reference.text_files import parse_json

# Okabe and Ito's colours, told apart by colour-blind readers and visible on both backgrounds.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def records(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run, of one kind or all, in order; a last line that was cut off is left out.

    Raises:
        ConfigError: a line other than the last is not JSON.
    """
    file, found = run / "metrics.jsonl", []
    lines = file.read_bytes().splitlines() if file.is_file() else []
    for place, line in enumerate(lines, start=1):
        try:
            record = parse_json(line) if line.strip() else None
        except ValueError as error:
            if place < len(lines):
                raise ConfigError(f"{file}, line {place}: expected a JSON object, got {line[:60]!r}.") from error
            break
        if isinstance(record, dict) and kind in (None, record.get("kind")):
            found.append(record)
    return found


def number(value: float | None) -> float:
    """A value of ``metrics.jsonl``, where null is NaN."""
    return math.nan if value is None else float(value)
