"""What a run is given: rewards and prompts by their names in the configuration."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from reference.config.settings import Config
from reference.errors import ConfigError
from reference.interfaces import Prompt
from reference.prompts.pool import Pool, all_prompts, held_out_prompts, repeated_prompts, training_pool
from reference.rewards.scorer import Scorer, scorer_of


class Inputs(NamedTuple):
    """Rewards trained and evaluated, and prompts for either: all that a user may have named wrongly.

    Attributes:
        given: hashes of the prompts' content by name, to be compared when a run is resumed.
    """

    trained: Scorer
    watched: Scorer
    pool: Pool
    held_out: list[Prompt]
    given: dict[str, str]


def prepare(config: Config) -> Inputs:
    """Load rewards and prompts.

    Raises:
        ConfigError: one of them cannot be used.
    """
    pool, held_out = _prompts(config)
    check_held_out(held_out, pool)
    trained = scorer_of(config, config.rewards)
    watched = scorer_of(config, tuple(dict.fromkeys(config.rewards + config.log.watch)), trained.rewards)
    return Inputs(trained, watched, pool, held_out, {"training prompts": _digest(all_prompts(pool))})


def _prompts(config: Config) -> tuple[Pool, list[Prompt]]:
    """Prompts to train on and held-out ones; what is wrong with either is said at once."""
    try:
        pool = training_pool(config)
    except ConfigError as first:
        try:
            held_out_prompts(config)
        except ConfigError as second:
            raise ConfigError(f"{first}\n{second}") from None
        raise
    return pool, held_out_prompts(config)


def check_held_out(held_out: Sequence[Prompt], pool: Pool) -> None:
    """Warn of held-out prompts that are trained on.

    Raises:
        ConfigError: all of them are.
    """
    repeated = repeated_prompts(held_out, all_prompts(pool))
    if held_out and repeated == len(held_out):
        raise ConfigError(
            f"rollout.held_out: all {repeated} held-out prompts are training prompts too: evaluations would tell what "
            "was learnt by heart. Give other prompts; make-prompts writes files that share none."
        )
    if repeated:
        print(f"warning: {repeated} of {len(held_out)} held-out prompts are training prompts too", file=sys.stderr)


def _digest(prompts: Sequence[Prompt]) -> str:
    """Hash of the texts and the metadata of prompts."""
    return hashlib.sha256("\n".join(repr(tuple(prompt)) for prompt in prompts).encode()).hexdigest()
