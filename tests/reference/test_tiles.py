"""Held-out images with their prompts and scores: written by an evaluation, shown in a report; and where that goes."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from reference.errors import ConfigError
from reference.interfaces import Scores
from reference.run.report import report_on, write_report
from reference.run.tiles import read_tiles, save_tiles, tile_cards
from tests.reference.test_report import evaluation, write_run


def save(run: Path, name: str, brightness: float, prompts: tuple[str, ...] = ("a", "b", "c")) -> Path:
    """Each image has a level of grey of its own, the second reward does not apply to the second image."""
    path, N = run / "grids" / f"{name}.png", len(prompts)
    levels = brightness + torch.arange(N) / 10
    images = levels.reshape(N, 1, 1, 1).expand(N, 3, 8, 8)
    known = torch.tensor([[True, True], [True, False], [True, True]])[:N]
    scores = Scores(torch.stack([levels, -levels], 1), known)
    save_tiles(images, prompts, ("bright", "dark"), scores, path)
    return path


def level(data: bytes) -> float:
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (96, 96)
        pixel = image.getpixel((40, 40))
    assert isinstance(pixel, tuple)
    return pixel[0] / 255


def test_what_is_written_is_read(tmp_path: Path) -> None:
    found = read_tiles(save(tmp_path, "before", 0.5))
    assert found is not None
    assert found.prompts == ["a", "b", "c"]
    assert [sorted(s) for s in found.scores] == [["bright", "dark"], ["bright"], ["bright", "dark"]]
    assert found.scores[2]["dark"] == pytest.approx(-0.7)
    assert [level(data) for data in found.images] == pytest.approx([0.5, 0.6, 0.7], abs=0.01)


def test_rows_of_ten_and_the_first_twelve(tmp_path: Path) -> None:
    prompts = tuple(f"prompt {i}" for i in range(40))
    images = (torch.arange(40) / 40).reshape(40, 1, 1, 1).expand(40, 3, 4, 4)
    scores = Scores(torch.zeros(40, 1), torch.ones(40, 1, dtype=torch.bool))
    save_tiles(images, prompts, ("zero",), scores, tmp_path / "all.png")
    found = read_tiles(tmp_path / "all.png")
    assert found is not None
    assert found.prompts == list(prompts[:12])
    assert [level(data) for data in found.images] == pytest.approx([i / 40 for i in range(12)], abs=0.01)


def test_a_card_has_both_images_and_all_scores(tmp_path: Path) -> None:
    save(tmp_path, "before", 0.1)
    save(tmp_path, "after", 0.7)
    cards = tile_cards({"run": tmp_path})
    assert len(cards) == 3
    pictures = re.findall(r'base64,([^"]*)"', cards[1])
    assert [level(base64.b64decode(p)) for p in pictures] == pytest.approx([0.2, 0.8], abs=0.01)
    assert "bright 0.20 → 0.80</span>" in cards[1]
    assert "bright 0.10 → 0.70, dark -0.10 → -0.70</span>" in cards[0]


def test_several_runs_stand_on_one_card_where_their_prompts_are_the_same(tmp_path: Path) -> None:
    for run, prompts in (("one", ("a", "b")), ("two", ("a", "b")), ("other", ("x", "y"))):
        save(tmp_path / run, "before", 0.1, prompts)
        save(tmp_path / run, "after", 0.5, prompts)
    cards = tile_cards({label: tmp_path / label for label in ("one", "two", "other", "missing")})
    assert len(cards) == 2
    assert re.findall(r"<small>([^<]*)", cards[0]) == ["before", "one", "two"]
    assert "one: bright 0.10 → 0.50" in cards[0]


def test_prompts_and_names_are_text(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>'
    for name in ("before", "after"):
        path = save(tmp_path / "run", name, 0.5, (evil, '" onerror="alert(1)'))
        data = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        data["tiles"][0]["scores"]["<b>"] = 1.0
        path.with_suffix(".json").write_text(json.dumps(data), encoding="utf-8")
    run = write_run(tmp_path / "run", evaluation(0, text=(0.5, 0.4, 0.6)))
    html = write_report(run).read_text(encoding="utf-8")
    assert "&lt;script&gt;" in html
    for planted in ("<script", "<b>1", ' onerror="'):
        assert planted not in html


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"columns": 10, "tiles": 3}',
        '{"columns": 0, "tiles": [{"prompt": "a", "scores": {}}]}',
        '{"columns": -3, "tiles": [{"prompt": "a", "scores": {}}]}',
        '{"columns": 10, "tiles": [{"prompt": "a"}]}',
        '{"columns": 10, "tiles": [{"prompt": "a", "scores": {"x": "y"}}]}',
        '{"columns": 10, "tiles": [{"prompt": "a", "scores": [1]}]}',
        '{"columns": 100000, "tiles": [{"prompt": "a", "scores": {}}]}',
        '{"columns": 10, "tiles": []}',
    ],
)
def test_a_damaged_file_leaves_the_whole_picture(tmp_path: Path, text: str) -> None:
    for name in ("before", "after"):
        save(tmp_path, name, 0.5).with_suffix(".json").write_text(text, encoding="utf-8")
    assert tile_cards({"run": tmp_path}) == []
    run = write_run(tmp_path, evaluation(0, text=(0.5, 0.4, 0.6)))
    assert write_report(run).read_text(encoding="utf-8").count("<img") == 2


def test_a_picture_that_is_none(tmp_path: Path) -> None:
    path = save(tmp_path, "before", 0.5)
    path.write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    assert read_tiles(path) is None
    path.unlink()
    assert read_tiles(path) is None


def test_a_page_goes_where_it_is_asked_for(tmp_path: Path) -> None:
    run, other = (write_run(tmp_path / name, evaluation(0, text=(0.5, 0.4, 0.6))) for name in ("one", "two"))
    assert report_on([run], None) == (run / "report.html", [])
    html, page = (run / "report.html").read_bytes(), tmp_path / "x" / "ü y" / "z.html"
    for folders in ([run], [run, run]):  # the same one twice is one
        assert report_on(folders, page) == (page, [])
        assert page.read_bytes() == html
        page.unlink()
    assert report_on([run, other], page) == (page, [])
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "page.html"):
        with pytest.raises(ConfigError, match=r"^--out: cannot write"):
            report_on([run], out)
    assert not list(tmp_path.rglob("*.tmp"))
