"""Made prompts: files that read back, and held-out ones that nothing trains on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reference.__main__ import main
from reference.errors import ConfigError
from reference.prompts.files import read_source
from reference.prompts.made import make_lines, write_prompts

KINDS = ("general", "ocr", "geneval")


def test_a_folder_is_no_file_of_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for out, message in ((".", "--out: expected the name of a file"), ("file/x.txt", "--out: cannot write file/x.txt")):
        with pytest.raises(ConfigError, match=message):
            write_prompts("general", Path(out), 0, count=1, test_count=1)


@pytest.mark.parametrize("kind", KINDS)
def test_files_read_back_and_share_no_prompt_whatever_the_seeds(kind: str, tmp_path: Path) -> None:
    trained, tests = set(), set()
    for seed in (0, 1):
        paths = write_prompts(kind, tmp_path / f"{seed}" / kind, seed, count=300, test_count=100)
        assert paths[1].name == f"{kind}-test"
        found = [read_source(f"{'text' if kind == 'general' else kind}:{path}") for path in paths]
        assert [len({prompt.text for prompt in prompts}) for prompts in found] == [300, 100]
        trained |= {prompt.text for prompt in found[0]}
        tests |= {prompt.text for prompt in found[1]}
        for prompt in found[0]:
            assert {"general": set(), "ocr": {"ocr"}, "geneval": {"geneval"}}[kind] == prompt.metadata.keys()
    assert not trained & tests
    assert len(trained) > 300


@pytest.mark.parametrize("kind", KINDS)
def test_the_format_of_a_file_is_seen_without_being_told(kind: str, tmp_path: Path) -> None:
    path, _ = write_prompts(kind, tmp_path / kind, 0, count=20, test_count=5)
    assert read_source(path) == read_source(f"{'text' if kind == 'general' else kind}:{path}")


def test_a_file_that_is_missing_says_how_to_make_it() -> None:
    with pytest.raises(ConfigError, match=r"no file prompts/ocr-test\.txt.* python -m reference make-prompts ocr$"):
        read_source("ocr:prompts/ocr-test.txt")


def test_more_begin_with_the_same_and_there_is_an_end() -> None:
    for kind in ("general", "ocr"):
        assert make_lines(kind, 0, 50, held_out=True)[:20] == make_lines(kind, 0, 20, held_out=True)
    assert len(make_lines("general", 0, 4800, held_out=False)) == 4800
    with pytest.raises(ConfigError, match="count: expected 1 to 4800 different general prompts, got 4801"):
        make_lines("general", 0, 4801, held_out=False)
    with pytest.raises(ConfigError, match="count: expected 1 to 1200 different general prompts, got 0"):
        make_lines("general", 0, 0, held_out=True)


def test_the_command_writes_both_files_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["make-prompts", "ocr", "--count", "30", "--test-count", "10"]) == 0
    said = capsys.readouterr().out
    assert "30 prompts to train on: prompts/ocr.txt" in said
    assert "10 held-out prompts, none of them there: prompts/ocr-test.txt" in said
    assert main(["make-prompts", "ocr"]) == 2
    assert "prompts/ocr.txt exists" in capsys.readouterr().err
    assert main(["make-prompts", "geneval", "--out", "prompts/geneval-test.jsonl"]) == 2
    assert "give prompts/geneval.jsonl" in capsys.readouterr().err
    assert sorted(path.name for path in Path("prompts").iterdir()) == ["ocr-test.txt", "ocr.txt"]
    with pytest.raises(ConfigError, match="cannot write"):
        write_prompts("ocr", Path("prompts/ocr.txt/below"), 0, count=3, test_count=3)
