"""Images of a run on a grid: any prompts, with the averaged weights of its newest checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from reference.config.checks import at_least
from reference.config.flags import Generate
from reference.config.settings import is_world
from reference.errors import ConfigError
from reference.policy.adapters import Adapter, weights_of
from reference.policy.load import load_model
from reference.processes.devices import tf32
from reference.prompts.pool import held_out_prompts
from reference.run.live import save_grid
from reference.run.state import load_run
from reference.step.chance import generator
from reference.step.rollout import Sampling, generate_batches
from reference.text_files import make_folder
from reference.world.scenes import tokens


def generate_grid(asked: Generate) -> Path:
    """Sample images of each prompt, a row each, and write them as one PNG; the file's path.

    Raises:
        ConfigError: the run has no checkpoint, or its model, a flag or a prompt cannot be used; nothing was sampled.
    """
    at_least(1, {"--images": asked.images, "--count": asked.count})
    at_least(0, {"--steps": asked.steps})
    config, state = load_run(asked.run, asked.device)
    out = asked.out or asked.run / "grids" / "generated.png"
    _check_out(out)
    if is_world(config.model.base):
        _check_prompts(asked.prompts)
    texts = list(asked.prompts) or [prompt.text for prompt in held_out_prompts(config)[: asked.count]]
    repeated = [text for text in texts for _ in range(asked.images)]
    base, policy = load_model(config, texts)
    noise = torch.randn(len(repeated), *base.latent_shape, generator=generator(asked.seed, "generate"))
    adapter: Adapter = "base" if asked.untrained else "default"
    how = Sampling(config.rollout.sampler, asked.steps or config.log.eval_steps, config.rollout.batch)
    with weights_of(policy, state["ema"]), tf32(base.device):
        pictures = torch.cat([made for _, made in generate_batches(policy, base, repeated, noise, adapter, how)])
    save_grid(pictures, out, columns=asked.images, scale=max(1, 96 // pictures.shape[-1]))
    return out


def _check_out(out: Path) -> None:
    """Raise unless a picture can be written there."""
    if out.is_dir() or Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise ConfigError(f"--out: expected the file of a picture, such as grid.png, got {out}.")
    make_folder(out.parent, "--out")


def _check_prompts(prompts: Sequence[str]) -> None:
    """Raise for what the small world has no words for."""
    for prompt in prompts:
        try:
            tokens(prompt)
        except ValueError as error:
            raise ConfigError(f"--prompts: {prompt!r} is nothing of the small world: {error}") from error
