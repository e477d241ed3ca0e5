"""Records of runs that were never trained, for what reads them."""

from __future__ import annotations

import json
from typing import Any

from reference.config.settings import Config


def records(config: Config, gains: tuple[float, float, float], cpu: float, prompts: int = 3) -> list[dict[str, Any]]:
    """A run of two epochs whose rewards rise evenly to ``gains``."""
    found: list[dict[str, Any]] = []
    for epoch in range(3):
        if epoch:
            found.append({"kind": "step", "epoch": epoch - 1, "grad_norm": 0.5 * epoch, "kl": 0.01 * (epoch - 1)})
            fresh = {"text": -0.1, "jpeg": 0.3} if epoch > 1 else None
            refresh = {"min_cosine": 0.5, "next_min_cosine": -0.1, "next_cosines": fresh}
            found.append({"kind": "refresh", "epoch": epoch - 1, **refresh})
            found.append({"kind": "epoch", "epoch": epoch - 1, "images": 10, "cpu_seconds": cpu})
        share = epoch / 2
        per_prompt = {
            name: [None if name == "text" and p == 0 else 1.0 + p + share * gain for p in range(prompts)]
            for name, gain in zip(("text", "jpeg", "objects"), gains, strict=True)
        }
        std = {"text": 0.5, "jpeg": 0.1, "objects": 1.0}
        found.append({"kind": "eval", "epoch": epoch, "per_prompt": per_prompt, "within_std": std})
    return found


def write(config: Config, lines: list[dict[str, Any]]) -> None:
    config.run.mkdir(parents=True)
    (config.run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
