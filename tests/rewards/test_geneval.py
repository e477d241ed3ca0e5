"""GenEval: its rules on hand-made detections, the detector's arithmetic, and both models loaded from disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers.models.clip.configuration_clip import CLIPConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.mask2former.configuration_mask2former import Mask2FormerConfig
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentation
from transformers.models.swin.configuration_swin import SwinConfig

from reference.errors import ConfigError
from reference.interfaces import Scores
from reference.prompts.geneval import CLASSES, COLOURS
from reference.rewards.clip import load_clip
from reference.rewards.detector import Detection, instances, load_detector, prepare
from reference.rewards.geneval import (
    classifier,
    coloured,
    crop,
    graded,
    load,
    load_strict,
    objects,
    relations,
    reward_of,
    strict,
)

CPU = torch.device("cpu")
H = W = 32


def detection(*found: tuple[str, float, tuple[int, int, int, int]]) -> Detection:
    """Objects as (class, score, box), whose masks fill their boxes."""
    masks = torch.zeros(len(found), H, W, dtype=torch.bool)
    for mask, (_, _, (left, top, right, bottom)) in zip(masks, found, strict=True):
        mask[top:bottom, left:right] = True
    boxes = torch.tensor([box for _, _, box in found]).float().view(-1, 4)
    labels = torch.tensor([CLASSES.index(name) for name, _, _ in found], dtype=torch.long)
    return Detection(boxes, torch.tensor([score for _, score, _ in found]), labels, masks)


LEFT, RIGHT, TOP = (0, 12, 8, 20), (24, 12, 32, 20), (12, 0, 20, 8)
CAT_CATS = [("cat", 0.95, (4 * i, 0, 4 * i + 3, 8)) for i in range(8)]


def scores(row: dict, found: Detection, colours: Sequence[str] = ()) -> tuple[float, float]:
    """Strict and graded; ``colours`` of all objects found."""
    own = objects(found, row)
    named = dict(enumerate(colours))
    return strict(row, own, found.boxes.tolist(), named), graded(row, own, found.boxes.tolist(), named)


def clause(name: str, count: int = 1, **more: object) -> dict:
    return {"class": name, "count": count, **more}


def row_of(tag: str, *include: dict, exclude: Sequence[dict] = ()) -> dict:
    return {"tag": tag, "prompt": "", "include": list(include)} | ({"exclude": list(exclude)} if exclude else {})


# --- rules


def test_single_object() -> None:
    row = row_of("single_object", clause("cat"))
    assert scores(row, detection(("cat", 0.31, LEFT))) == (1, 1)
    assert scores(row, detection(("cat", 0.29, LEFT), ("dog", 0.9, RIGHT))) == (0, 0)  # not above the threshold
    assert scores(row, detection(*CAT_CATS)) == (1, 1)  # more do no harm
    assert scores(row, detection()) == (0, 0)


def test_two_object() -> None:
    row = row_of("two_object", clause("cat"), clause("dog"))
    assert scores(row, detection(("dog", 0.5, LEFT), ("cat", 0.4, RIGHT))) == (1, 1)
    assert scores(row, detection(("dog", 0.5, LEFT))) == (0, 0.5)
    assert scores(row, detection(("bird", 0.5, LEFT))) == (0, 0)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [(0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (4, 2 / 3), (5, 1 / 3), (6, 0), (8, 0)],
)
def test_counting(seen: int, expected: float) -> None:
    row = row_of("counting", clause("cat", 3), exclude=[clause("cat", 4)])
    got = scores(row, detection(*CAT_CATS[:seen]))
    assert got == pytest.approx((float(seen == 3), expected))
    unsure = [("cat", 0.9, box) for _, _, box in CAT_CATS]  # not above the threshold of counting
    assert scores(row, detection(*CAT_CATS[:seen], *unsure)) == got


def test_exclude_needs_no_include_of_the_same_class() -> None:
    row = row_of("counting", clause("cat", 2), exclude=[clause("dog")])
    assert scores(row, detection(*CAT_CATS[:2])) == (1, 1)
    assert scores(row, detection(*CAT_CATS[:2], ("dog", 0.95, LEFT))) == (0, 0)  # none allowed
    assert scores(row, detection(*CAT_CATS[:2], ("dog", 0.5, LEFT))) == (1, 1)
    twice = row_of("counting", clause("cat", 2), exclude=[clause("cat", 3), clause("dog", 4)])
    dogs = [("dog", 0.95, LEFT)] * 4
    assert scores(twice, detection(*CAT_CATS[:3], *dogs)) == pytest.approx((0, (1 - 1 / 2) * (1 - 1 / 3)))


def test_colors() -> None:
    row = row_of("colors", clause("cat", color="red"))
    found = detection(("cat", 0.9, LEFT), ("cat", 0.8, RIGHT))
    assert scores(row, found, ["red", "blue"]) == (1, 1)
    assert scores(row, found, ["blue", "red"]) == (0, 0.5)  # the surest counts
    assert scores(row, detection(), []) == (0, 0)
    two = row_of("colors", clause("cat", 2, color="red"))
    assert scores(two, found, ["red", "blue"]) == (0, 0.75)
    assert scores(two, detection(("cat", 0.9, LEFT)), ["red"]) == (0, 0.5)
    assert coloured(row, objects(found, row)) == [(0, "cat")]
    assert coloured(two, objects(found, two)) == [(0, "cat"), (1, "cat")]


def test_position() -> None:
    row = row_of("position", clause("dog"), clause("cat", position=["left of", 0]))
    assert scores(row, detection(("cat", 0.9, LEFT), ("dog", 0.9, RIGHT))) == (1, 1)
    # dog 1, cat (found 1, stands right 0) / 2
    assert scores(row, detection(("cat", 0.9, RIGHT), ("dog", 0.9, LEFT))) == (0, 0.75)
    assert scores(row, detection(("cat", 0.9, LEFT))) == (0, 0.25)
    assert scores(row, detection(("dog", 0.9, LEFT))) == (0, 0.5)
    surest = detection(("cat", 0.5, LEFT), ("cat", 0.9, RIGHT), ("dog", 0.9, LEFT))
    assert scores(row, surest) == (0, 0.75)  # the surest cat stands right of the dog
    two = row_of("position", clause("dog", 2), clause("cat", position=["left of", 0]))
    half = detection(("cat", 0.9, TOP), ("dog", 0.9, RIGHT), ("dog", 0.9, LEFT))
    assert scores(two, half) == pytest.approx((0, (1 + (1 + 1 / 2) / 2) / 2))


def test_color_attr() -> None:
    row = row_of("color_attr", clause("cat", color="red"), clause("dog", color="blue"))
    found = detection(("cat", 0.9, LEFT), ("dog", 0.8, RIGHT))
    assert scores(row, found, ["red", "blue"]) == (1, 1)
    assert scores(row, found, ["blue", "red"]) == (0, 0.5)
    assert scores(row, found, ["red", "red"]) == (0, 0.75)
    assert scores(row, detection(("dog", 0.8, RIGHT)), ["blue"]) == (0, 0.5)


def test_relations() -> None:
    a = (0, 0, 10, 10)
    assert relations(a, (20, 0, 30, 10)) == {"left of"}
    assert relations((20, 0, 30, 10), a) == {"right of"}
    assert relations(a, (0, 20, 10, 30)) == {"above"}
    assert relations((0, 20, 10, 30), a) == {"below"}
    assert relations(a, (20, 20, 30, 30)) == {"left of", "above"}  # (20 - 2) / 28.3 = 0.64 each
    assert relations(a, a) == set()
    assert relations(a, (2, 0, 12, 10)) == set()  # shortened by 0.1 (10 + 10) to nothing
    # (x - 2) / x > 0.5 from x = 4 on
    assert relations(a, (4.0, 0, 14.0, 10)) == set()
    assert relations(a, (4.1, 0, 14.1, 10)) == {"left of"}
    # the direction keeps its full length: (12 - 2) / 16.6 = 0.60, (11.5 - 6) / 16.6 = 0.33
    assert relations((0, 0, 10, 30), (12, 11.5, 22, 41.5)) == {"left of"}


def test_no_more_than_sixteen_of_a_class() -> None:
    found = detection(*[("cat", 0.5 + 0.01 * i, LEFT) for i in range(20)], ("dog", 0.4, RIGHT))
    own = objects(found, row_of("single_object", clause("cat")))
    assert own == {"cat": list(range(19, 3, -1)), "dog": [20]}
    assert objects(found, row_of("counting", clause("cat")))["cat"] == []


def test_the_reward_scores_the_images_that_have_a_row() -> None:
    images = torch.rand(4, 3, H, W)
    found = {
        1: detection(("cat", 0.9, LEFT), ("dog", 0.9, RIGHT)),
        3: detection(("cat", 0.4, LEFT), ("cat", 0.9, RIGHT), ("cat", 0.8, TOP)),
    }

    def detect(part: Tensor) -> list[Detection]:
        return [found[next(i for i in range(4) if torch.equal(images[i], image))] for image in part]

    def classify(crops: Sequence[Tensor], names: Sequence[str]) -> list[str]:
        assert list(names) == ["dog", "cat", "cat"]
        assert [part.shape for part in crops] == [(3, 8, 8)] * 3
        torch.testing.assert_close(crops[0], (images[1, :, 12:20, 24:32] * 255).round() / 255)
        return ["blue", "red", "blue"]

    rows = {
        1: row_of("color_attr", clause("cat"), clause("dog", color="blue")),
        3: row_of("colors", clause("cat", 2, color="red")),
    }
    metadata = [None, {"geneval": rows[1]}, {"ocr": "x"}, {"geneval": rows[3]}]
    for rule, expected in ((strict, [0, 1, 0, 0]), (graded, [0, 1, 0, 0.75])):
        result = reward_of(detect, classify, CPU, rule)(images, [""] * 4, metadata)
        assert isinstance(result, Scores)
        assert result.values.tolist() == expected
        assert result.applicable.tolist() == [False, True, False, True]
    nothing = reward_of(detect, classify, CPU, strict)(images, [""] * 4, [{}] * 4)
    assert isinstance(nothing, Scores)
    assert not nothing.applicable.any()


# --- detector


def log(probabilities: list[list[float]]) -> Tensor:
    return torch.tensor(probabilities).log()


def test_instances_by_hand() -> None:
    classes = log([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8], [0.5, 0.4, 0.1]])
    masks = torch.full((4, 4, 4), -9.0)
    masks[0, :, :2] = torch.tensor(3.0).log()  # probability 3/4
    masks[1, 2, 3] = torch.tensor(9.0).log()  # 9/10
    masks[2] = 9.0
    found = instances(classes, masks, (4, 4), (4, 4), (4, 4), threshold=0.3)
    torch.testing.assert_close(found.scores, torch.tensor([0.8 * 0.9, 0.7 * 0.75]), rtol=1e-5, atol=0)
    assert found.labels.tolist() == [1, 0]
    assert found.boxes.tolist() == [[3, 2, 4, 3], [0, 0, 2, 4]]
    assert found.masks[1].int().tolist() == [[1, 1, 0, 0]] * 4
    low = instances(classes, masks, (4, 4), (4, 4), (4, 4), threshold=0.12)
    torch.testing.assert_close(low.scores, torch.tensor([0.72, 0.525, 0.15]), rtol=1e-5, atol=0)
    assert low.labels.tolist() == [1, 0, 1]  # one query as two classes; a mask that is empty is nothing


def test_masks_are_enlarged_before_they_are_cut_and_lose_the_padding() -> None:
    # Enlarged to the padded input: columns 1, 0.5, -0.5, -1, of which two are the image; enlarged to it: 1 ... 0.5.
    masks = torch.tensor([[[1.0, -1.0], [1.0, -1.0]]])
    found = instances(log([[0.9, 0.1]]), masks, (4, 4), (4, 2), (8, 4), threshold=0.3)
    columns = torch.tensor([1, 0.875, 0.625, 0.5])
    torch.testing.assert_close(found.scores, 0.9 * columns.sigmoid().mean()[None], rtol=1e-5, atol=0)
    assert found.boxes.tolist() == [[0, 0, 4, 8]]
    assert found.masks.shape == (1, 8, 4)
    nothing = instances(log([[0.9, 0.1]]), -masks.abs(), (4, 4), (4, 2), (8, 4), threshold=0.3)
    assert [list(x.shape) for x in nothing] == [[0, 4], [0], [0], [0, 8, 4]]
    unsure = instances(log([[0.2, 0.8]]), masks, (4, 4), (4, 2), (8, 4), threshold=0.3)
    assert [list(x.shape) for x in unsure] == [[0, 4], [0], [0], [0, 8, 4]]


def test_no_more_than_a_hundred_pairs() -> None:
    masks = torch.full((150, 1, 1), 9.0)
    classes = torch.zeros(150, 2)
    classes[:, 0] = torch.linspace(1, 2, 150)
    found = instances(classes, masks, (1, 1), (1, 1), (2, 2), threshold=0.3)
    assert len(found.scores) == 100
    assert found.scores[-1] > classes[49].softmax(0)[0] * 0.99


@pytest.mark.parametrize("shape", [(64, 64), (48, 120), (210, 50)])
def test_pixels_are_the_processors(shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    image = F.interpolate(torch.rand(1, 3, 8, 8, generator=g), shape, mode="bilinear")
    pixels, (height, width) = prepare(image)
    processor = Mask2FormerImageProcessorPil(size={"shortest_edge": 800, "longest_edge": 1333}, size_divisor=0)
    picture = Image.fromarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy())
    expected = processor(picture, return_tensors="pt").pixel_values
    assert expected.shape[-2:] == (height, width)
    assert all(side % 32 == 0 for side in pixels.shape[-2:])
    difference = (pixels[..., :height, :width] - expected).abs() * 255 * 0.226
    assert difference.max() < 2.1  # one rounding along each axis
    assert difference.mean() < 0.05  # of 255: ties go the other way
    assert not pixels[..., height:, :].any()
    assert not pixels[..., width:].any()


# --- models


def make_detector(folder: Path, labels: int = 80) -> Path:
    """A tiny detector that takes everything for a cat."""
    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, out_features=stages)
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=8,
        encoder_layers=1, decoder_layers=1, num_attention_heads=2, dim_feedforward=8, num_queries=3, num_labels=labels,
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.bias[CLASSES.index("cat")] = 20.0
    model.save_pretrained(folder)
    return folder


def make_clip(folder: Path) -> Path:
    """A tiny CLIP whose embeddings depend on their input."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + ["-"]
    words = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    V = len(words)
    width = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**width, "vocab_size": V, "max_position_embeddings": 40}
        | {"bos_token_id": V - 2, "eos_token_id": V - 1, "pad_token_id": V - 1},
        vision_config={**width, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim and "norm" not in name:
                p.normal_(0, 0.4)
    model.save_pretrained(folder)
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    return folder


def test_colours_are_those_of_the_masked_crop(tmp_path: Path) -> None:
    clip = load_clip("geneval", CPU, str(make_clip(tmp_path)))
    images = F.interpolate(torch.rand(12, 3, 2, 2).round(), (H, W), mode="nearest")
    masked = detection(("hot dog", 0.9, (3, 5, 25, 22)))
    masked.masks[0, 8:12, 6:20] = False
    got = classifier(clip)([crop(image, masked, 0) for image in images], ["hot dog"] * 12)

    texts = [
        [f"a photo of a {c} hot dog", f"a photo of a {c}-colored hot dog", f"a photo of a {c} object"] for c in COLOURS
    ]
    with torch.no_grad():
        directions = []
        for three in texts:
            features = [clip.model.get_text_features(**clip.tokenizer(t, return_tensors="pt")) for t in three]
            directions.append(F.normalize(torch.cat([F.normalize(f.pooler_output) for f in features]).mean(0), dim=0))
        processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        expected = []
        for image in images:
            picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
            blank = Image.new("RGB", picture.size, "#999")
            mask = Image.fromarray(masked.masks[0].numpy().astype(np.uint8) * 255)
            part = Image.composite(picture, blank, mask).crop((3, 5, 25, 22))
            pixels = processor(part, return_tensors="pt").pixel_values
            feature = clip.model.get_image_features(pixels).pooler_output[0]
            expected.append(COLOURS[int((torch.stack(directions) @ feature).argmax())])
    assert got == expected
    assert len(set(got)) > 1


def test_a_long_crop_is_cut_to_its_middle() -> None:
    image = torch.linspace(0, 1, W).expand(3, H, W)
    part = crop(image, detection(("cat", 0.9, (0, 4, 32, 6))), 0)
    assert part.shape == (3, 2, 8)
    torch.testing.assert_close(part[0, 0], (image[0, 0, 12:20] * 255).round() / 255)


def test_both_models_are_loaded_and_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reference.rewards.detector._SHORTEST", 64)
    source = f"{make_detector(tmp_path / 'detector')},{make_clip(tmp_path / 'clip')}"
    images = torch.rand(2, 3, H, W)
    [first, _] = load_detector("geneval", CPU, str(tmp_path / "detector"), threshold=0.3)(images)
    assert {CLASSES[i] for i in first.labels.tolist()} == {"cat"}
    assert first.masks.shape[1:] == (H, W)
    cats = len(first.scores)
    assert 1 <= cats <= 3

    metadata = [{"geneval": row_of("two_object", clause("cat"), clause("dog"))}, None]
    result = load(CPU, source)(images, [""] * 2, metadata)
    assert isinstance(result, Scores)
    assert result.values.tolist() == [0.5, 0]
    assert result.applicable.tolist() == [True, False]
    metadata = [{"geneval": row_of("single_object", clause("cat", cats))}] * 2
    result = load_strict(CPU, source)(images[:1].expand(2, 3, H, W), [""] * 2, metadata)
    assert isinstance(result, Scores)
    assert result.values.tolist() == [1, 1]
    metadata = [{"geneval": row_of("colors", clause("cat", color=colour))} for colour in COLOURS]
    result = load(CPU, source)(images[:1].expand(10, 3, H, W), [""] * 10, metadata)
    assert isinstance(result, Scores)
    assert sorted(result.values.tolist()) == [0.5] * 9 + [1.0]  # one of the ten colours


def test_detectors_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        load(CPU, str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="80 classes, got one of 30"):
        load(CPU, str(make_detector(tmp_path / "others", labels=30)))
    folder = make_detector(tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    del weights["class_predictor.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 are missing, class_predictor\.weight first"):
        load(CPU, str(folder))
