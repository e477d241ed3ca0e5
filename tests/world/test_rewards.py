"""The readers and rewards of the small world on images whose truth is known, and the checks of what rewards return."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from reference.errors import ConfigError, RewardError, TrainingError, with_the_way_on
from reference.interfaces import Prompt, Scores, load_callable, plain_prompts, score
from reference.world import render as render_module
from reference.world import rewards
from reference.world.accuracy import accuracy
from reference.world.readers import detect, read_text
from reference.world.render import Placed, layout, render
from reference.world.scenes import COLOURS, KINDS, LETTERS, RELATIONS, SHAPES, SIZES, Objects, Scene, prompt_of
from reference.world.scenes import random_scene as draw_scene

FIVE: dict[str, Callable[..., Any]] = {
    "objects": rewards.objects,
    "text": rewards.text,
    "similarity": rewards.similarity,
    "colourfulness": rewards.colourfulness,
    "jpeg": rewards.jpeg,
}
ALL: dict[str, Callable[..., Any]] = {
    **FIVE,
    "objects_strict": rewards.objects_strict,
    "sharpness": rewards.sharpness,
    "contrast": rewards.contrast,
}


@cache
def truth(count: int = 150) -> tuple[list[Scene], list[str], Tensor]:
    """Random scenes of every kind in turn, their prompts and images."""
    rng = random.Random(11)
    scenes = [draw_scene(rng, KINDS[i % len(KINDS)]) for i in range(count)]
    return scenes, [prompt_of(scene) for scene in scenes], render(scenes, seed=11)


def values_of(result: Tensor | Scores) -> Tensor:
    return result.values if isinstance(result, Scores) else result


def graded(image: Tensor, scene: Scene) -> tuple[float, float]:
    """``(objects, objects_strict)`` of one image ``[1, 3, 32, 32]`` for the prompt of a scene."""
    prompts = [prompt_of(scene)]
    return float(rewards.objects(image, prompts).values), float(rewards.objects_strict(image, prompts).values)


def read(image: Tensor, word: str) -> float:
    return float(rewards.text(image, [f'the text "{word}"']).values)


@pytest.fixture
def paint(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """Images of objects at given places: the same seed gives the same background and shades."""

    def paint(placed: Sequence[Placed], seed: int) -> Tensor:
        monkeypatch.setattr(render_module, "layout", lambda scene, rng: list(placed))
        return render([Scene()], seed=seed)

    return paint


def placed_singles() -> list[tuple[Scene, Placed]]:
    """One object of every shape, colour and size, somewhere."""
    rng = random.Random(12)
    scenes = [Scene((Objects(shape, colour, 1, size),)) for shape in SHAPES for colour in COLOURS for size in SIZES]
    return [(scene, layout(scene, rng)[0]) for scene in scenes]


def blurred(image: Tensor, width: int) -> Tensor:
    return F.avg_pool2d(F.pad(image, (width // 2,) * 4, mode="replicate"), width, 1)


def noises(count: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(13)
    blobs = torch.rand(count, 3, 5, 5, generator=g)
    return {
        "uniform": torch.rand(count, 3, 32, 32, generator=g),
        "gaussian": (0.5 + 0.25 * torch.randn(count, 3, 32, 32, generator=g)).clamp(0, 1),
        "blobs": F.interpolate(blobs, size=(32, 32), mode="bilinear", align_corners=True),
    }


# --- readers


def test_detections_have_the_shape_colour_place_and_size_that_was_drawn(paint) -> None:
    for seed, (scene, p) in enumerate(placed_singles()):
        ((found,),) = detect(paint([p], seed))
        (asked,) = scene.objects
        assert (found.shape, found.colour, found.size) == (asked.shape, asked.colour, asked.size)
        assert found.confidence == 1
        low = p.radius / 3 if asked.shape == "triangle" else 0  # the centre of mass is reported
        assert abs(found.x - p.x) < 0.2
        assert abs(found.y - p.y - low) < 0.2
        assert found.radius == pytest.approx(p.radius, rel=0.07)


def test_every_object_is_detected_once() -> None:
    scenes, _, images = truth()
    for scene, found in zip(scenes, detect(images), strict=True):
        asked = [(o.shape, o.colour) for o in scene.objects for _ in range(o.count)]
        assert sorted((d.shape, d.colour) for d in found) == sorted(asked)


def test_every_letter_is_read_at_every_slot() -> None:
    words = [a + b + c for a in LETTERS for b, c in zip(LETTERS, LETTERS[::-1], strict=True)]
    assert read_text(render([Scene(text=word) for word in words], seed=1)) == words


def test_nothing_is_read_where_nothing_is_written() -> None:
    scenes, _, images = truth()
    assert read_text(images) == [scene.text or "" for scene in scenes]


# --- rewards of rendered truth


def test_a_right_image_scores_exactly_one() -> None:
    scenes, prompts, images = truth()
    with_objects = torch.tensor([bool(scene.objects) for scene in scenes])
    with_text = torch.tensor([scene.text is not None for scene in scenes])
    for reward, applies in (
        (rewards.objects, with_objects),
        (rewards.objects_strict, with_objects),
        (rewards.text, with_text),
    ):
        values, applicable = reward(images, prompts)
        assert torch.equal(applicable, applies)
        assert values.tolist() == applies.float().tolist()  # and 0 where it does not apply


def test_a_right_prompt_is_more_similar_than_another_of_its_kind() -> None:
    _, prompts, images = truth()
    right = rewards.similarity(images, prompts)
    other = rewards.similarity(images, prompts[len(KINDS) :] + prompts[: len(KINDS)])
    assert right.mean() > other.mean() + 0.3
    assert (right > other).float().mean() > 0.8
    assert right.abs().max() <= 1 + 1e-6


def test_the_accuracy_table_has_a_row_a_reward() -> None:
    lines = accuracy(count=10).splitlines()
    assert [line.split(" | ")[0] for line in lines[:10]] == [
        "| reward",
        "|---|---|---|---|",
        "| objects",
        "| objects_strict",
        "| text",
        "| similarity",
        "| colour",
        "| jpeg",
        "| sharpness",
        "| contrast",
    ]
    assert lines[2].startswith("| objects | 1.000 | ")
    assert "objects: exactly 1 on 100.0 % of 8 scenes." in lines
    assert "text: exactly 1 on 100.0 % of 4 scenes." in lines


# --- each fault by itself


def test_a_wrong_shape_costs_0_4(paint) -> None:
    for seed, (scene, p) in enumerate(placed_singles()):
        for other in range(1, len(SHAPES)):
            image = paint([p._replace(shape=(p.shape + other) % len(SHAPES))], seed)
            value, strict = graded(image, Scene((Objects(scene.objects[0].shape, scene.objects[0].colour),)))
            assert value == pytest.approx(0.6)
            assert strict == 0


def test_a_wrong_colour_costs_0_4(paint) -> None:
    for seed, (scene, p) in enumerate(placed_singles()):
        for other in range(1, len(COLOURS)):
            value, strict = graded(paint([p._replace(colour=(p.colour + other) % len(COLOURS))], seed), scene)
            assert value == pytest.approx(0.6)
            assert strict == 0


def test_a_wrong_size_costs_0_2(paint) -> None:
    for seed, (scene, p) in enumerate(placed_singles()):
        (asked,) = scene.objects
        other = SIZES[1 - SIZES.index(str(asked.size))]
        value, strict = graded(paint([p], seed), Scene((Objects(asked.shape, asked.colour, 1, other),)))
        assert value == pytest.approx(0.8)
        assert strict == 0
        assert graded(paint([p], seed), Scene((Objects(asked.shape, asked.colour),))) == (1, 1)


def test_faults_add_up(paint) -> None:
    image = paint([Placed(0, 0, 12.0, 12.0, 4.0)], 0)  # a small red circle
    for scene, value in (
        (Scene((Objects("square", "blue"),)), 0.2),
        (Scene((Objects("square", "blue", 1, "large"),)), 0.0),
        (Scene((Objects("circle", "blue", 1, "large"),)), 0.4),
    ):
        assert graded(image, scene) == pytest.approx((value, 0))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_too_many_or_missing_costs_its_share(paint, count: int) -> None:
    rng = random.Random(14)
    for seed in range(6):
        scene = Scene((Objects(SHAPES[seed % 3], COLOURS[seed % 4], count, SIZES[seed % 2]),))
        placed = layout(scene, rng)
        assert graded(paint(placed, seed), scene) == (1, 1)
        assert graded(paint(placed[1:], seed), scene) == pytest.approx(((count - 1) / count, 0))
        if count > 1:
            (o,) = scene.objects
            fewer = Scene((Objects(o.shape, o.colour, count - 1, o.size),))
            assert graded(paint(placed, seed), fewer) == pytest.approx(((count - 1) / count, 0))


def test_an_object_that_nobody_asked_for_costs_its_share(paint) -> None:
    right, stray = Placed(0, 0, 8.0, 16.0, 4.0), Placed(1, 2, 24.0, 16.0, 4.0)
    scene = Scene((Objects("circle", "red"),))
    assert graded(paint([right], 0), scene) == (1, 1)
    assert graded(paint([right, stray], 0), scene) == (0.5, 0)


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_swapped_relation_costs_0_4(paint, relation: str) -> None:
    rng = random.Random(15)
    opposite = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))[relation]
    for seed in range(6):
        first, second = (Objects(SHAPES[(seed + i) % 3], COLOURS[(seed + i) % 4], 1, SIZES[seed % 2]) for i in (0, 1))
        scene = Scene((first, second), relation)
        a, b = layout(scene, rng)
        assert graded(paint([a, b], seed), scene) == (1, 1)
        swapped = paint([a._replace(x=b.x, y=b.y), b._replace(x=a.x, y=a.y)], seed)
        assert graded(swapped, scene) == pytest.approx((0.6, 0))
        assert graded(swapped, Scene((first, second), opposite)) == (1, 1)


def test_only_the_relation_in_the_picture_holds(paint) -> None:
    circle, square = Objects("circle", "red"), Objects("square", "blue")
    places = dict(zip(RELATIONS, ((8.0, 16.0), (24.0, 16.0), (16.0, 8.0), (16.0, 24.0)), strict=True))
    for shown, (x, y) in places.items():
        image = paint([Placed(0, 0, x, y, 4.0), Placed(1, 2, 32 - x, 32 - y, 4.0)], 0)
        for asked in RELATIONS:
            value, strict = graded(image, Scene((circle, square), asked))
            assert value == pytest.approx(1.0 if asked == shown else 0.6)
            assert strict == (asked == shown)


def test_one_of_a_pair_alone_gets_less_than_a_swapped_pair(paint) -> None:
    scene = Scene((Objects("circle", "red"), Objects("square", "blue")), "left of")
    a, b = Placed(0, 0, 8.0, 16.0, 4.0), Placed(1, 2, 24.0, 16.0, 4.0)
    assert graded(paint([a, b], 0), scene) == (1, 1)
    assert graded(paint([a], 0), scene) == pytest.approx((0.3, 0))
    assert graded(paint([b], 0), scene) == pytest.approx((0.3, 0))


@pytest.mark.parametrize("half", ["left", "right", "top"])
def test_half_an_object_scores_less(paint, half: str) -> None:
    at = torch.arange(32)
    for seed, (scene, p) in enumerate(placed_singles()):
        middle = round(p.y if half == "top" else p.x)
        erased = {"left": at < middle, "right": at >= middle, "top": (at < middle)[:, None]}[half]
        image = torch.where(erased, paint([], seed), paint([p], seed))
        value, strict = graded(image, scene)
        assert value < 0.85
        if p.shape != 0 or scene.objects[0].size == "large":  # half of a small disc still counts as a small circle
            assert strict == 0


def test_an_erased_object_scores_nothing(paint) -> None:
    for seed, (scene, _) in enumerate(placed_singles()):
        assert graded(paint([], seed), scene) == (0, 0)


def test_a_blurred_object_scores_less_where_its_corners_are_lost(paint) -> None:
    for seed, (scene, p) in enumerate(placed_singles()):
        if p.shape != 0:  # a blurred disc is a disc
            value, strict = graded(blurred(paint([p], seed), 9), scene)
            assert value < 0.85
            assert strict == 0
        assert graded(blurred(paint([p], seed), 25), scene) == (0, 0)


# --- text


def edit(word: str, i: int) -> tuple[str, str, str]:
    """One letter wrong, one missing, one too many, at place ``i``."""
    other = LETTERS[(LETTERS.index(word[i]) + 5) % len(LETTERS)]
    return word[:i] + other + word[i + 1 :], word[:i] + word[i + 1 :], word[:i] + other + word[i:]


def test_faults_of_the_text_cost_their_edit_distance() -> None:
    rng = random.Random(16)
    for seed in range(15):
        word = "".join(rng.sample(LETTERS, 3))
        wrong, missing, _ = edit(word, seed % 3)
        pair = word[:2]
        wrong_2, _, extra = edit(pair, seed % 2)
        for written, target, value in (
            (word, word, 1.0),
            (wrong, word, 2 / 3),
            (missing, word, 2 / 3),
            (pair, pair, 1.0),
            (wrong_2, pair, 1 / 2),
            (extra, pair, 1 / 2),
            (None, word, 0.0),
            (None, pair, 0.0),
        ):
            image = render([Scene(text=written)], seed=seed)
            assert read(image, target) == pytest.approx(value), (written, target)


def test_an_erased_letter_costs_its_share() -> None:
    for seed in range(10):
        whole, empty = render([Scene(text="CAT")], seed=seed), render([Scene()], seed=seed)
        for slot, rest in enumerate(("AT", "CT", "CA")):
            left = int((whole != empty).any(1).any(1)[0].nonzero()[0])  # of the C, whose first column is inked
            image = whole.clone()
            image[..., left + 8 * slot : left + 8 * slot + 5] = empty[..., left + 8 * slot : left + 8 * slot + 5]
            assert read_text(image) == [rest]
            assert read(image, "CAT") == pytest.approx(2 / 3)


def test_a_text_of_other_letters_scores_nothing() -> None:
    image = render([Scene(text="HEN")], seed=0)
    assert read(image, "CAT") == 0
    assert read(image, "OX") == 0  # the distance is longer than the word


# --- images without a scene


@pytest.mark.parametrize("kind", ["uniform", "gaussian", "blobs"])
def test_noise_scores_next_to_nothing(kind: str) -> None:
    _, prompts, _ = truth()
    images = noises(20)[kind]
    objects, text = rewards.objects(images, prompts[:20]), rewards.text(images, prompts[:20])
    bound = 0.15 if kind == "blobs" else 0.07  # a saturated blob is some object, of a wrong colour or shape
    assert objects.values[objects.applicable].mean() < bound
    assert rewards.objects_strict(images, prompts[:20]).values.sum() == 0
    assert text.values[text.applicable].mean() < 0.05


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_constant_images_score_nothing(value: float) -> None:
    _, prompts, _ = truth()
    images = torch.full((20, 3, 32, 32), value)
    for reward in (rewards.objects, rewards.objects_strict, rewards.text):
        assert reward(images, prompts[:20]).values.tolist() == [0] * 20
    assert rewards.colourfulness(images, prompts[:20]).tolist() == [0] * 20
    assert rewards.similarity(images, prompts[:20]).isfinite().all()
    assert rewards.jpeg(images, prompts[:20]).unique().numel() == 1


# --- colourfulness and JPEG


def test_colourfulness_by_hand() -> None:
    image = torch.full((1, 3, 32, 32), 0.1)
    image[:, 0, :16] = 0.2  # half is (0.2, 0.1, 0.1), half is (0.1, 0.2, 0.1)
    image[:, 1, 16:] = 0.2
    # rg = R - G is 0.1 or -0.1: mean 0, variance 0.01; yb = (R + G) / 2 - B is 0.05 everywhere
    by_hand = (math.sqrt(0.01) + 0.3 * 0.05) / (109 / 255)
    assert float(rewards.colourfulness(image, ["a red circle"])) == pytest.approx(by_hand, rel=1e-5)
    assert by_hand == pytest.approx(0.26904, abs=1e-5)


def test_colourfulness_is_0_for_grey_and_1_at_most() -> None:
    grey = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0)).expand(1, 3, 32, 32)
    gaudy = (torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    assert rewards.colourfulness(torch.cat([grey, gaudy]), ["", ""]).tolist() == pytest.approx([0, 1], abs=1e-6)
    assert float(rewards.colourfulness(gaudy, [""])) == 1


def test_jpeg_is_the_size_of_the_file_in_kilobytes() -> None:
    images = torch.cat([truth()[2][:3], torch.full((1, 3, 32, 32), 0.3), noises(1)["uniform"]])
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
        sizes.append(-len(buffer.getvalue()) / 1000)
    values = rewards.jpeg(images, [""] * 5)
    assert values.tolist() == pytest.approx(sizes)
    flat, noise = values[3:]
    assert flat > values[:3].max()
    assert noise < values[:3].min()


# --- sharpness and contrast


def test_sharpness_by_hand() -> None:
    ramp = torch.arange(32.0) / 100  # of the luma, whatever the channels: their weights add up to 1
    across = ramp.expand(1, 3, 32, 32)
    assert float(rewards.sharpness(across, [""])) == pytest.approx(0.01, rel=1e-4)
    assert float(rewards.sharpness(across.mT, [""])) == pytest.approx(0.01, rel=1e-4)
    assert float(rewards.sharpness((across + across.mT) / 2, [""])) == pytest.approx(0.005 * 2**0.5, rel=1e-4)
    green = torch.zeros(1, 3, 32, 32)
    green[:, 1] = ramp
    assert float(rewards.sharpness(green, [""])) == pytest.approx(0.00587, rel=1e-4)
    assert float(rewards.sharpness(torch.full((1, 3, 32, 32), 0.7), [""])) == pytest.approx(0.0, abs=1e-7)


def test_contrast_by_hand() -> None:
    halves = torch.zeros(2, 3, 32, 32)
    halves[:, :, :16] = 1.0  # half black, half white: the largest standard deviation in [0, 1]
    halves[1] = 0.25 + halves[1] / 2
    assert rewards.contrast(halves, ["", ""]).tolist() == pytest.approx([0.5, 0.25], rel=1e-5)
    assert float(rewards.contrast(torch.full((1, 3, 32, 32), 0.7), [""])) == pytest.approx(0.0, abs=1e-6)
    red = torch.zeros(1, 3, 32, 32)
    red[:, 0, :16] = 1.0
    assert float(rewards.contrast(red, [""])) == pytest.approx(0.299 / 2, rel=1e-5)


def test_blur_lowers_sharpness_and_noise_raises_it() -> None:
    images = truth()[2][:20]
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noisy = (images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    sharp = [rewards.sharpness(x, [""] * 20) for x in (blurred, images, noisy)]
    assert (sharp[0] < sharp[1]).all()
    assert (sharp[1] < sharp[2]).all()
    assert (rewards.jpeg(noisy, [""] * 20) < rewards.jpeg(images, [""] * 20)).all()


# --- every reward


@pytest.mark.parametrize("name", ALL)
def test_a_score_is_finite_and_the_image_s_alone(name: str) -> None:
    _, prompts, images = truth()
    images, prompts = torch.cat([images[:10], noises(5)["uniform"]]), [*prompts[:10], *prompts[:5]]
    before = images.clone()
    result = ALL[name](images, prompts, [None] * 15)
    values = values_of(result)
    assert values.shape == (15,)
    assert values.dtype == torch.float32
    assert values.device.type == "cpu"
    assert values.isfinite().all()
    assert torch.equal(images, before)
    assert len(prompts) == 15
    alone = [ALL[name](images[i : i + 1], prompts[i : i + 1]) for i in range(15)]
    torch.testing.assert_close(torch.cat([values_of(item) for item in alone]), values, rtol=1e-5, atol=1e-5)
    if isinstance(result, Scores):
        assert torch.cat([item.applicable for item in alone]).tolist() == result.applicable.tolist()
        assert torch.cat([item.values for item in alone]).tolist() == values.tolist()
        assert result.applicable.dtype == torch.bool


@pytest.mark.parametrize("name", ["objects", "objects_strict", "text", "similarity"])
def test_a_prompt_outside_the_language_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="got 'a red dog'"):
        ALL[name](torch.zeros(1, 3, 32, 32), ["a red dog"])


# --- scoring


def scored(result: Any, count: int = 3) -> Scores:
    prompts = [f"prompt {i}" for i in range(count)]
    return score({"some": lambda *_: result}, torch.zeros(count, 3, 2, 2), plain_prompts(prompts))


def test_scores_are_columns_in_the_order_of_the_rewards() -> None:
    def half(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Scores:
        return Scores(torch.tensor([math.nan, float(metadata[1]["count"])]), torch.tensor([0, 1]))

    def bright(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        return images.mean((1, 2, 3)).requires_grad_()

    prompts = [Prompt("a", {"count": 5}, None), Prompt("b", {"count": 7}, None)]
    result = score({"half": half, "bright": bright}, torch.ones(2, 3, 2, 2), prompts)
    assert result.values.tolist() == [[0, 1], [7, 1]]  # the NaN does not apply
    assert result.applicable.tolist() == [[False, True], [True, True]]
    assert result.values.dtype == torch.float64
    assert result.applicable.dtype == torch.bool
    assert not result.values.requires_grad


def test_what_a_reward_raises_is_named() -> None:
    def broken(*_: object) -> Tensor:
        raise KeyError("weights")

    message = r"^reward 'broken' raised KeyError: 'weights' \(test_rewards.py, line \d+\)$"
    with pytest.raises(RewardError, match=message) as caught:
        score({"broken": broken}, torch.zeros(1, 3, 2, 2), plain_prompts(["a"]))
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("result", "what"),
    [
        (torch.zeros(2), r"scores of shape \[3\], one an image, as a tensor, list or array, got \[2\]"),
        (torch.zeros(3, 1), r"scores .* got \[3, 1\]"),
        (torch.tensor(0.0), r"scores .* got \[\]"),
        ([0.0, 0.0], r"scores .* got \[2\]"),
        (["a", "b", "c"], "scores .* got list"),
        (None, "scores .* got NoneType"),
        (0.5, "scores .* got float"),
        (Scores(torch.zeros(3), torch.ones(2)), r"applicable of shape \[3\], one an image, as a tensor, got \[2\]"),
        ((torch.zeros(3), [True, True, True]), "applicable .* got list"),
    ],
)
def test_what_is_no_score_for_each_image_is_named(result: Any, what: str) -> None:
    with pytest.raises(RewardError, match=rf"^reward 'some': expected {what}"):
        scored(result)


@pytest.mark.parametrize(
    ("result", "values", "applicable"),
    [
        ([0.5, 1, 2.0], [0.5, 1, 2], [True] * 3),
        (np.array([0.5, 1.0, 2.0], dtype=np.float32), [0.5, 1, 2], [True] * 3),
        ([0.5, None, 2.0], [0.5, 0, 2], [True, False, True]),
        (([0.5, 1.0, 2.0], {"strict": [0, 0, 1]}), [0.5, 1, 2], [True] * 3),
        ((torch.tensor([0.5, 1.0, 2.0]), {}), [0.5, 1, 2], [True] * 3),
        (torch.tensor([0.5, 1.0, 2.0], dtype=torch.bfloat16), [0.5, 1, 2], [True] * 3),
        ((torch.tensor([0.5, 1.0, 2.0]), torch.tensor([True, True, False])), [0.5, 1, 0], [True, True, False]),
    ],
)
def test_what_the_field_returns_is_understood(result: Any, values: list[float], applicable: list[bool]) -> None:
    found = scored(result)
    assert found.values.flatten().tolist() == values
    assert found.applicable.flatten().tolist() == applicable


def test_a_reward_that_changes_its_images_changes_no_other_s() -> None:
    def spoil(images: Tensor, *_: object) -> Tensor:
        images.mul_(100)
        return images.mean((1, 2, 3))

    images = torch.rand(3, 3, 2, 2)
    before = images.clone()
    found = score({"spoil": spoil, "mean": lambda x, *_: x.mean((1, 2, 3))}, images, plain_prompts(["a"] * 3))
    assert torch.equal(images, before)
    torch.testing.assert_close(found.values[:, 1], before.mean((1, 2, 3)).double())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_score_that_is_not_finite_is_named(bad: float) -> None:
    with pytest.raises(RewardError, match=rf"got {bad} for image 1 \('prompt 1'\) and 1 more") as caught:
        scored(torch.tensor([0.0, bad, bad]))
    assert "reward 'some'" in str(caught.value)
    assert "not applicable" in str(caught.value)
    with pytest.raises(RewardError, match=r"for image 2 .* and 0 more"):
        scored(Scores(torch.tensor([0.0, bad, bad]), torch.tensor([True, False, True])))
    result = scored(Scores(torch.tensor([0.5, bad, bad]), torch.tensor([True, False, False])))
    assert result.values.tolist() == [[0.5], [0], [0]]
    assert result.applicable.tolist() == [[True], [False], [False]]


def test_the_world_s_rewards_pass_the_checks() -> None:
    scenes, prompts, images = truth()
    result = score(FIVE, images[:20], plain_prompts(prompts[:20]))
    assert result.values.shape == result.applicable.shape == (20, 5)
    assert result.applicable[:, 2:].all()
    assert result.applicable[:, 0].tolist() == [bool(scene.objects) for scene in scenes[:20]]


@pytest.mark.parametrize("path", ["reference.world.rewards:text", "reference.world.rewards.text"])
def test_callables_are_found_by_their_path(path: str) -> None:
    assert load_callable(path, "reward") is rewards.text


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("reference.world.no_such:text", "No module named 'reference.world.no_such'"),
        ("no_such_package.text", "No module named 'no_such_package'"),
        ("reference.world.rewards:no_such", "has no attribute 'no_such'"),
    ],
)
def test_a_path_to_nothing_says_why(path: str, why: str) -> None:
    with pytest.raises(ValueError, match=r"^rewards\.mine: expected the dotted path of a callable, got ") as caught:
        load_callable(path, "rewards.mine")
    assert repr(path) in str(caught.value)
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import torch\nx = 1 / 0\n", r"ZeroDivisionError: division by zero \(NAME\.py, line 2\)"),
        ("x = 1\ndef f(images)\n", r"SyntaxError: expected ':' \(NAME\.py, line 2\)"),
        ("import sys\nsys.exit(3)\n", r"SystemExit: 3 \(NAME\.py, line 2\)"),
        ("import no_such_package\n", r"ModuleNotFoundError: No module named 'no_such_package' \(NAME\.py, line 1\)"),
    ],
)
def test_a_file_that_cannot_be_run_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, why: str
) -> None:
    name = tmp_path.name  # one that no module has
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=rf"^balance: expected the dotted .*: {why.replace('NAME', name)}\.$"):
        load_callable(f"{name}:f", "balance")


def test_images_that_are_not_finite_are_no_reward_s_fault() -> None:
    images = torch.zeros(3, 3, 8, 8)
    images[1, 0, 0, 0], images[2, 2, 3, 3] = torch.nan, torch.inf
    message = r"^the policy's images are not finite, image 5 \('b'\) and 1 more: .* lower optim\.lr"
    with pytest.raises(TrainingError, match=message) as caught:
        score({"colour": lambda images, *_: images.mean((1, 2, 3))}, images, plain_prompts("abc"), first=4)
    assert str(with_the_way_on(caught.value, 7)) == str(caught.value)  # which would be the same again


@pytest.mark.parametrize("path", ["", ":", "text", "reference.world.scenes:LETTERS", "reference.world.scenes"])
def test_a_path_to_no_callable_is_shown(path: str) -> None:
    with pytest.raises(ValueError, match=r"^reward: expected the dotted path of a callable such as ") as caught:
        load_callable(path, "reward")
    assert str(caught.value).endswith(f"got {path!r}.")
