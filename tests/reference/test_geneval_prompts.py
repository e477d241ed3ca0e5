"""Generated prompts in GenEval's language."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from reference.errors import ConfigError
from reference.prompts.geneval import (
    CLASSES,
    COLOURS,
    TASKS,
    check_row,
    make_geneval_prompts,
)

EACH = dict.fromkeys(TASKS, 60)


def test_the_classes_are_cocos() -> None:
    assert len(set(CLASSES)) == 80
    places = {0: "person", 16: "dog", 62: "tv", 64: "computer mouse", 65: "tv remote", 66: "computer keyboard"}
    assert {i: CLASSES[i] for i in places} == places
    assert CLASSES[-1] == "toothbrush"


@pytest.mark.parametrize("task", TASKS)
def test_rows_of_a_task(task: str) -> None:
    rows = make_geneval_prompts(0, per_task={task: 60})
    assert len({row["prompt"] for row in rows}) == 60
    keys = [sorted(set(clause) - {"class", "count"}) for clause in rows[0]["include"]]
    expected = {"colors": [["color"]], "position": [[], ["position"]], "color_attr": [["color"], ["color"]]}
    assert keys == expected.get(task, [[]] * len(keys))
    for row in rows:
        check_row(row)
        assert row["tag"] == task
        assert ("exclude" in row) == (task == "counting")
        assert len({clause["class"] for clause in row["include"]}) == len(row["include"])


def test_prompts_ask_for_what_the_rows_say() -> None:
    words = {"": 1, "two ": 2, "three ": 3, "four ": 4}
    for row in make_geneval_prompts(3, per_task=EACH):
        text = row["prompt"].removeprefix("a photo of ")
        include = row["include"]
        if row["tag"] == "counting":
            [clause] = include
            assert words[re.match("two |three |four |", text)[0]] == clause["count"]  # type: ignore[index]
            assert row["exclude"] == [{"class": clause["class"], "count": clause["count"] + 1}]
            assert not text.endswith(clause["class"]) or clause["class"] == "sheep"
            continue
        ordered = include[::-1] if row["tag"] == "position" else include
        link = f" {include[1]['position'][0]} " if row["tag"] == "position" else " and "
        phrases = [" ".join(filter(None, (c.get("color"), c["class"]))) for c in ordered]
        assert re.sub(r"\b(a pair of|an?) (?=\w)", "", text) == link.join(phrases)


def test_articles_and_plurals() -> None:
    prompts = {row["prompt"] for row in make_geneval_prompts(0, per_task={"single_object": 80, "counting": 231})}
    for phrase in (
        "an apple", "a bench", "an umbrella", "a pair of skis", "a pair of scissors", "two people", "three knives",
        "four sheep", "two buses", "three wine glasses", "four toothbrushes", "two couches", "two computer mice",
        "three dogs",
    ):  # fmt: skip
        assert f"a photo of {phrase}" in prompts
    colours = {row["prompt"] for row in make_geneval_prompts(0, per_task={"colors": 790})}
    assert {"a photo of an orange car", "a photo of a red apple", "a photo of a pair of blue skis"} <= colours
    assert not any("person" in prompt for prompt in colours)
    assert Counter(next(c for c in COLOURS if f" {c} " in p) for p in colours)["red"] == 79


def test_shares_of_the_tasks() -> None:
    counts = Counter(row["tag"] for row in make_geneval_prompts(0, count=2000))
    assert sum(counts.values()) == 2000
    assert (counts["single_object"], counts["counting"]) == (80, 231)  # all there are
    assert {counts[task] for task in TASKS} == {80, 231, 422, 423}
    assert Counter(row["tag"] for row in make_geneval_prompts(0, count=7))["single_object"] == 2


def test_rows_depend_on_the_seed_alone_and_more_begin_with_the_same() -> None:
    few, more = ([row["prompt"] for row in make_geneval_prompts(0, per_task={"position": n})] for n in (20, 50))
    assert more[:20] == few
    assert few != [row["prompt"] for row in make_geneval_prompts(1, per_task={"position": 20})]
    assert few == [r["prompt"] for r in make_geneval_prompts(0, per_task=EACH) if r["tag"] == "position"][:20]


def test_the_two_sides_share_no_prompt_and_are_all_there_is() -> None:
    sides = [
        {row["prompt"] for seed in range(2) for row in make_geneval_prompts(seed, per_task=wanted, held_out=held_out)}
        for held_out, wanted in ((True, {"single_object": 15, "counting": 41, "colors": 158, "two_object": 1233}),
                                 (False, {"single_object": 65, "counting": 190, "colors": 632, "two_object": 5087}))
    ]  # fmt: skip
    assert not sides[0] & sides[1]
    assert [len(side) for side in sides] == [15 + 41 + 158 + 1233, 65 + 190 + 632 + 5087]
    counts = Counter(row["tag"] for row in make_geneval_prompts(0, count=500, held_out=True))
    assert set(counts) == set(TASKS)
    with pytest.raises(ConfigError, match="expected 0 to 15 different rows of single_object, got 16"):
        make_geneval_prompts(0, per_task={"single_object": 16}, held_out=True)


def test_more_than_there_are() -> None:
    with pytest.raises(ConfigError, match="expected 0 to 80 different rows of single_object, got 81"):
        make_geneval_prompts(0, per_task={"single_object": 81})
    with pytest.raises(ConfigError, match="expected tasks among single_object"):
        make_geneval_prompts(0, per_task={"colours": 1})
    for count in (0, 10**6):
        with pytest.raises(ConfigError, match="count: expected 1 to"):
            make_geneval_prompts(0, count=count)
