"""Speed and memory of the trainer's steps: harmonized against weighted-sum ones, and a plain DiffusionNFT step beside.

    python -m benchmarks.trainer --small        # a small SD3 transformer, for a CPU: seconds to two minutes
    python -m benchmarks.trainer --full-size    # the architecture of Stable Diffusion 3.5 Medium, for one GPU of 80 GB
    python -m benchmarks.trainer --full-size --modes compiled --only step --only cycle --out trainer.json

Weights are random: no download. A *step* is ``reference.step.balance.step_gradient`` on two micro-batches of
``--batch`` rows (a row is an image at a timestep), gradient clipping, AdamW and the average of the weights. Its kinds:

    step/weighted-sum      one backward pass a micro-batch, whatever K
    step/shared K=..       a full harmonization (min-norm), all K gradients from one shared backward pass
    step/k-pass K=..       the same from K + 1 backward passes
    step/transcription     DiffusionNFT's training step written down from its equations: three forwards (old, base,
                           new), one backward pass, PEFT's own switches, no compile
    cycle/.. N=10          ten steps, the first of which refreshes the coefficients; time of one of them
    cycle/soft-min         ten steps of a rule that does not solve, none of which measures
    epochs/.. N=10         ten epochs of a step each, the first of which refreshes; time of one of them
    epoch/..               sampling in 10 steps (without decoding and rewards) and training on 9 of the 10 timesteps

Kinds of one group are timed in turns; ``speed`` and ``memory`` are relative to the group's weighted-sum in the same
mode. ``--only`` takes the beginning of names and can be repeated; weighted-sum always runs along. What fails, as for
want of memory, says so in its row. With ``--limit`` seconds gone, no group is begun. Results are written after each.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import free, measure
from benchmarks.trainer_models import FULL, SMALL, Setup, build, random_rows
from benchmarks.trainer_steps import Kind, epoch, kinds, training
from reference.config.settings import LogConfig
from reference.policy.adapters import Policy, compile_blocks, parameters


def chosen(only: list[str] | None) -> Iterator[list[Kind]]:
    """The kinds of each group whose names begin as asked for, with the group's baseline."""
    every = kinds()
    for group in dict.fromkeys(kind.group for kind in every):
        part = [kind for kind in every if kind.group == group]
        wanted = [kind for kind in part if not only or any(f"{group}/{kind.name}".startswith(x) for x in only)]
        if wanted:
            yield wanted if part[0] in wanted else [part[0], *wanted]


def run_group(
    policy: Policy, setup: Setup, group: list[Kind], mode: str, options: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """Time a group; one record for each kind."""
    B = 2 * setup.batch

    def make(kind: Kind) -> Callable[[], Callable[[], None]]:
        def ready() -> Callable[[], None]:
            rows = random_rows(setup, B, kind.K, device)
            if kind.group in ("epoch", "epochs"):
                return epoch(policy, rows, kind, setup, device)
            return training(policy, rows, kind, setup)

        return ready

    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    found = measure({kind.name: make(kind) for kind in group}, options.repeats, device, options.budget, clock)
    free(device)
    records = []
    for kind in group:
        timing = found[kind.name]
        record: dict[str, Any] = {"name": f"{kind.group}/{kind.name}", "mode": mode, "K": kind.K, "error": timing.error}
        if timing.error is None:
            seconds = statistics.median(timing.seconds) / kind.steps
            record |= {"seconds": seconds, "repeats": len(timing.seconds), "first_call": timing.first}
            record |= {"spread": (max(timing.seconds) - min(timing.seconds)) / kind.steps / seconds}
            # of an epoch the images, of a step its rows
            record |= {"per_second": B / seconds, "peak_bytes": timing.peak}
        records.append(record)
    baseline = records[0]
    for record in records:
        if "seconds" in record and "seconds" in baseline:
            record["speed"] = baseline["seconds"] / record["seconds"]
            if record["peak_bytes"] is not None:
                record["memory"] = record["peak_bytes"] / baseline["peak_bytes"]
    return records


TARGETS = (
    ("full harmonization at every step, K = 5: speed of a step", "step/shared K=5", "speed", 0.75, "at least"),
    ("full harmonization at every step, K = 5: speed of an epoch", "epoch/shared K=5", "speed", 0.80, "at least"),
    ("full harmonization, K = 5: peak memory", "step/shared K=5", "memory", 1.03, "at most"),
    ("amortized N = 10, marble-paper: speed of a step", "cycle/marble-paper N=10", "speed", 0.98, "at least"),
    ("amortized N = 10, marble: speed of a step", "cycle/marble N=10", "speed", 0.98, "at least"),
    ("amortized N = 10, marble-paper: speed of an epoch", "epochs/marble-paper N=10", "speed", 0.97, "at least"),
    ("amortized N = 10, marble: speed of an epoch", "epochs/marble N=10", "speed", 0.97, "at least"),
    ("transcription: speed of a step beside weighted-sum", "step/transcription", "speed", 1.0, "at most"),
)


def targets(records: list[dict[str, Any]], mode: str) -> list[dict[str, Any]]:
    """Each target beside what was measured, where it was."""
    by_name = {record["name"]: record for record in records if record["mode"] == mode}
    found = []
    for text, name, key, bound, sense in TARGETS:
        value = by_name.get(name, {}).get(key)
        if value is not None:
            met = value >= bound if sense == "at least" else value <= bound
            found.append({"target": f"{text}: {sense} {bound:g}", "mode": mode, "measured": value, "met": met})
    for group, what in (("cycle", "a step"), ("epochs", "an epoch")):
        names = ("weighted-sum", "soft-min", "soft-min N=10")
        base, plain, often = (by_name.get(f"{group}/{name}", {}).get("seconds") for name in names)
        if base is not None and plain is not None and often is not None:
            every = LogConfig().measure_every
            speed = base / (plain + 10 * (often - plain) / every)  # what one measurement adds, spread over the interval
            text = f"soft-min, measuring every {every} steps: speed of {what}: at least 0.98"
            found.append({"target": text, "mode": mode, "measured": speed, "met": speed >= 0.98})
    few, many = (by_name.get(f"step/shared K={K}", {}).get("seconds") for K in (5, 64))
    if few is not None and many is not None:
        row = {"target": "K = 64 beside K = 5: time at most 1.15", "mode": mode}
        found.append(row | {"measured": many / few, "met": many <= 1.15 * few})
    return found


def show(record: dict[str, Any]) -> str:
    """A line of the table."""
    head = f"{record['mode']:9} {record['name']:26}"
    if record["error"] is not None:
        return f"{head} {record['error']}"
    peak, memory = record["peak_bytes"], record.get("memory")
    figures = f"{1e3 * record['seconds']:10.0f} {record['per_second']:9.2f} {record.get('speed', float('nan')):6.3f}"
    space = "" if peak is None else f" {peak / 2**30:8.2f} {memory if memory is not None else float('nan'):6.3f}"
    return f"{head} {figures}{space:16} {record['repeats']:3d} {record['spread']:6.0%} {record['first_call']:7.1f}"


def where_of(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    gpu = device.type == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if gpu else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--small", action="store_true", help="a small transformer")
    size.add_argument("--full-size", action="store_true", help="SD3.5 Medium's architecture")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bf16"), help="of the frozen weights; default by size")
    parser.add_argument("--batch", type=int, help="rows of a micro-batch; a step has two of them")
    parser.add_argument("--repeats", type=int, default=3 if gpu else 2)
    parser.add_argument("--only", action="append", help="beginning of a name, as step/shared; may be repeated")
    parser.add_argument(
        "--modes", nargs="+", choices=("eager", "compiled"), help="default: both on a GPU, eager on a CPU"
    )
    parser.add_argument("--budget", type=float, default=15.0, help="seconds for the repeats of one kind")
    parser.add_argument("--limit", type=float, default=450.0, help="seconds after which no further group is begun")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, for a busy machine without a GPU"
    )
    parser.add_argument("--out", type=Path, help="also write everything to this JSON file")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats: expected at least 1")
    if options.clock == "cpu" and options.device != "cpu":
        parser.error("--clock cpu: expected --device cpu, whose work it measures")
    names = [f"{kind.group}/{kind.name}" for kind in kinds()]
    for start in options.only or []:
        if not any(name.startswith(start) for name in names):
            parser.error(f"--only: expected the beginning of one of {', '.join(names)}, got {start}")
    options.modes = options.modes or (["eager", "compiled"] if options.device.startswith("cuda") else ["eager"])
    return options


def main(arguments: list[str] | None = None, setups: tuple[Setup, Setup] = (SMALL, FULL)) -> dict[str, Any]:
    """Measure, print a table, write JSON; returns what it wrote."""
    begun = time.monotonic()
    options = parse(arguments)
    device = torch.device(options.device)
    setup = setups[1] if options.full_size else setups[0]
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}.get(options.dtype, setup.dtype)
    setup = dataclasses.replace(setup, batch=options.batch or setup.batch, dtype=dtype)
    policy = build(setup, device)
    P = sum(p.numel() for p in parameters(policy).values())
    total = sum(p.numel() for p in policy.model.parameters()) - 2 * P
    where = where_of(device) | {"clock": options.clock}
    result: dict[str, Any] = {"where": where, "setup": {k: str(v) for k, v in vars(setup).items()}}
    result |= {"trained_parameters": P, "records": [], "targets": []}
    print(" ".join(f"{k}={v}" for k, v in where.items()))
    sizes = f"{total / 1e6:.1f} M weights in {dtype}, {P / 1e6:.2f} M trained"
    print(f"{sizes}; two micro-batches of {setup.batch} rows a step\n")
    columns = f"{'ms':>10} {'per s':>9} {'speed':>6} {'GiB':>8} {'memory':>6} {'n':>3} spread  1st s"
    print(f"{'mode':9} {'name':26} {columns}")
    for mode in dict.fromkeys(options.modes):
        if mode == "compiled":
            compile_blocks(policy)
        for group in chosen(options.only):
            if time.monotonic() - begun > options.limit:
                message = f"not begun: {options.limit:g} s were over"
                new = [{"name": f"{k.group}/{k.name}", "mode": mode, "K": k.K, "error": message} for k in group]
            else:
                new = run_group(policy, setup, group, mode, options, device)
            print("\n".join(map(show, new)), flush=True)
            result["records"] += new
            if options.out:
                options.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
        result["targets"] += targets(result["records"], mode)
    print("\ntargets, set for --full-size on a GPU")
    for row in result["targets"]:
        print(f"{row['mode']:9} {row['target']:72} {row['measured']:6.3f}  {'met' if row['met'] else 'missed'}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
