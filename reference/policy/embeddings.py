"""Prompt embeddings on disk: computed once, read as they are needed, shared by all runs."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from reference.errors import ConfigError

Encode = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
_TOGETHER = 16  # prompts encoded at a time
_SHARD = 128  # prompts of a file: a few hundred megabytes for Stable Diffusion 3.5


class Embeddings(NamedTuple):
    """Which file of ``folder`` holds the embeddings of each prompt, by the prompt's key."""

    folder: Path
    files: dict[str, Path]


def open_embeddings(folder: Path) -> Embeddings:
    """What a folder holds; nothing if it is not there.

    Raises:
        ConfigError: a file is damaged.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                files |= dict.fromkeys((name.partition(".")[0] for name in file.keys()), path)  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"model.cache: {path} is damaged: {error}. Delete it; it is computed again.") from error
    return Embeddings(folder, files)


def missing_prompts(embeddings: Embeddings, prompts: Iterable[str]) -> list[str]:
    """The distinct prompts that are not there yet."""
    return [prompt for prompt in dict.fromkeys(prompts) if _key(prompt) not in embeddings.files]


def add_prompts(embeddings: Embeddings, prompts: Sequence[str], encode: Encode) -> Embeddings:
    """Encode prompts and keep what comes out; what an interrupted run has written is not lost.

    Raises:
        ConfigError: the folder cannot be written.
    """
    files = dict(embeddings.files)
    with tqdm(total=len(prompts), desc="encoding prompts", unit="prompt", disable=None) as bar:
        for start in range(0, len(prompts), _SHARD):
            shard: dict[str, Tensor] = {}
            for at in range(start, min(start + _SHARD, len(prompts)), _TOGETHER):
                part = prompts[at : min(at + _TOGETHER, start + _SHARD)]
                for prompt, embeds, pooled in zip(part, *encode(part), strict=True):
                    shard[f"{_key(prompt)}.embeds"] = embeds.cpu().contiguous()
                    shard[f"{_key(prompt)}.pooled"] = pooled.cpu().contiguous()
                bar.update(len(part))
            path = _write(embeddings.folder, shard)
            files |= dict.fromkeys((name.partition(".")[0] for name in shard), path)
    return Embeddings(embeddings.folder, files)


def read_embeddings(embeddings: Embeddings, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Embeddings ``[B, L, D]`` and pooled ones ``[B, D']`` of prompts that are there."""
    by_file: dict[Path, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_file.setdefault(embeddings.files[_key(prompt)], []).append(i)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for path, numbers in by_file.items():
        with safe_open(path, framework="pt") as file:
            for i in numbers:
                key = _key(prompts[i])
                found[i] = file.get_tensor(f"{key}.embeds"), file.get_tensor(f"{key}.pooled")
    embeds, pooled = zip(*(found[i] for i in range(len(prompts))), strict=True)
    return torch.stack(embeds).to(device), torch.stack(pooled).to(device)


def _key(prompt: str) -> str:
    """A prompt's key."""
    return hashlib.sha256(prompt.encode()).hexdigest()


def _write(folder: Path, shard: dict[str, Tensor]) -> Path:
    """Write a file of a folder, whole or not at all; its name depends on the prompts alone."""
    path = folder / f"{hashlib.sha256(''.join(shard).encode()).hexdigest()[:16]}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        os.close(handle)
        try:
            save_file(shard, temporary)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model.cache: cannot write {path}: {error}. Choose another --model.cache.") from error
    return path
