"""Speed and memory of the trainer's steps: harmonized against weighted-sum ones, and a plain DiffusionNFT step beside.

    python -m benchmarks.trainer --small        # a small SD3 transformer, for a CPU: seconds to two minutes
    python -m benchmarks.trainer --full-size    # the architecture of Stable Diffusion 3.5 Medium, for one GPU of 80 GB
    python -m benchmarks.trainer --full-size --modes compiled --only step --only cycle --out trainer.json

Weights are random: no download. A *step* is ``reference.balance.step_gradient`` on two micro-batches of ``--batch``
rows (a row is an image at a timestep), gradient clipping, AdamW and the average of the weights. Its kinds:

    step/weighted-sum      one backward pass a micro-batch, whatever K
    step/shared K=..       a full harmonization (min-norm), all K gradients from one shared backward pass
    step/k-pass K=..       the same from K + 1 backward passes
    step/transcription     DiffusionNFT's training step written down from its equations: three forwards (old, base,
                           new), one backward pass, PEFT's own switches, no compile
    cycle/.. N=10          ten steps, the first of which refreshes the coefficients; time of one of them
    epoch/..               sampling in 10 steps (without decoding and rewards) and training on 9 of the 10 timesteps

Kinds of one group are timed in turns; ``speed`` and ``memory`` are relative to the group's weighted-sum in the same
mode. ``--only`` takes the beginning of names and can be repeated; weighted-sum always runs along. What fails, as for
want of memory, says so in its row. With ``--limit`` seconds gone, no group is begun. Results are written after each.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations at import
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    from reference.balance import Step, init_balance, step_gradient
    from reference.config import Config, LossConfig, Rule, SolveConfig, rule_of
    from reference.policy import (
        Policy,
        active,
        add_lora,
        compile_blocks,
        load_adapter,
        merged,
        parameters,
        velocity,
    )
    from reference.rollout import sample, times
    from reference.rows import Rows

from marble_core import ema_tree

LOSS = LossConfig(form="x0", beta=0.1, a_max=5.0, kl_weight=1e-4)
CLIP, CYCLE, SAMPLING_STEPS = 1.0, 10, 10


@dataclass(frozen=True)
class Setup:
    """A model and its data.

    Attributes:
        transformer: arguments of ``SD3Transformer2DModel``.
        latent: height and width of a latent.
        tokens: of a prompt.
        rank, alpha: of the LoRA adapters, on the attention's linear layers.
        batch: rows of a micro-batch.
        dtype: of the frozen weights, and of autocast where it is not float32; adapters are float32.
    """

    transformer: dict[str, Any]
    latent: int
    tokens: int
    rank: int
    alpha: float
    batch: int
    dtype: torch.dtype


# transformer/config.json of stabilityai/stable-diffusion-3.5-medium; 512 px; 77 tokens of CLIP and 256 of T5
FULL = Setup(
    transformer=dict(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        out_channels=16,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    ),
    latent=64,
    tokens=77 + 256,
    rank=32,
    alpha=64.0,
    batch=9,
    dtype=torch.bfloat16,
)
SMALL = Setup(
    transformer=FULL.transformer
    | dict(
        sample_size=16,
        num_layers=3,
        num_attention_heads=3,
        joint_attention_dim=128,
        caption_projection_dim=192,
        pooled_projection_dim=128,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
    ),
    latent=16,
    tokens=24,
    rank=8,
    alpha=16.0,
    batch=4,
    dtype=torch.float32,
)


class Kind(NamedTuple):
    """Something that is timed.

    Attributes:
        group: kinds of one group are timed in turns and compared with its ``weighted-sum``.
        name: within the group.
        K: rewards.
        rule: None for the transcription.
        every: steps from one refresh to the next, 0 for none.
        steps: optimiser steps of one call; its time is divided by them.
    """

    group: str
    name: str
    K: int
    rule: Rule | None
    every: int
    steps: int = 1


def kinds() -> list[Kind]:
    """All that can be timed, the important first."""
    weighted, full = _rule("weighted-sum"), _rule("min-norm")
    found = [Kind("step", "weighted-sum", 5, weighted, 0), Kind("step", "transcription", 5, None, 0)]
    found += [Kind("step", f"shared K={K}", K, full, 1) for K in (5, 16, 64)]
    found += [Kind("cycle", "weighted-sum", 5, weighted, 0, CYCLE)]
    for name in ("marble-paper", "min-norm", "marble"):
        found.append(Kind("cycle", f"{name} N={CYCLE}", 5, _rule(name), CYCLE, CYCLE))
    found += [Kind("epoch", "weighted-sum", 5, weighted, 0), Kind("epoch", "shared K=5", 5, full, 1)]
    found += [Kind("epoch", "transcription", 5, None, 0), Kind("k-pass", "weighted-sum", 5, weighted, 0)]
    return found + [Kind("k-pass", f"k-pass K={K}", K, _rule("min-norm", "k_pass"), 1) for K in (5, 16, 64)]


def _rule(name: str, rows: str = "shared") -> Rule:
    """A rule of the trainer by name."""
    return rule_of(Config(balance=name, solve=SolveConfig(rows=rows)))  # type: ignore[arg-type]


def build_transformer(setup: Setup, device: torch.device | str) -> SD3Transformer2DModel:
    """A transformer with random weights, made where it stays and in its dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(setup.dtype)
    try:
        with torch.device(device):
            transformer = SD3Transformer2DModel(**setup.transformer)
        for buffer in transformer.buffers():  # position embeddings, in float32 at first
            buffer.data = buffer.data.to(setup.dtype)
        return transformer.eval()
    finally:
        torch.set_default_dtype(before)


def build(setup: Setup, device: torch.device) -> Policy:
    """The policy, with adapters ``default`` and ``old`` that differ."""
    torch.manual_seed(0)
    autocast = None if setup.dtype == torch.float32 else setup.dtype
    transformer = build_transformer(setup, device)
    policy = add_lora(transformer, rank=setup.rank, alpha=setup.alpha, targets="attention", seed=0, autocast=autocast)
    trained = parameters(policy)
    for adapter in ("default", "old"):
        state = {name: p + 0.02 * torch.randn_like(p) for name, p in trained.items()}
        load_adapter(policy, adapter, state)
    return policy


def random_rows(setup: Setup, B: int, K: int, device: torch.device) -> Rows:
    """``B`` rows in two halves, as the trainer makes them."""
    g = torch.Generator(device).manual_seed(1)
    shape = (B, setup.transformer["in_channels"], setup.latent, setup.latent)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=device)

    embeds = normal(B, setup.tokens, setup.transformer["joint_attention_dim"])
    pooled = normal(B, setup.transformer["pooled_projection_dim"])
    t = torch.linspace(0.05, 1.0, B, device=device)
    prompt = torch.arange(B, device=device)
    half = (prompt >= B // 2).long()
    return Rows(normal(*shape), normal(*shape), t, embeds, pooled, normal(B, K), normal(B), half, prompt)


def transcription(policy: Policy, rows: Rows, loss: LossConfig, micro_batch: int) -> dict[str, Tensor]:
    """DiffusionNFT's training step for one scalar advantage, from its paper's equations (arXiv 2509.16117): velocities
    of the old policy, of the base and of the new one, the two branches, one backward pass."""
    model, trained, B = policy.model, parameters(policy), rows.x0.shape[0]
    for start in range(0, B, micro_batch):
        part = slice(start, start + micro_batch)
        x0, noise, t, advantage = (x[part] for x in (rows.x0, rows.noise, rows.t, rows.A_sum))
        time = t.view(-1, 1, 1, 1)
        x_t = (1 - time) * x0 + time * noise
        condition = rows.embeds[rows.prompt[part]], rows.pooled[rows.prompt[part]]
        with torch.no_grad():
            model.set_adapter("old")
            v_old = velocity(policy, x_t, t, condition)
            with model.disable_adapter():
                v_ref = velocity(policy, x_t, t, condition)
        model.set_adapter("default")
        v = velocity(policy, x_t, t, condition)
        branches = []
        for v_branch in ((1 - loss.beta) * v_old + loss.beta * v, (1 + loss.beta) * v_old - loss.beta * v):
            error = x_t - time * v_branch - x0
            with torch.no_grad():
                scale = error.abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-5)
            branches.append((error.square() / scale).mean(dim=(1, 2, 3)))
        r = (advantage / loss.a_max).clamp(-1, 1) / 2 + 0.5
        policy_loss = (r * branches[0] + (1 - r) * branches[1]) * loss.a_max / loss.beta
        kl = (v - v_ref).square().mean(dim=(1, 2, 3))
        ((policy_loss + loss.kl_weight * kl).sum() / B).backward()  # type: ignore[no-untyped-call]
    gradient = {name: p.grad for name, p in trained.items() if p.grad is not None}
    for p in trained.values():
        p.grad = None
    return gradient


def training(policy: Policy, rows: Rows, kind: Kind, setup: Setup) -> Callable[[], None]:
    """``kind.steps`` optimiser steps, ready to be called."""
    trained = parameters(policy)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-6)
    start = None if kind.rule is None else init_balance(kind.K, kind.rule, trained)
    prior = torch.full((kind.K,), 1 / kind.K, dtype=torch.float64)
    average = {name: p.detach().clone() for name, p in trained.items()}

    def run() -> None:
        nonlocal average
        balance = start
        for i in range(kind.steps):
            if kind.rule is None or balance is None:
                with torch.compiler.set_stance("force_eager"):
                    gradient = transcription(policy, rows, LOSS, setup.batch)
            else:
                refresh = kind.every > 0 and i % kind.every == 0
                step = Step(refresh, collect=False, uniform=False, prior=prior, metric=None, previous=None)
                result = step_gradient(policy, rows, balance, kind.rule, LOSS, step, micro_batch=setup.batch)
                gradient, balance = result.gradient, result.balance
            for name, p in trained.items():
                p.grad = gradient[name]
            torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average = ema_tree(average, trained, 0.9)

    return run


def epoch(policy: Policy, rows: Rows, kind: Kind, setup: Setup, device: torch.device) -> Callable[[], None]:
    """Sampling of ``2 batch`` images, then one step on each of them at 9 of its 10 timesteps."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    J, N = int(0.99 * SAMPLING_STEPS), 2 * setup.batch
    schedule = times(scheduler, SAMPLING_STEPS)[:J].to(device)
    image = torch.arange(N, device=device).repeat_interleave(J)
    many = Rows(*(x[image] for x in rows))._replace(embeds=rows.embeds, pooled=rows.pooled, t=schedule.repeat(N))
    train = training(policy, many, kind, setup)

    def run() -> None:
        stance = "force_eager" if kind.rule is None else "default"
        switch = active if kind.rule is None else merged
        with torch.no_grad(), torch.compiler.set_stance(stance), switch(policy, "old"):
            for part in range(0, N, setup.batch):
                condition = tuple(x[part : part + setup.batch] for x in (rows.embeds, rows.pooled))
                flow = lambda x, t, condition=condition: velocity(policy, x, t, condition)  # noqa: E731
                noise = torch.randn_like(rows.x0[part : part + setup.batch])
                many.x0[part * J : (part + setup.batch) * J] = sample(
                    flow, noise, scheduler, sampler="dpm2", steps=SAMPLING_STEPS
                ).repeat_interleave(J, dim=0)
        train()

    return run


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
                _free(device)
                continue
            if before is None:
                found[name] = Timing([], seconds, None, None)
            else:
                found[name] = before._replace(seconds=[*before.seconds, seconds], peak=max_of(before.peak, peak))
    return found


def max_of(a: int | None, b: int | None) -> int | None:
    """The larger of two figures, either of which may be missing."""
    return b if a is None else a if b is None else max(a, b)


def _free(device: torch.device) -> None:
    """Give back what a failed or finished call held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


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
            if kind.group == "epoch":
                return epoch(policy, rows, kind, setup, device)
            return training(policy, rows, kind, setup)

        return ready

    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    found = measure({kind.name: make(kind) for kind in group}, options.repeats, device, options.budget, clock)
    _free(device)
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
    ("amortized N = 10, min-norm: speed of a step", "cycle/min-norm N=10", "speed", 0.98, "at least"),
    ("amortized N = 10, marble: speed of a step", "cycle/marble N=10", "speed", 0.98, "at least"),
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
