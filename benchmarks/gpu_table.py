"""Tables for docs/benchmarks.md from what ``gpu_session.sh`` has written: ``python -m benchmarks.gpu_table OUT``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def table(folder: Path) -> str:
    """Markdown of the benchmark's records, its targets and the run from end to end, as far as they are there."""
    found = {name: json.loads(path.read_text()) for name in ("eager", "compiled", "end-to-end")
             if (path := folder / f"{name}.json").is_file()}  # fmt: skip
    if not found:
        return f"{folder} has no results."
    lines = [" · ".join(f"{key} {value}" for key, value in next(iter(found.values()))["where"].items()), ""]
    steps = [found[name] for name in ("eager", "compiled") if name in found]
    if steps:
        lines += ["| mode | what | ms | speed | GiB | memory |", "|---|---|---|---|---|---|"]
        lines += [_row(record) for result in steps for record in result["records"]]
        lines += ["", "| target | measured | |", "|---|---|---|"]
        for target in (target for result in steps for target in result["targets"]):
            met = "met" if target["met"] else "missed"
            lines.append(f"| {target['mode']}: {target['target']} | {target['measured']:.3f} | {met} |")
    if "end-to-end" in found:
        lines += _end_to_end(found["end-to-end"])
    return "\n".join(lines)


def _row(record: dict[str, Any]) -> str:
    """A record of the benchmark."""
    if record["error"] is not None:
        return f"| {record['mode']} | {record['name']} | {record['error']} | | | |"
    numbers = [f"{1e3 * record['seconds']:.0f}", f"{record.get('speed', float('nan')):.3f}"]
    peak = record["peak_bytes"]
    numbers += ["", ""] if peak is None else [f"{peak / 2**30:.2f}", f"{record.get('memory', float('nan')):.3f}"]
    return f"| {record['mode']} | {record['name']} | {' | '.join(numbers)} |"


def _end_to_end(found: dict[str, Any]) -> list[str]:
    """Epochs of the trainer, and its memory beside the plan's."""
    lines = ["", "| epoch | sampling, s | scoring, s | training, s |", "|---|---|---|---|"]
    for i, seconds in enumerate(found["epochs"]):
        lines.append(f"| {i} | {seconds['sample']:.1f} | {seconds['score']:.1f} | {seconds['train']:.1f} |")
    for name in ("two epochs", "resumed for a third"):
        peak = found[name].get("peak_gib")
        lines += ["", f"{name}: {found[name]['seconds']:.0f} s" + (f", peak {peak:.1f} GiB" if peak else "")]
    planned = [line.strip("# ") for line in found["plan"].splitlines() if "memory" in line or "base" in line]
    return [*lines, "", "The plan said:", "", *(f"- {line}" for line in planned)]


if __name__ == "__main__":
    print(table(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/gpu-session")))
