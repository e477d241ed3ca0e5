"""Checkpoints: whole or not at all, damage is noticed, what does not fit is refused, and generators continue."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from marble_core import init_gains
from reference.config.settings import Config
from reference.errors import CheckpointError, ConfigError
from reference.run.checkpoint import latest, load, rng_state, save, set_rng_state
from reference.run.state import VERSION, State, usable
from reference.run.watch import init_health
from reference.step.balance import Balance
from reference.step.estimate import init_estimate

STATE: dict[str, Any] = {
    "step": 3,
    "name": "x",
    "flag": True,
    "nothing": None,
    "weights": {"a": torch.randn(2, 3), "b": torch.randn(4, dtype=torch.float64), "c": torch.arange(3)},
    "half": torch.randn(5).bfloat16(),
    "leaves": [torch.tensor(float("nan")), torch.tensor(1.5)],
    "pair": (1, 2.5),
}


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = save(tmp_path / "new" / "folder", 3, STATE)
    found = load(path)
    assert {k: found[k] for k in ("step", "name", "flag", "nothing", "pair")} == {
        k: STATE[k] for k in ("step", "name", "flag", "nothing", "pair")
    }
    for key, x in STATE["weights"].items():
        assert found["weights"][key].dtype == x.dtype
        assert torch.equal(found["weights"][key], x)
    assert torch.equal(found["half"], STATE["half"])
    assert found["leaves"][0].isnan()


def test_unusual_values_come_back_bit_for_bit(tmp_path: Path) -> None:
    payload = (
        torch.tensor([0x7FC01234, -0x80000000, 0x7F800000, 1]).int().view(torch.float32)
    )  # NaN, -0, inf, subnormal
    tensors = [
        payload,
        torch.zeros(0, 3, dtype=torch.float16),
        torch.tensor(True),
        torch.arange(6, dtype=torch.uint8).reshape(2, 3).T,
        torch.tensor([2**62 + 1]),
    ]
    found = load(save(tmp_path, 1, {"tensors": tensors, "nested": [{0: (None, -0.0, [()], "é")}]}))
    assert repr(found["nested"]) == "[{0: (None, -0.0, [()], 'é')}]"
    for x, y in zip(tensors, found["tensors"], strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 100):
        save(tmp_path, step, {"step": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010.ckpt", "step-00000100.ckpt"]
    assert latest(tmp_path) == {"step": 100}


def test_no_checkpoint(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "missing") is None


def flip(data: bytes, i: int) -> bytes:
    return data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d[:-1],
        lambda d: d[: len(d) // 2],
        lambda d: b"",
        lambda d: d + b"x",
        lambda d: flip(d, 2),
        lambda d: flip(d, 20),
        lambda d: flip(d, len(d) - 5),
        lambda d: b"something else",
    ],
)
def test_damage_is_noticed_and_the_one_before_is_used(tmp_path: Path, damage: Any) -> None:
    save(tmp_path, 1, {"step": 1})
    newest = save(tmp_path, 2, {"step": 2})
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.raises(CheckpointError, match=r"step-00000002\.ckpt is damaged"):
        load(newest)
    with pytest.warns(UserWarning, match=r"step-00000002\.ckpt is damaged.*Trying the one before it"):
        assert latest(tmp_path) == {"step": 1}


def test_without_a_whole_one_there_is_none(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, {"step": step}).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"step-0000000[12]\.ckpt is damaged") as warned:
        assert latest(tmp_path) is None
    assert len(warned) == 2


def test_later_steps_do_not_crowd_out_what_is_saved(tmp_path: Path) -> None:
    save(tmp_path, 8, {"step": 8})
    save(tmp_path, 10, {"step": 10}).write_bytes(b"damaged")
    save(tmp_path, 9, {"step": 9})  # of the run that went on from 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000008.ckpt", "step-00000009.ckpt"]
    save(tmp_path, 2, {"step": 2})  # of a run that began anew beside the checkpoints of another
    assert latest(tmp_path) == {"step": 2}


def test_a_half_written_file_is_never_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1, {"step": 1})
    (tmp_path / "step-00000002.tmp").write_bytes(b"half")
    assert latest(tmp_path) == {"step": 1}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path, 1, {"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(CheckpointError, match=r"No space left on device.*Earlier checkpoints are untouched"):
            save(tmp_path, 2, {"step": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.ckpt"]
    assert latest(tmp_path) == {"step": 1}


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "checkpoints"):
        with pytest.raises(CheckpointError, match="cannot save"):
            save(folder, 1, {"step": 1})


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        load(tmp_path / "step-00000001.ckpt")


def test_generators_continue_where_they_were(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.random(), random.gauss(0, 1), float(np.random.normal()), float(torch.randn(()))

    draw()
    path = save(tmp_path, 1, rng_state())
    first = draw()
    assert draw() != first
    set_rng_state(load(path))
    assert draw() == first


RECORDS = b'{"kind": "eval"}\n{"kind": "step"}\n'


def fresh() -> State:
    """A state before the first epoch, of an adapter with one matrix."""
    balance = Balance(torch.zeros(2), init_estimate(2, None, {}))
    return State(0, 0, 0, -1, 0, {"a": torch.zeros(2, 3)}, balance, None, init_gains(2), init_health())


def begun(run: Path, records: bytes = RECORDS, **changes: Any) -> Path:
    """A run of two epochs, evaluated after the second."""
    state = {"version": VERSION, "epoch": 2, "part": 0, "evaluated": 2, "given": {}, "default": {"a": torch.ones(2, 3)}}
    state |= {"balance": pytree.tree_leaves(fresh().balance), "metrics": len(RECORDS)} | changes
    save(run / "checkpoints", 4, state)
    (run / "metrics.jsonl").write_bytes(records)
    return run


@pytest.mark.parametrize(
    ("changes", "epochs", "message"),
    [
        ({}, 1, "expected epochs to be at least the 2 that .* has begun, got 1; .*Give --epochs 2 or more"),
        ({"epoch": 1, "part": 1}, 1, "expected epochs to be at least the 2 that"),
        ({"default": {"a": torch.ones(4, 3)}}, 2, "are of another model than this one; nothing was changed"),
        ({"balance": []}, 2, "are of another balance than this one"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], epochs: int, message: str
) -> None:
    run = begun(tmp_path, **changes)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=f"^--resume: {message}|^--resume: the checkpoints in .* {message}"):
        usable(Config(run=run, epochs=epochs), {}, fresh())
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert usable(Config(run=begun(tmp_path), epochs=2), {}, fresh())["evaluated"] == 2


@pytest.mark.parametrize(
    ("records", "left"),
    [
        (b"", 0),
        (RECORDS[:20], 17),
        (RECORDS[:-1], 17),
        (RECORDS[:17] + b"\0" * 17, 17),  # as a disk may leave it, and as it was filled up once
        (RECORDS[:20] + b"\0" * 40, 17),
    ],
)
def test_a_run_whose_records_were_lost_goes_on_with_what_is_left(tmp_path: Path, records: bytes, left: int) -> None:
    config = Config(run=begun(tmp_path, records), epochs=2)
    with pytest.warns(
        UserWarning, match=r"metrics\.jsonl: expected the 34 bytes .* records are lost\. The run goes on"
    ):
        saved = usable(config, {}, fresh())
    assert (saved["metrics"], saved["evaluated"]) == (left, 1)  # and it is evaluated again


def test_records_after_a_checkpoint_are_nothing_to_warn_of(tmp_path: Path) -> None:
    saved = usable(Config(run=begun(tmp_path, RECORDS + b'{"kind": "st'), epochs=2), {}, fresh())
    assert (saved["metrics"], saved["evaluated"]) == (len(RECORDS), 2)
