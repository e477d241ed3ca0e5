"""Judging a run: the trainer's own numbers again, bootstrap intervals, the paper's table, and the files."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reference.__main__ import main
from reference.config.flags import Evaluate
from reference.config.presets import preset
from reference.config.settings import Config, LogConfig, ModelConfig
from reference.config.toml import to_toml
from reference.errors import ConfigError, RewardError
from reference.experiments.evaluation import evaluate_run, prompts_of, reward_names, with_strict
from reference.experiments.paper import composite, paper_table
from reference.experiments.summary import (
    Evaluation,
    Judged,
    analyse,
    as_json,
    as_markdown,
    bootstrap,
    standings,
    write_csv,
)
from reference.interfaces import Scores
from reference.policy.adapters import adapter_state
from reference.policy.load import load_model
from reference.run import checkpoint
from reference.run.reading import records
from reference.train import train

NAN = float("nan")
TABLE = paper_table()
REWARDS = ("objects", "text", "jpeg")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps whose last evaluation and checkpoint are of the same weights."""
    tiny = preset("tiny")
    log = dataclasses.replace(tiny.log, eval_prompts=4, watch=("objects_strict",))
    optim = dataclasses.replace(tiny.optim, lr=5e-3)  # so that the images change
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    train(dataclasses.replace(tiny, run=folder, epochs=1, rewards=REWARDS, log=log, optim=optim))
    return folder


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


# --- a run


@pytest.mark.slow
def test_it_gives_the_trainers_own_evaluations(run: Path, tmp_path: Path) -> None:
    text = evaluate_run(Evaluate(run, folder=tmp_path, images=2, steps=2, base=True, device="cpu"))
    before, after = (record["per_prompt"] for record in records(run, "eval"))
    assert list(after) == [*REWARDS, "objects_strict"]
    for file, expected, close in (("prompts.csv", after, 1e-6), ("prompts-base.csv", before, 1e-4)):
        rows = rows_of(tmp_path / file)
        assert len(rows) == 4
        for name, column in expected.items():
            known = [None if row[name] == "" else float(row[name]) for row in rows]
            assert [x is None for x in known] == [x is None for x in column]
            assert [x for x in known if x is not None] == pytest.approx([x for x in column if x is not None], abs=close)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["epoch"], summary["step"], summary["prompts"], summary["steps"]) == (1, 2, 4, 2)
    assert {k: (v["trained"], v["prompts"]) for k, v in summary["rewards"].items()} == {
        "objects": (True, 3), "text": (True, 1), "jpeg": (True, 4), "objects_strict": (False, 3)
    }  # fmt: skip
    jpeg = summary["rewards"]["jpeg"]
    gains = np.array(after["jpeg"]) - np.array(before["jpeg"])
    assert jpeg["change"]["mean"] == pytest.approx(gains.mean(), abs=1e-4)
    assert abs(gains).max() > 1e-3  # the two models are different ones
    assert jpeg["change"]["low"] <= jpeg["change"]["mean"] <= jpeg["change"]["high"]
    assert summary["rewards"]["text"]["run"]["low"] is None  # one prompt tells nothing of the spread
    assert summary["composite"]["rewards"] == []
    assert text == (tmp_path / "summary.md").read_text()
    assert "| text | trained | 1 |" in text


def test_prompts_rewards_and_steps_of_ones_own(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('the text "CAT"\na red circle\na red circle\n', encoding="utf-8")
    (run / "evaluation").mkdir(exist_ok=True)
    stale = run / "evaluation" / "prompts-base.csv"
    stale.touch()
    flags = ["--run", str(run), "--prompts", str(prompts), "--rewards", "text", "colour", "--steps", "1"]
    assert main(["evaluate", *flags, "--device", "cpu"]) == 0
    assert f"files: {run / 'evaluation'}" in capsys.readouterr().out
    rows = rows_of(run / "evaluation" / "prompts.csv")
    assert list(rows[0]) == ["prompt", "text", "text_applicable", "colour", "colour_applicable"]
    assert [row["prompt"] for row in rows] == ['the text "CAT"', "a red circle", "a red circle"]
    assert [row["text_applicable"] for row in rows] == ["1", "0", "0"]
    assert [row["text"] == "" for row in rows] == [False, True, True]
    assert rows[1]["colour"] != rows[2]["colour"]  # the same prompt from other noise
    assert not stale.exists()


def test_a_reward_that_draws_random_numbers_says_the_same_every_time(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "drawn_here.py").write_text("import torch\ndef rand(images, *_):\n    return torch.rand(len(images))\n")
    (tmp_path / "prompts.txt").write_text("a red circle\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    flags = ["--run", str(run), "--prompts", str(tmp_path / "prompts.txt"), "--rewards", "drawn_here:rand"]
    said = []
    for _ in range(2):
        assert main(["evaluate", *flags, "--steps", "1", "--device", "cpu"]) == 0
        said.append((run / "evaluation" / "prompts.csv").read_text(encoding="utf-8"))
    assert said[0] == said[1]


@pytest.mark.slow
def test_stable_diffusion_3_with_files_of_several_kinds(
    tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelConfig(base=str(tiny_sd3), resolution=16, t5_tokens=12, cache=tmp_path / "cache", lora_rank=2)
    config = dataclasses.replace(
        preset("tiny"), device="cpu", model=model, rewards=("mine_of_this_test:size",), log=LogConfig(watch=())
    )
    (tmp_path / "mine_of_this_test.py").write_text(
        "import torch\n"
        "from reference.interfaces import Scores\n"
        "def size(images, prompts, metadata):\n"
        "    known = ['ocr' in m for m in metadata]\n"
        "    return Scores(torch.tensor([float(len(m.get('ocr', ''))) for m in metadata]), torch.tensor(known))\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    _, policy = load_model(config, ["a cat"])
    state = {"ema": adapter_state(policy, "default"), "epoch": 3, "step": 7}
    checkpoint.save(tmp_path / "checkpoints", 7, state)
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    (tmp_path / "ocr.txt").write_text('a sign "stop"\na cup "no"\n', encoding="utf-8")
    (tmp_path / "plain.txt").write_text("a cat\n", encoding="utf-8")
    sources = (f"ocr:{tmp_path / 'ocr.txt'}", f"text:{tmp_path / 'plain.txt'}")
    evaluate_run(Evaluate(tmp_path, folder=tmp_path / "out", prompts=sources, steps=2, device="cpu"))
    rows = rows_of(tmp_path / "out" / "prompts.csv")
    found = {row["prompt"]: row["mine_of_this_test:size"] for row in rows}
    assert found == {'a sign "stop"': "4.0", "a cat": "", 'a cup "no"': "2.0"}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["rewards"]["mine_of_this_test:size"]["run"] == {"mean": 3.0, "low": 2.0, "high": 4.0}
    assert tuple(summary["sources"]) == sources


def test_what_cannot_be_judged_is_said_before_anything_is_sampled(run: Path, tmp_path: Path) -> None:
    def message(folder: Path = run, **given: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            evaluate_run(Evaluate(folder, folder=tmp_path / "out", device="cpu", **given))
        return str(caught.value)

    assert "--run: expected the folder of a run" in message(tmp_path / "nothing")
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "config.toml").write_text(to_toml(preset("tiny")), encoding="utf-8")
    assert "has no checkpoint yet" in message(fresh)
    assert "cannot read" in message(prompts=(str(tmp_path / "none.txt"),))
    bad = tmp_path / "bad.txt"
    bad.write_text("a red circle\na cow\n", encoding="utf-8")
    assert "line 2: prompt: expected a scene" in message(prompts=(str(bad),))
    assert "Did you mean 'colour'?" in message(rewards=("color",))
    assert "No module named 'no'" in message(rewards=("no.module:reward",))
    assert "--images: expected at least 1, got 0" in message(images=0)
    assert "--steps: expected at least 1, got -1" in message(steps=-1)
    assert "scoring.models: expected name=source" in message(models=("jpeg=here",))
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--folder: cannot write to"):
        evaluate_run(Evaluate(run, folder=tmp_path / "file", device="cpu"))


def broken(images: Any, prompts: Any, metadata: Any) -> Any:
    """A reward."""
    raise KeyError("size")


def test_an_evaluation_that_fails_leaves_the_earlier_one(run: Path, tmp_path: Path) -> None:
    names = ("prompts.csv", "prompts-base.csv", "summary.json", "summary.md")
    for name in names:
        (tmp_path / name).write_text("earlier", encoding="utf-8")
    with pytest.raises(RewardError, match="KeyError"):
        evaluate_run(Evaluate(run, folder=tmp_path, rewards=(f"{__name__}:broken",), steps=1, device="cpu"))
    moved = tmp_path / "moved"
    (moved / "checkpoints").mkdir(parents=True)
    for file in (run / "checkpoints").iterdir():
        (moved / "checkpoints" / file.name).write_bytes(file.read_bytes())
    elsewhere = dataclasses.replace(preset("tiny"), model=ModelConfig(base=str(tmp_path)))  # a folder without a model
    (moved / "config.toml").write_text(to_toml(elsewhere), encoding="utf-8")
    with pytest.raises(ConfigError, match="missing"):
        evaluate_run(Evaluate(moved, folder=tmp_path, rewards=("jpeg",), steps=1, device="cpu"))
    assert [(tmp_path / name).read_text(encoding="utf-8") for name in names] == ["earlier"] * 4


def test_a_source_names_rewards_that_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a red circle\n", encoding="utf-8")
    source = f"text:{tmp_path / 'a.txt'}#mine:dark"
    assert prompts_of(preset("tiny"), [source], ("mine:dark",))[0].rewards == ("mine:dark",)
    with pytest.raises(ConfigError, match="got 'mine:dark'"):
        prompts_of(preset("tiny"), [source])


def test_every_prompt_of_a_file_counts_whatever_the_run_evaluates(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n" * 9, encoding="utf-8")
    tiny = preset("tiny")
    assert len(prompts_of(tiny, ())) == 3
    assert len(prompts_of(tiny, [str(file)])) == 9
    assert len(prompts_of(tiny, ["world"])) == 3
    assert reward_names(tiny, ()) == (*tiny.rewards, "objects_strict")
    assert reward_names(Config(rewards=("jpeg",)), ("text", "text")) == ("text",)


def test_genevals_strict_score_is_where_the_graded_one_is_1() -> None:
    scores = Scores(
        torch.tensor([[0.3, 1.0], [0.4, 0.99], [0.5, 0.0]], dtype=torch.float64),
        torch.tensor([[True, True], [True, True], [True, False]]),
    )
    found = with_strict(("ocr", "geneval"), scores)
    assert found.values[:, 2].tolist() == [1.0, 0.0, 0.0]
    assert found.applicable[:, 2].tolist() == [True, True, False]
    assert with_strict(("ocr", "text"), scores) is scores


# --- intervals


def test_means_of_prompts_drawn_again() -> None:
    means = bootstrap(np.array([[0.0], [1.0]]), ["a", "b"])[:, 0]
    assert means.shape == (10_001,)
    assert means[0] == 0.5
    values, counts = np.unique(means[1:], return_counts=True)
    assert values.tolist() == [0.0, 0.5, 1.0]
    assert counts / 10_000 == pytest.approx([0.25, 0.5, 0.25], abs=0.02)  # 4 standard errors


def test_a_prompt_that_comes_twice_is_drawn_as_one() -> None:
    means = bootstrap(np.array([[0.0], [0.0], [3.0]]), ["a", "a", "b"])[:, 0]
    assert means[0] == 1.0
    assert set(np.unique(means[1:])) == {0.0, 1.0, 3.0}  # both, or one of them twice
    twice = bootstrap(np.array([[0.0], [1.0], [0.0], [1.0]]), ["a", "b", "a", "b"])
    assert np.array_equal(twice, bootstrap(np.array([[0.0], [1.0]]), ["a", "b"]))


def test_columns_share_the_draws_and_nan_counts_nowhere() -> None:
    x = np.random.default_rng(1).normal(size=(40, 1))
    means = bootstrap(np.hstack([x, 2 * x + 1, np.full_like(x, NAN)]), [str(i) for i in range(40)])
    np.testing.assert_allclose(means[:, 1], 2 * means[:, 0] + 1, atol=1e-12)
    assert np.isnan(means[:, 2]).all()
    assert np.std(means[1:, 0]) == pytest.approx(x.std() / math.sqrt(40), rel=0.03)  # the bootstrap's own, large B
    some = np.where(np.arange(40)[:, None] < 20, x, NAN)
    assert bootstrap(some, [str(i) for i in range(40)])[0, 0] == pytest.approx(x[:20].mean())
    one = bootstrap(np.array([[1.0], [NAN]]), ["a", "b"])
    assert one[0, 0] == 1.0
    assert np.isnan(one[1:]).all()


# --- the paper's table


def test_the_printed_composites_come_out() -> None:
    assert (len(TABLE.models), len(TABLE.rewards)) == (11, 8)
    ours = TABLE.scores / TABLE.scales
    found = composite(TABLE, TABLE.rewards, ours)
    np.testing.assert_allclose(found, TABLE.composites, rtol=0, atol=5.01e-4)  # half a unit of the third decimal
    assert TABLE.models[int(found.argmax())] == "MARBLE"
    sample = found * math.sqrt(10 / 11)  # as it would be with the sample's standard deviation
    assert abs(sample - TABLE.composites).max() > 0.1


def test_a_composite_over_some_columns() -> None:
    mean, std = TABLE.scores.mean(0), TABLE.scores.std(0)
    own = np.array([mean[2] + 2 * std[2], mean[1]]) / TABLE.scales[[2, 1]]
    assert composite(TABLE, ("pickscore", "ocr"), own) == pytest.approx(1.0)  # 2 and 0 standard deviations
    assert sum(standings(TABLE, ("pickscore", "ocr")).values()) == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match=r"expected some of .*'ocr'.* got \['text'\]"):
        composite(TABLE, ("text",), own[:1])


def evaluation(*, base: bool) -> Evaluation:
    """A run with MARBLE's scores and a base with those without CFG, on two prompts that differ in PickScore."""
    names = ("pickscore", "geneval", "geneval_strict", "ocr")
    place = [TABLE.rewards.index(name) for name in ("pickscore", "geneval_strict", "ocr")]

    def judged(model: str) -> Judged:
        pick, strict, ocr = (TABLE.scores[TABLE.models.index(model)] / TABLE.scales)[place]
        return Judged(
            np.array([[pick - 0.01, strict, strict, ocr], [pick + 0.01, strict, strict, ocr]]), np.full((2, 4), 1.0)
        )

    where = {"run": "runs/x", "epoch": 9, "step": 9, "images": 1, "steps": 40, "sampler": "dpm2", "seed": 0}
    trained = (True, True, True, False)
    before = judged("SD3.5-M without CFG") if base else None
    return Evaluation(where, names, trained, ("a", "b"), judged("MARBLE"), before)


def test_a_run_among_the_papers_models() -> None:
    found = evaluation(base=True)
    result = analyse(found, TABLE)
    assert result.columns == ("geneval_strict", "ocr", "pickscore")  # GenEval is judged by the strict score
    paper = standings(TABLE, result.columns)
    assert result.composite["run"].mean == pytest.approx(paper["MARBLE"])
    assert result.composite["base"].mean == pytest.approx(paper["SD3.5-M without CFG"])
    assert result.rewards["pickscore"]["change"] == pytest.approx([(22.83 - 20.51) / 26] * 3)  # equal on both prompts
    assert result.composite["change"] == pytest.approx([paper["MARBLE"] - paper["SD3.5-M without CFG"]] * 3)
    half = 0.01 * 26 / TABLE.scores[:, 2].std() / 3  # one prompt drawn twice, in a mean over three columns
    run = result.composite["run"]
    assert (run.low, run.high) == pytest.approx((run.mean - half, run.mean + half))
    data = json.loads(as_json(found, result, TABLE))
    assert data["composite"]["paper"]["models"]["MARBLE"] == pytest.approx(paper["MARBLE"])
    assert data["composite"]["run"]["mean"] == pytest.approx(run.mean)
    assert "2605.06507" in data["composite"]["paper"]["source"]


def test_the_table_for_people(tmp_path: Path) -> None:
    found = evaluation(base=False)
    text = as_markdown(found, analyse(found, TABLE), TABLE)
    lines = text.splitlines()
    assert "| reward | | prompts | run |" in lines
    assert "| ocr | held out | 2 | 0.9600 [0.9600, 0.9600] |" in lines
    assert "Composite over GenEval, OCR, PickScore" in text
    models = [line.split(" | ")[0] for line in lines if line.startswith("|")]
    assert set(models[models.index("| model") + 2 :][:3]) >= {"| **this run**", "| MARBLE"}
    assert models[-1] == "| SD3.5-M without CFG"
    nothing = found._replace(rewards=("a", "b", "c", "d"))
    assert "No composite" in as_markdown(nothing, analyse(nothing, TABLE), TABLE)
    hole = Judged(np.array([[0.1, NAN], [NAN, 0.25]]), np.array([[2.0, 0.0], [0.0, 1.0]]))
    write_csv(tmp_path / "x.csv", ("u", "v"), ('say "hi", twice', "b"), hole)
    assert (tmp_path / "x.csv").read_text() == (
        'prompt,u,u_applicable,v,v_applicable\n"say ""hi"", twice",0.1,2,,0\nb,,0,0.25,1\n'
    )
