"""The demo: weighted sum and MARBLE from the same seeds, for a few minutes, with one report about both."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path

from reference.config import Config
from reference.report import reward_table, write_comparison
from reference.train import train

RULES = ("weighted-sum", "soft-min")


def demo(settings: Config) -> str:
    """Run both rules afresh in ``settings.run``; returns the table and the path of the report, as text."""
    images = settings.rollout.prompts_per_epoch * settings.rollout.images_per_prompt
    print(
        f"Two runs of {settings.epochs} epochs of {images} images each, from the same base model and seeds: the sum of "
        "five rewards,\nthen MARBLE. Each scores held-out prompts before and after. It takes a few minutes.\n"
    )
    began, runs = time.monotonic(), {}
    for rule in RULES:
        run = settings.run / rule
        if (run / "metrics.jsonl").exists():
            shutil.rmtree(run)
        print(f"{rule}: training in {run}", flush=True)
        train(dataclasses.replace(settings, run=run, balance=rule))
        runs[rule] = run
    report = write_comparison(runs, settings.run / "report.html")
    minutes = (time.monotonic() - began) / 60
    return (
        f"\nHeld-out prompts, mean and 95 % interval, after {minutes:.1f} minutes:\n\n{reward_table(runs)}\n\n"
        "One short run proves nothing: it shows the machinery, and what moves within minutes. Which rule is better is "
        "a\nquestion for several seeds and longer runs.\n\n"
        f"report: {Path(report).resolve()}"
    )
