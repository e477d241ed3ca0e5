"""Runs that are killed, doubled or kept waiting. ``KILLS=100 pytest tests/faults`` kills more; ``make faults`` does."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reference.config.presets import preset
from reference.config.settings import Config, LogConfig, ScoringConfig
from reference.errors import ConfigError, RewardError
from reference.interfaces import plain_prompts, score
from reference.rewards.scorer import scorer_of
from reference.run.lock import lock
from reference.run.reading import records
from reference.run.state import newest
from reference.train import train

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("KILLS", "2"))
pytestmark = pytest.mark.slow


def config(run: Path, **changes: Any) -> Config:
    tiny = preset("tiny")
    log = dataclasses.replace(tiny.log, watch=(), eval_every=1)
    given: dict[str, Any] = {"epochs": 3, "rewards": ("objects", "colour", "jpeg"), "threads": 1, **changes}
    return dataclasses.replace(tiny, run=run, log=log, **given)


def flags(run: Path, balance: str) -> list[str]:
    """A command line that says what ``config`` says."""
    found = ["train", "--preset", "tiny", "--balance", balance, "--rewards", "objects", "colour", "jpeg"]
    return [*found, "--epochs", "3", "--threads", "1", "--log.watch", "--log.eval-every", "1", "--run", str(run)]


def contents(run: Path) -> tuple[str, list[dict[str, Any]]]:
    """A hash of all adapters at the end, and the records without times."""
    found = hashlib.sha256()
    state = newest(run)
    for kind in ("default", "old", "ema"):
        for _, x in sorted(state[kind].items()):
            found.update(x.contiguous().view(torch.uint8).numpy().tobytes())
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return found.hexdigest(), [{k: v for k, v in r.items() if "seconds" not in k} for r in lines]


@pytest.mark.parametrize("balance", ["soft-min", "cone"])
def test_a_run_that_is_killed_at_random_ends_as_an_undisturbed_one(tmp_path: Path, balance: str) -> None:
    train(config(tmp_path / "calm", balance=balance))
    rng, run = random.Random(balance), tmp_path / "killed"
    command = [sys.executable, "-m", "reference", *flags(run, balance)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    killed = 0
    for _ in range(20 * KILLS):
        begun = any((run / "checkpoints").glob("step-*.ckpt"))
        process = subprocess.Popen(
            [*command, "--resume"] if begun else command,
            env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        if killed < KILLS:
            while process.poll() is None and not (run / "metrics.jsonl").exists():
                time.sleep(0.01)
            time.sleep(rng.random() * 4 + 2 * begun)  # while it samples, scores, trains, saves, evaluates or reports
        if killed < KILLS and process.poll() is None:
            process.kill()
        _, error = process.communicate()
        assert process.returncode in (0, -9), error.decode()
        killed += process.returncode == -9
        if process.returncode == 0:
            assert contents(run) == contents(tmp_path / "calm")
            assert (run / "report.html").exists()
            if killed >= KILLS:
                return
            shutil.rmtree(run)  # and once more
    raise AssertionError(f"{killed} kills")


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
def test_a_second_trainer_is_refused_while_the_first_is_alive(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(run, epochs=1))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with (run / "metrics.jsonl").open("ab") as file:
        lock(file, run)
        with pytest.raises(ConfigError, match=r"run: another trainer is writing to .*run\. Wait for it, stop it"):
            train(config(run, epochs=2), resume=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    train(config(run, epochs=2), resume=True)


def test_a_run_folder_may_move_between_two_parts(tmp_path: Path) -> None:
    train(config(tmp_path / "calm", epochs=2))
    train(config(tmp_path / "here", epochs=1))
    (tmp_path / "here").rename(tmp_path / "there")
    train(config(tmp_path / "there", epochs=2), resume=True)
    assert contents(tmp_path / "there")[0] == contents(tmp_path / "calm")[0]


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock jumps by days at every look, mostly back: neither files nor resumption nor times depend on it."""
    train(config(tmp_path / "calm", epochs=2))
    now, rng = [2e9], random.Random(0)

    def jumping() -> float:
        now[0] += rng.uniform(-3e5, 1e5)
        return now[0]

    with monkeypatch.context() as patch:
        patch.setattr(time, "time", jumping)
        patch.setattr(time, "time_ns", lambda: int(1e9 * jumping()))
        train(config(tmp_path / "run", epochs=1))
        train(config(tmp_path / "run", epochs=2), resume=True)
    assert contents(tmp_path / "run")[0] == contents(tmp_path / "calm")[0]
    kinds = [[r["kind"] for r in contents(tmp_path / name)[1]] for name in ("run", "calm")]
    assert kinds[0] == kinds[1]
    times = [x for r in records(tmp_path / "run", "epoch") for x in r["seconds"].values()]
    assert min(times) >= 0


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(config(tmp_path / name, epochs=1))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    for picture in ("before.png", "after.json"):
        one, two = ((tmp_path / name / "grids" / picture).read_bytes() for name in ("one", "two"))
        assert one == two


seen: list[tuple[int, int, int, int]] = []  # largest memory in kB, living tensors, open files, threads


def counted(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
    resources = pytest.importorskip("resource")
    memory = resources.getrusage(resources.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
    files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    tensors = sum(issubclass(type(x), Tensor) for x in gc.get_objects())
    seen.append((memory, tensors, files, threading.active_count()))
    return images.mean((1, 2, 3))


def test_memory_files_and_threads_stay_flat(tmp_path: Path) -> None:
    """Over twenty epochs, after the first ten. ``docs/reliability.md`` has figures of hours."""
    seen.clear()
    log = LogConfig(watch=(), eval_every=2, eval_prompts=3, eval_images=2, eval_steps=2, save_every=1, trackers=())
    train(dataclasses.replace(config(tmp_path / "run", epochs=20, rewards=(f"{__name__}:counted", "jpeg")), log=log))
    first, last = seen[len(seen) // 2], seen[-1]
    assert last[0] - first[0] < 20_000  # the largest can only grow
    assert abs(last[1] - first[1]) < 20  # fewer than two an epoch: nothing is kept
    assert last[2:] == first[2:]


released = threading.Event()


def hangs(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
    released.wait(60)
    return images.mean((1, 2, 3))


def tracked(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
    assert not torch.is_grad_enabled()
    weight = torch.ones((), requires_grad=True)
    with torch.enable_grad():
        return images.mean((1, 2, 3)) * weight


def raises(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
    raise KeyError("size")


def test_a_reward_that_hangs_is_named_where_there_is_a_limit(tmp_path: Path) -> None:
    def scores(name: str, timeout: float) -> Any:
        own = f"{__name__}:{name}"
        made = Config(rewards=(own,), scoring=ScoringConfig(timeout=timeout))
        return score(scorer_of(made, (own,)).rewards, torch.rand(2, 3, 8, 8), plain_prompts(["a", "b"]))

    try:
        began = time.monotonic()
        with pytest.raises(RewardError, match=r"'.*:hangs' took longer than scoring\.timeout = 0\.2 s for 2 images"):
            scores("hangs", 0.2)
        assert time.monotonic() - began < 10
        found = scores("tracked", 30.0)
        assert not found.values.requires_grad  # no graph is kept
        with pytest.raises(RewardError, match=r":raises' raised KeyError: 'size' \(test_runs\.py, line \d+\)"):
            scores("raises", 30.0)
        waiting = config(tmp_path / "run", rewards=("colour", f"{__name__}:hangs"), scoring=ScoringConfig(timeout=0.2))
        with pytest.raises(RewardError, match=r"took longer than scoring\.timeout.*go on with --resume"):
            train(waiting)
        released.set()
        train(dataclasses.replace(waiting, scoring=ScoringConfig(timeout=60.0)), resume=True)
    finally:
        released.set()
