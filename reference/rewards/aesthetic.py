"""LAION's aesthetic predictor: how good an image looks, whatever its prompt.

    s = head(image embedding of unit length)

with CLIP ViT-L/14 and five linear layers that were fitted to ratings from 1 to 10. Scores of generated images are about
5 to 7. Schuhmann, "Improved aesthetic predictor", 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reference.errors import ConfigError
from reference.interfaces import Reward
from reference.rewards.clip import CLIP_L, embed_images, load_checkpoint, load_clip, load_head, scoring

MODEL = CLIP_L
HEAD = "sac+logos+ava1-l14-linearMSE.pth"
HEAD_URL = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/" + HEAD.replace("+", "%2B")


def load(device: torch.device, source: str | None = None) -> Reward:
    """The aesthetic predictor on a device.

    Args:
        source: a folder with a CLIP model and its tokenizer as ``save_pretrained`` writes them, and the file ``HEAD``
            beside them. By default CLIP comes from the hub and the head from its author's repository.

    Raises:
        ConfigError: a part is not there, or cannot be downloaded.
    """
    clip = load_clip("aesthetic", device, source or MODEL)
    weights = load_checkpoint("aesthetic", source, HEAD) if source else _published_head()
    width = clip.model.config.projection_dim
    head = load_head("aesthetic", f"{source or HEAD_URL}", weights, width, "layers.").to(device)

    def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        with scoring(device):
            return head(embed_images(clip, images))[:, 0]  # type: ignore[no-any-return]

    return score


def _published_head() -> dict[str, Tensor]:
    """The weights of the head, kept in torch's own cache; only tensors are read, never code.

    Raises:
        ConfigError: they cannot be downloaded.
    """
    try:
        return torch.hub.load_state_dict_from_url(
            HEAD_URL, map_location="cpu", progress=False, weights_only=True, file_name=HEAD
        )
    except OSError as error:
        raise ConfigError(
            f"reward 'aesthetic': {HEAD_URL} cannot be downloaded: {error}. Download it elsewhere into a folder, with "
            f"the files of {MODEL} (`hf download {MODEL} --local-dir FOLDER`), and give "
            "--scoring.models aesthetic=FOLDER."
        ) from error
