"""The trainer's errors: each says what happened, and what is left."""

from __future__ import annotations


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
