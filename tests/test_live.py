"""What a run shows and writes while it goes on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reference.errors import ConfigError
from reference.live import Live, save_grid


def test_records_are_json_and_not_a_number_is_null(tmp_path: Path) -> None:
    live = Live(tmp_path, (), epochs=2, first=0)
    live.log({"kind": "step", "step": 1, "loss": float("nan"), "list": [1.0, float("inf")], "inner": {"x": 2.5}})
    live.log({"kind": "refresh", "step": 1, "min_cosine": 0.25})
    assert live.min_cosine == 0.25
    position = live.position()
    live.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"kind": "step", "step": 1, "loss": None, "list": [1.0, None], "inner": {"x": 2.5}}
    assert position == (tmp_path / "metrics.jsonl").stat().st_size


def test_a_run_that_goes_on_appends(tmp_path: Path) -> None:
    for step in (1, 2):
        live = Live(tmp_path, (), epochs=2, first=step - 1)
        assert live.position() == sum(p.stat().st_size for p in tmp_path.iterdir())
        live.log({"kind": "step", "step": step})
        live.close()
        live.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_the_bar_shows_phase_rewards_and_cosine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    live = Live(tmp_path, (), epochs=2, first=0)
    monkeypatch.setattr(live.bar, "set_description", shown.append)
    monkeypatch.setattr(live.bar, "set_postfix_str", shown.append)
    live.phase(1, "sampling")
    live.log({"kind": "refresh", "step": 1, "min_cosine": -0.25})
    live.show(1, {"objects": 0.5, "text": 0.125})
    live.close()
    assert shown == ["epoch 1: sampling", "objects 0.50 text 0.12 min cos -0.25"]


def test_tensorboard_by_accelerates_trackers(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of packages that TensorBoard imports
        live = Live(tmp_path, ("tensorboard",), epochs=1, first=0)
        live.log({"kind": "epoch", "step": 2, "rewards": {"objects": {"mean": 0.5}}})
        live.close()
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (events,) = tmp_path.rglob("events.out.tfevents.*")
        found = EventAccumulator(str(events.parent))
        found.Reload()
    (scalar,) = found.Scalars("epoch/rewards/objects/mean")
    assert (scalar.step, scalar.value) == (2, 0.5)


def test_a_tracker_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"log\.trackers: cannot start tensorbord"):
        Live(tmp_path, ("tensorbord",), epochs=1, first=0)


def test_a_grid_has_every_image_in_its_place(tmp_path: Path) -> None:
    images = torch.rand(5, 3, 2, 4)
    save_grid(images, tmp_path / "new" / "grid.png", columns=3, scale=2)
    sheet = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert sheet.shape == (2 * 4, 3 * 8, 3)
    for i, image in enumerate(images):
        top, left = 4 * (i // 3), 8 * (i % 3)
        expected = (image * 255).round().byte().permute(1, 2, 0).numpy()
        for y, x in ((0, 0), (1, 1)):
            assert np.array_equal(sheet[top + y : top + 4 : 2, left + x : left + 8 : 2], expected)
    assert (sheet[4:, 16:] == 255).all()


def test_a_grid_clamps_and_rounds(tmp_path: Path) -> None:
    levels = torch.tensor([-1.0, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 2.0])
    save_grid(levels.expand(1, 3, 1, 6), tmp_path / "grid.png", columns=2)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255] + [255] * 6
