"""What a run shows while it goes on: a progress bar, metrics.jsonl, trackers, image grids."""

from __future__ import annotations

import contextlib
import io
import json
import math
import netrc
import os
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import LoggerType, get_available_trackers
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from reference.errors import ConfigError
from reference.run.lock import lock


class Live:
    """Output of one run; every line of ``metrics.jsonl`` also goes to the trackers.

    Of several processes, all have one, and only the ``main`` one's writes anything. Nothing here stops training: lines
    that a full disk refuses wait in ``pending``, go into the checkpoints and are written as soon as there is room; a
    tracker that fails is said once and left out.
    """

    def __init__(self, run: Path, trackers: Sequence[str], epochs: int, *, main: bool = True) -> None:
        self.main = main
        self.file = _opened(run / "metrics.jsonl" if main else Path(os.devnull))
        if main:
            lock(self.file, run)
        try:
            self.accelerator = _trackers(run, trackers) if trackers and main else None
        except ConfigError:
            self.file.close()
            raise
        self.position = self.file.seek(0, os.SEEK_END)  # of the last whole line
        self.pending = ""
        self.full = False
        self.min_cosine = self.loss = math.nan  # of the last refresh, of the last step
        self.doing, self.passes = "", 0  # the phase, and passes of the model in it
        self.began, self.first = time.monotonic(), 0  # when, and with which epoch
        disable = None if main else True
        self.bar = tqdm(total=epochs, unit="epoch", disable=disable, dynamic_ncols=True)

    def start(self, epoch: int) -> None:
        """Let the bar begin where a resumed run does."""
        self.bar.n = self.bar.initial = self.first = epoch
        self.bar.refresh()

    def phase(self, epoch: int, name: str) -> None:
        """Say what is being done."""
        self.doing, self.passes = f"epoch {epoch}: {name}", 0
        self.bar.set_description(self.doing)

    def tick(self) -> None:
        """Count a pass of the model: within an epoch the bar moves by them."""
        self.passes += 1
        self.bar.set_description(f"{self.doing}, pass {self.passes}", refresh=False)
        self.bar.update(0)  # drawn a few times a second at most

    def show(self, epoch: int, rewards: dict[str, float]) -> None:
        """One more epoch done: its rewards, the minimum cosine of the last refresh, and the loss of the last step."""
        numbers = " ".join(f"{name} {value:.2f}" for name, value in rewards.items())
        for x, text in ((self.min_cosine, f" min cos {self.min_cosine:+.2f}"), (self.loss, f" loss {self.loss:.3g}")):
            numbers += "" if math.isnan(x) else text  # not measured yet since this process began
        self.bar.set_postfix_str(numbers)
        self.bar.update()
        if self.bar.disable:  # not a terminal: a line an epoch instead of a bar
            self.say(f"epoch {epoch}: {numbers} | {self._times(epoch)}")

    def _times(self, epoch: int) -> str:
        """Time so far, of an epoch, and until the end."""
        seconds = time.monotonic() - self.began
        each = seconds / (epoch + 1 - self.first)
        left = each * ((self.bar.total or 0) - epoch - 1)
        return f"{clock(seconds)}, {each:.1f} s an epoch, {clock(left)} left"

    def pictures(self, sheet: Image.Image, step: int) -> None:
        """Show a grid of held-out images to the trackers that take images."""
        if self.accelerator is None:
            return
        pixels = np.asarray(sheet)
        for tracker in self.accelerator.trackers:
            try:
                if tracker.name == "tensorboard":
                    tracker.log_images({"held-out images": pixels[None]}, step=step, dataformats="NHWC")
                elif tracker.name == "wandb":
                    tracker.log_images({"held-out images": [pixels]}, step=step)
            except Exception as error:  # whatever a tracker's package raises
                self.say(f"warning: {tracker.name} took no picture: {type(error).__name__}: {error}")

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self.main:
            self.bar.write(text)

    def log(self, record: dict[str, Any]) -> None:
        """Append a record to ``metrics.jsonl`` and send its numbers to the trackers."""
        self.min_cosine = record.get("min_cosine", self.min_cosine)
        self.loss = record.get("loss", self.loss)
        self.append(json.dumps(_plain(record)) + "\n")
        if self.accelerator is not None:
            try:
                self.accelerator.log(dict(_numbers(record["kind"], record)), step=record["step"])
            except Exception as error:  # whatever a tracker's package raises
                self.say(f"warning: the trackers failed and are left out from now on: {type(error).__name__}: {error}")
                self.accelerator = None

    def append(self, text: str) -> None:
        """Write whole lines, after those that wait; what cannot be written waits."""
        self.pending += text
        data = self.pending.encode()
        try:
            if self.main:
                if self.file.seek(0, os.SEEK_END) > self.position:  # a shorter file would be filled up with zeros
                    self.file.truncate(self.position)  # a line that was cut off
                if self.file.write(data) != len(data):
                    raise OSError("not all of it was written")
        except OSError as error:
            if not self.full:
                self.say(f"warning: cannot write to metrics.jsonl: {error}. Its lines wait until there is room.")
            self.full = True
            return
        self.position, self.pending, self.full = self.position + len(data), "", False

    def cut(self, position: int, pending: str) -> None:
        """Take back what was logged after a checkpoint, whose lines that still waited come again."""
        self.position = position
        if self.main:
            self.file.truncate(position)
        self.append(pending)

    def sync(self) -> None:
        """Bring the lines to the disk, before a checkpoint that says how many there are."""
        with contextlib.suppress(OSError):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file, the bar and the trackers."""
        self.file.close()
        self.bar.close()
        if self.accelerator is not None:
            try:
                self.accelerator.end_training()
            except Exception as error:
                self.say(f"warning: the trackers could not be closed: {type(error).__name__}: {error}")


def _opened(path: Path) -> io.FileIO:
    """A file to append to.

    Raises:
        ConfigError: there is no place for it.
    """
    try:
        return path.open("ab", buffering=0)
    except OSError as error:
        raise ConfigError(f"run: cannot write {path}: {error}. Make room, or give another --run.") from error


def clock(seconds: float) -> str:
    """A time as one reads it.

    Example:
        >>> clock(42.4), clock(125), clock(7380)
        ('42 s', '2 min 5 s', '2 h 3 min')
    """
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60} min"


def _trackers(run: Path, names: Sequence[str]) -> Accelerator:
    """Accelerate's trackers, started."""
    try:
        accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with=list(names), project_dir=run)
        accelerator.init_trackers("tensorboard" if list(names) == ["tensorboard"] else run.name)
        missing = set(names) - {tracker.name for tracker in accelerator.trackers}
        if missing:
            raise ValueError(f"{', '.join(sorted(missing))} is not installed")
    except Exception as error:  # whatever a tracker's package raises
        raise ConfigError(f"log.trackers: cannot start {', '.join(names)}: {error}") from error
    return accelerator


def check_trackers(names: Sequence[str]) -> None:
    """Check what can be checked before anything is loaded.

    Raises:
        ConfigError: a tracker is unknown, its package is not installed, or Weights & Biases has no key.
    """
    known = {tracker.value: tracker for tracker in LoggerType if tracker.value != "all"}
    for name in names:
        if name not in known:
            raise ConfigError(f"log.trackers: expected names among {', '.join(sorted(known))}, got {name!r}.")
        if known[name] not in get_available_trackers():
            raise ConfigError(f"log.trackers: the package of {name} is not installed. Install it, or leave {name} out.")
        if name == "wandb" and not _wandb_has_key():
            raise ConfigError(
                "log.trackers: wandb has no key. Give one with `wandb login` or in the variable WANDB_API_KEY, or set "
                "WANDB_MODE=offline."
            )


def _wandb_has_key() -> bool:
    """Whether Weights & Biases can start without asking."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE", "").lower() in ("offline", "disabled", "dryrun"):
        return True
    host = urllib.parse.urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _plain(value: Any) -> Any:
    """A value as JSON has it: no NaN, which is null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(prefix: str, record: dict[str, Any]) -> list[tuple[str, float]]:
    """All numbers of a record under names with slashes."""
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            found += _numbers(f"{prefix}/{key}", value)
        elif isinstance(value, bool | int | float) and key != "step":
            found.append((f"{prefix}/{key}", float(value)))
    return found


def save_grid(images: Tensor, path: Path, *, columns: int, scale: int = 1, largest: int = 1024) -> Image.Image:
    """Images ``[N, 3, H, W]`` as one PNG, row by row; ``scale`` enlarges without smoothing, and images that are wider
    than ``largest`` are shrunk. Returns the picture."""
    images = F.interpolate(images.detach().float().cpu(), scale_factor=float(scale), mode="nearest")
    if images.shape[-1] > largest:
        images = F.interpolate(images, scale_factor=largest / images.shape[-1], mode="area")
    N, C, H, W = images.shape
    rows = math.ceil(N / columns)
    sheet = torch.ones(rows * columns, C, H, W)
    sheet[:N] = images.clamp(0, 1)
    sheet = sheet.reshape(rows, columns, C, H, W).permute(0, 3, 1, 4, 2).reshape(rows * H, columns * W, C)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray((sheet * 255).round().byte().numpy())
    picture.save(path)
    return picture
