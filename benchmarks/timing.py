"""Time calls in turns, with what they hold of a GPU's memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Seconds of each call, of the first one, the peak of the device's memory in bytes, and why there are none."""

    seconds: list[float]
    first: float
    peak: int | None
    error: str | None


def timed(
    call: Callable[[], None], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, int | None]:
    """Seconds of a call, the device's work included, and the peak of its memory."""
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = clock()
    call()
    if gpu:
        torch.cuda.synchronize(device)
    return clock() - start, torch.cuda.max_memory_allocated(device) if gpu else None


def measure(
    calls: dict[str, Callable[[], Callable[[], None]]],
    repeats: int,
    device: torch.device,
    budget: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time calls in turns, after one each that warms up. A call that takes more than its ``budget`` seconds for all
    repeats gets fewer, but one.

    Args:
        calls: each makes what is then called again and again.
    """
    ready: dict[str, Callable[[], None]] = {}
    found: dict[str, Timing] = {}
    for turn in range(repeats + 1):
        for name, make in calls.items():
            before = found.get(name)
            if before is not None and (before.error or (turn > 1 and sum(before.seconds) > budget)):
                continue
            try:
                if name not in ready:
                    ready[name] = make()
                seconds, peak = timed(ready[name], device, clock)
            except (RuntimeError, ValueError) as error:  # torch's own, of the device and of the compiler
                found[name] = Timing([], 0.0, None, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
                ready.pop(name, None)
                free(device)
                continue
            if before is None:
                found[name] = Timing([], seconds, None, None)
            else:
                found[name] = before._replace(seconds=[*before.seconds, seconds], peak=max_of(before.peak, peak))
    return found


def max_of(a: int | None, b: int | None) -> int | None:
    """The larger of two figures, either of which may be missing."""
    return b if a is None else a if b is None else max(a, b)


def free(device: torch.device) -> None:
    """Give back what a failed or finished call held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
