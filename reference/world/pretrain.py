"""Pre-training of the world's base model: rectified flow on rendered scenes, reproducible and resumable."""

from __future__ import annotations

import copy
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from marble_core import ema_tree
from reference.config.checks import at_least
from reference.config.settings import PretrainConfig
from reference.errors import ConfigError
from reference.tensor_files import load_tensors
from reference.text_files import make_folder
from reference.world.model import PromptEncoder, encode_images, log_line, new_transformer, save_base, token_ids
from reference.world.render import ink_mask, render
from reference.world.scenes import KINDS, prompt_of, random_scene

KIND_WEIGHTS = (3, 3, 3, 1, 1)  # of KINDS: the base learns letters on a fixed grid much sooner than shapes anywhere


def pretrain(config: PretrainConfig, folder: Path) -> None:
    """Train, log to ``folder/pretrain.log``, save to ``folder/state.pt`` on the way and to ``folder`` in the end.

    Data, noise and times depend on the seed and the step alone, so a run that was stopped goes on as if it had not.
    """
    at_least(1, {"--steps": config.steps, "--batch": config.batch, "--save-every": config.save_every})
    at_least(0, {"--lr": config.lr, "--warmup": config.warmup, "--ink-weight": config.ink_weight})
    make_folder(folder)
    torch.manual_seed(config.seed)
    transformer, encoder = new_transformer(), PromptEncoder()
    model = nn.ModuleDict({"transformer": transformer, "encoder": encoder})
    named = dict(model.named_parameters())
    matrices = {name for name, p in named.items() if "transformer_blocks" in name and p.ndim == 2}
    inside = [p for name, p in named.items() if name in matrices]
    rest = [p for name, p in named.items() if name not in matrices]
    momenta = [torch.zeros_like(p) for p in inside]
    optimizer = torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01)
    average = {name: p.detach().clone() for name, p in named.items()}
    start = _load(folder / "state.pt", config, model, optimizer, momenta, average)
    began, losses = time.monotonic(), []
    for step in range(start, config.steps):
        rate = config.lr * min((step + 1) / max(config.warmup, 1), 1.0)
        optimizer.param_groups[0]["lr"] = rate
        loss = _loss(transformer, encoder, *batch(config, step))
        loss.backward()  # type: ignore[no-untyped-call]
        muon_step(inside, momenta, rate)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        average = ema_tree(average, named, min((1 + step) / (10 + step), 0.997))
        losses.append(loss.detach())
        if (step + 1) % 100 == 0:
            line = f"step {step + 1} samples {(step + 1) * config.batch} loss {torch.stack(losses).mean():.4f}"
            log_line(folder / "pretrain.log", f"{line} seconds {time.monotonic() - began:.0f}")
            losses = []
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            _save(folder, step + 1, config, model, optimizer, momenta, average)


def batch(config: PretrainConfig, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(latents, noise, t, ids, weight)`` of one step, a function of seed and step; no held-out prompt among them."""
    seed = 1_000_003 * config.seed + step
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    kinds = rng.choices(KINDS, KIND_WEIGHTS, k=config.batch)
    scenes = [random_scene(rng, kind, held_out=False) for kind in kinds]
    x0 = encode_images(render(scenes, seed=seed))
    noise = torch.randn(x0.shape, generator=generator)
    t = torch.sigmoid(0.5 + torch.randn(config.batch, generator=generator))  # logit-normal as SD3, nearer to noise
    ink = F.pixel_unshuffle(ink_mask(scenes, seed=seed).float().unsqueeze(1), 2).repeat(1, 3, 1, 1)
    weight = 1 + (config.ink_weight - 1) * ink
    return x0, noise, t, token_ids([prompt_of(scene) for scene in scenes]), weight


def _loss(
    transformer: nn.Module, encoder: nn.Module, x0: Tensor, noise: Tensor, t: Tensor, ids: Tensor, weight: Tensor
) -> Tensor:
    """Weighted mean square error of the velocity."""
    s = t.reshape(-1, 1, 1, 1)
    embeds, pooled = encoder(ids)
    v: Tensor = transformer(
        hidden_states=(1 - s) * x0 + s * noise,
        timestep=1000 * t,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    error: Tensor = v - (noise - x0)
    return (weight * error.square()).mean()


@torch.no_grad()
def muon_step(matrices: Sequence[nn.Parameter], momenta: Sequence[Tensor], lr: float, momentum: float = 0.95) -> None:
    """One step of Muon: along the orthogonal factor of the Nesterov momentum, scaled to the size of an AdamW step.

    ``torch.optim.Muon`` is the same rule, one matrix at a time in bfloat16: on a CPU that took three times as long as
    the forward and backward pass. Here matrices of one shape are done together, in float32.

    Reference: Jordan et al. (2024), Muon; the scale 0.2 sqrt(max(m, n)): Liu et al., arXiv 2502.16982.
    """
    shapes: dict[torch.Size, list[int]] = {}
    for i, p in enumerate(matrices):
        assert p.grad is not None
        momenta[i].lerp_(p.grad, 1 - momentum)
        shapes.setdefault(p.shape, []).append(i)
    for shape, members in shapes.items():
        x = torch.stack(
            [torch.lerp(grad, momenta[i], momentum) for i in members if (grad := matrices[i].grad) is not None]
        )
        x = x if shape[0] <= shape[1] else x.mT
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        x = x if shape[0] <= shape[1] else x.mT
        for i, step in zip(members, x, strict=True):
            matrices[i].mul_(1 - 0.01 * lr).sub_(step, alpha=lr * 0.2 * max(shape) ** 0.5)


def _save(
    folder: Path,
    step: int,
    config: PretrainConfig,
    model: nn.ModuleDict,
    optimizer: torch.optim.Optimizer,
    momenta: list[Tensor],
    average: dict[str, Tensor],
) -> None:
    """The state to go on from, and the averaged weights as a base model in float16."""
    state: dict[str, Any] = {"step": step, "model": model.state_dict(), "average": average, "momenta": momenta}
    state |= {"optimizer": optimizer.state_dict(), "settings": _settings(config)}
    torch.save(state, folder / "state.tmp")
    os.replace(folder / "state.tmp", folder / "state.pt")
    averaged = copy.deepcopy(model)
    averaged.load_state_dict({**model.state_dict(), **average})
    save_base(folder, averaged["transformer"].half(), averaged["encoder"].half())  # type: ignore[arg-type]


def _settings(config: PretrainConfig) -> dict[str, float]:
    """What has to be equal to go on from a saved state."""
    return {name: x for name, x in vars(config).items() if name not in ("steps", "save_every")}


def _load(
    path: Path,
    config: PretrainConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    momenta: list[Tensor],
    average: dict[str, Tensor],
) -> int:
    """Load a saved state in place; the step to go on from.

    Raises:
        ConfigError: it cannot be read, or was made with other settings.
    """
    if not path.exists():
        return 0
    try:
        state = load_tensors(path, path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--folder: {error} Remove it to begin again.") from error
    before, now = state.get("settings", {}), _settings(config)
    other = [f"{name} = {x}" for name, x in before.items() if x != now.get(name)]
    if other:
        raise ConfigError(f"--folder: {path} was made with {', '.join(other)}. Give the same, or another --folder.")
    model.load_state_dict(state["model"])
    average.update(state["average"])
    for momentum, saved in zip(momenta, state["momenta"], strict=True):
        momentum.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
