"""What the trainer needs of a base model, whatever its size, and how the small world's is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from reference.errors import ConfigError
from reference.world import model as world


class Base(NamedTuple):
    """A base model.

    Attributes:
        transformer: predicts velocities.
        scheduler: its flow-matching scheduler.
        encode: prompts to embeddings ``[B, L, D]`` and pooled ones ``[B, D']``, on the device.
        decode: latents to images ``[B, 3, H, W]`` in [0, 1].
        latent_shape: ``(C, H, W)`` of one latent.
        device: where the model is, and the latents given to it.
    """

    transformer: SD3Transformer2DModel
    scheduler: FlowMatchEulerDiscreteScheduler
    encode: Callable[[Sequence[str]], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor], Tensor]
    latent_shape: tuple[int, int, int]
    device: torch.device = torch.device("cpu")


def load_base(name: str, device: torch.device | None = None) -> Base:
    """Load the small world's base model: ``"world"`` for the one that ships with the code, or a folder like it.

    The transformer stays on the CPU, for adapters to be added.

    Raises:
        ConfigError: files are missing, and what to do.
    """
    folder = world.WEIGHTS if name == "world" else Path(name)
    wanted = ("transformer/config.json", "scheduler/scheduler_config.json", "prompt_encoder.safetensors")
    missing = [part for part in wanted if not (folder / part).is_file()]
    if missing:
        raise ConfigError(
            f"model.base: expected a base model in {folder}, but {', '.join(missing)} is missing. "
            "Use model.base=world, make one with python -m reference world-pretrain, or give the folder of a Stable "
            "Diffusion 3 pipeline, with its model_index.json."
        )
    device = device or torch.device("cpu")
    transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    encoder = world.load_encoder(folder).to(device)

    def encode(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            embeds, pooled = encoder(world.token_ids(prompts).to(device))
        return embeds, pooled

    size = int(transformer.config["sample_size"])
    shape = (int(transformer.config["in_channels"]), size, size)
    return Base(transformer.eval(), scheduler, encode, world.decode_latents, shape, device)
