"""The world's base model: a small SD3 transformer on pixel-unshuffled images, and an encoder of its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from reference.world.render import RESOLUTION
from reference.world.scenes import MAX_TOKENS, VOCABULARY, tokens

WEIGHTS = Path(__file__).parent / "weights"
PIXEL_MEAN, PIXEL_STD = 0.3, 0.25  # of the scenes, roughly: latents of about unit scale, as a VAE's
_FOLD = 2  # pixels a side that become channels of one latent
_WIDTH = 64  # of the prompt embeddings


class PromptEncoder(nn.Module):
    """Prompts to what SD3 attends to: an embedding for each token, and a pooled one."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(len(VOCABULARY), _WIDTH)
        self.place = nn.Parameter(torch.zeros(MAX_TOKENS, _WIDTH))
        self.pool = nn.Linear(_WIDTH, _WIDTH)
        nn.init.normal_(self.token.weight, std=0.3)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """``ids [B, L]`` to ``([B, L, 64], [B, 64])``."""
        x = self.token(ids) + self.place
        return x, self.pool(x.mean(1))


def new_transformer() -> SD3Transformer2DModel:
    """The base model with random weights: 1.4 M parameters, 64 patches of 4 x 4 pixels."""
    return SD3Transformer2DModel(
        sample_size=RESOLUTION // _FOLD,
        patch_size=2,
        in_channels=3 * _FOLD**2,
        out_channels=3 * _FOLD**2,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=_WIDTH,
        caption_projection_dim=96,
        pooled_projection_dim=_WIDTH,
        pos_embed_max_size=RESOLUTION // _FOLD // 2,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Straight rectified flow: as few pixels need no shift towards noise."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def encode_images(images: Tensor) -> Tensor:
    """Images ``[B, 3, H, W]`` in [0, 1] to latents ``[B, 12, H/2, W/2]``; exact, in place of a VAE."""
    return F.pixel_unshuffle((images - PIXEL_MEAN) / PIXEL_STD, _FOLD)


def decode_latents(latents: Tensor) -> Tensor:
    """The inverse of ``encode_images``, clamped to [0, 1]."""
    return (F.pixel_shuffle(latents, _FOLD) * PIXEL_STD + PIXEL_MEAN).clamp(0, 1)


def token_ids(prompts: Sequence[str]) -> Tensor:
    """Token ids ``[B, L]`` of prompts in the world's language."""
    return torch.tensor([tokens(prompt) for prompt in prompts])


def save_base(folder: Path, transformer: SD3Transformer2DModel, encoder: PromptEncoder) -> None:
    """Write a base model in diffusers' layout: transformer/, scheduler/, and the prompt encoder beside them."""
    transformer.save_pretrained(folder / "transformer")
    new_scheduler().save_pretrained(folder / "scheduler")
    save_file({k: v.contiguous() for k, v in encoder.state_dict().items()}, folder / "prompt_encoder.safetensors")


def load_encoder(folder: Path) -> PromptEncoder:
    """The prompt encoder of a base model, in float32, frozen."""
    encoder = PromptEncoder()
    encoder.load_state_dict({k: v.float() for k, v in load_file(folder / "prompt_encoder.safetensors").items()})
    return encoder.requires_grad_(False).eval()


def log_line(path: Path, line: str) -> None:
    """Print a line and keep it."""
    print(line, flush=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
