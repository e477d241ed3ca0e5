"""Files of prompts, their formats and faults, and mixtures of several."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from reference.errors import ConfigError
from reference.geneval_prompts import make_geneval_prompts
from reference.prompt_files import Prompt, mixture_of_epoch, parse_spec, passes, read_mixture, read_source

ROW = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}


def write(tmp_path: Path, text: str, name: str = "prompts.txt") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, '\ufeffa cat\r\na "dog"\r\n  a cow  \r\na\u2028cat\r\na cat')
    assert read_source(path) == [Prompt(t, {}, None) for t in ("a cat", 'a "dog"', "a cow", "a\u2028cat", "a cat")]


def test_an_ocr_file_has_the_first_quoted_text(tmp_path: Path) -> None:
    path = write(tmp_path, 'A sign that says "Keep  Out" and "No"\nA shop named " ICE "\n')
    first, second = read_source(path)
    assert first == Prompt('A sign that says "Keep  Out" and "No"', {"ocr": "Keep  Out"}, None)
    assert second.metadata == {"ocr": "ICE"}


def test_a_geneval_file_has_its_rows(tmp_path: Path) -> None:
    lines = f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n"
    expected = [Prompt("a photo of a bench", {"geneval": ROW}, None)] * 2
    assert read_source(write(tmp_path, lines)) == expected
    assert read_source(write(tmp_path, lines, "rows.jsonl")) == expected


def test_the_format_can_be_forced_and_the_rewards_restricted(tmp_path: Path) -> None:
    path = write(tmp_path, 'a "cat"\na "dog"\n')
    assert read_source(f"text:{path}#pickscore, hpsv2") == [
        Prompt('a "cat"', {}, ("pickscore", "hpsv2")),
        Prompt('a "dog"', {}, ("pickscore", "hpsv2")),
    ]
    assert read_source(path)[0].metadata == {"ocr": "cat"}
    assert parse_spec(r"C:\prompts.txt").path == Path(r"C:\prompts.txt")
    assert parse_spec("ocr:a:b.txt") == (Path("a:b.txt"), "ocr", None)


@pytest.mark.parametrize("spec", ["", "ocr:", "#ocr", "a.txt#", "a.txt#ocr,,pickscore"])
def test_a_source_without_its_parts(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"expected \[format:\]path"):
        read_source(spec)


def faults(spec: str | Path) -> dict[int, str]:
    """The lines at fault, by number."""
    with pytest.raises(ConfigError) as error:
        read_source(spec)
    lines = [line.strip().removeprefix("line ").split(": ", 1) for line in str(error.value).splitlines()[1:]]
    return {int(number): message for number, message in lines}


def test_every_line_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    assert faults(write(tmp_path, "\na cat\n \na dog\n\n")) == {1: "empty", 3: "empty", 5: "empty"}
    found = faults(write(tmp_path, 'a "cat"\na cat\na ""\n\na "dog"\na "cow" 24" high\n'))
    assert list(found) == [2, 3, 4]
    assert "straight double quotes" in found[2]
    assert "got nothing" in found[3]
    assert found[4] == "empty"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " "}, "prompt: expected a text"),
        ({"tag": "colours"}, "tag: expected one of"),
        ({"tag": ["counting"]}, "tag: expected one of"),
        ({"include": []}, "include: expected a list of clauses, got []"),
        ({"include": ["bench"]}, "include[0]: expected an object"),
        ({"include": [{"class": "remote", "count": 1}]}, "include[0].class: expected one of GenEval's 80"),
        ({"include": [{"class": "bench"}]}, "include[0].count: expected an integer from 1 to 16, got None"),
        ({"include": [{"class": "bench", "count": True}]}, "include[0].count"),
        ({"include": [{"class": "bench", "count": 17}]}, "include[0].count"),
        ({"include": [{"class": "bench", "count": 1, "color": "grey"}]}, "include[0].color"),
        ({"include": [{"class": "bench", "count": 1, "colour": "red"}]}, "include[0]: expected the keys"),
        ({"include": [{"class": "bench", "count": 1, "position": ["above", 0]}]}, "expected a clause before it"),
        ({"exclude": [{"class": "bench", "count": 0}]}, "exclude[0].count"),
        ({"exclude": [{"class": "bench", "count": 2, "color": "red"}]}, "exclude[0]: expected the keys"),
        ({"exclude": {}}, "exclude: expected a list"),
    ],
)
def test_a_row_that_cannot_be_judged_is_named(tmp_path: Path, change: dict, message: str) -> None:
    text = f"{json.dumps(ROW)}\n{json.dumps(ROW | change)}\n"
    found = faults(write(tmp_path, text, "rows.jsonl"))
    assert list(found) == [2]
    assert message in found[2]


@pytest.mark.parametrize("position", [["above", 1], ["above", -1], ["near", 0], ["above"], "above"])
def test_a_position_is_relative_to_an_earlier_clause(tmp_path: Path, position: object) -> None:
    row = ROW | {"include": [{"class": "bench", "count": 1}, {"class": "cat", "count": 1, "position": position}]}
    assert "include[1].position" in faults(write(tmp_path, json.dumps(row)))[1]


def test_lines_that_are_no_json(tmp_path: Path) -> None:
    found = faults(write(tmp_path, f"{json.dumps(ROW)}\n{{\n\n[1]\na cat\n"))
    assert list(found) == [2, 3, 4, 5]
    assert found[3] == "empty"
    assert "expected a JSON object, got [1]" in found[4]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_source(tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ConfigError, match="cannot read"):
        read_source(tmp_path / "binary")
    with pytest.raises(ConfigError, match="an empty file"):
        read_source(write(tmp_path, ""))


def test_the_faults_of_all_sources_are_in_one_error(tmp_path: Path) -> None:
    good, bad = write(tmp_path, "a cat\n", "good.txt"), write(tmp_path, "a cat\n\n", "bad.txt")
    assert read_mixture([good, f"{good}#ocr"]) == [[Prompt("a cat")], [Prompt("a cat", {}, ("ocr",))]]
    with pytest.raises(ConfigError) as error:
        read_mixture([bad, good, tmp_path / "none.txt"])
    assert "line 2: empty" in str(error.value)
    assert "none.txt" in str(error.value)


def test_the_default_metadata_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        Prompt("a cat").metadata["ocr"] = "CAT"  # type: ignore[index]


def source(name: str, size: int) -> list[Prompt]:
    return [Prompt(f"{name}{i}") for i in range(size)]


def names(prompts: list[Prompt]) -> str:
    return "".join(prompt.text[0] for prompt in prompts)


def test_prompts_come_in_the_order_in_which_they_are_due() -> None:
    sources = [source("a", 5), source("b", 3), source("c", 1)]
    # due at 1/2 + j over 3/6, 2/6, 1/6: a 1 3 5, b 1.5 4.5, c 3; ties in the order of the sources
    assert names(mixture_of_epoch(sources, (3, 2, 1), 6, 0, 0)) == "abacba"
    assert names(mixture_of_epoch(sources, (3, 2, 1), 3, 0, 1)) == "cba"
    assert names(mixture_of_epoch(sources[:2], (), 4, 0, 0)) == "abab"


@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.2, 0.1), (1e-3, 1, 5, 5), (1, 2, 3, 4, 5), (0.9, 1e-6)])
@pytest.mark.parametrize("count", [1, 7, 48])
def test_shares_hold_after_any_number_of_prompts(weights: tuple[float, ...], count: int) -> None:
    sources = [source("abcde"[i], 3 + i) for i in range(len(weights))]
    shares = [w / math.fsum(weights) for w in weights]
    given: Counter[str] = Counter()
    for epoch in range(30):
        for number, prompt in enumerate(mixture_of_epoch(sources, weights, count, 0, epoch), epoch * count + 1):
            given[prompt.text[0]] += 1
            for i, w in enumerate(shares):
                assert abs(given["abcde"[i]] - w * number) <= (1 + len(weights) * w) / 2 + 1e-9


def test_epochs_of_any_length_cut_one_stream() -> None:
    sources = [source("a", 4), source("b", 7), source("c", 2)]
    weights = (0.5, 0.3, 0.2)
    whole = mixture_of_epoch(sources, weights, 120, 3, 0)
    for count in (1, 8, 40):
        cut = [p for epoch in range(120 // count) for p in mixture_of_epoch(sources, weights, count, 3, epoch)]
        assert cut == whole
    assert mixture_of_epoch(sources, weights, 120, 4, 0) != whole


def test_each_source_is_gone_through_in_passes() -> None:
    sources = [source("a", 6), source("b", 6)]
    stream = mixture_of_epoch(sources, (1, 2), 54, 0, 0)
    for name, passed in (("a", 3), ("b", 6)):
        own = [p.text for p in stream if p.text[0] == name]
        turns = [own[6 * i : 6 * i + 6] for i in range(passed)]
        assert all(sorted(turn) == [f"{name}{i}" for i in range(6)] for turn in turns)
        assert len(set(map(tuple, turns))) == passed
    orders = [[p.text[1] for p in stream if p.text[0] == name][:6] for name in "ab"]
    assert orders[0] != orders[1]


def test_passes_are_the_same_everywhere() -> None:
    assert "".join(passes("abc", 0, 6, 0)) == "cabbac"
    assert [x for start in range(0, 40, 5) for x in passes(range(7), start, start + 5, "s")] == passes(
        range(7), 0, 40, "s"
    )
    assert passes("abc", 4, 4, 0) == []


@pytest.mark.parametrize("weights", [(1,), (1, 0), (1, -1), (1, math.nan), (1, math.inf)])
def test_weights_that_cannot_be_shares(weights: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.weights: expected 2 positive numbers"):
        mixture_of_epoch([source("a", 2), source("b", 2)], weights, 2, 0, 0)


def test_a_mixture_of_nothing() -> None:
    for sources in ([], [source("a", 1), []]):
        with pytest.raises(ConfigError, match="at least one source"):
            mixture_of_epoch(sources, (), 2, 0, 0)


def test_generated_rows_are_read_back(tmp_path: Path) -> None:
    rows = make_geneval_prompts(0, count=60)
    path = write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "rows.jsonl")
    assert [prompt.metadata["geneval"] for prompt in read_source(path)] == rows
