"""What the rewards on CLIP and BLIP share: images as their processors make them, embeddings, and loading."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from reference.errors import ConfigError
from reference.tensor_files import load_tensors
from reference.text_files import names_missing_folder

BATCH = 32  # images or texts a forward pass
CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)

# (images [N, 3, H, W] in [0, 1], size) -> what the model sees, [N, 3, size, size]
Prepare = Callable[[Tensor, int], Tensor]


class Clip(NamedTuple):
    """A CLIP model in float32, its tokenizer, and where it is."""

    model: Any
    tokenizer: Any
    device: torch.device


# --- images


def quantize(images: Tensor) -> Tensor:
    """Float32 images in [0, 1], rounded to multiples of 1/255: as a file of 8 bits a channel has them."""
    return images.float().clamp(0, 1).mul(255).round().div(255)


def normalize(images: Tensor) -> Tensor:
    """Images of [0, 1] with CLIP's mean and standard deviation of each channel taken out."""
    mean, std = (images.new_tensor(x).view(3, 1, 1) for x in (_MEAN, _STD))
    return (images - mean) / std


def resize_and_crop(images: Tensor, size: int, mode: str, eight_bits: bool) -> Tensor:
    """The shorter edge resized to ``size`` with antialiasing, then the central square.

    Args:
        images: ``[N, 3, H, W]``.
        mode: bicubic, which overshoots [0, 1] by some hundredths, or bilinear.
        eight_bits: round to 8 bits after each axis, first the horizontal one, as Pillow does.
    """
    short = min(images.shape[-2:])
    height, width = (int(size * x / short) for x in images.shape[-2:])
    for shape in ((images.shape[-2], width), (height, width)):
        images = F.interpolate(images, shape, mode=mode, antialias=True, align_corners=False)
        images = quantize(images) if eight_bits else images
    top, left = (height - size) // 2, (width - size) // 2
    return images[..., top : top + size, left : left + size]


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """Images as ``CLIPImageProcessor`` prepares them: bicubic, central square, 8 bits, normalized.

    On the images' device. The processor resizes with Pillow; pixels are equal but for a few that round differently.
    """
    return normalize(resize_and_crop(quantize(images), size, "bicubic", eight_bits=True))


# --- embeddings


@contextlib.contextmanager
def scoring(device: torch.device) -> Iterator[None]:
    """No gradients, and float32 whatever autocast the caller has switched on."""
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        yield


def embed_images(clip: Clip, images: Tensor, prepare: Prepare = clip_pixels) -> Tensor:
    """Embeddings of N images, ``[N, D]`` of unit length."""
    size = clip.model.config.vision_config.image_size
    parts = (prepare(part.to(clip.device), size) for part in torch.split(images, BATCH))
    return F.normalize(torch.cat([clip.model.get_image_features(part).pooler_output for part in parts]), dim=-1)


def embed_texts(clip: Clip, texts: Sequence[str]) -> Tensor:
    """Embeddings of N texts, ``[N, D]`` of unit length; a text that comes again is embedded once."""
    distinct = list(dict.fromkeys(texts))
    parts = [_text_features(clip, distinct[i : i + BATCH]) for i in range(0, len(distinct), BATCH)]
    place = {text: i for i, text in enumerate(distinct)}
    rows = torch.tensor([place[text] for text in texts], device=clip.device)
    return F.normalize(torch.cat(parts), dim=-1)[rows]


def _text_features(clip: Clip, texts: Sequence[str]) -> Tensor:
    """Embeddings of a batch of texts, cut off at the model's length."""
    length = clip.model.config.text_config.max_position_embeddings
    tokens = clip.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    return clip.model.get_text_features(**tokens.to(clip.device)).pooler_output  # type: ignore[no-any-return]


def cosines(clip: Clip, images: Tensor, texts: Sequence[str], prepare: Prepare = clip_pixels) -> Tensor:
    """Cosine of each image with its own text, ``[N]``."""
    with scoring(clip.device):
        return (embed_images(clip, images, prepare) * embed_texts(clip, texts)).sum(-1)


def linear_head(width: int) -> nn.Sequential:
    """The head of LAION's aesthetic predictor and of ImageReward: five linear layers without activations.

    The places between them, where training has dropout, keep the names of the published weights.
    """
    i = nn.Identity
    sizes = (nn.Linear(width, 1024), i(), nn.Linear(1024, 128), i(), nn.Linear(128, 64), i())
    return nn.Sequential(*sizes, nn.Linear(64, 16), nn.Linear(16, 1))


# --- loading


def load_clip(reward: str, device: torch.device, source: str, tokenizer: str | None = None) -> Clip:
    """A CLIP model and its tokenizer, from a hub id or a folder that ``save_pretrained`` wrote.

    Args:
        reward: the name that messages give.
        tokenizer: where the tokenizer is, if it is not with the model.

    Raises:
        ConfigError: it is not there, cannot be downloaded, or is no CLIP model.
    """
    model = load_pretrained(reward, source, _from_pretrained(CLIPModel, {})).to(device)
    return Clip(model, load_tokenizer(reward, tokenizer or source, CLIPTokenizer), device)


def load_tokenizer(reward: str, source: str, kind: Any) -> Any:
    """A tokenizer of this class, from a hub id or a folder.

    Raises:
        ConfigError: it is not there, or cannot be downloaded.
    """
    tokenizer = load_pretrained(reward, source, kind.from_pretrained)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of missing files
        raise ConfigError(_advice(reward, source, f"the vocabulary of a {kind.__name__} is not there"))
    return tokenizer


def load_pretrained(reward: str, source: str, load: Callable[[str], Any]) -> Any:
    """``load(source)``, with an error that says what to do.

    Raises:
        ConfigError: nothing usable is there.
    """
    _check_source(reward, source)
    try:
        return load(str(Path(source).expanduser()) if _is_local(source) else source)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(_advice(reward, source, f"it cannot be loaded: {error}")) from error


def load_weights(
    reward: str, source: str, kind: Any, config: Any, weights: Mapping[str, Tensor], options: Mapping[str, Any]
) -> Any:
    """A transformers model of converted weights, in float32 on the CPU.

    Args:
        kind: the model's class.
        options: other arguments of the class.

    Raises:
        ConfigError: weights are missing, or of another shape. Those without a place in the model are left out.
    """
    build = _from_pretrained(kind, {"config": config, "state_dict": dict(weights), **options})
    return build(None, f"{reward}: {source}")


def _from_pretrained(kind: Any, options: Mapping[str, Any]) -> Callable[..., Any]:
    """``kind.from_pretrained`` that takes no weights for granted: what a file lacks would be left random."""

    def load(source: str | None, where: str | None = None) -> Any:
        model, report = kind.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        wrong = sorted({*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])})
        if wrong:
            raise ConfigError(
                f"{where or source}: expected the weights of a {kind.__name__}; {len(wrong)} are missing or of another "
                f"shape, {wrong[0]} the first."
            )
        return model.eval().requires_grad_(False)

    return load


def load_head(reward: str, source: str, weights: Mapping[str, Tensor], width: int, prefix: str) -> nn.Sequential:
    """A ``linear_head`` with the weights that have this prefix, in float32 on the CPU.

    Raises:
        ConfigError: weights are missing, or of another shape.
    """
    head = linear_head(width).requires_grad_(False)
    own = {name.removeprefix(prefix): x.float() for name, x in weights.items() if name.startswith(prefix)}
    try:
        head.load_state_dict(own)
    except RuntimeError as error:
        raise ConfigError(f"{reward}: {source}: expected the head of embeddings of width {width}: {error}") from error
    return head


def load_checkpoint(reward: str, source: str, name: str) -> dict[str, Tensor]:
    """The state dict in file ``name`` of a folder or a hub repository; only tensors are read, never code.

    Raises:
        ConfigError: it is not there, or is not a file of tensors.
    """
    _check_source(reward, source)
    if _is_local(source):
        path = Path(source).expanduser() / name
        if not path.is_file():
            raise ConfigError(_advice(reward, source, f"there is no {name} in this folder"))
    else:
        try:
            path = Path(hf_hub_download(source, name))
        except (OSError, ValueError) as error:
            raise ConfigError(_advice(reward, source, f"{name} cannot be downloaded: {error}")) from error
    try:
        found = load_tensors(path, path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{reward}: {error}") from error
    return found.get("state_dict", found)  # type: ignore[no-any-return]


def _check_source(reward: str, source: str) -> None:
    """A path has to be there; a hub id is looked up later.

    Raises:
        ConfigError: the source is a path, and there is nothing.
    """
    if names_missing_folder(source):
        raise ConfigError(_advice(reward, source, "there is no such folder"))


def _is_local(source: str) -> bool:
    """A folder here, and not the id of a repository on the hub."""
    return Path(source).expanduser().is_dir()


def _advice(reward: str, source: str, problem: str) -> str:
    """What is wrong with a source, and how to get a right one."""
    return (
        f"reward {reward!r}: {source!r}: {problem.rstrip('.')}. Without a network, download it elsewhere "
        f"(`hf download REPOSITORY --local-dir FOLDER`) and give --scoring.models {reward}=FOLDER; docs/rewards.md "
        "says which repository and which files. A gated repository needs its licence accepted and `hf auth login`."
    )
