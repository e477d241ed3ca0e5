"""What training writes into ``metrics.jsonl``: a line a step, a refresh, an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from marble_core import GainState
from reference.interfaces import Scores
from reference.run.state import Run, State
from reference.step.balance import StepResult


def log_step(run: Run, state: State, metrics: dict[str, float], result: StepResult, refresh: bool) -> None:
    """Record a step with the coefficients that it applied, and what was found at a refresh."""
    names, where = run.config.rewards, {"epoch": state.epoch, "step": state.step}
    record = {"refresh": refresh, "skipped": state.skipped > 0, **metrics}
    run.live.log({"kind": "step", **where, **record, "coefficients": _named(names, result.coefficients.tolist())})
    if result.refresh is not None:
        run.live.log({"kind": "refresh", **where, **{k: _named(names, v) for k, v in result.refresh.items()}})


def _named(names: Sequence[str], value: Any) -> Any:
    """Lists with an entry a reward, also nested ones, as dictionaries."""
    return {k: _named(names, v) for k, v in zip(names, value, strict=True)} if isinstance(value, list) else value


def log_epoch(
    run: Run, state: State, scores: Scores, gains: Tensor, clock: list[float], cpu: float, notes: list[str]
) -> None:
    """Record an epoch's rewards on its training prompts, its times and its warnings."""
    names, live, summary = run.config.rewards, run.live, {}
    for name, values, on in zip(names, scores.values.T, scores.applicable.T, strict=True):
        x = values[on]
        std = float(x.std()) if len(x) > 1 else None
        summary[name] = {"mean": float(x.mean()) if len(x) else None, "std": std, "n": len(x)}
    seconds = {k: b - a for k, a, b in zip(("sample", "score", "train"), clock, clock[1:], strict=False)}
    record: dict[str, Any] = {"epoch": state.epoch, "step": state.step, "images": len(scores.values)}
    record |= {"seconds": seconds, "cpu_seconds": cpu}
    record |= {"gains": dict(zip(names, gains.tolist(), strict=True))}
    live.log({"kind": "epoch", **record, "rewards": summary, "warnings": notes})
    for note in notes:
        live.say(f"warning, epoch {state.epoch}: {note}")
    live.show(state.epoch, {k: v["mean"] for k, v in summary.items() if v["mean"] is not None})


def epoch_notes(A: Tensor, scores: Scores, gains: GainState, names: Sequence[str]) -> list[str]:
    """Warnings about an epoch's rewards: constant ones, and after 1, 2, 4, 8 epochs those that have never applied."""
    silent = (A == 0).all(0) & scores.applicable.any(0)
    notes = [
        f"reward {name!r} was constant within every group; its coefficient is carried over"
        for name, quiet in zip(names, silent.tolist(), strict=True)
        if quiet
    ]
    if gains.epochs & (gains.epochs - 1):
        return notes
    return notes + [
        f"reward {name!r} has applied to no image in {gains.epochs} epochs: nothing is learnt from it and its share "
        "of the weights is lost. Give prompts that it applies to, or leave it out"
        for name, images in zip(names, gains.images.sum(0).tolist(), strict=True)
        if not images
    ]
