"""The records of a run folder, as numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def records(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run, of one kind or all, in order; a last line that was cut off is left out."""
    file, found = run / "metrics.jsonl", []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return [record for record in found if kind in (None, record["kind"])]


def number(value: float | None) -> float:
    """A value of ``metrics.jsonl``, where null is NaN."""
    return math.nan if value is None else float(value)
