"""What a run shows and writes while it goes on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.tracking import LoggerType
from PIL import Image

from reference.errors import ConfigError
from reference.run import live as live_module
from reference.run.live import Live, check_trackers, save_grid


def test_records_are_json_and_not_a_number_is_null(tmp_path: Path) -> None:
    live = Live(tmp_path, (), epochs=2)
    live.log({"kind": "step", "step": 1, "loss": float("nan"), "list": [1.0, float("inf")], "inner": {"x": 2.5}})
    live.log({"kind": "refresh", "step": 1, "min_cosine": 0.25})
    assert live.min_cosine == 0.25
    position = live.position
    live.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"kind": "step", "step": 1, "loss": None, "list": [1.0, None], "inner": {"x": 2.5}}
    assert position == (tmp_path / "metrics.jsonl").stat().st_size


def test_a_run_that_goes_on_appends(tmp_path: Path) -> None:
    for step in (1, 2):
        live = Live(tmp_path, (), epochs=2)
        assert live.position == sum(p.stat().st_size for p in tmp_path.iterdir())
        live.log({"kind": "step", "step": step})
        live.close()
        live.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_the_bar_shows_phase_rewards_and_cosine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    live = Live(tmp_path, (), epochs=2)
    monkeypatch.setattr(live.bar, "set_description", shown.append)
    monkeypatch.setattr(live.bar, "set_postfix_str", shown.append)
    live.phase(1, "sampling")
    live.log({"kind": "refresh", "step": 1, "min_cosine": -0.25})
    live.log({"kind": "step", "step": 1, "loss": 0.125})
    live.show(1, {"objects": 0.5, "text": 0.125})
    live.close()
    assert shown == ["epoch 1: sampling", "objects 0.50 text 0.12 min cos -0.25 loss 0.125"]


def test_without_a_terminal_a_line_an_epoch_has_time_and_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("reference.run.live.time.monotonic", lambda: now[0])
    live = Live(tmp_path, (), epochs=5)
    live.bar.disable = True
    live.start(2)
    now[0] += 90
    live.show(2, {"objects": 0.5})
    live.close()
    assert capsys.readouterr().out == "epoch 2: objects 0.50 | 1 min 30 s, 90.0 s an epoch, 3 min 0 s left\n"


def test_within_an_epoch_the_bar_counts_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    live = Live(tmp_path, (), epochs=2)
    monkeypatch.setattr(live.bar, "set_description", lambda text, refresh=True: shown.append(text))
    live.phase(0, "sampling")
    live.tick()
    live.tick()
    live.phase(0, "training, step 1 of 2")
    live.tick()
    live.close()
    assert shown == [
        "epoch 0: sampling",
        "epoch 0: sampling, pass 1",
        "epoch 0: sampling, pass 2",
        "epoch 0: training, step 1 of 2",
        "epoch 0: training, step 1 of 2, pass 1",
    ]


def test_tensorboard_by_accelerates_trackers(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of packages that TensorBoard imports
        live = Live(tmp_path, ("tensorboard",), epochs=1)
        live.log({"kind": "epoch", "step": 2, "rewards": {"objects": {"mean": 0.5}}})
        live.pictures(save_grid(torch.rand(4, 3, 8, 8), tmp_path / "grid.png", columns=2), 2)
        live.close()
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (events,) = tmp_path.rglob("events.out.tfevents.*")
        found = EventAccumulator(str(events.parent))
        found.Reload()
    (picture,) = (
        found.Images("held-out images/0")
        if "held-out images/0" in found.Tags()["images"]
        else found.Images("held-out images")
    )
    assert (picture.step, picture.width, picture.height) == (2, 16, 16)
    (scalar,) = found.Scalars("epoch/rewards/objects/mean")
    assert (scalar.step, scalar.value) == (2, 0.5)


def test_a_tracker_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"log\.trackers: cannot start tensorbord"):
        Live(tmp_path, ("tensorbord",), epochs=1)


def test_lines_that_a_full_disk_refuses_wait_and_come_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    live = Live(tmp_path, (), epochs=1)
    live.log({"kind": "step", "step": 1})
    written, file = live.position, live.file

    class Full:
        """A file on a full disk: it takes a few bytes and then fails."""

        def seek(self, offset: int, whence: int) -> int:
            return file.seek(offset, whence)

        def truncate(self, size: int) -> int:
            return file.truncate(size)

        def write(self, data: bytes) -> int:
            file.write(data[:5])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(live, "file", Full())
    live.log({"kind": "step", "step": 2})
    live.log({"kind": "step", "step": 3})
    assert live.position == written
    assert [json.loads(line)["step"] for line in live.pending.splitlines()] == [2, 3]
    monkeypatch.setattr(live, "file", file)
    live.log({"kind": "step", "step": 4})
    assert (live.pending, live.position) == ("", (tmp_path / "metrics.jsonl").stat().st_size)
    live.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert "".join(capsys.readouterr()).count("No space left on device") == 1  # said once


def test_cutting_back_brings_waiting_lines_again(tmp_path: Path) -> None:
    live = Live(tmp_path, (), epochs=1)
    live.log({"kind": "step", "step": 1})
    position = live.position
    live.log({"kind": "step", "step": 2})
    live.cut(position, '{"kind": "step", "step": 7}\n')
    live.log({"kind": "step", "step": 8})
    live.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 7, 8]


def test_a_file_that_was_emptied_under_the_run_is_not_filled_up(tmp_path: Path) -> None:
    live = Live(tmp_path, (), epochs=1)
    live.log({"kind": "step", "step": 1})
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    live.log({"kind": "step", "step": 2})
    live.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"kind": "step", "step": 2}\n'


def test_a_tracker_that_fails_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def log(self, values: object, step: int) -> None:
            raise ConnectionError("no route to host")

    live = Live(tmp_path, (), epochs=1)
    live.accelerator = Broken()
    for step in (1, 2):
        live.log({"kind": "step", "step": step, "x": 1.0})
    live.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert "".join(capsys.readouterr()).count("ConnectionError: no route to host") == 1


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


def test_trackers_are_checked_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(("tensorboard",))
    check_trackers(())
    with pytest.raises(ConfigError, match=r"log\.trackers: expected names among .*tensorboard.*, got 'tensorbord'"):
        check_trackers(("tensorbord",))
    with pytest.raises(ConfigError, match=r"log\.trackers: the package of wandb is not installed"):
        check_trackers(("tensorboard", "wandb"))
    monkeypatch.setattr(live_module, "get_available_trackers", lambda: [LoggerType.WANDB])
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(file))
    with pytest.raises(ConfigError, match=r"log\.trackers: wandb has no key.*WANDB_MODE=offline"):
        check_trackers(("wandb",))
    file.write_text("machine api.wandb.ai login user password 0123\n")
    check_trackers(("wandb",))
    file.unlink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(("wandb",))
