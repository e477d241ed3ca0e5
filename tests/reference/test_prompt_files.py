"""Files of prompts, their formats and faults, and mixtures of several."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from reference.errors import ConfigError
from reference.interfaces import Prompt
from reference.prompts.files import mixture_of_epoch, parse_spec, passes, read_mixture, read_source
from reference.prompts.geneval import make_geneval_prompts

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


def test_blank_prompts_are_no_prompts_in_any_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in {
        "rows.jsonl": '{"prompt": "a cat"}\n{"prompt": "  "}\n{"prompt": ""}\n',
        "rows.json": '[{"prompt": "a cat"}, {"prompt": "  "}, ""]',
        "rows.csv": 'id,prompt\n0,a cat\n1,"  "\n2,\n3,\n',
    }.items():
        assert read_source(write(tmp_path, text, name)) == [Prompt("a cat")], name
        assert "2 blank lines are skipped" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="an empty file"):
        read_source(write(tmp_path, '{"prompt": " "}\n', "none.jsonl"))


def test_line_ends_of_all_kinds_and_within_cells(tmp_path: Path) -> None:
    two = ["a red dog in a park", "a cat"]
    for end in ("\n", "\r\n", "\r"):
        assert [p.text for p in read_source(write(tmp_path, end.join(two) + end))] == two
        table = end.join(["prompt,id", f'"a red dog{end}in a park",0', "a cat,1", ""])
        assert [p.text for p in read_source(write(tmp_path, table, "table.csv"))] == two


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
    found = faults(write(tmp_path, 'a "cat"\na cat\na ""\n\na "dog"\na "cow" 24" high\n'))
    assert list(found) == [2, 3]
    assert "between quotes" in found[2]
    assert "got nothing" in found[3]


def test_blank_lines_are_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "\na cat\n \na dog\n\n")
    assert [p.text for p in read_source(path)] == ["a cat", "a dog"]
    assert "3 blank lines are skipped" in capsys.readouterr().err
    assert [p.text for p in read_source(write(tmp_path, "a cat\r\n\r\na dog\r\n", "crlf.txt"))] == ["a cat", "a dog"]
    assert "1 blank line is skipped" in capsys.readouterr().err
    read_source(write(tmp_path, "a cat\na dog\n", "none.txt"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("line", "target"),
    [
        ('a sign that says "OPEN"', "OPEN"),
        ("a sign that says \u201cOPEN\u201d", "OPEN"),
        ("a sign that says \u201eOPEN\u201c", "OPEN"),
        ("a sign that says \u201dOPEN\u201d", "OPEN"),
        ("a sign that says \u00abOPEN\u00bb", "OPEN"),
        ("a sign that says \u00bbOPEN\u00ab", "OPEN"),
        ("a sign that says \u2039OPEN\u203a", "OPEN"),
        ("a sign that says \u300cOPEN\u300d", "OPEN"),
        ("a sign that says \u300eOPEN\u300f", "OPEN"),
        ("a sign that says \u2018OPEN\u2019", "OPEN"),
        ("a sign that says \u2018DON\u2019T\u2019 here", "DON\u2019T"),
        ('the cat\u2019s sign says \u201cYES\u201d and "NO"', "YES"),
        ("the cat's sign says \"IT'S\"", "IT'S"),
        ("rock 'n' roll on a sign: \u00ab OPEN \u00bb", "OPEN"),
    ],
)
def test_the_first_quoted_text_of_any_kind_is_the_target(tmp_path: Path, line: str, target: str) -> None:
    (prompt,) = read_source(write(tmp_path, line + "\n"))
    assert prompt == Prompt(line, {"ocr": target})


@pytest.mark.parametrize("line", ["the cat's toy", "rock 'n' roll", "the cats\u2019 toys, don\u2019t", "'til dawn"])
def test_apostrophes_are_no_quotes(tmp_path: Path, line: str) -> None:
    assert read_source(write(tmp_path, line + "\n")) == [Prompt(line)]
    assert list(faults("ocr:" + str(write(tmp_path, line + "\n")))) == [1]


def test_arrays_objects_and_tables_are_read_as_what_they_are(tmp_path: Path) -> None:
    two = ["a cat", "a dog"]
    files = {
        "array.txt": json.dumps(two),
        "indented.json": json.dumps(two, indent=1),
        "objects.json": json.dumps([{"prompt": text, "id": i} for i, text in enumerate(two)]),
        "lines.jsonl": "".join(json.dumps({"prompt": text}) + "\n" for text in two),
        "table.csv": 'id,prompt\n0,a cat\n1,"a dog"\n',
        "table.tsv": "prompt\tid\na cat\t0\na dog\t1\n",
        "mark.txt": "\ufeffa cat\na dog\n",
    }
    for name, text in files.items():
        assert [p.text for p in read_source(write(tmp_path, text, name))] == two, name
    quoted = write(tmp_path, json.dumps(['a "CAT"', 'a "DOG"']), "quoted.json")
    assert [p.metadata["ocr"] for p in read_source(quoted)] == ["CAT", "DOG"]
    rows = write(tmp_path, json.dumps([ROW]), "geneval.json")
    assert [p.metadata["geneval"] for p in read_source(rows)] == [ROW]
    assert [p.text for p in read_source(write(tmp_path, "[style] a cat [4k]\n"))] == ["[style] a cat [4k]"]


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("a.txt", "a cat".encode("utf-16"), "UTF-16"),
        ("a.txt", b"PK\x03\x04rest", "zip"),
        ("a.txt", b"\x1f\x8brest", "gzip"),
        ("a.txt", b"PAR1rest", "Parquet"),
        ("a.txt", b"a\0b", "binary"),
        ("a.yaml", b"- a cat\n", "YAML"),
        ("a.txt", b"- a cat\n- a dog\n", "a dash"),
        ("a.json", b'{\n "prompts": ["a cat"]\n}\n', "JSON document"),
        ("a.json", b'[\n "a cat",\n]\n', "JSON array"),
        ("a.json", b"[1, 2]", "expected a text or an object"),
        ("a.csv", b"text,id\na cat,0\n", "column named prompt"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path: Path, name: str, data: bytes, kind: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=kind):
        read_source(tmp_path / name)


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
    assert list(found) == [2, 4, 5]
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
    good, bad = write(tmp_path, "a cat\n", "good.txt"), write(tmp_path, 'a "cat"\na dog\n', "bad.txt")
    assert read_mixture([good, f"{good}#ocr"]) == [[Prompt("a cat")], [Prompt("a cat", {}, ("ocr",))]]
    with pytest.raises(ConfigError) as error:
        read_mixture([f"ocr:{bad}", good, tmp_path / "none.txt"])
    assert "line 2: expected a text between quotes" in str(error.value)
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
