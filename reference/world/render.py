"""Scenes to pixels: random layouts, anti-aliased shapes, a bitmap font, a textured background."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from reference.world.scenes import COLOURS, LETTERS, RELATIONS, SHAPES, Scene

RESOLUTION = 32
PALETTE = torch.tensor([[0.90, 0.15, 0.15], [0.15, 0.75, 0.20], [0.20, 0.30, 0.95], [0.95, 0.85, 0.15]])
INK = 0.97
GLYPH_HEIGHT, GLYPH_WIDTH = 7, 5
CELL = 8  # pixels from one letter to the next: two patches of the model
TEXT_LEFT, TEXT_TOP = (2, 3, 4, 5), (23, 24)  # where a word may start, in pixels
_RADII = {"small": (3.4, 4.2), "large": (5.6, 6.6), None: (3.4, 6.4)}
_GAP = 2.0  # pixels between any two objects, so that they stay apart for the reader
_MAX_OBJECTS = 3
_GLYPHS = {
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "C": "01111 10000 10000 10000 10000 10000 01111",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "N": "10001 11001 11001 10101 10011 10011 10001",
    "O": "01110 10001 10001 10001 10001 10001 01110",
    "S": "01111 10000 10000 01110 00001 00001 11110",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "U": "10001 10001 10001 10001 10001 10001 01110",
    "X": "10001 01010 01010 00100 01010 01010 10001",
}


class Placed(NamedTuple):
    """One object in pixels: its shape and colour (indices), centre and radius."""

    shape: int
    colour: int
    x: float
    y: float
    radius: float


def glyphs() -> Tensor:
    """The letters as bitmaps ``[L, 7, 5]`` of 0 and 1, in the order of ``LETTERS``."""
    rows = [[[float(bit) for bit in row] for row in _GLYPHS[letter].split()] for letter in LETTERS]
    return torch.tensor(rows)


def layout(scene: Scene, rng: random.Random) -> list[Placed]:
    """Random places for a scene's objects: apart from each other and from the text, in the relation asked for.

    A layout that leaves no room is started again from new sizes.
    """
    bottom = TEXT_TOP[0] - 1.0 if scene.text else float(RESOLUTION)
    while True:
        placed: list[Placed] = []
        for o in scene.objects:
            low, high = _RADII[o.size]
            radius = rng.uniform(low, high)
            for _ in range(o.count):
                x, y = (rng.uniform(radius + 1, end - radius - 1) for end in (RESOLUTION, bottom))
                placed.append(Placed(SHAPES.index(o.shape), COLOURS.index(o.colour), x, y, radius))
        relation = None if scene.relation is None else RELATIONS.index(scene.relation)
        if _apart(placed) and (relation is None or _related(placed[0], placed[1], relation)):
            return placed


def _apart(placed: list[Placed]) -> bool:
    """Whether no two bounding boxes come closer than the gap."""
    return all(
        max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius + _GAP
        for i, a in enumerate(placed)
        for b in placed[:i]
    )


def _related(a: Placed, b: Placed, relation: int) -> bool:
    """Whether ``a`` is clearly left of, right of, above or below ``b``."""
    dx, dy = b.x - a.x, b.y - a.y
    ahead, aside = ((dx, dy), (-dx, dy), (dy, dx), (-dy, dx))[relation]
    return ahead > 1.2 * abs(aside)


def render(scenes: Sequence[Scene], *, seed: int) -> Tensor:
    """Images of scenes, with random layouts, shades and backgrounds.

    Args:
        scenes: B of them.
        seed: the same seed gives the same images.

    Returns:
        ``[B, 3, 32, 32]`` float32 in [0, 1].
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    images = _backgrounds(len(scenes), generator)
    layouts = [layout(scene, rng) for scene in scenes]
    blank = Placed(0, 0, -99.0, -99.0, 1.0)
    slots = [[*placed, *[blank] * (_MAX_OBJECTS - len(placed))] for placed in layouts]
    table = torch.tensor(slots, dtype=torch.float32).reshape(len(scenes), _MAX_OBJECTS, 5)
    shades = PALETTE[table[..., 1].long()]
    shades = (shades + 0.12 * (torch.rand(shades.shape, generator=generator) - 0.5)).clamp(0, 1)
    cover = coverage(table[..., 0].long(), table[..., 2:4], table[..., 4])
    for i in range(_MAX_OBJECTS):
        images = torch.lerp(images, shades[:, i, :, None, None].expand_as(images), cover[:, i, None])
    return torch.where(ink_mask(scenes, seed=seed).unsqueeze(1), INK, images)


def coverage(shape: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """Share of every pixel that an object covers, anti-aliased.

    Args:
        shape: ``[...]``, indices into ``SHAPES``.
        centre: ``[..., 2]``, x and y in pixels.
        radius: ``[...]``, half the width in pixels.

    Returns:
        ``[..., 32, 32]`` in [0, 1].
    """
    axis = torch.arange(RESOLUTION) + 0.5
    x, y = axis - centre[..., 0, None, None], axis[:, None] - centre[..., 1, None, None]
    r, x = radius[..., None, None], x.abs()
    circle = (x.square() + y.square()).sqrt() - r
    square = torch.maximum(x, y.abs()) - 0.9 * r
    triangle = torch.maximum(y - r, (2 * x - y - r) / 5**0.5)  # apex up, as wide as high
    distance = torch.stack([circle.expand_as(square), square, triangle.expand_as(square)])
    chosen = distance.gather(0, shape[None, ..., None, None].expand(1, *square.shape))[0]
    return (0.5 - chosen).clamp(0, 1)


def ink_mask(scenes: Sequence[Scene], *, seed: int) -> Tensor:
    """Pixels ``[B, 32, 32]`` (bool) that the text of each scene inks in ``render`` with the same seed."""
    rng = random.Random(seed)
    mask = torch.zeros(len(scenes), RESOLUTION, RESOLUTION, dtype=torch.bool)
    font = glyphs().bool()
    for b, scene in enumerate(scenes):
        left, top = rng.choice(TEXT_LEFT), rng.choice(TEXT_TOP)
        for slot, letter in enumerate(scene.text or ""):
            x = left + slot * CELL
            mask[b, top : top + GLYPH_HEIGHT, x : x + GLYPH_WIDTH] = font[LETTERS.index(letter)]
    return mask


def _backgrounds(B: int, generator: torch.Generator) -> Tensor:
    """Dim, faintly tinted, with a soft texture."""
    value = 0.12 + 0.2 * torch.rand(B, 1, 1, 1, generator=generator)
    tint = 0.08 * (torch.rand(B, 3, 1, 1, generator=generator) - 0.5)
    coarse = 0.12 * (torch.rand(B, 1, 5, 5, generator=generator) - 0.5)
    texture = F.interpolate(coarse, size=(RESOLUTION, RESOLUTION), mode="bilinear", align_corners=True)
    return (value + tint + texture).clamp(0, 1)
