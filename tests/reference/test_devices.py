"""Devices by name, and settings that hold for a run alone."""

from __future__ import annotations

import contextlib

import pytest
import torch

from reference.errors import ConfigError
from reference.processes.devices import device_of, tf32


def test_auto_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, name in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert device_of("auto") == torch.device(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:99", ""])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"scoring\.device: cannot use '{name}': .*Use auto, cpu"):
        device_of(name, "scoring.device")


def test_tf32_is_on_inside_alone() -> None:
    before = torch.get_float32_matmul_precision()
    with contextlib.suppress(KeyError), tf32(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before
    with tf32(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == before
