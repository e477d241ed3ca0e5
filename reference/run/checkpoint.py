"""Checkpoints: atomic, verified by a checksum, and everything that a run needs to go on bit-exactly."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reference.errors import CheckpointError
from reference.tensor_files import load_tensors

_MAGIC = b"MARBLE1\n"


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write ``state`` as the checkpoint of ``step``, and keep the one before it.

    Others are removed, of later steps too: those are damaged, or the run would have gone on from them. The bytes go to
    a temporary file that is synced and then renamed, so a checkpoint is there whole or not at all.

    Raises:
        CheckpointError: it could not be written (a full disk, say).
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    path = folder / f"step-{step:08d}.ckpt"
    temporary = path.with_suffix(".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(_MAGIC + hashlib.sha256(payload).digest())
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CheckpointError(f"cannot save {path}: {error}. Earlier checkpoints are untouched.") from error
    others = [other for other in folder.glob("step-*.ckpt") if other != path]
    before = max((other for other in others if other < path), default=None)
    for other in others:
        if other != before:
            with contextlib.suppress(OSError):  # the next save tries again
                other.unlink()
    return path


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def latest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, None without any; warns of every damaged one that is passed over."""
    for path in sorted(folder.glob("step-*.ckpt"), reverse=True):
        try:
            return load(path)
        except CheckpointError as error:
            warnings.warn(f"{error} Trying the one before it.", stacklevel=2)
    return None


def load(path: Path) -> dict[str, Any]:
    """One checkpoint.

    Raises:
        CheckpointError: it is damaged, cut short, or not a checkpoint.
    """
    head = len(_MAGIC) + 32
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}.") from error
    if data[: len(_MAGIC)] != _MAGIC or hashlib.sha256(data[head:]).digest() != data[len(_MAGIC) : head]:
        raise CheckpointError(f"{path} is damaged: its checksum does not match.")
    try:
        state = load_tensors(data[head:], path)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is no checkpoint: it holds a {type(state).__name__}.")
    return state


def rng_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's global generators, in types that load without running code."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, [int(key) for key in keys], int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """The inverse of ``rng_state``."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])  # perhaps fewer than before
