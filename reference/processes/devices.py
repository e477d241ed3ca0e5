"""Where tensors live, and the settings of a device that hold for a run alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from reference.errors import ConfigError


def device_of(name: str, argument: str = "device") -> torch.device:
    """The device of a name; ``"auto"`` is a GPU where there is one.

    Raises:
        ConfigError: there is no such device here.

    Example:
        >>> device_of("cpu")
        device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{argument}: cannot use {name!r}: {reason} Use auto, cpu, cuda or cuda:1.") from error
    return device


@contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """Let float32 matrix products run in TF32 on a GPU meanwhile; the settings of before are back afterwards."""
    if device.type != "cuda":
        yield
        return
    before, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = cudnn
