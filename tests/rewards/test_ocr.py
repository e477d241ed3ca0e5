"""The OCR reward: its arithmetic, and the models of rapidocr's wheel on rendered text."""

from __future__ import annotations

import sys
import threading
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from reference.errors import ConfigError
from reference.interfaces import Scores
from reference.rewards.ocr import load, reward_of, text_score

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "target", "score"),
    [
        ("hello", "Hello", 1.0),
        ("O P E N\tnow", "open", 1.0),
        ("we are open today", "OPEN", 1.0),  # a part counts as exact
        ("oper", "open", 1 - 1 / 4),
        ("ope", "open", 1 - 1 / 4),
        ("oxyn", "open", 1 - 2 / 4),
        ("", "open", 0.0),
        ("something else altogether", "open", 0.0),  # more edits than letters
        ("Ünïcode", "ünïcode", 1.0),
    ],
)
def test_score_of_a_text(text: str, target: str, score: float) -> None:
    assert text_score(text, target) == pytest.approx(score, abs=1e-15)


def test_targets_come_from_the_metadata_and_other_images_are_not_read() -> None:
    seen = []

    def reader(image: np.ndarray) -> list[str]:
        assert image.dtype == np.uint8
        assert image.shape == (2, 4, 3)
        seen.append(tuple(int(x) for x in image[0, 0]))
        return ["CA", "T"]

    images = torch.zeros(5, 3, 2, 4)
    images[0, 0] = 1.0  # red
    images[3, 2] = 0.5  # blue
    metadata: list[dict | None] = [{"ocr": "cat"}, None, {}, {"ocr": "cut", "other": 1}, {"geneval": {}}]
    scores = reward_of([reader])(images, [""] * 5, metadata)
    assert isinstance(scores, Scores)
    assert scores.applicable.tolist() == [True, False, False, True, False]
    assert scores.values.tolist() == pytest.approx([1, 0, 0, 2 / 3, 0])
    assert seen == [(0, 0, 255), (128, 0, 0)]  # blue, green, red
    none = reward_of([reader])(images, [""] * 5, [{}] * 5)
    assert isinstance(none, Scores)
    assert not none.applicable.any()


def test_readers_share_the_images_and_keep_their_order() -> None:
    both, busy = threading.Barrier(2, timeout=20), threading.Lock()

    def reader_of(lock: threading.Lock):
        def reader(image: np.ndarray) -> list[str]:
            assert lock.acquire(blocking=False), "a reader was used by two threads at a time"
            both.wait()  # passes only if both readers are at work
            lock.release()
            return [str(image[0, 0, 0])]

        return reader

    images = (torch.arange(6.0) / 255)[:, None, None, None].expand(6, 3, 1, 1)
    reward = reward_of([reader_of(busy), reader_of(threading.Lock())])
    scores = reward(images, [""] * 6, [{"ocr": str(i)} for i in range(6)])
    assert isinstance(scores, Scores)
    assert scores.values.tolist() == [1.0] * 6


def test_a_reader_that_fails_fails_the_reward() -> None:
    def reader(image: np.ndarray) -> list[str]:
        raise RuntimeError("no model")

    with pytest.raises(RuntimeError, match="no model"):
        reward_of([reader])(torch.zeros(1, 3, 2, 2), [""], [{"ocr": "cat"}])


def picture(text: str) -> Tensor:
    """Black text on white."""
    image = Image.new("RGB", (256, 128), "white")
    font = ImageFont.load_default(size=48)
    ImageDraw.Draw(image).text((20, 30), text, fill="black", font=font)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def test_the_models_of_the_wheel_read_text() -> None:
    reward = load(CPU)
    images = torch.stack([picture("HELLO"), picture("HELLO"), picture("")])
    scores = reward(images, [""] * 3, [{"ocr": "Hello"}, {"ocr": "HOLLY"}, {"ocr": "Hello"}])
    assert isinstance(scores, Scores)
    assert scores.applicable.all()
    assert scores.values.tolist() == pytest.approx([1.0, 1 - 2 / 5, 0.0])  # HELLO, E > O and O > Y, nothing


def test_paddleocr_reads_through_its_own_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    class PaddleOCR:
        def __init__(self, **options: object) -> None:
            assert options["device"] == "cpu"

        def predict(self, image: np.ndarray) -> list[dict[str, list[str]]]:
            return [{"rec_texts": ["STOP", "here"]}]

    monkeypatch.setitem(sys.modules, "paddleocr", types.SimpleNamespace(PaddleOCR=PaddleOCR))
    scores = load(CPU, "paddle")(torch.zeros(1, 3, 8, 8), [""], [{"ocr": "stop here"}])
    assert isinstance(scores, Scores)
    assert scores.values.tolist() == [1.0]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="expected no source, or paddle, got 'tesseract'"):
        load(CPU, "tesseract")
    for name, source in (("paddleocr", "paddle"), ("rapidocr", None), ("onnxruntime", None)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match="pip install"):
            load(CPU, source)
        monkeypatch.delitem(sys.modules, name)
