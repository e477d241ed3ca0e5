"""Held-out images of an evaluation: one picture of all, and a file with the prompt and scores of each."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from reference.interfaces import Scores
from reference.run.live import save_grid
from reference.text_files import parse_json, write_whole

_COLUMNS = 10
_SHOWN = 12  # tiles of a report: the first ones, whatever their scores


class Tiles(NamedTuple):
    """The images of an evaluation as a report shows them.

    Attributes:
        images: as PNG files.
        prompts: of each.
        scores: of each by reward; those that do not apply are left out.
    """

    images: list[bytes]
    prompts: list[str]
    scores: list[dict[str, float]]


def save_tiles(
    images: Tensor, prompts: Sequence[str], rewards: Sequence[str], scores: Scores, path: Path
) -> Image.Image:
    """Write ``path`` (a PNG) and, beside it, a JSON file with what each image is. Returns the picture.

    Args:
        images: ``[N, 3, H, W]``.
        prompts: N texts.
        rewards: K names.
        scores: ``[N, K]`` of these images.

    Raises:
        OSError: a file could not be written.
    """
    picture = save_grid(images, path, columns=_COLUMNS, scale=max(1, 96 // images.shape[-1]), largest=256)
    found = [
        {name: value for name, value, applies in zip(rewards, row, known, strict=True) if applies}
        for row, known in zip(scores.values.tolist(), scores.applicable.tolist(), strict=True)
    ]
    tiles = [{"prompt": prompt, "scores": s} for prompt, s in zip(prompts, found, strict=True)]
    text = json.dumps({"columns": _COLUMNS, "tiles": tiles}, allow_nan=False, indent=1)
    write_whole(path.with_suffix(".json"), f"{text}\n".encode())
    return picture


def read_tiles(path: Path) -> Tiles | None:
    """The first images of a picture that ``save_tiles`` wrote; None where it or its file is missing or damaged."""
    try:
        found = parse_json(path.with_suffix(".json").read_bytes())
        tiles, columns = found["tiles"], int(found["columns"])
        prompts = [str(tile["prompt"]) for tile in tiles[:_SHOWN]]
        scores = [{str(k): float(v) for k, v in tile["scores"].items()} for tile in tiles[:_SHOWN]]
        with Image.open(path) as sheet:
            width, height = sheet.width // columns, sheet.height // math.ceil(len(tiles) / columns)
            images = [
                _cut(sheet, i % columns * width, i // columns * height, width, height) for i in range(len(prompts))
            ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None
    return Tiles(images, prompts, scores)


def _cut(sheet: Image.Image, x: int, y: int, width: int, height: int) -> bytes:
    """A part of a picture, as a PNG."""
    file = io.BytesIO()
    sheet.crop((x, y, x + width, y + height)).save(file, format="PNG")
    return file.getvalue()


def tile_cards(runs: Mapping[str, Path]) -> list[str]:
    """A card for each of the first prompts: its image before, and after with every run, with all scores.

    A run whose pictures or prompts differ from the first one's is left out.
    """
    found = {label: _before_and_after(folder) for label, folder in runs.items()}
    known = {label: pair for label, pair in found.items() if pair is not None}
    if not known:
        return []
    first, _ = next(iter(known.values()))
    alike = {label: pair for label, pair in known.items() if pair[0].prompts == pair[1].prompts == first.prompts}
    return [_card(alike, i) for i in range(len(first.prompts))]


def _before_and_after(folder: Path) -> tuple[Tiles, Tiles] | None:
    before, after = (read_tiles(folder / "grids" / f"{name}.png") for name in ("before", "after"))
    return None if before is None or after is None else (before, after)


def _card(runs: Mapping[str, tuple[Tiles, Tiles]], i: int) -> str:
    """One prompt: images side by side, and a line of scores for each run."""
    first, alone = next(iter(runs.values()))[0], len(runs) == 1
    pictures = [("before", first.images[i])]
    pictures += [("after" if alone else label, after.images[i]) for label, (_, after) in runs.items()]
    images = "".join(
        f'<span><img alt="{escape(f"{what}: {first.prompts[i]}")}" src="data:image/png;base64,'
        f'{base64.b64encode(data).decode()}"><small>{escape(what)}</small></span>'
        for what, data in pictures
    )
    lines = []
    for label, (before, after) in runs.items():
        text = ", ".join(f"{k} {_pair(before.scores[i], after.scores[i], k)}" for k in after.scores[i])
        lines.append(escape(text if alone else f"{label}: {text}"))
    scores = f'<span class="note">{"<br>".join(lines)}</span>'
    caption = f"<figcaption>{escape(first.prompts[i])}<br>{scores}</figcaption>"
    return f'<figure class="tile"><div>{images}</div>{caption}</figure>'


def _pair(before: Mapping[str, float], after: Mapping[str, float], name: str) -> str:
    """As ``0.33 → 1.00``."""
    return " → ".join(f"{x:.2f}" if x is not None else "-" for x in (before.get(name), after[name]))
