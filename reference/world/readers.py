"""What an image shows, read from its pixels alone: objects (shape, colour, place, size) and text."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from reference.world.render import GLYPH_HEIGHT, GLYPH_WIDTH, PALETTE, RESOLUTION, coverage, glyphs
from reference.world.scenes import COLOURS, LETTERS, SHAPES

Array = NDArray[np.float64]

_MIN_CHROMA = 0.3  # max - min of the channels: half-covered edges of objects have more, dim backgrounds less
_MIN_AREA = 8  # pixels
_NO_FIT, _FIT = 0.5, 0.8  # overlaps with the ideal shape at which confidence is 0 and 1
_AREA_OF_UNIT = (np.pi, 3.24, 2.0)  # of a circle, square and triangle of radius 1
_TOO_LARGE = 8.0  # no object is: a wash of colour is not a large square
_LARGE = 4.9  # radius in pixels from which on an object is large
_MIN_MATCH = 0.85  # correlation with a letter
_MIN_CONTRAST = 0.06  # standard deviation of whiteness within a letter's window


class Detection(NamedTuple):
    """An object found: its shape and colour, how well it fits the shape (in (0, 1]), centre and radius in pixels."""

    shape: str
    colour: str
    confidence: float
    x: float
    y: float
    radius: float

    @property
    def size(self) -> str:
        """``"small"`` or ``"large"``."""
        return "large" if self.radius >= _LARGE else "small"


def detect(images: Tensor) -> list[list[Detection]]:
    """Objects of every image: connected regions of one saturated hue, fitted with each shape.

    Args:
        images: ``[N, 3, 32, 32]`` in [0, 1].

    Returns:
        N lists; fits with no confidence are left out.
    """
    pixels = images.detach().double().cpu()
    hues = _hues(pixels).numpy()
    return [_detect(hue, image) for hue, image in zip(hues, pixels.permute(0, 2, 3, 1).numpy(), strict=True)]


def _hues(images: Tensor) -> Tensor:
    """Index of the nearest palette colour at every pixel ``[N, 32, 32]``; -1 where too little colour."""
    chroma = images.amax(1) - images.amin(1)
    direction = F.normalize(images - images.mean(1, keepdim=True), dim=1)
    palette = PALETTE.double()
    palette = F.normalize(palette - palette.mean(1, keepdim=True), dim=1)
    nearest = torch.einsum("nchw,kc->nkhw", direction, palette).argmax(1)
    return torch.where(chroma > _MIN_CHROMA, nearest, -1)


def _detect(hue: NDArray[np.int64], image: Array) -> list[Detection]:
    """Objects of one image ``[32, 32, 3]``."""
    found = []
    for colour, name in enumerate(COLOURS):
        labels, _ = ndimage.label(hue == colour, structure=np.ones((3, 3)))
        for i, box in enumerate(ndimage.find_objects(labels)):
            region = labels[box] == i + 1
            if region.sum() >= _MIN_AREA:
                shape, overlap, x, y, radius = _fit(region, box, image)
                confidence = min((overlap - _NO_FIT) / (_FIT - _NO_FIT), 1.0)
                if confidence > 0 and radius < _TOO_LARGE:
                    found.append(Detection(SHAPES[shape], name, confidence, x, y, radius))
    return found


def _fit(region: NDArray[np.bool_], box: tuple[slice, slice], image: Array) -> tuple[int, float, float, float, float]:
    """Best shape for a region: ``(shape, overlap, x, y, radius)``, all from the soft cover of its pixels."""
    rows, columns = (slice(max(s.start - 1, 0), min(s.stop + 1, RESOLUTION)) for s in box)
    crop = image[rows, columns]
    inside = np.zeros(crop.shape[:2], dtype=bool)
    top, left = box[0].start - rows.start, box[1].start - columns.start
    inside[top : top + region.shape[0], left : left + region.shape[1]] = region
    near = ndimage.binary_dilation(inside)
    colour = np.median(crop[inside], axis=0)
    outside = np.median(crop[~near], axis=0) if (~near).any() else np.zeros(3)
    axis = colour - outside
    cover = np.clip((crop - outside) @ axis / max(axis @ axis, 1e-6), 0, 1) * near
    y, x = np.indices(cover.shape)
    area = cover.sum()
    x_mean = columns.start + 0.5 + (x * cover).sum() / area
    y_mean = rows.start + 0.5 + (y * cover).sum() / area
    radii = np.sqrt(area / np.array(_AREA_OF_UNIT))
    centres = np.stack([np.full(3, x_mean), y_mean - np.array([0, 0, radii[2] / 3])], axis=1)  # a triangle's is low
    ideal = coverage(torch.arange(3), torch.from_numpy(centres), torch.from_numpy(radii)).numpy()
    whole = np.zeros((RESOLUTION, RESOLUTION))
    whole[rows, columns] = cover
    overlaps = np.minimum(ideal, whole).sum((1, 2)) / np.maximum(ideal, whole).sum((1, 2))
    best = int(overlaps.argmax())
    return best, float(overlaps[best]), float(x_mean), float(y_mean), float(radii[best])


@cache
def _templates() -> Tensor:
    """Letters with a blank margin of one pixel, centred and of unit norm: ``[L, 1, 9, 7]``."""
    bitmaps = F.pad(glyphs(), (1, 1, 1, 1))
    centred = bitmaps - bitmaps.mean((1, 2), keepdim=True)
    return (centred / centred.square().sum((1, 2), keepdim=True).sqrt()).unsqueeze(1)


def read_text(images: Tensor) -> list[str]:
    """The line of white letters in every image, ``""`` if there is none.

    Each window is correlated with each letter; the best match fixes the line, which is read from left to right.

    Args:
        images: ``[N, 3, 32, 32]`` in [0, 1].

    Returns:
        N strings over ``LETTERS``.
    """
    white = F.pad(images.detach().float().cpu().amin(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    templates = _templates()
    n = templates[0].numel()
    ones = torch.ones(1, 1, GLYPH_HEIGHT + 2, GLYPH_WIDTH + 2)
    mean, square = F.conv2d(white, ones) / n, F.conv2d(white.square(), ones) / n
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    match = F.conv2d(white, templates) / (deviation * n**0.5).clamp(min=1e-6)
    match = torch.where(deviation > _MIN_CONTRAST, match, 0.0)
    best, letter = match.max(1)
    return [_read_line(b, i) for b, i in zip(best.numpy(), letter.numpy(), strict=True)]


def _read_line(match: NDArray[np.float32], letter: NDArray[np.int64]) -> str:
    """Letters on the row of the best match, where they match well, best first, none over another."""
    row = int(match.max(1).argmax())
    band = slice(max(row - 1, 0), row + 2)
    strength = match[band].max(0)
    letters = np.take_along_axis(letter[band], match[band].argmax(0)[None], 0)[0]
    taken: dict[int, str] = {}
    for x in np.argsort(-strength, kind="stable"):
        if strength[x] < _MIN_MATCH:
            break
        if all(abs(x - other) > GLYPH_WIDTH for other in taken):
            taken[int(x)] = LETTERS[letters[x]]
    return "".join(taken[x] for x in sorted(taken))
