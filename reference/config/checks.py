"""What makes a configuration impossible, said before anything loads."""

from __future__ import annotations

import dataclasses
import math
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reference.config.settings import (
    BUILT_IN_RULES,
    OWN_RULE,
    REWARDS,
    WORLD_REWARDS,
    WORLD_SOURCES,
    Config,
    SolveConfig,
    is_world,
    training_times,
)
from reference.errors import ConfigError, did_you_mean


def validate(config: Config) -> None:
    """Check values and combinations.

    Raises:
        ConfigError: the first thing that is wrong, and what to change.
    """
    rollout, loss, optim = config.rollout, config.loss, config.optim
    _check_ranges(config)
    names = config.rewards
    _check(len(names) > 0, "rewards to name at least one", names)
    _check(len(set(names)) == len(names), "rewards to be distinct", names)
    _check_names(config)
    _check(
        len(config.reward_weights) in (0, len(names)), f"reward_weights to be empty or {len(names)} numbers, one a "
        "reward", config.reward_weights,
    )  # fmt: skip
    _check(not config.reward_weights or config.balance == "weighted-sum", "reward_weights only with balance "
           "weighted-sum; another rule would ignore them", config.reward_weights)  # fmt: skip
    _check(rollout.images_per_prompt >= 2, "rollout.images_per_prompt to be at least 2: advantages are relative to the "
           "group", rollout.images_per_prompt)  # fmt: skip
    _check(0 < loss.timestep_fraction <= 1, "loss.timestep_fraction to be in (0, 1]", loss.timestep_fraction)
    _check(0 <= loss.timesteps_per_image <= training_times(config), "loss.timesteps_per_image to be at most the "
           f"{training_times(config)} that are trained on", loss.timesteps_per_image)  # fmt: skip
    images = rollout.prompts_per_epoch * rollout.images_per_prompt
    _check(images >= optim.steps_per_epoch, f"optim.steps_per_epoch to be at most the {images} images of an epoch",
           optim.steps_per_epoch)  # fmt: skip
    _check(not (config.model.shard and config.model.compile), "model.compile to be off with model.shard, which would "
           "compile every block again and again", config.model.compile)  # fmt: skip
    _check_prompts(config)
    _check_rule(config)
    _check_finite(config)


def at_least(least: int, flags: Mapping[str, float]) -> None:
    """Check flags of a command that are numbers, by name.

    Raises:
        ConfigError: the first that is smaller, or not finite.

    Example:
        >>> at_least(1, {"--images": 2, "--save-every": 1})
    """
    for name, value in flags.items():
        if not least <= value < math.inf:
            raise ConfigError(f"{name}: expected at least {least}, got {value}.")


def _check_finite(group: Any, prefix: str = "") -> None:
    """Numbers that are infinite or none; most are caught by their ranges."""
    for name, value in vars(group).items():
        if dataclasses.is_dataclass(value):
            _check_finite(value, f"{prefix}{name}.")
        numbers = value if isinstance(value, tuple) else (value,)
        finite = all(math.isfinite(x) for x in numbers if isinstance(x, float))
        _check(finite, f"{prefix}{name} to be finite", value)


def _check_names(config: Config) -> None:
    """Names that are unknown, and rewards that judge the images of another model."""
    world, base = is_world(config.model.base), config.model.base
    known_place = world or "/" in base or Path(base).exists()
    _check(known_place, "model.base to be world, a folder that exists, or an id on the hub such as owner/name", base)
    known, others = (WORLD_REWARDS, tuple(REWARDS)) if world else (tuple(REWARDS), WORLD_REWARDS)
    what = "the small world" if world else "Stable Diffusion 3"
    for key, names in (("rewards", config.rewards), ("log.watch", config.log.watch)):
        for name in names:
            _check(name not in others, f"{key} to name rewards of {what}, {', '.join(known)}, or module:callable", name)
            _check_name(key, name, known)


NO_SECRETS = (
    "expected a URL without user, password or query: a configuration is written to files and shown in reports. A key "
    "belongs in the environment variable that docs/rewards.md names."
)


def carries_secret(source: str) -> bool:
    """Whether a URL has a part in which a password or a key may be.

    Example:
        >>> carries_secret("http://localhost:8080/v1#model"), carries_secret("https://me:word@host/v1")
        (False, True)
    """
    url = urllib.parse.urlsplit(source)
    return "//" in source and bool("@" in url.netloc or url.query)


def _check_prompts(config: Config) -> None:
    """Sources of prompts that contradict each other, the model or the scoring."""
    r, world, background = config.rollout, is_world(config.model.base), config.scoring.background
    _check(len(r.prompts) > 0, "rollout.prompts to name at least one source", r.prompts)
    _check(len(r.weights) in (0, len(r.prompts)), f"rollout.weights to be empty or {len(r.prompts)} numbers, one a "
           "source", r.weights)  # fmt: skip
    _check(all(0 < w < math.inf for w in r.weights), "rollout.weights to be finite and positive", r.weights)
    one = len(r.prompts) == 1 and r.prompts[0] in WORLD_SOURCES
    _check(not one or r.prompts_per_epoch <= r.pool, "rollout.prompts_per_epoch to be at most "
           f"rollout.pool = {r.pool}", r.prompts_per_epoch)  # fmt: skip
    generated = bool(set(r.prompts + r.held_out) & set(WORLD_SOURCES))
    _check(world or not generated, "rollout.prompts and rollout.held_out to be files for Stable Diffusion 3; make some "
           "with python -m reference make-prompts", r.prompts + r.held_out)  # fmt: skip
    _check(world or len(r.held_out) > 0, "rollout.held_out to name a file for Stable Diffusion 3", r.held_out)
    for entry in config.scoring.models:
        if carries_secret(entry.partition("=")[2]):
            raise ConfigError(f"scoring.models: {entry.partition('=')[0]}: {NO_SECRETS}")
    _check(not background or config.scoring.batch > 0, "scoring.batch to be positive where scoring.background is set",
           config.scoring.batch)  # fmt: skip


def _check_ranges(config: Config) -> None:
    """Numbers that are out of range whatever the others are."""
    rollout, loss, optim = config.rollout, config.loss, config.optim
    positive = {
        "epochs": config.epochs, "model.lora_rank": config.model.lora_rank, "model.lora_alpha": config.model.lora_alpha,
        "rollout.pool": rollout.pool, "rollout.prompts_per_epoch": rollout.prompts_per_epoch,
        "rollout.steps": rollout.steps, "rollout.batch": rollout.batch, "loss.beta": loss.beta,
        "loss.a_max": loss.a_max, "optim.lr": optim.lr,
        "optim.clip": optim.clip, "optim.eps": optim.eps, "optim.steps_per_epoch": optim.steps_per_epoch,
        "optim.micro_batch": optim.micro_batch, "log.eval_prompts": config.log.eval_prompts,
        "log.eval_images": config.log.eval_images, "log.eval_steps": config.log.eval_steps,
        "model.resolution": config.model.resolution, "model.t5_tokens": config.model.t5_tokens,
    }  # fmt: skip
    for name, value in positive.items():
        _check(value > 0, f"{name} to be positive", value)
    _check(0 <= optim.ema_cap <= 1, "optim.ema_cap to be in [0, 1]", optim.ema_cap)
    not_negative = {
        "threads": config.threads, "loss.kl_weight": loss.kl_weight, "loss.norm_guard": loss.norm_guard,
        "optim.weight_decay": optim.weight_decay,
        "log.eval_every": config.log.eval_every,
        "log.measure_every": config.log.measure_every, "log.save_every": config.log.save_every,
        "scoring.batch": config.scoring.batch, "scoring.timeout": config.scoring.timeout,
    }  # fmt: skip
    for name, value in not_negative.items():
        _check(value >= 0, f"{name} to be at least 0", value)
    _check(all(0 <= beta < 1 for beta in optim.betas), "optim.betas to be in [0, 1)", optim.betas)


def _check_rule(config: Config) -> None:
    """Numbers of the rule that are out of range, or that it would ignore."""
    name, s, K = config.balance, config.solve, len(config.rewards)
    _check_name("balance", name, tuple(BUILT_IN_RULES))
    taken = BUILT_IN_RULES.get(name, OWN_RULE)
    ignored = [f.name for f in dataclasses.fields(SolveConfig) if getattr(s, f.name) is not None]
    ignored = [switch for switch in ignored if switch not in taken]
    which = f"which takes {', '.join(taken)}" if taken else "which takes none"
    which += "; log.measure_every says how often it measures" if "refresh_every" in ignored else ""
    _check(not ignored, f"no solve.{'/'.join(ignored)} with balance {name}, {which}", ignored)
    for switch, value in {"rho": s.rho, "keep": s.keep}.items():
        _check(value is None or 0 <= value <= 1, f"solve.{switch} to be in [0, 1]", value)
    for switch, value in {"guard": s.guard, "decay": s.decay}.items():
        _check(value is None or 0 <= value < 1, f"solve.{switch} to be in [0, 1)", value)
    _check(s.refresh_every is None or s.refresh_every > 0, "solve.refresh_every to be positive", s.refresh_every)
    _check(s.strength is None or 0 <= s.strength < 1e9, "solve.strength to be finite and at least 0", s.strength)
    _check(s.ahead is None or 1e-9 <= s.ahead <= 1e9, "solve.ahead to be from 1e-9 to 1e9", s.ahead)
    prior = s.prior or ()
    _check(len(prior) in (0, K), f"solve.prior to be empty or {K} numbers, one a reward", prior)
    usable = all(0 <= p < math.inf for p in prior) and (not prior or sum(prior) > 0)
    _check(usable, "solve.prior to be finite, at least 0, and not all 0", prior)


def _check_name(key: str, name: str, known: Sequence[str]) -> None:
    """Raise unless a name is known, or looks like the path of a callable."""
    if name not in known and ":" not in name and "." not in name:
        hint = did_you_mean(name, known)
        raise ConfigError(f"config: expected {key} to be in {list(known)} or module:callable, got {name!r}.{hint}")


def _check(ok: bool, expected: str, got: object) -> None:
    """Raise unless ``ok``."""
    if not ok:
        raise ConfigError(f"config: expected {expected}, got {got!r}.")
