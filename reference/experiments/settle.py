"""The test of the claim: where the weighted sum's step lowers a reward, does the balanced step raise every one?

From the same weights and the same mini-batch every rule takes one virtual step. The rewards are measured again on
held-out prompts with the noise of before, so that a difference is the step's.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from marble_core import (
    GainState,
    combine_rows,
    cross_alignment,
    cross_gram,
    gains_since_start,
    gram_matrix,
    harmonize,
)
from marble_core.rules import Evidence
from reference.config.checks import at_least
from reference.config.settings import Config
from reference.errors import ConfigError
from reference.experiments.bank import key_of, rows_and_sum, weighed_epoch
from reference.experiments.candidates import coefficients_of
from reference.policy.adapters import Policy, adapter_state, load_adapter
from reference.policy.base import Base
from reference.policy.load import load_model
from reference.processes.peers import ALONE
from reference.prompts.pool import all_prompts
from reference.run.inputs import Inputs, prepare
from reference.run.intervals import change
from reference.run.state import newest
from reference.step.batch import group_of, step_rows, whole_step
from reference.step.estimate import Tree
from reference.step.evaluation import Judging, evaluate, prompt_means, within_std
from reference.step.halves import halves, joined
from reference.step.rollout import sampling_of
from reference.text_files import make_folder, parse_json, write_whole

_OTHER_SEED = 2000  # so that no batch is one that the run was trained on
_FRESH = 100_000  # the number of the batch that all directions are compared with


# The raw sum of rewards has a gradient of its own.
RULES = (
    *("uniform", "soft-min", "marble", "marble-paper, between solves"),
    *("noise-aware", "catch-up", "cone", "upgrad"),
)
SUM = "weighted-sum"


class Setting(NamedTuple):
    """What a batch is tried with.

    Attributes:
        prompts: groups of images of a batch.
        sizes: lengths of the steps along each direction; 0 is a step of AdamW with the run's settings.
        images: of each held-out prompt.
    """

    prompts: int
    sizes: tuple[float, ...]
    images: int


class Bench(NamedTuple):
    """The policy under test, and all that is needed to draw a batch and to judge a step."""

    config: Config
    base: Base
    policy: Policy
    inputs: Inputs
    gain: Tensor
    optimizer: dict[str, Any] | None


def open_bench(config: Config, run: Path | None) -> Bench:
    """Load the base policy of a configuration, or the newest checkpoint of a run.

    Raises:
        ConfigError: the run has no checkpoint.
    """
    inputs = prepare(config)
    base, policy = load_model(config, [p.text for p in [*all_prompts(inputs.pool), *inputs.held_out]])
    gain, optimizer = torch.full((len(config.rewards),), torch.nan, dtype=torch.float64), None
    if run is not None:
        state = newest(run)
        load_adapter(policy, "default", state["default"])
        load_adapter(policy, "old", state["old"])
        gain, optimizer = gains_since_start(GainState(*state["gains"])), state["optimizer"]
    return Bench(config, base, policy, inputs, gain, optimizer)


class Batch(NamedTuple):
    """Gradients of one mini-batch: of the rewards (both halves), of the raw sum, and of what all rules share."""

    a: Tree
    b: Tree
    total: Tree
    shared: Tree


def gradients(bench: Bench, number: int, prompts: int) -> Batch:
    """Draw a mini-batch of ``prompts`` groups and take its gradients, in two halves that share no prompt."""
    rollout_config = dataclasses.replace(bench.config.rollout, prompts_per_epoch=prompts)
    config = dataclasses.replace(bench.config, seed=bench.config.seed + _OTHER_SEED, rollout=rollout_config)
    weighed = weighed_epoch(bench.policy, bench.base, bench.inputs.trained, bench.inputs.pool, config, number)
    half = group_of(len(weighed.A), config) % 2
    index = torch.cat([(half == side).nonzero().flatten() for side in (0, 1)])
    rows, whole = step_rows(bench.base, weighed, index, config, 0), whole_step(index, config, ALONE)
    parts = [rows_and_sum(bench.policy, part, config) for part, _ in halves(rows, whole)]
    found = joined(parts, whole, len(config.rewards))
    return Batch(found.a, found.b, found.own, found.shared)


def directions(batch: Batch, gain: Tensor) -> tuple[dict[str, Tree], dict[str, Tensor], Evidence]:
    """The gradient that each rule would hand to the optimiser, its coefficients, and what it looked at."""
    h = {k: (batch.a[k] + batch.b[k]) / 2 for k in batch.a}
    evidence = Evidence(gram_matrix(h).cpu(), cross_gram(batch.a, batch.b).cpu(), gain)
    coefficients = {label: coefficients_of(label, evidence, len(gain)) for label in RULES}
    found = {SUM: batch.total} | {label: combine_rows(h, c) for label, c in coefficients.items()}
    whole = {label: {k: x + batch.shared[k] for k, x in tree.items()} for label, tree in found.items()}
    return whole, coefficients, evidence


def stepped(bench: Bench, direction: Tree, size: float) -> Tree:
    """The weights after one virtual step: of length ``size`` along a direction, or of AdamW where it is 0."""
    weights = adapter_state(bench.policy, "default")
    if size > 0:
        length = math.sqrt(sum(float(x.double().square().sum()) for x in direction.values()))
        return {k: x - size / max(length, 1e-300) * direction[k] for k, x in weights.items()}
    o, trial = bench.config.optim, [torch.nn.Parameter(x) for x in weights.values()]
    adam = torch.optim.AdamW(trial, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, eps=o.eps)
    if bench.optimizer is not None:
        adam.load_state_dict(bench.optimizer)
    for p, g in zip(trial, direction.values(), strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(trial, o.clip)
    adam.step()
    return {k: p.detach() for k, p in zip(weights, trial, strict=True)}


def judged(bench: Bench, weights: Mapping[str, Tensor], images: int) -> tuple[Tensor, Tensor]:
    """Mean of every reward on each held-out prompt ``[P, K]``, and its spread within a prompt ``[K]``."""
    inputs, judging = bench.inputs, Judging(images, 1, sampling_of(bench.config.rollout))
    scores, _ = evaluate(bench.policy, bench.base, weights, inputs.held_out, inputs.trained, judging)
    return prompt_means(scores, images), within_std(scores, images)


def try_batch(bench: Bench, number: int, setting: Setting, before: Tensor, other: Tree) -> dict[str, Any]:
    """One batch: paired held-out changes of every reward after each rule's step, and what its gradients look like.

    ``other`` are the K gradients of a batch that no direction is made from.
    """
    batch = gradients(bench, number, setting.prompts)
    found, coefficients, evidence = directions(batch, bench.gain)
    names, changes = bench.config.rewards, {}
    for size in setting.sizes:
        for label, direction in found.items():
            after, _ = judged(bench, stepped(bench, direction, size), setting.images)
            pairs = zip(before.T.tolist(), after.T.tolist(), strict=True)
            changes[f"{label} @ {size:g}"] = {k: change(x, y)[:3] for k, (x, y) in zip(names, pairs, strict=True)}
    h = {k: (batch.a[k] + batch.b[k]) / 2 for k in batch.a}
    assert evidence.gram is not None
    solved = harmonize(evidence.gram)
    cosines = {
        kind: {label: float(cross_alignment(d, rows).minimum) for label, d in found.items()}
        for kind, rows in (("same", h), ("fresh", other))
    }
    return {
        "batch": number,
        "changes": changes,
        "coefficients": {label: c.tolist() for label, c in coefficients.items()},
        "direction_norm": float(solved.direction_norm),
        "stationary": bool(solved.stationary),
        "cosines": cosines,
    }


def settle(config: Config, run: Path | None, setting: Setting, batches: int, folder: Path) -> list[dict[str, Any]]:
    """Try ``batches`` mini-batches; those that are in the folder are not tried again.

    Returns:
        One record a batch, as written to ``folder``.

    Raises:
        ConfigError: a number that cannot be, a folder that cannot be used, or batches in it that were tried with other
            settings or at another policy.
    """
    at_least(1, {"--batches": batches, "--images": setting.images})
    at_least(2, {"--prompts": setting.prompts})
    if not setting.sizes or not all(0 <= size < math.inf for size in setting.sizes):
        raise ConfigError(f"--sizes: expected finite numbers from 0 on, got {list(setting.sizes)}.")
    if config.threads:
        torch.set_num_threads(config.threads)
    asked = {"eval_prompts": config.log.eval_prompts, **setting._asdict(), "sizes": list(setting.sizes)}
    key = key_of(config, run, asked)
    make_folder(folder)
    paths = [folder / f"batch-{n:04d}.json" for n in range(batches)]
    found = {n: _read(path, key, config) for n, path in enumerate(paths) if path.exists()}
    waiting = [n for n in range(batches) if n not in found]
    if waiting:
        bench = open_bench(config, run)
        before, spread = judged(bench, adapter_state(bench.policy, "default"), setting.images)
        units = dict(zip(config.rewards, spread.tolist(), strict=True))
        fresh = gradients(bench, _FRESH, setting.prompts)
        other = {k: (fresh.a[k] + fresh.b[k]) / 2 for k in fresh.a}
        for n in waiting:
            record = try_batch(bench, n, setting, before, other) | {"within_std": units, "key": key}
            write_whole(paths[n], f"{json.dumps(record)}\n".encode())
            found[n] = _read(paths[n], key, config)
            print(f"batch {n}: done", flush=True)
    return [found[n] for n in range(batches)]


def _read(path: Path, key: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """A batch that was tried before; one from before there were keys is held to the sizes and rewards in it.

    Raises:
        ConfigError: it was tried with other settings or at another policy, or is damaged.
    """
    try:
        record: dict[str, Any] = parse_json(path.read_bytes())
        sizes = list(dict.fromkeys(name.rpartition(" @ ")[2] for name in record["changes"]))
        found, wanted = {"sizes": sizes, "rewards": list(record["within_std"])}, dict(key)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--folder: cannot read {path}: {error}. Remove it to try the batch again.") from error
    if "key" in record:
        found = record["key"]
    else:
        wanted = {"sizes": list(dict.fromkeys(f"{x:g}" for x in key["sizes"])), "rewards": list(config.rewards)}
    other = [name for name, value in wanted.items() if found.get(name) != value]
    if other:
        raise ConfigError(
            f"--folder: {path} was tried with other settings or at another policy (other {', '.join(other)}). Choose "
            "another --folder."
        )
    return record
