"""Stable Diffusion 3 as a base model: a pipeline on the hub or in a folder, its text encoders used once and freed."""

from __future__ import annotations

import functools
import gc
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import Tensor

from reference.config.settings import ModelConfig
from reference.errors import ConfigError
from reference.policy.base import Base
from reference.policy.embeddings import (
    Embeddings,
    Encode,
    add_prompts,
    missing_prompts,
    open_embeddings,
    read_embeddings,
)
from reference.text_files import parse_json

T = TypeVar("T")

_DECODED = 8  # latents decoded at a time
_WANTED = ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json", "vae/config.json")


class Source(NamedTuple):
    """Where a pipeline is.

    Attributes:
        name: its folder or hub id.
        commit: of a hub id.
        fingerprint: what changes when the text encoders do.
        t5: whether it has the third text encoder.
    """

    name: str
    commit: str | None
    fingerprint: str
    t5: bool


def load_sd3(model: ModelConfig, prompts: Sequence[str], device: torch.device) -> Base:
    """Load a Stable Diffusion 3 pipeline for training.

    The embeddings of all prompts are computed first, where the cache does not have them, and the text encoders freed.
    The transformer stays on the CPU, for adapters to be added.

    Args:
        model: names the pipeline, its resolution and precision.
        prompts: all that ``Base.encode`` will be asked for.
        device: of the VAE and the embeddings.

    Raises:
        ConfigError: files are missing or may not be downloaded, and what to do; a resolution that does not fit.
    """
    source = locate(model)
    dtype = torch.bfloat16 if model.precision == "bf16" else torch.float32
    place = {"pretrained_model_name_or_path": source.name, "revision": source.commit}
    transformer = _loaded(
        model,
        "transformer",
        lambda: SD3Transformer2DModel.from_pretrained(**place, subfolder="transformer", torch_dtype=dtype),
    )
    scheduler = _scheduler(model, source)
    vae = _loaded(
        model, "vae", lambda: AutoencoderKL.from_pretrained(**place, subfolder="vae", torch_dtype=torch.float32)
    )
    shape = latent_shape(model.resolution, transformer, vae)
    embeddings = _embeddings(model, source, transformer, scheduler, prompts, device)
    vae = vae.to(device).eval().requires_grad_(False)

    def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return read_embeddings(embeddings, texts, device)

    return Base(transformer.eval(), scheduler, encode, lambda latents: decode(vae, latents), shape, device)


def empty_transformer(model: ModelConfig) -> tuple[SD3Transformer2DModel, tuple[int, int, int]]:
    """The transformer of a pipeline without its weights, to count its layers, and the shape of a latent.

    Raises:
        ConfigError: as of ``load_sd3``, but for what is wrong with the weights.
    """
    source = locate(model)
    _scheduler(model, source)

    def load(kind: Any, part: str) -> Any:
        config = kind.load_config(source.name, revision=source.commit, subfolder=part)
        with torch.device("meta"):
            return kind.from_config(config)

    transformer, vae = (
        _loaded(model, f"the configuration of the {part}", functools.partial(load, kind, part))
        for kind, part in ((SD3Transformer2DModel, "transformer"), (AutoencoderKL, "vae"))
    )
    return transformer, latent_shape(model.resolution, transformer, vae)


def _scheduler(model: ModelConfig, source: Source) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a pipeline.

    Raises:
        ConfigError: its times depend on the resolution.
    """
    load = FlowMatchEulerDiscreteScheduler.from_pretrained
    found = _loaded(model, "scheduler", lambda: load(source.name, revision=source.commit, subfolder="scheduler"))
    if found.config.get("use_dynamic_shifting"):
        raise ConfigError(
            "model.base: expected a scheduler whose times do not depend on the resolution, as in Stable Diffusion 3, "
            f"got use_dynamic_shifting in {model.base}. Set it to false in scheduler/scheduler_config.json, with "
            "the shift that the model was made with."
        )
    return found


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents ``[B, C, H, W]`` to images ``[B, 3, H', W']`` in [0, 1], a few at a time."""
    scale, shift = vae.config["scaling_factor"], vae.config["shift_factor"] or 0.0
    parts = [vae.decode(x / scale + shift, return_dict=False)[0] for x in torch.split(latents.to(vae.device), _DECODED)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def latent_shape(resolution: int, transformer: SD3Transformer2DModel, vae: AutoencoderKL) -> tuple[int, int, int]:
    """``(C, H, W)`` of the latent of a square image.

    Raises:
        ConfigError: the resolution is no multiple of a patch, or too large for the position embeddings.
    """
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    patch = factor * int(transformer.config["patch_size"])
    largest = patch * int(transformer.config["pos_embed_max_size"])
    if resolution % patch or not 0 < resolution <= largest:
        raise ConfigError(
            f"model.resolution: expected a multiple of {patch} up to {largest} for this model, got {resolution}."
        )
    return int(transformer.config["in_channels"]), resolution // factor, resolution // factor


def locate(model: ModelConfig) -> Source:
    """Find a pipeline, and say what to do where it cannot be had.

    Raises:
        ConfigError: no such folder or id, a licence to accept, a token that is missing, or no way to the hub.
    """
    folder = Path(model.base)
    if folder.is_dir():
        missing = [name for name in _WANTED if not (folder / name).is_file()]
        if missing:
            raise ConfigError(
                f"model.base: expected a Stable Diffusion 3 pipeline in {folder}, but {', '.join(missing)} is missing. "
                "Save one there with save_pretrained, or give the id of one on the Hugging Face hub."
            )
        return Source(str(folder), None, _folder_fingerprint(folder), _has_t5(folder / "model_index.json"))
    index = _index_on_hub(model)
    return Source(model.base, index.parent.name, f"{model.base} {index.parent.name}", _has_t5(index))


def _index_on_hub(model: ModelConfig) -> Path:
    """The index of a pipeline on the hub, downloaded; the folder that it is in is named after the commit."""
    try:
        return Path(hf_hub_download(model.base, "model_index.json", revision=model.revision))
    except GatedRepoError as error:
        raise ConfigError(
            f"model.base: {model.base} asks for its licence to be accepted. Accept it on https://huggingface.co/"
            f"{model.base}, make a token there, and give it with `hf auth login` or in the variable HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"model.revision: {model.base} has no revision {model.revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"model.base: expected a folder or an id on the Hugging Face hub, and {model.base} is neither, or is "
            "private: then give a token with `hf auth login` or in the variable HF_TOKEN."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"model.base: {model.base} is no folder, not downloaded yet, and the Hugging Face hub cannot be reached. "
            f"Run `hf download {model.base}` where it can, copy the files here, and give their folder."
        ) from error
    except EntryNotFoundError as error:
        raise ConfigError(f"model.base: {model.base} has no model_index.json, so it is no pipeline.") from error
    except HFValidationError as error:
        raise ConfigError(f"model.base: there is no folder {model.base}, and it is no id on the hub.") from error
    except OSError as error:
        raise ConfigError(f"model.base: cannot download {model.base}: {error}") from error


def _has_t5(index: Path) -> bool:
    """Whether a pipeline's index names a T5 encoder."""
    try:
        found = parse_json(index.read_bytes()).get("text_encoder_3")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"model.base: cannot read {index}: {error}") from error
    return bool(found and found[0])


def _loaded(model: ModelConfig, part: str, load: Callable[[], T]) -> T:
    """A part of a pipeline, or an error that says which could not be loaded."""
    try:
        return load()
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model.base: cannot load {part} of {model.base}: {reason} Complete the files (`hf download {model.base}` "
            "for an id on the hub), or give another model."
        ) from error


def _folder_fingerprint(folder: Path) -> str:
    """What identifies the text encoders of a folder: its path, and the sizes and times of their files."""
    files = sorted(p for part in ("text_encoder*", "tokenizer*") for p in folder.glob(f"{part}/**/*") if p.is_file())
    stats = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return repr((str(folder.resolve()), stats))


def embeddings_folder(model: ModelConfig, source: Source) -> Path:
    """Where the embeddings of a pipeline's text encoders are kept."""
    identity = repr((source.fingerprint, model.precision, model.t5_tokens))
    return model.cache / hashlib.sha256(identity.encode()).hexdigest()[:16]


def _embeddings(
    model: ModelConfig,
    source: Source,
    transformer: SD3Transformer2DModel,
    scheduler: FlowMatchEulerDiscreteScheduler,
    prompts: Sequence[str],
    device: torch.device,
) -> Embeddings:
    """The embeddings of all prompts, from the cache or from the text encoders, which are freed afterwards."""
    embeddings = open_embeddings(embeddings_folder(model, source))
    missing = missing_prompts(embeddings, prompts)
    if not missing:
        return embeddings
    pipeline = _text_pipeline(model, source, transformer, scheduler)
    _tell_truncated(pipeline, missing, model.t5_tokens)
    embeddings = add_prompts(embeddings, missing, _encoder(pipeline, model, device))
    del pipeline
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return embeddings


def _text_pipeline(
    model: ModelConfig,
    source: Source,
    transformer: SD3Transformer2DModel,
    scheduler: FlowMatchEulerDiscreteScheduler,
) -> StableDiffusion3Pipeline:
    """The pipeline with the text encoders that it has, and without its VAE."""
    return _loaded(
        model,
        "the text encoders",
        lambda: StableDiffusion3Pipeline.from_pretrained(
            source.name,
            revision=source.commit,
            transformer=transformer,
            scheduler=scheduler,
            vae=None,
            **({} if source.t5 else {"text_encoder_3": None, "tokenizer_3": None}),
            dtype=transformer.dtype,
        ),
    )


def _tell_truncated(pipeline: StableDiffusion3Pipeline, prompts: Sequence[str], t5_tokens: int) -> None:
    """Say how many prompts are longer than what the text encoders read."""
    clip, t5 = int(pipeline.tokenizer.model_max_length), pipeline.tokenizer_3
    longer = {f"the {clip} tokens that the CLIP encoders read": (pipeline.tokenizer, clip)}
    if t5 is not None:
        longer[f"the model.t5_tokens = {t5_tokens} that the T5 encoder reads"] = (t5, t5_tokens)
    for limit, (tokenizer, length) in longer.items():
        count = sum(len(ids) > length for ids in tokenizer(list(prompts)).input_ids)
        if count:
            print(f"{count} of {len(prompts)} prompts are cut off after {limit}", file=sys.stderr)


def _encoder(pipeline: StableDiffusion3Pipeline, model: ModelConfig, device: torch.device) -> Encode:
    """The pipeline's own way from prompts to embeddings; the text encoders go with it."""
    dtype = pipeline.transformer.dtype
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
        if encoder is not None:
            encoder.to(device, dtype)

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            list(texts),
            None,
            None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=model.t5_tokens,
        )
        return embeds, pooled

    return encode
