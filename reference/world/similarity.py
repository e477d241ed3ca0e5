"""A small dual encoder of the world's images and prompts, trained contrastively: the world's CLIP."""

from __future__ import annotations

import random
import time
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from reference.config.checks import at_least
from reference.config.settings import SimilarityConfig
from reference.text_files import make_folder
from reference.world.model import log_line, token_ids
from reference.world.render import render
from reference.world.scenes import KINDS, MAX_TOKENS, VOCABULARY, Scene, prompt_of, random_scene

_DIM = 64


class DualEncoder(nn.Module):
    """Images and prompts to unit vectors of one space."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96)
        convolutions = [
            layer for a, b in pairwise(widths) for layer in (nn.Conv2d(a, b, 4, stride=2, padding=1), nn.GELU())
        ]
        self.look = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(96 * 16, _DIM))
        self.token = nn.Embedding(len(VOCABULARY), 32)
        self.read = nn.Sequential(nn.Flatten(), nn.Linear(32 * MAX_TOKENS, 192), nn.GELU(), nn.Linear(192, _DIM))
        self.log_scale = nn.Parameter(torch.tensor(2.3))

    def image(self, images: Tensor) -> Tensor:
        """``[B, 3, 32, 32]`` in [0, 1] to ``[B, 64]``."""
        return F.normalize(self.look(images - 0.3), dim=-1)

    def text(self, ids: Tensor) -> Tensor:
        """Token ids ``[B, L]`` to ``[B, 64]``."""
        return F.normalize(self.read(self.token(ids)), dim=-1)


def train_dual_encoder(config: SimilarityConfig, folder: Path) -> None:
    """Train from scratch; write ``folder/similarity.safetensors`` (float16) and ``folder/similarity.log``.

    Raises:
        ConfigError: a number that cannot be, or a folder that cannot be written to.
    """
    at_least(1, {"--steps": config.steps, "--batch": config.batch})
    at_least(0, {"--lr": config.lr})
    make_folder(folder)
    torch.manual_seed(config.seed)
    model = DualEncoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.steps, pct_start=0.05)
    began = time.monotonic()
    for step in range(config.steps):
        images, ids = _batch(config, step)
        logits = model.log_scale.exp() * model.image(images) @ model.text(ids).mT
        same = torch.arange(config.batch)
        loss = (F.cross_entropy(logits, same) + F.cross_entropy(logits.mT, same)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            accuracy = (logits.argmax(1) == same).float().mean()
            line = f"step {step + 1} loss {loss:.3f} top1 {accuracy:.3f} seconds {time.monotonic() - began:.0f}"
            log_line(folder / "similarity.log", line)
    save_file(
        {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}, folder / "similarity.safetensors"
    )


def _batch(config: SimilarityConfig, step: int) -> tuple[Tensor, Tensor]:
    """Images and token ids of scenes with distinct prompts, none of them held out."""
    seed = 1_000_003 * (config.seed + 1) + step  # apart from those of pre-training
    rng, generator = random.Random(f"scenes {seed}"), torch.Generator().manual_seed(2**31 + seed)
    scenes: dict[str, Scene] = {}
    while len(scenes) < config.batch:
        scene = random_scene(rng, rng.choice(KINDS), held_out=False)
        scenes[prompt_of(scene)] = scene
    images = render(list(scenes.values()), seed=seed)
    amount = 0.1 * torch.rand(config.batch, 1, 1, 1, generator=generator)
    noisy = images + amount * torch.randn(images.shape, generator=generator)
    return noisy.clamp(0, 1), token_ids(list(scenes))


def load_dual_encoder(path: Path) -> DualEncoder:
    """The dual encoder saved at ``path``, in float32, frozen."""
    model = DualEncoder()
    model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return model.requires_grad_(False).eval()
