"""The trainer's errors: each says what happened, and what is left."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration, a file or a folder that cannot be used; nothing has been done."""


class RewardError(RuntimeError):
    """A reward raised, or returned something that is not a score for each image."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the others are untouched."""


class TrainingError(RuntimeError):
    """The run cannot go on; what was trained is in its checkpoints."""


class PeerError(TrainingError):
    """Another process of the run has failed, so this one stops as well; the message is the other's."""


class Interrupted(Exception):
    """The user asked to stop; everything is saved."""


_LOST = ("gloo", "NCCL", "Connection reset by peer", "Connection closed by peer")  # what collectives say of it


def with_the_way_on(error: Exception, step: int) -> Exception:
    """An error with how to go on after it; what is not the trainer's own becomes one of its errors."""
    go_on = f"The state of step {step} is saved: go on with --resume."
    if isinstance(error, Interrupted | PeerError | ConfigError | CheckpointError):
        return error
    if isinstance(error, RewardError | TrainingError):
        if "--resume" in str(error):  # it says itself what to do
            return error
        return type(error)(f"{error} {go_on}" if str(error).endswith(".") else f"{error}. {go_on}")
    if isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST):
        return TrainingError(f"another process is gone, or was silent for too long; see its output. {go_on}")
    return TrainingError(f"training stopped by {type(error).__name__}: {error}. {go_on}")


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message about an unknown name: the nearest known one, or nothing.

    Example:
        >>> did_you_mean("objets", ["objects", "text"]), did_you_mean("zzz", ["objects", "text"])
        (" Did you mean 'objects'?", '')
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {prefix + near[0]!r}?" if near else ""
