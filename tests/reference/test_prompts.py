"""Prompt sources and the order in which a run goes through them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reference.config.checks import validate
from reference.config.presets import preset
from reference.config.settings import Config, RolloutConfig
from reference.errors import ConfigError
from reference.interfaces import Prompt, plain_prompts
from reference.prompts import pool as pool_module
from reference.prompts.geneval import TASKS
from reference.prompts.made import write_prompts
from reference.prompts.pool import Pool, held_out_prompts, prompts_of_epoch, read_prompts, training_pool, world_prompts
from reference.run.inputs import prepare
from reference.splits import is_held_out


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, 'a red circle\n  the text "CAT"  \n')
    assert read_prompts(path) == plain_prompts(["a red circle", 'the text "CAT"'])
    pool = training_pool(Config(rollout=RolloutConfig(prompts=(str(path),), pool=5)))
    assert pool.sources == (tuple(read_prompts(path)),)


def test_a_file_of_the_world_may_say_its_format_and_rewards(tmp_path: Path) -> None:
    path = write(tmp_path, '{"prompt": "a red circle"}\nthe text "CAT"\n')
    for spec, rewards in ((f"text:{path}", None), (f"{path}#objects,jpeg", ("objects", "jpeg"))):
        (source,) = training_pool(Config(rollout=RolloutConfig(prompts=(spec,)))).sources
        assert source == (Prompt("a red circle", {}, rewards), Prompt('the text "CAT"', {}, rewards))
    for spec, message in ((f"ocr:{path}", r"expected \[text:\]path"), (f"{path}#jpg", "Did you mean 'jpeg'")):
        with pytest.raises(ConfigError, match=message):
            training_pool(Config(rollout=RolloutConfig(prompts=(spec,))))


def test_all_files_that_are_missing_are_named(tmp_path: Path) -> None:
    missing = tuple(str(tmp_path / name) for name in ("one.txt", "two.txt"))
    for base in (Config(), preset("sd35m")):
        with pytest.raises(ConfigError, match=r"(?s)one\.txt.*two\.txt"):
            training_pool(dataclasses.replace(base, rollout=RolloutConfig(prompts=missing)))


def test_more_prompts_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_KINDS", {"world": ("single",)})  # 36 prompts, of which a fifth is held out
    counts = [len(world_prompts(n, 0, held_out=h)) for n, h in ((30, False), (6, True))]
    assert sum(counts) == 36
    for held_out, name in ((False, r"rollout\.pool"), (True, r"log\.eval_prompts")):
        with pytest.raises(ConfigError, match=f"{name}: expected at most .*, as many as world has to offer, got 37"):
            world_prompts(37, 0, held_out=held_out)


def test_every_line_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a red circle\n\na purple cow\ntwo blue squares\ntwo blue square\n")
    with pytest.raises(ConfigError) as error:
        read_prompts(path)
    message = str(error.value)
    assert "line 2" not in message  # a blank line is skipped
    assert "line 3" in message
    assert "'a purple cow'" in message
    assert "line 5" in message
    assert "line 1:" not in message
    assert "line 4:" not in message


def test_a_prompt_that_is_too_long_for_the_encoder_is_named(tmp_path: Path) -> None:
    text = 'a red circle\na small red circle left of a large blue square and the text "CAT"\n'
    with pytest.raises(ConfigError, match="line 2: prompt: expected at most 10 tokens, got 14"):
        read_prompts(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"), [(text, "expected at least one prompt, got an empty file") for text in ("", "\n\n", " \n")]
)
def test_an_empty_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_prompts(write(tmp_path, text))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ConfigError, match="cannot read"):
        read_prompts(tmp_path / "binary")


@pytest.mark.parametrize("held_out", [True, False])
def test_generated_prompts_are_distinct_and_keep_to_their_side(held_out: bool) -> None:
    prompts = world_prompts(80, 0, held_out=held_out)
    assert len(set(prompts)) == 80
    assert all(is_held_out(prompt) == held_out for prompt in prompts)
    assert prompts == world_prompts(90, 0, held_out=held_out)[:80]
    assert prompts != world_prompts(80, 1, held_out=held_out)
    assert sum('the text "' in prompt for prompt in prompts) >= 32  # two kinds of five


def test_sources_with_a_text_and_without() -> None:
    """Prompts of one source are of its kinds alone; two sources have what one has of both."""
    with_text = world_prompts(40, 0, held_out=False, source="world:text")
    without = world_prompts(40, 0, held_out=False, source="world:objects")
    assert all('the text "' in prompt for prompt in with_text)
    assert not any('the text "' in prompt for prompt in without)
    world = preset("world")
    rollout = dataclasses.replace(world.rollout, prompts=("world:text", "world:objects"), held_out=("world:text",))
    config = dataclasses.replace(world, rollout=rollout)
    validate(config)
    assert [len(source) for source in training_pool(config).sources] == [64, 64]
    assert all('the text "' in prompt.text for prompt in held_out_prompts(config))
    few = dataclasses.replace(rollout, prompts=("world:text",), prompts_per_epoch=65)
    with pytest.raises(ConfigError, match=r"at most rollout\.pool = 64, got 65"):
        validate(dataclasses.replace(world, rollout=few))


def of_model(*sources: str, held_out: tuple[str, ...] = (), count: int = 60) -> Config:
    plain = preset("sd35m")
    rollout = RolloutConfig(prompts=sources, held_out=held_out)
    log = dataclasses.replace(plain.log, eval_prompts=count)
    return dataclasses.replace(plain, rollout=rollout, log=log)


def test_files_of_several_kinds_are_read_with_what_rewards_need(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat\na dog\n")
    (tmp_path / "b.txt").write_text('a sign "CAFE"\n')
    sources = f"{tmp_path}/a.txt#pickscore,hpsv2", f"{tmp_path}/b.txt"
    pool = training_pool(of_model(*sources))
    assert pool.sources == (
        (Prompt("a cat", {}, ("pickscore", "hpsv2")), Prompt("a dog", {}, ("pickscore", "hpsv2"))),
        (Prompt('a sign "CAFE"', {"ocr": "CAFE"}, None),),
    )
    texts = [[p.text for p in prompts_of_epoch(pool, 4, 0, epoch)] for epoch in range(2)]
    assert all(Counter(t) == {"a cat": 1, "a dog": 1, 'a sign "CAFE"': 2} for t in texts)
    held_out = held_out_prompts(of_model(*sources, held_out=sources))
    assert [p.text for p in held_out] == ["a cat", 'a sign "CAFE"', "a dog"]  # in turn
    assert held_out_prompts(of_model(*sources, held_out=sources, count=2)) == held_out[:2]
    with pytest.raises(ConfigError, match=r"rewards after # .* got 'pikscore'\. Did you mean 'pickscore'"):
        training_pool(of_model(f"{tmp_path}/a.txt#pikscore"))


def test_a_limit_of_held_out_prompts_leaves_no_task_out(tmp_path: Path) -> None:
    write_prompts("geneval", tmp_path / "geneval.jsonl", 0, count=60, test_count=500)
    config = of_model(f"{tmp_path}/geneval.jsonl", held_out=(f"{tmp_path}/geneval-test.jsonl",), count=12)
    tasks = Counter(prompt.metadata["geneval"]["tag"] for prompt in held_out_prompts(config))
    assert tasks == dict.fromkeys(TASKS, 2)


def test_held_out_prompts_that_are_trained_on_are_counted_or_refused(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.txt").write_text("a cat\na dog\n")
    (tmp_path / "b.txt").write_text("A  Cat\na bird\n")
    (tmp_path / "c.txt").write_text("a fox\n")
    at = {name: f"{tmp_path}/{name}.txt" for name in "abc"}
    plain = of_model(at["a"], held_out=(at["b"],))
    log = dataclasses.replace(plain.log, watch=())
    with_rewards = dataclasses.replace(plain, rewards=(f"{__name__}:zero",), log=log)
    prepare(with_rewards)
    assert "1 of 2 held-out prompts are training prompts too" in capsys.readouterr().err
    prepare(dataclasses.replace(with_rewards, rollout=of_model(at["a"], held_out=(at["c"],)).rollout))
    assert not capsys.readouterr().err
    with pytest.raises(ConfigError, match="all 2 held-out prompts are training prompts too"):
        prepare(dataclasses.replace(with_rewards, rollout=of_model(at["a"], held_out=(at["a"],)).rollout))


def zero(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward."""
    return torch.zeros(len(images))


def passes_of_epoch(prompts: Sequence[str], count: int, seed: int, epoch: int) -> list[str]:
    pool = Pool((tuple(plain_prompts(prompts)),))
    return [prompt.text for prompt in prompts_of_epoch(pool, count, seed, epoch)]


@pytest.mark.parametrize(("size", "count"), [(10, 3), (7, 7), (4, 6), (1, 2)])
def test_each_pass_uses_every_prompt_once(size: int, count: int) -> None:
    pool = [f"prompt {i}" for i in range(size)]
    epochs = 2 * size
    stream = [p for epoch in range(epochs) for p in passes_of_epoch(pool, count, 0, epoch)]
    assert len(stream) == epochs * count
    for start in range(0, len(stream) - size + 1, size):
        assert Counter(stream[start : start + size]) == Counter(pool)


def test_an_epoch_across_the_border_of_two_passes() -> None:
    passes = [passes_of_epoch("abc", 3, 0, turn) for turn in range(2)]
    second = passes_of_epoch("abc", 2, 0, 1)  # positions 2 and 3: the last of one pass, the first of the next
    assert second == [passes[0][2], passes[1][0]]
    # the same everywhere, or a run could not go on under another version of Python
    assert ["".join(p) for p in passes] == ["cab", "bac"]


def test_the_order_depends_on_seed_pass_and_epoch_alone() -> None:
    pool = [f"prompt {i}" for i in range(20)]
    first = [passes_of_epoch(pool, 20, 0, epoch) for epoch in range(3)]
    assert first[1] == passes_of_epoch(pool, 20, 0, 1)
    assert len({tuple(order) for order in first}) == 3
    assert passes_of_epoch(pool, 20, 1, 0) != first[0]
    halves = passes_of_epoch(pool, 10, 0, 0) + passes_of_epoch(pool, 10, 0, 1)
    assert halves == first[0]


def test_missing_training_and_held_out_files_are_named_at_once(tmp_path: Path) -> None:
    rollout = dataclasses.replace(Config().rollout, prompts=(str(tmp_path / "a"),), held_out=(str(tmp_path / "b"),))
    with pytest.raises(ConfigError) as found:
        prepare(dataclasses.replace(Config(), rollout=rollout))
    assert all(str(tmp_path / name) in str(found.value) for name in "ab")
