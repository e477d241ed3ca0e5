"""ImageReward: how much people would prefer an image for its prompt, learned from rankings by people.

    s = (head(first token of text that attends to the image) - 0.16717363) / 1.0333395

about -2 to 2, 0 on average over the images it was fitted to. The model is BLIP with a ViT-L/16 and the head of
``clip.linear_head``; ``convert`` gives the published weights the names of transformers' ``BlipVisionModel`` and
``BlipTextModel``, so that the package image-reward, which needs transformers 4, is not needed.

Compatible, not certified: the names, the shapes and the forward pass are tested against a plain BLIP written from the
published architecture, with random weights. The scores of the published weights have not been compared with those of
the official package.
Xu et al., "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", 2023.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.models.bert.tokenization_bert import BertTokenizer
from transformers.models.blip.configuration_blip import BlipConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from reference.interfaces import Reward
from reference.rewards.clip import (
    BATCH,
    clip_pixels,
    load_checkpoint,
    load_head,
    load_pretrained,
    load_tokenizer,
    load_weights,
    scoring,
)

MODEL = "THUDM/ImageReward"
CHECKPOINT = "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
TOKENS = 35

_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "norm.": "post_layernorm.",
}
_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
}


class Weights(NamedTuple):
    """The published weights by part, each with the names of its module."""

    vision: dict[str, Tensor]
    text: dict[str, Tensor]
    head: dict[str, Tensor]


def load(device: torch.device, source: str | None = None) -> Reward:
    """ImageReward on a device.

    Args:
        source: a folder with the published file ``CHECKPOINT`` and the tokenizer of BERT (uncased); if there is a
            ``config.json`` of a ``BlipConfig`` it gives the sizes, otherwise they are the published ones. By default
            both come from the hub.

    Raises:
        ConfigError: a part is not there, or cannot be downloaded.
    """
    where = source or MODEL
    weights = convert(load_checkpoint("imagereward", where, CHECKPOINT))
    config = sizes(source)
    tokenizer = load_tokenizer("imagereward", source or TOKENIZER, BertTokenizer)
    text_config, pooled = config.text_config, {"add_pooling_layer": False}
    vision = load_weights("imagereward", where, BlipVisionModel, config.vision_config, weights.vision, {}).to(device)
    text = load_weights("imagereward", where, BlipTextModel, text_config, weights.text, pooled).to(device)
    head = load_head("imagereward", where, weights.head, text_config.hidden_size, "layers.").to(device)

    def batch(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen = vision(clip_pixels(images.to(device), config.vision_config.image_size)).last_hidden_state
        tokens = tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(device)
        read = text(tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen)
        return (head(read.last_hidden_state[:, 0])[:, 0] - MEAN) / STD  # type: ignore[no-any-return]

    def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        with scoring(device):
            return torch.cat([batch(x, prompts[i * BATCH :][:BATCH]) for i, x in enumerate(torch.split(images, BATCH))])

    return score


def sizes(source: str | None) -> Any:
    """The configuration in a folder that has one, or the published one, with what BLIP's code has fixed."""
    if source and (Path(source).expanduser() / "config.json").is_file():
        config = load_pretrained("imagereward", source, BlipConfig.from_pretrained)
    else:
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        config = BlipConfig(
            text_config={"num_attention_heads": 12}, vision_config={**vision, "image_size": 224, "patch_size": 16}
        )
    config.vision_config.layer_norm_eps = 1e-6
    config.text_config.is_decoder = True  # otherwise there is no attention to the image; the text's own has no mask
    return config


def convert(weights: Mapping[str, Tensor]) -> Weights:
    """The published weights, by part and with transformers' names; text keeps its own.

    Projections for BLIP's contrastive loss and position numbers are in the file and have no use here.
    """
    vision, text, head = (
        {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
        for prefix in ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
    )
    text.pop("embeddings.position_ids", None)
    return Weights({_vision_name(name): x for name, x in vision.items()}, text, head)


def _vision_name(name: str) -> str:
    """The name in ``BlipVisionModel`` of a weight of BLIP's vision transformer."""
    if name.startswith("blocks."):
        _, number, part = name.split(".", 2)
        layer, _, kind = part.rpartition(".")
        return f"encoder.layers.{number}.{_BLOCK.get(layer, layer)}.{kind}"
    for old, new in _VISION.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
