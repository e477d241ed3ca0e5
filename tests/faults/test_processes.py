"""Several processes of which one is killed or stands still, at any moment, also while all share the base model.

``RANKS=20 pytest tests/faults/test_processes.py`` does it more often; ``make faults`` does.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from reference.errors import TrainingError, with_the_way_on
from reference.policy.sharding import can_shard
from reference.run.state import begun
from tests.faults.test_runs import contents

ROOT = Path(__file__).resolve().parents[2]
RANKS = int(os.environ.get("RANKS", "1"))
pytestmark = pytest.mark.slow

# Short times, so that a test does not take minutes.
PROGRAM = """
import datetime, sys
from reference.__main__ import main
from reference.processes import alive, peers
peers._COLLECTIVE = datetime.timedelta(seconds=30)
alive._PATIENCE, alive._BEAT, alive._SILENCE, alive._STUCK = 2.0, 0.2, 2.0, 2.0
sys.exit(main(sys.argv[1:]))
"""


def start(
    run: Path, flags: Sequence[str], size: int = 2, program: str = PROGRAM, environment: Mapping[str, str] | None = None
) -> list[subprocess.Popen[str]]:
    """Processes without a launcher that would end the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shared |= environment or {}
    command = [sys.executable, "-c", program, "train", "--preset", "tiny", "--run", str(run), "--epochs", "4"]
    return [
        subprocess.Popen(
            [*command, "--log.watch", "--rewards", "objects", "colour", "jpeg", *flags],
            env={**os.environ, **shared, "PYTHONPATH": str(ROOT), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def end(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Wait for all, and what they said."""
    said = []
    for process in processes:
        try:
            said.append(process.communicate(timeout=120)[1])
        except subprocess.TimeoutExpired:
            process.kill()
            said.append(f"hangs\n{process.communicate()[1]}")
    return said


def assert_last_line_says_who_is_gone(said: str) -> None:
    last = [line for line in said.splitlines() if line.strip()][-1]
    gone = (
        "is gone",
        "nothing was heard of processes",
        "ends: it waits in a pass",
        "another process",
        "does not answer",
    )
    assert any(word in last for word in gone), said


def assert_all_steps(run: Path) -> None:
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["step"] for r in steps if r["kind"] == "step"] == list(range(1, 9))


def wait_for_lines(run: Path, count: int, processes: Sequence[subprocess.Popen[str]]) -> None:
    """Until a run has so many records, or its processes are gone."""
    file = run / "metrics.jsonl"
    while not (file.exists() and file.read_bytes().count(b"\n") >= count):
        time.sleep(0.02)
        if any(process.poll() is not None for process in processes):
            return


FLAGS = {
    "each its own base": [],
    "a shared base": ["--model.shard", "--balance", "marble-paper", "--model.lora-targets", "attention"],
}


@pytest.mark.parametrize("how", FLAGS if can_shard() else ["each its own base"])
@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGSTOP"])
def test_one_that_is_killed_or_stands_still_ends_the_other_with_a_line(
    tmp_path: Path, how: str, signal_name: str
) -> None:
    """And the run goes on from there, on another number of processes."""
    rng = random.Random(f"{how} {signal_name}")
    for attempt in range(RANKS):
        run, victim = tmp_path / f"run-{attempt}", rng.randrange(2)
        processes = start(run, FLAGS[how])
        wait_for_lines(run, rng.randrange(1, 12), processes)
        time.sleep(rng.random())
        processes[victim].send_signal(getattr(signal, signal_name))
        began = time.monotonic()
        (said,) = end([processes[1 - victim]])
        took = time.monotonic() - began
        processes[victim].kill()
        processes[victim].communicate()
        assert "hangs" not in said
        if processes[1 - victim].returncode == 0:  # it was done before
            continue
        assert took < 60, said
        assert processes[1 - victim].returncode == 1, said
        assert_last_line_says_who_is_gone(said)
        assert begun(run), said
        again = start(run, [*FLAGS[how], "--resume"], size=1 + attempt % 2)
        said_again = end(again)
        assert [p.returncode for p in again] == [0] * len(again), said_again
        assert_all_steps(run)


def test_a_lost_process_is_said_in_one_line() -> None:
    for text in ("[gloo/transport/tcp/pair.cc:537] Connection reset by peer", "NCCL communicator was aborted"):
        error = with_the_way_on(RuntimeError(text), 7)
        assert isinstance(error, TrainingError)
        assert str(error) == (
            "another process is gone, or was silent for too long; see its output. The state of step 7 is saved: go on "
            "with --resume."
        )


@pytest.mark.parametrize("sizes", [(1, 2, 3), (3, 1, 2)])
def test_a_run_goes_on_with_other_numbers_of_processes_and_another_name_of_its_device(
    tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    """An epoch on each: the same steps as alone, within rounding."""
    run = tmp_path / "run"
    for epochs, size in enumerate(sizes, start=1):
        flags = ["--epochs", f"{epochs}", "--device", "cpu" if epochs % 2 else "auto", "--log.save-every", "1"]
        processes = start(run, [*flags, *(["--resume"] if epochs > 1 else [])], size)
        said = end(processes)
        assert [p.returncode for p in processes] == [0] * size, said
    records = contents(run)[1]
    assert [r["step"] for r in records if r["kind"] == "step"] == list(range(1, 7))
