"""A disk that fails at one write after the other: full once, full until it is freed, read-only.

Every operation on the disk in a short run is counted, and then made to fail, one at a time. The run goes on, or ends
with an error that says so; when the disk is well again, it goes on from there to the end of an undisturbed run.
``DISK=all pytest tests/faults/test_disk.py`` takes every operation; ``make faults`` does.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import save_file

from reference.errors import CheckpointError, ConfigError, RewardError, TrainingError
from reference.run import state
from reference.run.state import begun
from reference.train import train
from tests.faults.test_runs import config, contents

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*Trying the one before it")]
EVERY = os.environ.get("DISK") == "all"
NO_SPACE, READ_ONLY, QUOTA = errno.ENOSPC, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC)


class Disk:
    """Counts what is done to files under a folder, and fails from the ``first`` operation to before the ``last``."""

    def __init__(self, folder: Path, first: int, last: int, code: int) -> None:
        self.folder, self.first, self.last, self.code = str(folder.resolve()), first, last, code
        self.count, self.names = 0, list[str]()

    def operation(self, path: object, what: str) -> None:
        """One of them, which may fail."""
        if not isinstance(path, str | os.PathLike) or not os.path.abspath(path).startswith(self.folder):
            return
        self.count += 1
        self.names.append(f"{what} {Path(os.path.abspath(path)).name}")
        if self.first <= self.count < self.last:
            raise OSError(self.code, os.strerror(self.code), str(path))


class Handle:
    """A file whose writes are operations."""

    def __init__(self, file: Any, path: object, disk: Disk) -> None:
        self._file, self._path, self._disk = file, path, disk

    def write(self, data: Any) -> Any:
        self._disk.operation(self._path, "write")
        return self._file.write(data)

    def __enter__(self) -> Handle:
        self._file.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.__exit__(*exc)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextlib.contextmanager
def on(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """Let this process's opening for writing, writes, renames and new folders be operations of a disk."""
    plain_open, plain_replace, plain_mkdir, plain_fsync = io.open, os.replace, os.mkdir, os.fsync

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wax+"):
            return plain_open(file, mode, *args, **kwargs)
        disk.operation(file, "open")
        return Handle(plain_open(file, mode, *args, **kwargs), file, disk)

    def replaced(source: Any, target: Any, **kwargs: Any) -> None:
        disk.operation(target, "rename")
        plain_replace(source, target, **kwargs)

    def made(path: Any, *args: Any, **kwargs: Any) -> None:
        if not os.path.isdir(path):
            disk.operation(path, "folder")
        plain_mkdir(path, *args, **kwargs)

    def synced(descriptor: Any) -> None:
        disk.operation(Path(f"/proc/self/fd/{descriptor}").resolve(), "sync")
        plain_fsync(descriptor)

    def exported(tensors: Any, path: Any, **kwargs: Any) -> None:
        disk.operation(path, "export")
        save_file(tensors, path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)
        patch.setattr(os, "replace", replaced)
        patch.setattr(os, "mkdir", made)
        patch.setattr(os, "fsync", synced)
        patch.setattr(state, "save_file", exported)
        yield disk


def attempt(run: Path, epochs: int) -> str:
    """Train to the end, going on from what there is; the error that stopped it, or nothing."""
    try:
        train(config(run, epochs=epochs), resume=begun(run))
    except (TrainingError, ConfigError, CheckpointError, RewardError) as error:
        return str(error)
    return ""


class Calm(NamedTuple):
    """A run that nothing disturbs: its folder after each epoch, and what each part does to the disk."""

    folders: list[Path]
    operations: list[list[str]]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Calm:
    folder, operations, folders = tmp_path_factory.mktemp("calm"), [], []
    run = folder / "run"
    for epochs in (1, 2):
        with pytest.MonkeyPatch.context() as patch, on(Disk(run, 0, 0, 0), patch) as disk:
            assert attempt(run, epochs) == ""
        operations.append(disk.names)
        folders.append(Path(shutil.copytree(run, folder / f"after-{epochs}")))
    return Calm(folders, operations)


def chosen(operations: list[str], code: int, part: int) -> list[int]:
    """All operations; in the short form of each other kind the first, or of a few."""
    places = range(1, len(operations) + 1)
    if EVERY:
        return list(places)
    kinds: dict[str, int] = {}
    for place, name in zip(places, operations, strict=True):
        kinds.setdefault(name.rstrip("0123456789.ckptm-"), place)
    return [*kinds.values()][::2] if code == NO_SPACE and part == 0 else [*kinds.values()][code % 7 :: 7]


def test_the_run_writes_everything_that_there_is_to_write(calm: Calm) -> None:
    names = "config.toml", "metrics.jsonl", "before.png", "after.json", "report.html", "step-00000000.tmp", "lora"
    for name in names:
        assert any(name in operation for operation in calm.operations[0]), name


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize(("code", "lasting"), [(NO_SPACE, 1), (QUOTA, 4), (READ_ONLY, 10**9)])
def test_a_write_that_fails_loses_nothing(
    calm: Calm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, lasting: int, part: int
) -> None:
    """Once (and the next write works), for four operations, or for the rest of the attempt; in a fresh run, or in one
    that goes on."""
    expected, run = contents(calm.folders[part]), tmp_path / "run"
    for place in chosen(calm.operations[part], code, part):
        name = f"{place}: {calm.operations[part][place - 1]}"
        if part:
            shutil.copytree(calm.folders[0], run)
        with on(Disk(run, place, place + lasting, code), monkeypatch):
            message = attempt(run, part + 1)
        if message:
            assert os.strerror(code) in message, name
        for _ in range(3):  # the disk is well again
            if attempt(run, part + 1) == "":
                break
        assert contents(run)[0] == expected[0], name
        assert _without_repeated(contents(run)[1]) == _without_repeated(expected[1]), name
        assert (run / "report.html").exists(), name
        assert not list(run.rglob("*.tmp")), name
        shutil.rmtree(run)


def _without_repeated(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records, of which a resumed run may have made the last ones again."""
    found: list[dict[str, Any]] = []
    for record in records:
        if record not in found:
            found.append(record)
    return found
