"""Rewards of the small world, computed from pixels."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from PIL import Image
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from reference.interfaces import Reward, Scores
from reference.world.model import WEIGHTS, token_ids
from reference.world.readers import Detection, detect, read_text
from reference.world.scenes import Objects, Scene, parse
from reference.world.similarity import DualEncoder, load_dual_encoder

_WRONG_RELATION = 0.6  # what is left of a score whose objects are right but stand wrong
_SURE = 0.8  # confidence that the strict variant asks for
_LUMA = (0.299, 0.587, 0.114)  # red, green, blue
_COLOURFUL = 109 / 255  # "extremely colourful" in Hasler and Suesstrunk's Table 2, on pixels in [0, 1]


def objects(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any] = ()) -> Scores:
    """Are the objects asked for there, and no others? Graded in [0, 1]; 1 for a perfect scene.

    In the spirit of GenEval: every object asked for takes the detection that suits it best, worth 0.4 for the shape,
    0.4 for the colour and 0.2 for the size (given where none is asked for), times the detection's confidence. The mean
    over the objects is multiplied by ``asked / found`` if there are too many, and by 0.6 if the relation is wrong.
    Inapplicable to prompts without objects.
    """
    scenes = [parse(prompt) for prompt in prompts]
    values = [grade(scene, found) for scene, found in zip(scenes, detect(images), strict=True)]
    return Scores(torch.tensor(values), torch.tensor([bool(scene.objects) for scene in scenes]))


def objects_strict(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any] = ()) -> Scores:
    """1 if everything that was asked for is right, else 0: GenEval's all or nothing."""
    scenes = [parse(prompt) for prompt in prompts]
    values = [float(is_right(scene, found)) for scene, found in zip(scenes, detect(images), strict=True)]
    return Scores(torch.tensor(values), torch.tensor([bool(scene.objects) for scene in scenes]))


def grade(scene: Scene, found: Sequence[Detection]) -> float:
    """The graded score of one scene's detections."""
    asked = [o for o in scene.objects for _ in range(o.count)]
    taken = _assign(asked, found)
    if not asked:
        return 0.0
    mean = sum(_quality(o, d) for o, d in zip(asked, taken, strict=True)) / len(asked)
    relation = 1.0 if _relation_holds(scene, taken) else _WRONG_RELATION
    return mean * relation * min(1.0, len(asked) / max(len(found), 1))


def is_right(scene: Scene, found: Sequence[Detection]) -> bool:
    """Whether the detections are what the scene asks for, no more and no less."""
    asked = [o for o in scene.objects for _ in range(o.count)]
    taken = _assign(asked, found)
    right = all(d is not None and _quality(o, d) >= max(d.confidence, _SURE) for o, d in zip(asked, taken, strict=True))
    return bool(asked) and right and len(found) == len(asked) and _relation_holds(scene, taken)


def _quality(o: Objects, d: Detection | None) -> float:
    """How well a detection is the object asked for, in [0, 1]."""
    if d is None:
        return 0.0
    right = 0.4 * (d.shape == o.shape) + 0.4 * (d.colour == o.colour) + 0.2 * (o.size in (None, d.size))
    return d.confidence * (1.0 if right > 0.99 else right)


def _assign(asked: Sequence[Objects], found: Sequence[Detection]) -> list[Detection | None]:
    """A detection for every object asked for, the best pairs first, each used once."""
    pairs = sorted(((_quality(o, d), -i, -j) for i, o in enumerate(asked) for j, d in enumerate(found)), reverse=True)
    taken: dict[int, int] = {}
    for quality, i, j in pairs:
        if quality > 0 and -i not in taken and -j not in taken.values():
            taken[-i] = -j
    return [found[taken[i]] if i in taken else None for i in range(len(asked))]


def _relation_holds(scene: Scene, taken: Sequence[Detection | None]) -> bool:
    """Whether the first object stands where it should: the direction asked for is the larger part of the offset."""
    if scene.relation is None:
        return True
    first, second = taken
    if first is None or second is None:
        return False
    dx, dy = second.x - first.x, second.y - first.y
    ahead = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[scene.relation]
    return ahead > math.hypot(dx, dy) / 2**0.5


def text(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any] = ()) -> Scores:
    """``1 - edit distance / length`` between the text read and the text quoted, at least 0; 1 for the exact text.

    Inapplicable to prompts that quote nothing.
    """
    targets = [parse(prompt).text or "" for prompt in prompts]
    pairs = zip(read_text(images), targets, strict=True)
    values = [max(0.0, 1.0 - Levenshtein.distance(read, t) / len(t)) if t else 0.0 for read, t in pairs]
    return Scores(torch.tensor(values), torch.tensor([bool(t) for t in targets]))


@cache
def dual_encoder() -> DualEncoder:
    """The shipped dual encoder, loaded once."""
    return load_dual_encoder(WEIGHTS / "similarity.safetensors")


@torch.no_grad()
def similarity(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any] = ()) -> Tensor:
    """Cosine between image and prompt in the shipped dual encoder, as CLIPScore."""
    encoder = dual_encoder()
    return (encoder.image(images.detach().float().cpu()) * encoder.text(token_ids(prompts))).sum(-1)


def colourfulness(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any] = ()) -> Tensor:
    """Hasler and Suesstrunk's colourfulness over its value for "extremely colourful", at most 1.

    ``sqrt(var(rg) + var(yb)) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2)``, ``rg = R - G``, ``yb = (R + G) / 2 - B``. The
    bound is there because the measure grows without end as an image turns into gaudy noise.
    """
    red, green, blue = images.detach().float().unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue], dim=1).flatten(2)
    spread = opponents.var(-1, correction=0).sum(1).sqrt()
    strength: Tensor = spread + 0.3 * opponents.mean(-1).norm(dim=1)
    return (strength / _COLOURFUL).clamp(max=1.0)


def jpeg(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any] = ()) -> Tensor:
    """Compressibility as in DDPO: minus the size of the image as a JPEG of quality 95, in kilobytes."""
    arrays = (images.detach().permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()

    def size(array: Any) -> float:
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, format="JPEG", quality=95)
        return buffer.tell() / 1000

    return torch.tensor([-size(array) for array in arrays])


def _luma(images: Tensor) -> Tensor:
    """Brightness of each pixel ``[N, H, W]`` (Rec. 601)."""
    return (images.detach().float() * torch.tensor(_LUMA, device=images.device).reshape(3, 1, 1)).sum(1)


def sharpness(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any] = ()) -> Tensor:
    """Mean length of the luma's gradient, by differences of neighbouring pixels: 0 for a flat image, at most 1.42.

    Edges raise it, and so does noise: it pulls against ``jpeg``, which both of them make larger.
    """
    y = _luma(images)
    across, down = y[:, :-1, 1:] - y[:, :-1, :-1], y[:, 1:, :-1] - y[:, :-1, :-1]
    return torch.hypot(across, down).flatten(1).mean(1)


def contrast(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any] = ()) -> Tensor:
    """Standard deviation of the luma over the pixels (RMS contrast, Peli 1990): 0 for a flat image, at most 1/2."""
    return _luma(images).flatten(1).std(1, correction=0)


REWARDS: dict[str, Reward] = {
    "objects": objects,
    "objects_strict": objects_strict,
    "text": text,
    "similarity": similarity,
    "colour": colourfulness,
    "jpeg": jpeg,
    "sharpness": sharpness,
    "contrast": contrast,
}
