"""Gradients of many independent units at one policy, kept as their inner products."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from marble_core import GainState, gains_since_start
from reference.config.settings import Config, training_times
from reference.config.toml import to_toml
from reference.policy.adapters import Policy, load_adapter
from reference.policy.base import Base
from reference.policy.load import load_model
from reference.prompts.pool import Pool, all_prompts, held_out_prompts, images_of_epoch, pool_of, training_pool
from reference.rewards.scorer import Scorer
from reference.run.inputs import prepare
from reference.run.state import essentials, newest
from reference.step.batch import Weighed, advantages, step_rows
from reference.step.chance import generator
from reference.step.gradients import Asked, Part, Rows, all_rows
from reference.step.method import by_raw_sum
from reference.step.rollout import sample_epoch, sampling_of

Array = np.ndarray[Any, np.dtype[np.float64]]
Indices = np.ndarray[Any, np.dtype[np.int64]]
_OTHER_SEED = 1000  # so that no unit is one that the run was trained on


class Bank(NamedTuple):
    """Inner products between the gradients of many independent units, a unit being the images of one prompt.

    Attributes:
        gram: ``[U, K + 2, U, K + 2]``: the K rewards' signal gradients, the weighted sum's, and the shared part's.
        training: number of units from training prompts; the others are from held-out prompts.
        rows: of a unit.
        gains: ``[K]``, of the rewards so far, as the run knew them; NaN at the base policy.
    """

    gram: Array
    training: int
    rows: int
    gains: Tensor


def key_of(config: Config, run: Path | None, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What gradients at a policy depend on, as JSON has it: results with other keys do not belong together.

    Args:
        asked: further numbers that they depend on.

    Raises:
        ConfigError: the run has no checkpoint, or prompts cannot be used.
    """
    prompts = [*all_prompts(training_pool(config)), *held_out_prompts(config)]
    settings = to_toml(essentials(config)) + repr(config.scoring.models)
    key = {"settings": _hash(settings.encode()), "texts": _hash(repr(list(map(tuple, prompts))).encode()), **asked}
    if run is None:
        return key | {"step": None, "checkpoint": None}
    step = newest(run)["step"]
    return key | {"step": step, "checkpoint": _hash((run / "checkpoints" / f"step-{step:08d}.ckpt").read_bytes())}


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def collect(config: Config, run: Path | None, units: int, held_out: int, sketch: int) -> dict[str, Any]:
    """Gradients of all units at one policy, as inner products."""
    inputs = prepare(config)
    base, policy = load_model(config, [p.text for p in [*all_prompts(inputs.pool), *inputs.held_out]])
    gains = torch.full((len(config.rewards),), torch.nan, dtype=torch.float64)
    if run is not None:
        state = newest(run)
        load_adapter(policy, "default", state["default"])
        load_adapter(policy, "old", state["old"])
        gains = gains_since_start(GainState(*state["gains"]))
    blocks = [
        _units(policy, base, inputs.trained, prompts, config, count, sketch)
        for prompts, count in ((inputs.pool, units), (pool_of(inputs.held_out), held_out))
    ]
    matrix = torch.cat(blocks)
    U, R = matrix.shape[:2]
    flat, gram = matrix.flatten(0, 1), torch.zeros(U * R, U * R, dtype=torch.float64)
    for start in range(0, flat.shape[1], 1 << 14):
        x = flat[:, start : start + (1 << 14)].double()
        gram += x @ x.mT
    J = config.loss.timesteps_per_image or training_times(config)
    rows = config.rollout.images_per_prompt * J
    return {"gram": gram.reshape(U, R, U, R), "rows": rows, "gains": gains}


def _units(
    policy: Policy,
    base: Base,
    scorer: Scorer,
    pool: Pool,
    config: Config,
    count: int,
    sketch: int,
) -> Tensor:
    """Gradients of ``count`` units ``[count, K + 2, P]``, from epochs of their own."""
    config = dataclasses.replace(config, seed=config.seed + _OTHER_SEED)
    n, found = config.rollout.images_per_prompt, []
    for epoch in itertools.count():
        weighed = weighed_epoch(policy, base, scorer, pool, config, epoch)
        for unit in range(config.rollout.prompts_per_epoch):
            index = torch.arange(unit * n, (unit + 1) * n)
            rows = step_rows(base, weighed, index, config, unit)
            h, shared, *_ = rows_and_sum(policy, rows, config)
            row = torch.cat([torch.cat([h[name].flatten(1), shared[name].flatten()[None]]) for name in h], dim=1)
            found.append(_sketched(row.cpu(), sketch))
            if len(found) == count:
                return torch.stack(found)
        print(f"{len(found)} of {count} units", flush=True)
    raise AssertionError


def weighed_epoch(policy: Policy, base: Base, scorer: Scorer, pool: Pool, config: Config, epoch: int) -> Weighed:
    """An epoch's images as the trainer draws them, with their advantages."""
    prompts, draws = images_of_epoch(pool, config, epoch), generator(config.seed, "rollout", epoch)
    rollout = sample_epoch(policy, base, scorer, prompts, draws, sampling_of(config.rollout))
    return Weighed(rollout, *advantages(rollout.scores, config), epoch)


def rows_and_sum(policy: Policy, rows: Rows, config: Config) -> Part:
    """Gradients of all rewards and of the raw sum ``[K + 1, ...]``, and of the shared part, over some rows."""
    asked = Asked(lambda A, A_sum: by_raw_sum(A, A_sum, A_sum, config.loss.a_max), False, config.optim.micro_batch)
    return all_rows(policy, rows, config.loss, asked, len(rows.half))


def _sketched(rows: Tensor, D: int) -> Tensor:
    """Count sketch: each entry with a random sign into one of ``D`` sums, which keeps inner products in expectation."""
    if D == 0:
        return rows
    g = torch.Generator().manual_seed(0)
    place, sign = torch.randint(D, (rows.shape[1],), generator=g), torch.randint(2, (rows.shape[1],), generator=g)
    return torch.zeros(rows.shape[0], D).index_add_(1, place, rows * (2 * sign - 1))
