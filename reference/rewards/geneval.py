"""GenEval: are the objects that were asked for in the image, as many, of that colour and in that place?

Two scores by the same rules on the same detections. Strict, 0 or 1: GenEval's evaluation. Graded, in [0, 1]: for
training; it is 1 exactly where strict is 1. The detector has GenEval's architecture and classes, but comes from another
training run than the checkpoint that GenEval names.
Ghosh et al., "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment", 2023.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reference.interfaces import Reward, Scores
from reference.prompts.geneval import CLASSES, COLOURS, MAX_COUNT
from reference.rewards.clip import CLIP_L, Clip, clip_pixels, embed_images, embed_texts, load_clip, quantize, scoring
from reference.rewards.detector import MODEL, Detection, Detector, load_detector

Box = Sequence[float]  # left, top, right, bottom
# (row, objects found of each class, boxes of all, colours of those whose colour matters) -> score
Rule = Callable[[Mapping[str, Any], Mapping[str, Sequence[int]], Sequence[Box], Mapping[int, str]], float]

_THRESHOLD, _COUNTING_THRESHOLD = 0.3, 0.9  # scores that count as found
_OVERLAP = 0.1  # share of both objects' sizes by which their distance is shortened
_DIRECTION = 0.5  # a relation holds if its component of the direction is above
_GREY = 0x99 / 255
_TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")


def load(device: torch.device, source: str | None = None) -> Reward:
    """The graded score, where ``metadata["geneval"]`` is a row of a GenEval file; inapplicable elsewhere.

    The mean over the clauses of ``include``. A clause is the mean of its checks: the share of ``count`` that was found;
    of these the share that has the colour; the share of pairs with the other clause's objects that stand as asked, 0 if
    either lacks objects. For each clause of ``exclude`` this is multiplied by ``1 - excess / (count - 1)``, not below
    0: three asked for and five there gives 1/3, as three asked for and one there does.

    Args:
        source: a detector, or ``detector,clip``: hub ids or folders; Mask2Former Swin-S and CLIP ViT-L/14 by default.

    Raises:
        ConfigError: a model is not there, or cannot be downloaded.
    """
    return _load(device, source, graded)


def load_strict(device: torch.device, source: str | None = None) -> Reward:
    """The strict score, 1 if all is right and else 0: GenEval's own evaluation. The rest is as for ``load``."""
    return _load(device, source, strict)


def _load(device: torch.device, source: str | None, rule: Rule) -> Reward:
    """The models, and the reward with one of the rules."""
    detector, _, clip = (source or "").partition(",")
    detect = load_detector("geneval", device, detector or MODEL, threshold=_THRESHOLD)
    return reward_of(detect, classifier(load_clip("geneval", device, clip or CLIP_L)), device, rule)


def reward_of(
    detect: Detector, classify: Callable[[Sequence[Tensor], Sequence[str]], list[str]], device: torch.device, rule: Rule
) -> Reward:
    """The reward with these models; ``classify`` gives the colours of crops ``[3, h, w]`` that show these classes."""

    def geneval(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any] | None]) -> Scores:
        rows = {i: entry["geneval"] for i, entry in enumerate(metadata) if entry and "geneval" in entry}
        values = torch.zeros(len(metadata), dtype=torch.float64)
        applicable = torch.zeros(len(metadata), dtype=torch.bool)
        if not rows:
            return Scores(values, applicable)
        with scoring(device):
            detections = dict(zip(rows, detect(images[list(rows)]), strict=True))
            found = {i: objects(detections[i], row) for i, row in rows.items()}
            wanted = [(i, j, name) for i, row in rows.items() for j, name in coloured(row, found[i])]
            crops = [crop(images[i].to(device), detections[i], j) for i, j, _ in wanted]
            named = classify(crops, [name for _, _, name in wanted]) if wanted else []
        for i, row in rows.items():
            colours = {j: colour for (k, j, _), colour in zip(wanted, named, strict=True) if k == i}
            values[i] = rule(row, found[i], detections[i].boxes.tolist(), colours)
        applicable[list(rows)] = True
        return Scores(values, applicable)

    return geneval


# --- rules


def objects(detection: Detection, row: Mapping[str, Any]) -> dict[str, list[int]]:
    """The objects that count, as places in the detection: of each class the surest 16 above the row's threshold."""
    threshold = _COUNTING_THRESHOLD if row["tag"] == "counting" else _THRESHOLD
    scores, labels = detection.scores.tolist(), detection.labels.tolist()
    found: dict[str, list[int]] = {}
    for j in sorted(range(len(scores)), key=lambda j: -scores[j]):
        own = found.setdefault(CLASSES[labels[j]], [])
        if scores[j] > threshold and len(own) < MAX_COUNT:
            own.append(j)
    return found


def coloured(row: Mapping[str, Any], found: Mapping[str, Sequence[int]]) -> list[tuple[int, str]]:
    """The objects, and their classes, whose colour matters: of each clause with a colour the surest ``count``."""
    wanted = ((j, c["class"]) for c in row["include"] if "color" in c for j in found.get(c["class"], ())[: c["count"]])
    return list(dict.fromkeys(wanted))


def strict(
    row: Mapping[str, Any], found: Mapping[str, Sequence[int]], boxes: Sequence[Box], colours: Mapping[int, str]
) -> float:
    """1 if everything is right, else 0: every clause of ``include`` in full, and none of ``exclude``.

    Of each clause the surest ``count`` objects are looked at; more do no harm unless excluded.
    """
    return float(graded(row, found, boxes, colours) == 1)


def graded(
    row: Mapping[str, Any], found: Mapping[str, Sequence[int]], boxes: Sequence[Box], colours: Mapping[int, str]
) -> float:
    """How much is right, in [0, 1]; see ``load``.

    Example:
        >>> row = {"include": [{"class": "cat", "count": 3}], "exclude": [{"class": "cat", "count": 4}]}
        >>> [graded(row, {"cat": range(n)}, [], {}) for n in (0, 3, 6)]
        [0.0, 1.0, 0.0]
    """
    clauses = row["include"]
    own = [found.get(c["class"], ())[: c["count"]] for c in clauses]
    scores = []
    for clause, seen in zip(clauses, own, strict=True):
        checks = [len(seen) / clause["count"]]
        if "color" in clause:
            checks.append(sum(colours[j] == clause["color"] for j in seen) / clause["count"])
        if "position" in clause:
            relation, other = clause["position"]
            whole = len(seen) == clause["count"] and len(own[other]) == clauses[other]["count"]
            pairs = [relation in relations(boxes[a], boxes[b]) for a in seen for b in own[other]]
            checks.append(sum(pairs) / len(pairs) if whole else 0.0)
        scores.append(sum(checks) / len(checks))
    score: float = sum(scores) / len(scores)
    for clause in row.get("exclude", ()):
        allowed = clause["count"] - 1
        excess = max(len(found.get(clause["class"], ())) - allowed, 0)
        score *= max(1 - excess / max(allowed, 1), 0.0)
    return score


def relations(a: Box, b: Box) -> set[str]:
    """Where ``a`` stands as seen from ``b``: none where they overlap too much, two on a diagonal.

    The offset of the centres is shortened in each direction by a tenth of both sizes, and divided by its full length.

    Example:
        >>> relations((0, 0, 10, 10), (20, 0, 30, 10)), relations((0, 0, 10, 10), (1, 0, 11, 10))
        ({'left of'}, set())
    """
    offset, rest = [], []
    for axis in (0, 1):
        offset.append((a[axis] + a[axis + 2] - b[axis] - b[axis + 2]) / 2)
        sizes = a[axis + 2] - a[axis] + b[axis + 2] - b[axis]
        rest.append(math.copysign(max(abs(offset[axis]) - _OVERLAP * sizes, 0.0), offset[axis]))
    if max(map(abs, rest)) < 1e-3:
        return set()
    dx, dy = (x / math.hypot(*offset) for x in rest)
    holds = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}
    return {relation for relation, component in holds.items() if component > _DIRECTION}


# --- colours


def crop(image: Tensor, detection: Detection, index: int) -> Tensor:
    """The box of an object ``[3, h, w]``, grey outside its mask.

    Of a box more than four times as long as wide the middle: the classifier sees no more than the central square.
    """
    left, top, right, bottom = (int(x) for x in detection.boxes[index])
    mask = detection.masks[index, top:bottom, left:right].to(image.device)
    part = torch.where(mask, quantize(image[:, top:bottom, left:right]), _GREY)
    longest = 4 * min(part.shape[1:])
    y, x = (max(0, (side - longest) // 2) for side in part.shape[1:])
    return part[:, y : y + longest, x : x + longest]


def classifier(clip: Clip) -> Callable[[Sequence[Tensor], Sequence[str]], list[str]]:
    """The colours of crops that show objects of these classes: of ten, the one whose texts are nearest to the crop."""

    @functools.cache
    def texts(name: str) -> Tensor:
        """One direction for each colour, the mean of three texts, ``[10, D]``."""
        words = [template.format(colour, name) for colour in COLOURS for template in _TEMPLATES]
        return F.normalize(embed_texts(clip, words).view(len(COLOURS), len(_TEMPLATES), -1).mean(1), dim=-1)

    def classify(crops: Sequence[Tensor], names: Sequence[str]) -> list[str]:
        size = clip.model.config.vision_config.image_size
        pixels = torch.cat([clip_pixels(part[None].to(clip.device), size) for part in crops])
        embeddings = embed_images(clip, pixels, lambda ready, _: ready)
        return [COLOURS[int((texts(name) @ e).argmax())] for name, e in zip(names, embeddings, strict=True)]

    return classify
