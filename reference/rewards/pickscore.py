"""PickScore: how much people would prefer an image for its prompt, learned from the choices of Pick-a-Pic.

    s = exp(logit_scale) cos(image, text) / 26

Scores of photographs and paintings that fit their prompt are about 0.8 to 0.9; differences of hundredths matter.
Kirstain et al., "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation", 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reference.interfaces import Reward
from reference.rewards.clip import CLIP_H, cosines, load_clip

MODEL = "yuvalkirstain/PickScore_v1"
_SCALE = 26.0  # brings scores near 1, as the training code of the field has them


def load(device: torch.device, source: str | None = None) -> Reward:
    """PickScore on a device.

    Args:
        source: a folder with a CLIP model and its tokenizer as ``save_pretrained`` writes them, or the hub id of one.
            The published model by default, with the tokenizer of the CLIP that it was trained from.

    Raises:
        ConfigError: the model is not there, or cannot be downloaded.
    """
    clip = load_clip("pickscore", device, source or MODEL, None if source else CLIP_H)
    scale = float(clip.model.logit_scale.exp()) / _SCALE

    def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        return cosines(clip, images, prompts) * scale

    return score
