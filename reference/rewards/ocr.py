"""OCR: does the image show the text that was asked for?"""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from reference.errors import ConfigError
from reference.interfaces import Reward, Scores

# From an image [H, W, 3], uint8, in the order blue, green, red, to the pieces of text in it.
Reader = Callable[[NDArray[np.uint8]], Sequence[str]]

_MAX_READERS = 8


def load(device: torch.device, source: str | None = None) -> Reward:
    """The reward ``1 - edits / len(target)`` in [0, 1] where ``metadata["ocr"]`` is the target; elsewhere inapplicable.

    ``edits`` is the Levenshtein distance from the target to all text read in the image, at most ``len(target)``, and 0
    where the target is part of that text. White space and case are ignored.

    Args:
        device: on a GPU with onnxruntime-gpu one reader runs there; else readers of one thread each share the CPU.
        source: None for rapidocr with the models of its wheel, ``"paddle"`` for PaddleOCR, which downloads its own.

    Raises:
        ConfigError: the package is not installed, or another source.
    """
    if source is None:
        on_gpu = device.type == "cuda" and _onnx_has_cuda()
        count = 1 if on_gpu else max(1, min(torch.get_num_threads(), _MAX_READERS))
        return reward_of([_rapidocr(device if on_gpu else None) for _ in range(count)])
    if source == "paddle":
        return reward_of([_paddleocr(device)])
    raise ConfigError(f"reward ocr: expected no source, or paddle, got {source!r}.")


def reward_of(readers: Sequence[Reader]) -> Reward:
    """The reward with these readers, each of which reads one image at a time in a thread of its own."""
    free: queue.SimpleQueue[Reader] = queue.SimpleQueue()
    for reader in readers:
        free.put(reader)

    def read(image: NDArray[np.uint8]) -> str:
        reader = free.get()
        try:
            return "".join(reader(image))
        finally:
            free.put(reader)

    def ocr(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any] | None]) -> Scores:
        targets = [(entry or {}).get("ocr") for entry in metadata]
        asked = [i for i, target in enumerate(targets) if target]
        pixels = (images[asked].detach().clamp(0, 1) * 255).round().byte().flip(1).permute(0, 2, 3, 1).cpu()
        values = torch.zeros(len(images), dtype=torch.float64)
        with ThreadPoolExecutor(len(readers)) as pool:
            for i, text in zip(asked, pool.map(read, pixels.contiguous().numpy()), strict=True):
                values[i] = text_score(text, targets[i] or "")
        return Scores(values, torch.tensor([bool(target) for target in targets], dtype=torch.bool))

    return ocr


def text_score(text: str, target: str) -> float:
    """How much of the target was read, in [0, 1].

    Example:
        >>> text_score("The CAT sat", "cat"), text_score("cot", "CAT"), text_score("", "cat")
        (1.0, 0.6666666666666667, 0.0)
    """
    text, target = ("".join(x.split()).lower() for x in (text, target))
    if target in text:
        return 1.0
    return 1 - min(Levenshtein.distance(text, target), len(target)) / len(target)


def _onnx_has_cuda() -> bool:
    """Whether the onnxruntime that is installed runs on NVIDIA's GPUs."""
    try:
        from onnxruntime import get_available_providers
    except ImportError:
        return False  # said where rapidocr is loaded
    return "CUDAExecutionProvider" in get_available_providers()


def _rapidocr(device: torch.device | None) -> Reader:
    """rapidocr with the models of its wheel, on a GPU or, for None, in one thread of the CPU."""
    try:
        import onnxruntime  # noqa: F401 (rapidocr itself would fail only at the first image)
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ConfigError(
            f"reward ocr: expected rapidocr and onnxruntime, got {error}. Install them: pip install "
            "'./reference[rewards]' in a clone."
        ) from error
    params: dict[str, Any] = {
        "Global.log_level": "error",
        "Global.use_cls": False,  # whether text stands on its head
        "Det.limit_type": "max",  # images of up to 960 pixels are not enlarged: half the time, as good
        "Det.limit_side_len": 960,
        "EngineConfig.onnxruntime.intra_op_num_threads": 1,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
    if device is not None:
        cuda = "EngineConfig.onnxruntime.cuda_ep_cfg"
        params["EngineConfig.onnxruntime.use_cuda"] = True
        params[f"{cuda}.device_id"] = device.index or 0
        params[f"{cuda}.cudnn_conv_algo_search"] = "HEURISTIC"  # the default tries all for each new width of a text
    engine = RapidOCR(params=params)
    return lambda image: engine(image).txts or ()  # None where there is no text


def _paddleocr(device: torch.device) -> Reader:
    """PaddleOCR of version 3."""
    try:
        from paddleocr import PaddleOCR
    except ImportError as error:
        raise ConfigError(
            f"reward ocr: source paddle: expected PaddleOCR 3, got {error}. Install it: pip install paddlepaddle "
            "'paddleocr>=3', or leave the source out to use rapidocr."
        ) from error
    where = f"gpu:{device.index or 0}" if device.type == "cuda" else "cpu"
    engine = PaddleOCR(
        lang="en",
        device=where,
        use_doc_orientation_classify=False,
        use_doc_unwarping=False,
        use_textline_orientation=False,
    )
    return lambda image: [text for page in engine.predict(image) for text in page["rec_texts"]]
