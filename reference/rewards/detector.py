"""Objects in real images: Mask2Former with a Swin-S backbone, trained on the instances of COCO's 80 classes.

Prepared and read out as mmdet does it for GenEval: inputs of shortest edge 800, the best 100 pairs of query and class,
masks enlarged to the image before they are cut, and each class probability times the mean probability in its mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentation

from reference.errors import ConfigError
from reference.prompts.geneval import CLASSES
from reference.rewards.clip import load_pretrained, quantize

MODEL = "facebook/mask2former-swin-small-coco-instance"
BATCH = 8  # images a forward pass
_SHORTEST, _LONGEST, _DIVISOR = 800, 1333, 32
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_PER_IMAGE = 100


class Detection(NamedTuple):
    """D objects of an image, the surest first.

    ``boxes [D, 4]``: left, top, right, bottom in pixels, right and bottom outside the object. ``scores [D]`` in [0, 1].
    ``labels [D]``: places in ``prompts.geneval.CLASSES``. ``masks [D, H, W]``, bool.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor


# (images [N, 3, H, W] in [0, 1]) -> N detections
Detector = Callable[[Tensor], list[Detection]]


def load_detector(reward: str, device: torch.device, source: str, *, threshold: float) -> Detector:
    """A detector on a device, which leaves out what is not above the threshold.

    Args:
        reward: the name that messages give.
        source: a hub id, or a folder that ``save_pretrained`` wrote.

    Raises:
        ConfigError: the model is not there, cannot be downloaded, lacks weights, or has other classes.
    """
    model = load_pretrained(reward, source, _load).to(device)

    def detect(images: Tensor) -> list[Detection]:
        found = []
        for part in torch.split(images, BATCH):
            pixels, inner = prepare(part.to(device))
            outputs = model(pixel_values=pixels)
            outer, size = ((int(x.shape[-2]), int(x.shape[-1])) for x in (pixels, images))
            for classes, masks in zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True):
                found.append(instances(classes, masks, outer, inner, size, threshold=threshold))
        return found

    return detect


def _load(source: str) -> Any:
    """The model, in float32 on the CPU; weights that the file lacks would be left random."""
    model, report = Mask2FormerForUniversalSegmentation.from_pretrained(
        source, dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(set(report["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if missing:
        raise ConfigError(f"{source}: expected Mask2Former's weights; {len(missing)} are missing, {missing[0]} first.")
    if model.config.num_labels != len(CLASSES):
        raise ConfigError(f"{source}: expected a detector of COCO's 80 classes, got one of {model.config.num_labels}.")
    return model.eval().requires_grad_(False)


def prepare(images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Images as the detector's processor makes them: 8 bits, resized bilinearly, normalized, padded with zeros.

    Args:
        images: ``[N, 3, H, W]`` in [0, 1].

    Returns:
        The model's input ``[N, 3, H', W']``, both sides multiples of 32, and height and width of the image in it.
    """
    H, W = images.shape[-2:]
    short = min(_SHORTEST, _LONGEST * min(H, W) / max(H, W))
    height, width = (round(short) if x == min(H, W) else int(short * x / min(H, W)) for x in (H, W))
    pixels = quantize(images)
    for shape in ((H, width), (height, width)):  # Pillow rounds after each axis, the horizontal one first
        pixels = quantize(F.interpolate(pixels, shape, mode="bilinear", antialias=True, align_corners=False))
    mean, std = (pixels.new_tensor(x).view(3, 1, 1) for x in (_MEAN, _STD))
    return F.pad((pixels - mean) / std, (0, -width % _DIVISOR, 0, -height % _DIVISOR)), (height, width)


def instances(
    classes: Tensor,
    masks: Tensor,
    outer: tuple[int, int],
    inner: tuple[int, int],
    size: tuple[int, int],
    *,
    threshold: float,
) -> Detection:
    """Objects of one image from the outputs of Q queries.

    Args:
        classes: ``[Q, C + 1]``, logits of the classes and, last, of no object.
        masks: ``[Q, h, w]``, logits of the masks, of the padded input.
        outer: height and width of the padded input.
        inner: height and width of the image in it.
        size: height and width of the image as it was.
        threshold: scores that are not above it are left out.

    Returns:
        The objects; a score is the class's probability times the mean probability in the mask.
    """
    probabilities = classes.softmax(-1)[:, :-1]
    C = probabilities.shape[1]
    best, pairs = probabilities.flatten().topk(min(_PER_IMAGE, probabilities.numel()))
    pairs, best = pairs[best > threshold], best[best > threshold]  # a mask only lowers the score
    logits = masks[pairs.div(C, rounding_mode="floor")][None]
    if len(pairs):
        logits = F.interpolate(logits, outer, mode="bilinear", align_corners=False)[..., : inner[0], : inner[1]]
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    else:
        logits = logits.new_zeros(1, 0, *size)
    cut = logits[0] > 0
    inside = (logits[0].sigmoid() * cut).sum((1, 2)) / (cut.sum((1, 2)) + 1e-6)
    scores, order = (best * inside).sort(descending=True, stable=True)
    order = order[scores > threshold]
    return Detection(_boxes(cut[order]), scores[scores > threshold], pairs[order] % C, cut[order])


def _boxes(masks: Tensor) -> Tensor:
    """The boxes ``[D, 4]`` around masks ``[D, H, W]`` that are not empty."""
    sides = []
    for axis in (1, 2):  # the mask's columns, then its rows
        there = masks.any(axis).int()
        sides += [there.argmax(1), there.shape[1] - there.flip(1).argmax(1)]
    left, right, top, bottom = sides
    return torch.stack((left, top, right, bottom), 1).float()
