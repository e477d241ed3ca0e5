"""HPSv2.1: how much people would prefer an image for its prompt, learned from the Human Preference Dataset v2.

    s = cos(image, text)

without a logit scale; about 0.2 to 0.35. The published checkpoint is an open_clip ViT-H-14; ``convert`` gives its
weights the names of transformers' ``CLIPModel``, so that open_clip is not needed.
Wu et al., "Human Preference Score v2", 2023.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.clip.configuration_clip import CLIPConfig
from transformers.models.clip.modeling_clip import CLIPModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from reference.errors import ConfigError
from reference.interfaces import Reward
from reference.rewards.clip import (
    CLIP_H,
    Clip,
    cosines,
    load_checkpoint,
    load_pretrained,
    load_tokenizer,
    load_weights,
    normalize,
    quantize,
)

MODEL = "xswu/HPSv2"
CHECKPOINT = "HPS_v2.1_compressed.pt"

# open_clip's names -> transformers', of everything outside the blocks
_OUTSIDE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers' spelling
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
_TRANSPOSED = ("text_projection", "visual.proj")  # open_clip multiplies from the right
_INSIDE = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def load(device: torch.device, source: str | None = None) -> Reward:
    """HPSv2.1 on a device.

    Args:
        source: a folder with the published file ``CHECKPOINT`` and the tokenizer of a CLIP; if there is a
            ``config.json`` of a ``CLIPModel`` it gives the sizes, otherwise they are ViT-H-14's. By default the
            checkpoint comes from the hub, and the tokenizer from the CLIP that it was trained from.

    Raises:
        ConfigError: a part is not there, or cannot be downloaded, or ftfy is not installed.
    """
    clean = cleaner()
    weights = convert(load_checkpoint("hpsv2", source or MODEL, CHECKPOINT))
    config = sizes(source)
    tokenizer = load_tokenizer("hpsv2", source or CLIP_H, CLIPTokenizer)
    model = load_weights("hpsv2", source or MODEL, CLIPModel, config, weights, {})
    clip = Clip(model.to(device), tokenizer, device)

    def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        return cosines(clip, images, [clean(prompt) for prompt in prompts], pixels)

    return score


def cleaner() -> Callable[[str], str]:
    """Text as open_clip cleans it before tokens are made: encoding mistakes and HTML entities are undone.

    Raises:
        ConfigError: ftfy is not installed.
    """
    try:
        from ftfy import fix_text
    except ImportError as error:
        raise ConfigError("reward 'hpsv2': expected ftfy: `pip install './reference[rewards]'` in a clone.") from error
    return lambda text: html.unescape(html.unescape(fix_text(text)))


def sizes(source: str | None) -> Any:
    """The configuration in a folder that has one, or that of ViT-H-14."""
    if source and (Path(source).expanduser() / "config.json").is_file():
        return load_pretrained("hpsv2", source, CLIPConfig.from_pretrained)
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    return CLIPConfig(
        text_config={**text, "hidden_act": "gelu", "projection_dim": 1024},
        vision_config={**vision, "hidden_act": "gelu", "projection_dim": 1024, "patch_size": 14},
        projection_dim=1024,
    )


def convert(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of open_clip under the names of transformers' ``CLIPModel``.

    Attention's stacked input projection is cut into that of queries, keys and values; projections are transposed.
    A name that is not known is left as it is, and is not loaded.
    """
    found: dict[str, Tensor] = {}
    for name, x in weights.items():
        tower, block, inner = name.partition("transformer.resblocks.")
        if not block:
            found[_OUTSIDE.get(name, name)] = x.T.contiguous() if name in _TRANSPOSED else x
            continue
        model = "vision_model" if tower == "visual." else "text_model"
        number, _, part = inner.partition(".")
        place = f"{model}.encoder.layers.{number}"
        layer, _, kind = part.rpartition(".")
        if kind.startswith("in_proj_"):
            for letter, chunk in zip("qkv", x.chunk(3), strict=True):
                found[f"{place}.self_attn.{letter}_proj.{kind.removeprefix('in_proj_')}"] = chunk.clone()
        else:
            found[f"{place}.{_INSIDE.get(layer, layer)}.{kind}"] = x
    return found


def pixels(images: Tensor, size: int) -> Tensor:
    """Images of 8 bits whose longer edge is resized to ``size``, in the middle of a black square, normalized.

    Bicubic with antialiasing; what overshoots [0, 1] stays, as in the official code.
    """
    long = max(images.shape[-2:])
    height, width = (round(x * (size / long)) for x in images.shape[-2:])
    images = F.interpolate(quantize(images), (height, width), mode="bicubic", antialias=True, align_corners=False)
    top, left = (size - height) // 2, (size - width) // 2
    return normalize(F.pad(images, (left, size - width - left, top, size - height - top)))
