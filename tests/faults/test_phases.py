"""Runs that die in one phase after the other: alone, and as one of two processes that share the base model.

``PHASES=all pytest tests/faults/test_phases.py`` takes every phase, ``make faults`` does; the short form some.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from reference.policy.sharding import can_shard
from reference.run.state import begun
from reference.train import train
from tests.faults.test_processes import (
    FLAGS,
    PROGRAM,
    assert_all_steps,
    assert_last_line_says_who_is_gone,
    end,
    start,
)
from tests.faults.test_runs import config, contents, flags

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="no such signals"),
]

# The process that is meant sends itself a signal before or after a call, or within a line of the records.
DYING = """
import importlib, io, os, signal
import reference.__main__

def dies(call):
    module, _, path = target.partition(":")
    owner, (*inner, name) = importlib.import_module(module), path.split(".")
    for part in inner:
        owner = getattr(owner, part)
    plain = getattr(owner, name)
    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call and when == "before":
            os.kill(os.getpid(), getattr(signal, number))
        result = plain(*args, **kwargs)
        if calls[0] == call and when == "after":
            os.kill(os.getpid(), getattr(signal, number))
        return result
    setattr(owner, name, wrapped)

class Cut(io.FileIO):
    def write(self, data):
        calls[0] += 1
        if calls[0] == int(call):
            super().write(data[: len(data) // 2])
            os.kill(os.getpid(), getattr(signal, number))
        return super().write(data)

target, when, call, number, rank = os.environ["DIES"].split()
calls = [0]
if os.environ.get("RANK", "0") == rank:
    if when == "within":
        importlib.import_module("reference.run.live")._opened = lambda path: Cut(path, "ab")
    else:
        dies(int(call))
"""


class Phase(NamedTuple):
    """Where a process dies: at which call of a function, and on which side of it."""

    target: str
    when: str = "before"
    call: int = 1


PHASES = {
    "opening: the configuration is not there yet": Phase("os:replace"),
    "opening: the first checkpoint is not there yet": Phase("os:fsync"),
    "evaluating the base: images are drawn": Phase("reference.step.evaluation:generate_batches", "after"),
    "evaluating the base: nothing is recorded": Phase("reference.run.held_out:evaluate", "after"),
    "evaluating: recorded, but no picture": Phase("reference.run.held_out:save_tiles", "before", 2),
    "sampling": Phase("reference.policy.adapters:merged", "before", 3),
    "sampled and scored": Phase("reference.train:sample_epoch", "after", 2),
    "scoring": Phase("reference.interfaces:score", "before", 3),
    "training: a micro-batch": Phase("reference.step.gradients:branch_losses", "before", 5),
    "training: a measurement": Phase("reference.step.gradients:shared_cotangent_rows", "before", 2),
    "training: stepped, but nothing else": Phase("torch.optim:AdamW.step", "after", 3),
    "training: half a line of the records": Phase("reference.run.live:_opened", "within", 5),
    "training: all is recorded": Phase("reference.train:log_epoch", "after", 2),
    "saving: written, but not renamed": Phase("os:replace", "before", 6),
    "saving: renamed, older ones are there": Phase("reference.run.checkpoint:_sync_folder", "after", 3),
    "saving: the adapter is not renamed": Phase("reference.run.state:save_file", "after", 3),
    "reporting": Phase("reference.train:final_report"),
    "reporting: written, but not renamed": Phase("reference.run.page:write_whole"),
}
SOME = ("scoring", "training: half a line of the records", "saving: renamed, older ones are there")
EVERY = os.environ.get("PHASES") == "all"


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("calm") / "run"
    train(config(run, balance="cone"))
    return run


@pytest.mark.parametrize("name", PHASES if EVERY else SOME)
def test_a_run_that_dies_in_a_phase_ends_as_an_undisturbed_one(tmp_path: Path, calm: Path, name: str) -> None:
    run, phase = tmp_path / "run", PHASES[name]
    dies = f"{phase.target} {phase.when} {phase.call} SIGKILL 0"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DIES": dies}
    command = [sys.executable, "-c", DYING + PROGRAM, *flags(run, "cone")]
    found = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == -9, f"{name} is never reached: {found.stderr}"
    train(config(run, balance="cone"), resume=begun(run))
    assert contents(run) == contents(calm)
    assert (run / "report.html").exists()
    assert {path.name for path in run.rglob("*")} == {path.name for path in calm.rglob("*")}


ADDING = Phase("torch.distributed:all_reduce", "before", 3)
SHARED = {
    "sampling": Phase("reference.policy.adapters:merged", "before", 3),
    "scoring": Phase("reference.interfaces:score", "before", 2),
    "training": Phase("reference.step.gradients:branch_losses", "after", 2),
    "measuring": Phase("reference.step.gradients:shared_cotangent_rows", "after", 1),
    "adding up: all have met": ADDING,
    "stepping": Phase("torch.optim:AdamW.step", "after", 2),
    "evaluating": Phase("reference.run.held_out:evaluate", "before", 2),
    "saving": Phase("reference.train:save_state", "before", 2),
}


@pytest.mark.skipif(not can_shard(), reason="this torch cannot share a model's weights on a CPU")
@pytest.mark.parametrize("victim", [0, 1] if EVERY else [1])
@pytest.mark.parametrize("number", ["SIGKILL", "SIGSTOP"] if EVERY else ["SIGKILL"])
@pytest.mark.parametrize("name", SHARED if EVERY else ["measuring"])
def test_the_others_end_with_a_line_in_whichever_phase_one_dies(
    tmp_path: Path, name: str, number: str, victim: int
) -> None:
    _ends_with_a_line_and_goes_on(tmp_path / "run", "a shared base", SHARED[name], number, victim)


@pytest.mark.parametrize("victim", [0, 1] if EVERY else [1])
@pytest.mark.parametrize("number", ["SIGKILL", "SIGSTOP"] if EVERY else ["SIGSTOP"])
def test_the_others_end_with_a_line_where_one_dies_between_meeting_and_adding_up(
    tmp_path: Path, number: str, victim: int
) -> None:
    """Where each has its own base, and nothing but the collective's own time limit ends it."""
    _ends_with_a_line_and_goes_on(tmp_path / "run", "each its own base", ADDING, number, victim)


def _ends_with_a_line_and_goes_on(run: Path, how: str, phase: Phase, number: str, victim: int) -> None:
    """One of two processes dies; the other says so; the run goes on from there, on one process."""
    dies = f"{phase.target} {phase.when} {phase.call} {number} {victim}"
    processes = start(run, FLAGS[how], program=DYING + PROGRAM, environment={"DIES": dies})
    (said,) = end([processes[1 - victim]])
    gone = processes[victim].poll()
    processes[victim].kill()
    processes[victim].communicate()
    assert gone == (-9 if number == "SIGKILL" else None), f"{phase} is never reached: {said}"
    assert "hangs" not in said
    assert_last_line_says_who_is_gone(said)
    assert "Traceback" not in said
    assert "frame #" not in said  # of C++
    assert processes[1 - victim].returncode == 1
    again = start(run, [*FLAGS[how], *(["--resume"] if begun(run) else [])], size=1)
    said_again = end(again)
    assert [p.returncode for p in again] == [0], said_again
    assert_all_steps(run)
