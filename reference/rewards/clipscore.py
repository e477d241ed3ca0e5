"""CLIPScore: how well an image fits its prompt, as CLIP ViT-L/14 sees it.

    s = exp(logit_scale) cos(image, text) / 100

The published scale is 100, so that scores are cosines, about 0.2 to 0.35. Images are resized *bilinearly* and stay
unrounded, as in the trainers of the field; CLIP's own processor is bicubic.
Hessel et al., "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reference.interfaces import Reward
from reference.rewards.clip import CLIP_L, cosines, load_clip, normalize, quantize, resize_and_crop

MODEL = CLIP_L
_SCALE = 100.0


def load(device: torch.device, source: str | None = None) -> Reward:
    """CLIPScore on a device.

    Args:
        source: a folder with a CLIP model and its tokenizer as ``save_pretrained`` writes them, or the hub id of one;
            OpenAI's ViT-L/14 by default.

    Raises:
        ConfigError: the model is not there, or cannot be downloaded.
    """
    clip = load_clip("clipscore", device, source or MODEL)
    scale = float(clip.model.logit_scale.exp()) / _SCALE

    def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        return cosines(clip, images, prompts, pixels) * scale

    return score


def pixels(images: Tensor, size: int) -> Tensor:
    """Images of 8 bits, resized bilinearly with antialiasing, central square, normalized."""
    return normalize(resize_and_crop(quantize(images), size, "bilinear", eight_bits=False))
