"""Rewards as plain callables, scored together and checked: what comes back is always usable."""

from __future__ import annotations

import http.client
import importlib
import sys
import time
import traceback
import urllib.error
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from reference.errors import ConfigError, RewardError, TrainingError

_WAITS = (1.0, 2.0, 4.0)  # seconds before a reward whose connection failed is tried again
_CLIENTS = ("requests", "urllib3", "httpx", "httpcore", "aiohttp", "openai", "grpc")


class Prompt(NamedTuple):
    """A prompt; what its source knows about it; and the names of the rewards that apply to it, None for all.

    ``metadata["ocr"]`` is the text to be seen in the image, ``metadata["geneval"]`` a row of a GenEval file.
    """

    text: str
    metadata: Mapping[str, Any] = MappingProxyType({})
    rewards: tuple[str, ...] | None = None


class Scores(NamedTuple):
    """Raw rewards and where they apply, each ``[N]`` from one reward or ``[N, K]`` from all."""

    values: Tensor
    applicable: Tensor


# (images [N, 3, H, W] in [0, 1], prompts, metadata) -> scores [N], or Scores where some images have none
Reward = Callable[[Tensor, Sequence[str], Sequence[Any]], "Tensor | Scores"]


def plain_prompts(texts: Iterable[str]) -> list[Prompt]:
    """Prompts of which nothing is known, to which every reward applies."""
    return [Prompt(text, {}, None) for text in texts]


def load_callable(path: str, argument: str) -> Callable[..., Any]:
    """The callable at a dotted path, ``package.module:name`` or ``package.module.name``.

    Raises:
        ConfigError: there is no such module or name, its file cannot be run, or it is not callable.
    """
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name) if module else None
    except (Exception, SystemExit) as error:  # whatever a file of the user's raises
        raise ConfigError(
            f"{argument}: expected the dotted path of a callable, got {path!r}: {place_of(error)}."
        ) from error
    if not callable(found):
        raise ConfigError(
            f"{argument}: expected the dotted path of a callable such as package.module:name, got {path!r}."
        )
    return found  # type: ignore[no-any-return]


def score(rewards: Mapping[str, Reward], images: Tensor, prompts: Sequence[Prompt], *, first: int = 0) -> Scores:
    """All K rewards of N images.

    Args:
        rewards: by name; the order is that of the columns.
        images: ``[N, 3, H, W]`` in [0, 1].
        prompts: N of them, each with the metadata that rewards are given and the rewards that apply to it.
        first: number of the first image, for errors.

    Returns:
        ``Scores`` with ``[N, K]``, float64 and bool, on the CPU; the value of an inapplicable entry is 0.

    Raises:
        RewardError: a reward raised, or returned the wrong number of scores, or one that is not finite. It names the
            reward and, where there is one, the first image and prompt.
        TrainingError: an image is not finite, which is no reward's fault.
    """
    bad = (~images.flatten(1).isfinite().all(1)).nonzero().flatten()
    if len(bad):
        i = int(bad[0])
        raise TrainingError(
            f"the policy's images are not finite, image {first + i} ({prompts[i].text!r}) and {len(bad) - 1} more: "
            "training has come apart. Start another run with a lower optim.lr or a higher loss.kl_weight; this one "
            "would end here again after --resume."
        )
    columns = [_column(name, reward, images, prompts, first) for name, reward in rewards.items()]
    return Scores(torch.stack([c.values for c in columns], 1), torch.stack([c.applicable for c in columns], 1))


def _column(name: str, reward: Reward, images: Tensor, prompts: Sequence[Prompt], first: int) -> Scores:
    """One reward of all images; those whose prompt leaves it out are not shown to it."""
    N = images.shape[0]
    own = [i for i, prompt in enumerate(prompts) if prompt.rewards is None or name in prompt.rewards]
    if len(own) == N:
        return _one(name, reward, images, prompts, range(first, first + N))
    values, applicable = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.bool)
    if own:
        found = _one(name, reward, images[own], [prompts[i] for i in own], [first + i for i in own])
        values[own], applicable[own] = found
    return Scores(values, applicable)


def _scores_of(result: Any, N: int) -> tuple[Any, Any]:
    """Scores and where they apply, from what a reward returned: a tensor, a list or an array, one of them with where it
    applies or with a dictionary of other information, as TRL's and flow_grpo's do. None is a score that does not apply.
    """
    pair = isinstance(result, tuple) and len(result) == 2 and not isinstance(result[1], float | int | None)
    values, applicable = result if pair else (result, None)
    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype != object:
        values = torch.from_numpy(values)
    if isinstance(values, list) and all(isinstance(x, float | int | None | np.number) for x in values):
        known = torch.tensor([x is not None for x in values], dtype=torch.bool)
        values = torch.tensor([0.0 if x is None else float(x) for x in values], dtype=torch.float64)
        applicable = known if applicable is None or isinstance(applicable, Mapping) else applicable
    if applicable is None or isinstance(applicable, Mapping):
        applicable = torch.ones(N, dtype=torch.bool)
    return values, applicable


def _unreadable(x: object, N: int) -> str:
    """What a column of scores is instead of N real numbers; empty where it is that."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    if x.is_nested or x.is_quantized or x.is_complex() or x.layout != torch.strided or x.device.type == "meta":
        return f"a tensor of {x.dtype}, {'nested' if x.is_nested else x.layout}, on {x.device}"
    return "" if x.shape == (N,) else f"{list(x.shape)}"


def place_of(error: BaseException) -> str:
    """An exception with the file and the line that raised it, or that cannot be read."""
    if isinstance(error, SyntaxError) and error.filename:
        file, line, text = error.filename, error.lineno, error.msg
    else:
        last = traceback.extract_tb(error.__traceback__)[-1]
        file, line, text = last.filename, last.lineno, str(error)
    where = "" if "importlib" in file or file == __file__ else f" ({Path(file).name}, line {line})"
    return f"{type(error).__name__}: {text}{where}"


def _called(name: str, reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> Any:
    """What a reward returns; a connection that fails is tried again, a few times, after some seconds."""
    texts, metadata = [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
    with torch.no_grad():
        for wait in _WAITS:
            try:
                return reward(images.clone(), texts, metadata)  # a copy: a reward may change its images
            except Exception as error:
                if not _may_pass(error):
                    raise
                print(f"reward {name!r}: {type(error).__name__}: {error}; tried again in {wait:g} s", file=sys.stderr)
                time.sleep(wait)
        return reward(images.clone(), texts, metadata)


def _may_pass(error: Exception) -> bool:
    """Whether an error is that of a connection, which may be gone at the next try."""
    if isinstance(error, ConnectionError | TimeoutError | http.client.HTTPException | urllib.error.URLError):
        return not isinstance(error, urllib.error.HTTPError) or error.code in (408, 429) or error.code >= 500
    package, name = type(error).__module__.partition(".")[0], type(error).__name__
    return package in _CLIENTS and any(word in name for word in ("Connect", "Timeout", "Network", "RemoteProtocol"))


def _one(name: str, reward: Reward, images: Tensor, prompts: Sequence[Prompt], numbers: Sequence[int]) -> Scores:
    """One reward, checked."""
    N = images.shape[0]
    try:
        result = _called(name, reward, images, prompts)
    except RewardError:
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(f"reward {name!r} raised {place_of(error)}") from error
    values, applicable = _scores_of(result, N)
    for what, x in (("scores", values), ("applicable", applicable)):
        if got := _unreadable(x, N):
            raise RewardError(
                f"reward {name!r}: expected {what} of shape [{N}], one an image, as a tensor"
                f"{', list or array' if what == 'scores' else ''}, got {got}."
            )
    values, applicable = values.detach().double().cpu(), applicable.detach().bool().cpu()
    bad = (applicable & ~values.isfinite()).nonzero().flatten()
    if len(bad):
        i = int(bad[0])
        where = f"image {numbers[i]} ({prompts[i].text!r}) and {len(bad) - 1} more"
        raise RewardError(
            f"reward {name!r}: expected finite scores, got {float(values[i])} for {where}. Mark images that have no "
            "score as not applicable."
        )
    return Scores(torch.where(applicable, values, 0.0), applicable)
