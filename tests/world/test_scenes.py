"""Scenes and their prompts, tokens, held-out prompts; layouts and pixels."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from reference.splits import HELD_OUT_SHARE, is_held_out
from reference.world.render import (
    GLYPH_HEIGHT,
    GLYPH_WIDTH,
    INK,
    RESOLUTION,
    TEXT_LEFT,
    TEXT_TOP,
    coverage,
    glyphs,
    ink_mask,
    layout,
    render,
)
from reference.world.scenes import (
    COLOURS,
    KINDS,
    LETTERS,
    MAX_TOKENS,
    RELATIONS,
    SHAPES,
    SIZES,
    VOCABULARY,
    Objects,
    Scene,
    parse,
    prompt_of,
    random_scene,
    tokens,
)


def scenes_of(kind: str, count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng, kind) for _ in range(count)]


def prompts_without_text() -> list[str]:
    """Every prompt of the kinds single, count and pair."""
    objects = [
        Objects(shape, colour, count, size)
        for shape, colour, count, size in itertools.product(SHAPES, COLOURS, (1, 2, 3), (None, *SIZES))
    ]
    one = [o for o in objects if o.count == 1]
    pairs = [
        Scene((a, b), relation)
        for a, b, relation in itertools.product(one, one, RELATIONS)
        if (a.shape, a.colour) != (b.shape, b.colour)
    ]
    return [prompt_of(scene) for scene in [*(Scene((o,)) for o in objects), *pairs]]


@pytest.mark.parametrize("kind", KINDS)
def test_parse_is_the_inverse_of_prompt_of(kind: str) -> None:
    for scene in scenes_of(kind, 400):
        assert parse(prompt_of(scene)) == scene


def test_prompts_by_hand() -> None:
    for prompt, scene in {
        "a red circle": Scene((Objects("circle", "red"),)),
        "three large blue squares": Scene((Objects("square", "blue", 3, "large"),)),
        'the text "SUN"': Scene(text="SUN"),
        'a small green triangle and the text "HA"': Scene((Objects("triangle", "green", 1, "small"),), text="HA"),
        "a red circle above a small blue square": Scene(
            (Objects("circle", "red"), Objects("square", "blue", 1, "small")), "above"
        ),
    }.items():
        assert prompt_of(scene) == prompt
        assert parse(prompt) == scene
        assert parse(f" {prompt}\n") == scene


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a red dog",
        "a purple circle",
        "A red circle",
        "red circle",
        "two red circle",
        "a red circles",
        "four red circles",
        "a huge red circle",
        "a small large red circle",
        "a circle red",
        "a red circle on grass",
        "a red circle and",
        "a red circle near a blue square",
        "a red circle left of",
        "a red circle left of a blue square above a green circle",
        "a  red circle",
        'the text "C"',
        'the text "CATS"',
        'the text "CAB"',
        'the text "cat"',
        "the text CAT",
        'the text "CAT" and a red circle',
        'a red circle the text "CAT"',
    ],
)
def test_a_prompt_outside_the_language_is_shown(prompt: str) -> None:
    for function in (parse, tokens):
        with pytest.raises(ValueError, match="expected a scene such as") as caught:
            function(prompt)
        assert str(caught.value).startswith("prompt: ")
        assert str(caught.value).endswith(f"got {prompt!r}.")


def test_tokens_by_hand() -> None:
    words = [VOCABULARY[i] for i in tokens('a small red circle and the text "TOO"')]
    assert words == ["a", "small", "red", "circle", "and", "text", "T0", "O1", "O2", "<pad>"]
    words = [VOCABULARY[i] for i in tokens("a red circle right of a large blue square")]
    assert words == ["a", "red", "circle", "right of", "a", "large", "blue", "square", "<pad>", "<pad>"]
    assert len(set(VOCABULARY)) == len(VOCABULARY)


def test_every_scene_fits_and_distinct_prompts_have_distinct_tokens() -> None:
    prompts = {
        *prompts_without_text(),
        *(prompt_of(scene) for scene in (*scenes_of("text", 1000), *scenes_of("object and text", 2000))),
    }
    ids = [tokens(prompt) for prompt in prompts]
    assert {len(item) for item in ids} == {MAX_TOKENS}
    assert len({tuple(item) for item in ids}) == len(prompts) > 6000
    for item in ids:  # padding is at the end only
        length = sum(i != 0 for i in item)
        assert 0 not in item[:length]


def test_a_prompt_with_too_many_tokens_is_shown() -> None:
    prompt = 'a small red circle left of a large blue square and the text "CAT"'
    with pytest.raises(ValueError, match="prompt: expected at most 10 tokens, got 14 in ") as caught:
        tokens(prompt)
    assert repr(prompt) in str(caught.value)


@pytest.mark.parametrize(
    ("held_out", "kept"),
    [
        ("a yellow circle", "a red square"),
        ("a small green triangle", "two blue squares"),
        ("two green circles", "three small red triangles"),
        ("a red square above a green square", "a blue square below a yellow triangle"),
        ('the text "OK"', 'the text "CAT"'),
        ('a small yellow circle and the text "HA"', 'a large blue triangle and the text "EO"'),
    ],
)
def test_the_same_prompts_are_held_out_everywhere(held_out: str, kept: str) -> None:
    assert is_held_out(held_out)
    assert not is_held_out(kept)


def test_a_fifth_of_the_prompts_is_held_out() -> None:
    assert HELD_OUT_SHARE == 0.2
    prompts = prompts_without_text()
    assert len(prompts) == 108 + (36 * 36 - 12 * 9) * 4
    share = sum(map(is_held_out, prompts)) / len(prompts)
    assert abs(share - 0.2) < 0.02  # 3.5 standard deviations
    texts = {prompt_of(scene) for scene in scenes_of("text", 4000)}
    assert abs(sum(map(is_held_out, texts)) / len(texts) - 0.2) < 0.035


@pytest.mark.parametrize("kind", KINDS)
def test_random_scenes_are_of_their_kind_and_side(kind: str) -> None:
    rng = random.Random(0)
    for held_out in (True, False):
        for _ in range(100):
            assert is_held_out(prompt_of(random_scene(rng, kind, held_out=held_out))) == held_out
    scenes = scenes_of(kind, 300)
    assert {len(scene.objects) for scene in scenes} == {{"text": 0, "pair": 2}.get(kind, 1)}
    assert {scene.relation for scene in scenes} == (set(RELATIONS) if kind == "pair" else {None})
    assert {len(scene.text or "") for scene in scenes} == ({2, 3} if "text" in kind else {0})
    assert {o.count for scene in scenes for o in scene.objects} == {"text": set(), "count": {2, 3}}.get(kind, {1})
    for scene in scenes:
        assert len({(o.shape, o.colour) for o in scene.objects}) == len(scene.objects)
    assert {is_held_out(prompt_of(scene)) for scene in scenes} == {True, False}


def test_random_scenes_repeat_with_the_source_of_randomness() -> None:
    assert scenes_of("pair", 20, seed=3) == scenes_of("pair", 20, seed=3) != scenes_of("pair", 20, seed=4)


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match=r"kind: expected one of \('single', .*\), got 'triple'"):
        random_scene(random.Random(0), "triple")


@pytest.mark.parametrize("kind", KINDS)
def test_objects_stay_apart_and_inside_and_off_the_text(kind: str) -> None:
    rng = random.Random(1)
    for scene in scenes_of(kind, 100):
        placed = layout(scene, rng)
        assert [(SHAPES[p.shape], COLOURS[p.colour]) for p in placed] == [
            (o.shape, o.colour) for o in scene.objects for _ in range(o.count)
        ]
        bottom = TEXT_TOP[0] if scene.text else RESOLUTION
        for p in placed:
            assert min(p.x, p.y) - p.radius > 1 - 1e-9
            assert p.x + p.radius < RESOLUTION - 1 + 1e-9
            assert p.y + p.radius < bottom - 1 + 1e-9
        for a, b in itertools.combinations(placed, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius + 2


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_hold_in_layouts(relation: str) -> None:
    rng = random.Random(2)
    scene = Scene((Objects("circle", "red"), Objects("square", "blue", 1, "large")), relation)
    for _ in range(50):
        a, b = layout(scene, rng)
        across, down = b.x - a.x, b.y - a.y
        ahead = {"left of": across, "right of": -across, "above": down, "below": -down}[relation]
        assert ahead > 0.75 * math.hypot(across, down)


def test_sizes_in_layouts() -> None:
    rng = random.Random(3)
    radii = {
        size: [layout(Scene((Objects("circle", "red", 2, size),)), rng)[0].radius for _ in range(100)]
        for size in (None, *SIZES)
    }
    assert 3.4 <= min(radii["small"]) < max(radii["small"]) <= 4.2
    assert 5.6 <= min(radii["large"]) < max(radii["large"]) <= 6.6
    assert min(radii[None]) < 4.2 < 5.6 < max(radii[None])


def test_images_are_a_function_of_the_seed() -> None:
    scenes = [scene for kind in KINDS for scene in scenes_of(kind, 10)]
    images = render(scenes, seed=5)
    assert images.shape == (50, 3, RESOLUTION, RESOLUTION)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    torch.rand(3)  # the global generator plays no part
    assert torch.equal(images, render(scenes, seed=5))
    assert (images != render(scenes, seed=6)).flatten(1).any(1).all()


def test_the_ink_mask_is_where_the_text_is() -> None:
    scenes = [scene for kind in KINDS for scene in scenes_of(kind, 20)]
    mask = ink_mask(scenes, seed=7)
    assert mask.shape == (100, RESOLUTION, RESOLUTION)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, (render(scenes, seed=7) == torch.tensor(INK)).all(1))
    strokes = dict(zip(LETTERS, glyphs().sum((1, 2)).tolist(), strict=True))
    for scene, inked in zip(scenes, mask, strict=True):
        assert inked.sum() == sum(strokes[letter] for letter in scene.text or "")
        assert not inked[: TEXT_TOP[0]].any()


def test_every_letter_fits_at_every_place() -> None:
    assert glyphs().shape == (len(LETTERS), GLYPH_HEIGHT, GLYPH_WIDTH)
    assert len({tuple(glyph.flatten().tolist()) for glyph in glyphs()}) == len(LETTERS)
    words = [Scene(text=letter * 3) for letter in LETTERS]
    corners = set()
    for seed in range(20):
        mask = ink_mask(words, seed=seed)
        for letter, bitmap, inked in zip(LETTERS, glyphs().bool(), mask, strict=True):
            rows, columns = inked.any(1).nonzero().flatten(), inked.any(0).nonzero().flatten()
            top, left = int(rows[0]), int(columns[0]) - int(bitmap.any(0).nonzero()[0])
            corners.add((left, top))
            for slot in range(3):
                window = inked[top : top + GLYPH_HEIGHT, left + 8 * slot : left + 8 * slot + GLYPH_WIDTH]
                assert torch.equal(window, bitmap), letter
    assert corners == set(itertools.product(TEXT_LEFT, TEXT_TOP))


@pytest.mark.parametrize(("shape", "area"), [(0, math.pi), (1, 3.24), (2, 2.0)])
def test_coverage_sums_to_the_area(shape: int, area: float) -> None:
    radius = torch.linspace(3.4, 6.6, 20)
    centre = 10 + 12 * torch.rand(20, 2, generator=torch.Generator().manual_seed(shape))
    cover = coverage(torch.full((20,), shape), centre, radius)
    assert cover.shape == (20, RESOLUTION, RESOLUTION)
    assert cover.min() == 0
    assert cover.max() == 1
    torch.testing.assert_close(cover.sum((1, 2)), area * radius.square(), rtol=0.03, atol=0)


def test_shapes_by_hand() -> None:
    circle, square, triangle = (
        coverage(torch.tensor(i), torch.tensor([16.0, 16.0]), torch.tensor(6.0)) > 0.5 for i in range(3)
    )
    assert circle.sum(1)[10:22].tolist() == [4, 8, 10, 10, 12, 12, 12, 12, 10, 10, 8, 4]
    assert square.sum(1)[10:22].tolist() == [0, *[10] * 10, 0]  # 10.8 pixels wide: 0.4 of the outermost is covered
    assert triangle.sum(1)[10:22].tolist() == [0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12]  # apex up, as wide as high
    for cover in (circle, square, triangle):
        assert torch.equal(cover, cover.flip(1))
    assert torch.equal(circle, circle.T)
    # half a pixel aside
    edge = coverage(torch.tensor(1), torch.tensor([16.5, 16.0]), torch.tensor(6.0))[16]
    torch.testing.assert_close(edge[[10, 11, 12]], torch.tensor([0.0, 0.9, 1.0]))
