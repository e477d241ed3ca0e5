"""Rewards as plain callables, scored together and checked: what comes back is always usable."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reference.errors import ConfigError, RewardError


class Scores(NamedTuple):
    """Raw rewards and where they apply, each ``[N]`` from one reward or ``[N, K]`` from all."""

    values: Tensor
    applicable: Tensor


# (images [N, 3, H, W] in [0, 1], prompts, metadata) -> scores [N], or Scores where some images have none
Reward = Callable[[Tensor, Sequence[str], Sequence[Any]], "Tensor | Scores"]


def load_callable(path: str, argument: str) -> Callable[..., Any]:
    """The callable at a dotted path, ``package.module:name`` or ``package.module.name``.

    Raises:
        ConfigError: there is no such module or name, or it is not callable.
    """
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name) if module else None
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{argument}: expected the dotted path of a callable, got {path!r}: {error}.") from error
    if not callable(found):
        raise ConfigError(
            f"{argument}: expected the dotted path of a callable such as package.module:name, got {path!r}."
        )
    return found  # type: ignore[no-any-return]


def score(rewards: Mapping[str, Reward], images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Scores:
    """All K rewards of N images.

    Args:
        rewards: by name; the order is that of the columns.
        images: ``[N, 3, H, W]`` in [0, 1].
        prompts: N of them.
        metadata: N entries, whatever the prompt source knows about each prompt.

    Returns:
        ``Scores`` with ``[N, K]``, float64 and bool, on the CPU; the value of an inapplicable entry is 0.

    Raises:
        RewardError: a reward raised, or returned the wrong number of scores, or one that is not finite. It names the
            reward and, where there is one, the first image and prompt.
    """
    columns = [_one(name, reward, images, prompts, metadata) for name, reward in rewards.items()]
    return Scores(torch.stack([c.values for c in columns], 1), torch.stack([c.applicable for c in columns], 1))


def _one(name: str, reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Scores:
    """One reward, checked."""
    N = images.shape[0]
    try:
        result = reward(images, prompts, metadata)
    except Exception as error:
        raise RewardError(f"reward {name!r} raised {type(error).__name__}: {error}") from error
    given: Any = result if isinstance(result, tuple) and len(result) == 2 else (result, torch.ones(N, dtype=torch.bool))
    values, applicable = given
    for what, x in (("scores", values), ("applicable", applicable)):
        if not isinstance(x, Tensor) or x.shape != (N,):
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise RewardError(f"reward {name!r}: expected {what} of shape [{N}], one an image, got {got}.")
    values, applicable = values.detach().double().cpu(), applicable.detach().bool().cpu()
    bad = (applicable & ~values.isfinite()).nonzero().flatten()
    if len(bad):
        i = int(bad[0])
        raise RewardError(
            f"reward {name!r}: expected finite scores, got {float(values[i])} for image {i} ({prompts[i]!r}) and "
            f"{len(bad) - 1} more. Mark images that have no score as not applicable."
        )
    return Scores(torch.where(applicable, values, 0.0), applicable)
