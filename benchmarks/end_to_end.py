"""The trainer from end to end on Stable Diffusion 3.5 Medium's architecture, with random weights and embeddings.

    python -m benchmarks.end_to_end --small       # on a CPU: a minute
    python -m benchmarks.end_to_end --full-size   # one GPU of 80 GB: preset sd35m-single-gpu, a part of its prompts

Nothing is downloaded: a pipeline with random weights is saved to ``--folder``, and random embeddings are put where
those of the text encoders are kept, so that none is loaded. Two epochs of the preset, an evaluation before and after,
the same run resumed for a third epoch, and its LoRA. What is told: seconds an epoch, and the peak of the device's
memory beside what ``--dry-run`` says of it. Rewards are read off the pixels. The results are printed as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.trainer import where_of
from benchmarks.trainer_models import FULL, SMALL, Setup, build_transformer
from reference.config.presets import preset
from reference.config.settings import Config, ScoringConfig
from reference.policy.embeddings import add_prompts, open_embeddings
from reference.prompts.made import make_lines
from reference.run.plan import plan
from reference.train import train

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations at import
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    from reference.policy.sd3 import embeddings_folder, locate

# vae/config.json of stabilityai/stable-diffusion-3.5-medium; the small one halves the image once
_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16, "scaling_factor": 1.5305,
    "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
_SMALL_VAE = _VAE | {"block_out_channels": (32, 32), "layers_per_block": 1}


def brightness(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
    """A reward: the mean of all pixels."""
    return images.mean((1, 2, 3))


def contrast(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
    """A reward: the standard deviation of all pixels."""
    return images.flatten(1).std(1)


def redness(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
    """A reward: red beside the other two channels."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def save_pipeline(setup: Setup, vae: dict[str, Any], folder: Path, device: torch.device) -> None:
    """Save a pipeline without text encoders; its index names none."""
    torch.manual_seed(0)
    build_transformer(setup, device).cpu().save_pretrained(folder / "transformer")
    blocks = len(vae["block_out_channels"])
    down, up = ("DownEncoderBlock2D",) * blocks, ("UpDecoderBlock2D",) * blocks
    AutoencoderKL(down_block_types=down, up_block_types=up, **vae).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index = {"_class_name": "StableDiffusion3Pipeline", "text_encoder_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def settings(setup: Setup, folder: Path, *, small: bool) -> Config:
    """The preset for one card, with prompts and rewards that need no download, and few of them."""
    base = preset("sd35m-single-gpu")
    for name, held_out in (("train.txt", False), ("test.txt", True)):
        lines = make_lines("general", 0, 32, held_out=held_out)
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    factor = 2 ** (len((_SMALL_VAE if small else _VAE)["block_out_channels"]) - 1)
    model = dataclasses.replace(
        base.model,
        base=str(folder / "pipeline"),
        cache=folder / "cache",
        resolution=setup.latent * factor,
        t5_tokens=setup.tokens - 77 if setup.tokens > 77 else setup.tokens,
        precision="bf16" if setup.dtype == torch.bfloat16 else "float32",
        lora_rank=setup.rank,
    )
    few = (2, 4) if small else (base.rollout.prompts_per_epoch, base.rollout.images_per_prompt)
    rollout = dataclasses.replace(
        base.rollout,
        prompts=(f"text:{folder / 'train.txt'}",),
        held_out=(f"text:{folder / 'test.txt'}",),
        prompts_per_epoch=few[0],
        images_per_prompt=few[1],
        batch=4 if small else base.rollout.batch,
    )
    log = dataclasses.replace(
        base.log, eval_every=0, eval_prompts=8, eval_steps=10, save_every=1, watch=(), trackers=()
    )
    rewards = tuple(f"benchmarks.end_to_end:{name}" for name in ("brightness", "contrast", "redness"))
    return dataclasses.replace(
        base,
        run=folder / "run",
        rewards=rewards,
        epochs=2,
        balance="marble",
        model=model,
        rollout=rollout,
        scoring=ScoringConfig(),
        log=log,
    )


def fill_cache(config: Config, setup: Setup, folder: Path) -> None:
    """Random embeddings of all prompts, where the trainer looks for those of the text encoders."""
    generator, dtype = torch.Generator().manual_seed(0), setup.dtype
    shapes = (setup.tokens, setup.transformer["joint_attention_dim"]), (setup.transformer["pooled_projection_dim"],)

    def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        embeds, pooled = (torch.randn(len(texts), *shape, generator=generator).to(dtype) for shape in shapes)
        return embeds, pooled

    texts = [line for name in ("train.txt", "test.txt") for line in (folder / name).read_text().splitlines()]
    add_prompts(open_embeddings(embeddings_folder(config.model, locate(config.model))), texts, encode)


def end_to_end(setup: Setup, folder: Path, device: str, *, small: bool) -> dict[str, Any]:
    """Make the pipeline, train two epochs, resume for a third, and tell what it took."""
    folder.mkdir(parents=True, exist_ok=True)
    gpu = device.startswith("cuda")
    if not (folder / "pipeline" / "model_index.json").is_file():
        save_pipeline(setup, _SMALL_VAE if small else _VAE, folder / "pipeline", torch.device(device))
    config = dataclasses.replace(settings(setup, folder, small=small), device=device)
    fill_cache(config, setup, folder)
    found: dict[str, Any] = {"where": where_of(torch.device(device)), "plan": plan(config).text.split("# plan")[-1]}
    for name, epochs, resume in (("two epochs", 2, False), ("resumed for a third", 3, True)):
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        train(dataclasses.replace(config, epochs=epochs), resume=resume)
        found[name] = {"seconds": time.perf_counter() - began}
        if gpu:
            found[name]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    lines = (config.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    found["epochs"] = [record["seconds"] for record in records if record["kind"] == "epoch"]
    found["steps"] = [record["step"] for record in records if record["kind"] == "step"]
    found["lora_bytes"] = (config.run / "pytorch_lora_weights.safetensors").stat().st_size
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--small", action="store_true", help="a small transformer")
    size.add_argument("--full-size", action="store_true", help="SD3.5 Medium's architecture")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, default=Path("runs/end-to-end"), help="where everything is put")
    parser.add_argument("--out", type=Path, help="also write the results there, as JSON")
    options = parser.parse_args(arguments)
    found = end_to_end(SMALL if options.small else FULL, options.folder, options.device, small=options.small)
    text = json.dumps(found, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
