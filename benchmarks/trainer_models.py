"""Models and rows for the trainer's benchmark: the architecture of Stable Diffusion 3.5 Medium, and a small one."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations at import
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    from reference.policy.adapters import Policy, add_lora, load_adapter, parameters
    from reference.step.gradients import Rows


@dataclass(frozen=True)
class Setup:
    """A model and its data.

    Attributes:
        transformer: arguments of ``SD3Transformer2DModel``.
        latent: height and width of a latent.
        tokens: of a prompt.
        rank, alpha: of the LoRA adapters, on the attention's linear layers.
        batch: rows of a micro-batch.
        dtype: of the frozen weights, and of autocast where it is not float32; adapters are float32.
    """

    transformer: dict[str, Any]
    latent: int
    tokens: int
    rank: int
    alpha: float
    batch: int
    dtype: torch.dtype


# transformer/config.json of stabilityai/stable-diffusion-3.5-medium; 512 px; 77 tokens of CLIP and 256 of T5
FULL = Setup(
    transformer=dict(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        out_channels=16,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    ),
    latent=64,
    tokens=77 + 256,
    rank=32,
    alpha=64.0,
    batch=9,
    dtype=torch.bfloat16,
)
SMALL = Setup(
    transformer=FULL.transformer
    | dict(
        sample_size=16,
        num_layers=3,
        num_attention_heads=3,
        joint_attention_dim=128,
        caption_projection_dim=192,
        pooled_projection_dim=128,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
    ),
    latent=16,
    tokens=24,
    rank=8,
    alpha=16.0,
    batch=4,
    dtype=torch.float32,
)


def build_transformer(setup: Setup, device: torch.device | str) -> SD3Transformer2DModel:
    """A transformer with random weights, made where it stays and in its dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(setup.dtype)
    try:
        with torch.device(device):
            transformer = SD3Transformer2DModel(**setup.transformer)
        for buffer in transformer.buffers():  # position embeddings, in float32 at first
            buffer.data = buffer.data.to(setup.dtype)
        return transformer.eval()
    finally:
        torch.set_default_dtype(before)


def build(setup: Setup, device: torch.device) -> Policy:
    """The policy, with adapters ``default`` and ``old`` that differ."""
    torch.manual_seed(0)
    autocast = None if setup.dtype == torch.float32 else setup.dtype
    transformer = build_transformer(setup, device)
    policy = add_lora(transformer, rank=setup.rank, alpha=setup.alpha, targets="attention", seed=0, autocast=autocast)
    trained = parameters(policy)
    for adapter in ("default", "old"):
        state = {name: p + 0.02 * torch.randn_like(p) for name, p in trained.items()}
        load_adapter(policy, adapter, state)
    return policy


def random_rows(setup: Setup, B: int, K: int, device: torch.device) -> Rows:
    """``B`` rows in two halves, as the trainer makes them."""
    g = torch.Generator(device).manual_seed(1)
    shape = (B, setup.transformer["in_channels"], setup.latent, setup.latent)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=device)

    embeds = normal(B, setup.tokens, setup.transformer["joint_attention_dim"])
    pooled = normal(B, setup.transformer["pooled_projection_dim"])
    t = torch.linspace(0.05, 1.0, B, device=device)
    prompt = torch.arange(B, device=device)
    half = (prompt >= B // 2).long()
    return Rows(
        normal(*shape),
        normal(*shape),
        t,
        embeds,
        pooled,
        normal(B, K),
        normal(B),
        half,
        prompt,
        torch.ones(B, device=device),
    )
