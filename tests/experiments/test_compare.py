"""Comparing rules: intervals by hand and in simulation, tables of made-up runs, and the command on tiny runs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from reference.__main__ import main
from reference.config.presets import preset
from reference.config.settings import Config, LogConfig, SolveConfig
from reference.config.toml import to_toml
from reference.errors import ConfigError, Interrupted, TrainingError
from reference.experiments import comparison
from reference.experiments.compare import Screening, compare, plan_runs, screened, settings_of_rules
from reference.experiments.comparison import finished, read_run, rows_a_solve
from reference.experiments.statistics import Array, crossed_interval, runs_that_lower, student, worst
from tests.experiments.made_runs import records, write

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = Config(epochs=2, rewards=("text", "jpeg"), log=LogConfig(watch=("objects",), eval_prompts=3, eval_images=2))


def test_crossed_interval_by_hand() -> None:
    """Two seeds, three prompts: row means 2 and 4, column means 1, 3 and 5, nothing left over."""
    x = np.array([[0.0, 2.0, 4.0], [2.0, 4.0, 6.0]])
    found = crossed_interval(x)
    ms_s, ms_p = 3 * 2.0, 2 * 4.0
    freedom = (ms_s + ms_p) ** 2 / (ms_s**2 / 1 + ms_p**2 / 2)
    half = stats.t.ppf(0.975, freedom) * math.sqrt((ms_s + ms_p) / 6)
    assert found == pytest.approx((3.0, 3.0 - half, 3.0 + half))


def test_without_a_difference_between_prompts_seeds_alone_count() -> None:
    x = np.repeat(np.array([[1.0], [2.0], [4.0]]), 5, axis=1)
    assert crossed_interval(x) == pytest.approx(student(x[:, 0]), rel=1e-9)


def test_one_seed_is_students_interval_over_prompts() -> None:
    x = np.array([[1.0, 2.0, 4.0, math.nan]])
    assert crossed_interval(x) == pytest.approx(student(np.array([1.0, 2.0, 4.0])))


def test_prompts_with_gaps_are_left_out_and_constants_have_no_width() -> None:
    x = np.array([[1.0, math.nan, 1.0], [1.0, 5.0, 1.0]])
    assert crossed_interval(x) == (1.0, 1.0, 1.0)
    assert math.isnan(crossed_interval(np.full((2, 3), math.nan)).mean)
    assert math.isnan(student(np.array([2.0])).low)


@pytest.mark.parametrize(("seed_sd", "prompt_sd"), [(1.0, 0.0), (0.0, 1.0), (0.3, 1.0), (0.0, 0.0)])
def test_crossed_intervals_cover(seed_sd: float, prompt_sd: float) -> None:
    rng, inside, n = np.random.default_rng(0), 0, 1000
    for _ in range(n):
        x = seed_sd * rng.normal(size=(5, 1)) + prompt_sd * rng.normal(size=(1, 40)) + rng.normal(size=(5, 40))
        found = crossed_interval(x)
        inside += found.low <= 0 <= found.high
    assert inside / n > 0.93


def test_the_smallest_gain_is_paired() -> None:
    """Two rules that differ by a constant: the difference has no spread, whatever seeds and prompts do."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(5, 30, 2)) + np.array([0.0, 3.0])
    x[:, ::3, 1] = math.nan
    assert crossed_interval(worst(x + 0.5) - worst(x)) == pytest.approx((0.5, 0.5, 0.5))
    assert crossed_interval(worst(x)) == pytest.approx(crossed_interval(x[:, :, 0]))


def test_runs_that_fail_in_different_rewards_do_not_cancel() -> None:
    """The mean of each reward is +1, but every run has lost one of them."""
    x = np.empty((2, 20, 2))
    x[0], x[1] = np.array([-1.0, 3.0]), np.array([3.0, -1.0])
    x += np.linspace(-0.1, 0.1, 20)[None, :, None]
    assert crossed_interval(worst(x)).mean == pytest.approx(-1.0)
    assert runs_that_lower(x) == 2
    assert runs_that_lower(x[:1] + 1.0) == runs_that_lower(np.full((3, 5, 2), math.nan)) == 0


def test_a_reward_that_applies_to_some_prompts_keeps_its_mean_and_its_error() -> None:
    x = np.random.default_rng(3).normal(size=(1, 40, 2)) + np.array([0.0, 9.0])
    x[0, :25, 0] = math.nan
    found, alone = worst(x)[0], x[0, 25:, 0]
    assert found.mean() == pytest.approx(alone.mean())
    assert found.std() / math.sqrt(40) == pytest.approx(alone.std() / math.sqrt(15))
    x[:, :, 0] = math.nan
    assert np.isnan(worst(x)).all()


@pytest.mark.parametrize(("means", "seed_sd"), [((0.3,) * 4, 0.02), ((0.3,) * 4, 0.3), ((0.0, 0.2, 0.4, 0.6), 0.3)])
def test_intervals_of_the_smallest_gain_cover(means: tuple[float, ...], seed_sd: float) -> None:
    """Where rewards are tied more closely than prompts can tell, the estimate and its upper end are low."""
    rng, below, above, n = np.random.default_rng(0), 0, 0, 300
    expected = (np.array(means) + seed_sd * rng.normal(size=(100_000, 4))).min(1).mean()
    for _ in range(n):
        x = np.array(means) + seed_sd * rng.normal(size=(5, 1, 4)) + 0.4 * rng.normal(size=(1, 60, 4))
        found = crossed_interval(worst(x + 0.4 * rng.normal(size=(5, 60, 4))))
        below, above = below + (expected < found.low), above + (expected > found.high)
    assert below / n < 0.06
    assert above / n < (0.25 if seed_sd < 0.1 else 0.06)


def test_a_planted_winner_is_found() -> None:
    """Gains that differ from seed to seed and prompt to prompt, alike for all rules; one is better at its worst."""
    rng = np.random.default_rng(2)
    common = 0.3 * rng.normal(size=(5, 1, 1)) + rng.normal(size=(1, 60, 2))
    noise = [0.5 * rng.normal(size=(5, 60, 2)) for _ in range(3)]
    winner = worst(common + noise[0] + np.array([1.0, 2.0]))
    loser = worst(common + noise[1] + np.array([2.0, 0.0]))
    twin = worst(common + noise[2] + np.array([1.0, 2.0]))
    assert crossed_interval(winner - loser).low > 0
    assert crossed_interval(winner - twin).low < 0 < crossed_interval(winner - twin).high


def made_up(folder: Path, seeds: int = 2) -> dict[str, list[Config]]:
    plans = plan_runs(settings_of_rules(SETTINGS, ("soft-min", "uniform")), seeds, folder)
    for s in range(seeds):
        write(plans["soft-min"][s], records(plans["soft-min"][s], (0.25, 0.06, 0.3), cpu=60.0))
        write(plans["uniform"][s], records(plans["uniform"][s], (0.5, -0.02, 0.3), cpu=30.0))
    return plans


def rows(text: str, start: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith(start)]


def test_tables_of_made_up_runs(tmp_path: Path) -> None:
    plans = made_up(tmp_path)
    text = compare(plans, tmp_path, jobs=1, tables_only=True).text
    assert (tmp_path / "tables.md").read_text(encoding="utf-8") == text + "\n"
    assert text.startswith("2 seeds, 3 held-out prompts, 2 images each.")
    gains = {row[0]: row[1:] for row in rows(text, "| text |") + rows(text, "| jpeg |") + rows(text, "| objects")}
    assert gains["text"] == ["2.500", "+0.250 [+0.250, +0.250] raised", "+0.500 [+0.500, +0.500] raised"]
    assert gains["jpeg"][2] == "-0.020 [-0.020, -0.020] **lowered**"
    assert gains["objects (not trained)"][1] == "+0.300 [+0.300, +0.300] raised"
    soft_min, uniform = rows(text, "| soft-min |"), rows(text, "| uniform |")
    assert soft_min[0] == ["soft-min", "2", "20", "2", "2.0", "0.75", "0.0050"]
    assert soft_min[1] == ["soft-min", "+0.50", "+0.60", "+0.50 [+0.50, +0.50]", "0 of 2"]
    assert uniform[1] == ["uniform", "+1.00", "-0.20", "-0.20 [-0.20, -0.20]", "2 of 2"]
    assert rows(text, "| soft-min - uniform |") == [["soft-min - uniform", "+0.70 [+0.70, +0.70]", "larger"]]
    # equal compute: uniform is done when soft-min is half way
    assert "Budget: 1.0 CPU minutes." in text
    assert soft_min[2] == ["soft-min", "+0.25 [+0.25, +0.25]", "+0.30 [+0.30, +0.30]", "+0.25 [+0.25, +0.25]"]
    assert soft_min[3][1:] == ["+0.500 [+0.500, +0.500]", *["-0.100 [-0.100, -0.100]"] * 2, "+0.300 [+0.300, +0.300]"]


def test_push_and_distance_are_of_the_first_steps_and_the_last_epochs(tmp_path: Path) -> None:
    """Of steps without a record of them, and of runs without a pull, there is a dash."""
    plans = plan_runs(settings_of_rules(dataclasses.replace(SETTINGS, epochs=8), ("soft-min", "uniform")), 1, tmp_path)
    for label, pull in (("soft-min", 1.0), ("uniform", 0.0)):
        lines = [r for r in records(plans[label][0], (0.2, 0.1, 0.3), cpu=60.0) if r["kind"] != "step"]
        lines[-1]["epoch"] = 8
        for i in range(16):
            step = {"epoch": i // 2, "grad_norm": float(i) if i < 10 else 99.0, "kl": pull * (i // 2)}
            lines.append({"kind": "step", **(step if label == "soft-min" or i < 2 else {"epoch": i // 2})})
        write(plans[label][0], lines)
    text = compare(plans, tmp_path, jobs=1, tables_only=True).text
    assert rows(text, "| soft-min |")[0][-2:] == ["4.5", "5.0"]
    assert rows(text, "| uniform |")[0][-2:] == ["0.50", "-"]


@pytest.mark.slow
def test_figures_and_numbers_are_reproducible(tmp_path: Path) -> None:
    plans, files = made_up(tmp_path), ("gains.svg", "curves.svg", "worst.svg", "summary.json")
    seen = []
    for _ in range(2):
        compare(plans, tmp_path, jobs=1, tables_only=True)
        seen.append([(tmp_path / name).read_bytes() for name in files])
    assert seen[0] == seen[1]
    summary = json.loads(seen[0][3])
    assert summary["gains"]["uniform"]["jpeg"]["mean"] == pytest.approx(-0.02)
    assert summary["within_std"] == {"text": 0.5, "jpeg": 0.1, "objects": 1.0}
    assert summary["differences"]["uniform"]["mean"] == pytest.approx(0.7)
    assert summary["equal_compute"]["soft-min"]["text"]["mean"] == pytest.approx(0.25)
    assert summary["cosines"]["uniform"]["jpeg, next batch"]["mean"] == pytest.approx(0.3)
    assert summary["folders"]["uniform"] == [str(tmp_path / "uniform" / f"seed-{s}") for s in range(2)]


def test_only_seeds_that_all_have(tmp_path: Path) -> None:
    plans = made_up(tmp_path)
    metrics = plans["uniform"][1].run / "metrics.jsonl"
    metrics.write_text(metrics.read_text(encoding="utf-8")[:-40], encoding="utf-8")  # cut while it was written
    assert not finished(plans["uniform"][1])
    text = compare(plans, tmp_path, jobs=1, tables_only=True).text
    assert text.startswith("1 seed (intervals are over prompts alone, and say nothing about other seeds), 3 held-out")
    assert "Seeds [1] are left out" in text
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert (summary["seeds"], summary["left_out"]) == ([0], [1])
    assert summary["cosines"]["soft-min"]["text, next batch"] == {"mean": -0.1, "low": None, "high": None}
    (plans["soft-min"][0].run / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="no seed that every rule has finished"):
        compare(plans, tmp_path, jobs=1, tables_only=True)


def test_a_run_that_went_on_is_read_up_to_the_epochs_compared(tmp_path: Path) -> None:
    plans = made_up(tmp_path)
    before = compare(plans, tmp_path, jobs=1, tables_only=True).text
    for configs in plans.values():
        with (configs[0].run / "metrics.jsonl").open("a", encoding="utf-8") as file:
            for line in records(configs[0], (9.0, 9.0, 9.0), cpu=1.0):
                later = {**line, "epoch": line["epoch"] + 2}
                file.write(json.dumps(later) + "\n" if later["epoch"] > 2 or line["kind"] != "eval" else "")
    assert compare(plans, tmp_path, jobs=1, tables_only=True).text == before


def test_cosines_that_do_not_exist_are_passed_over(tmp_path: Path) -> None:
    plans = made_up(tmp_path, seeds=1)
    fresh = {"next_cosines": {"text": None, "jpeg": 0.1}, "min_cosine": None, "next_min_cosine": 0.1}
    with (plans["soft-min"][0].run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "refresh", "epoch": 1, **fresh}) + "\n")
    assert read_run(plans["soft-min"][0]).cosines == pytest.approx([0.5, 0.0, -0.1, 0.2])


def test_a_finished_run_of_another_configuration_is_refused(tmp_path: Path) -> None:
    config = made_up(tmp_path)["uniform"][1]
    other = dataclasses.replace(config, threads=3, log=dataclasses.replace(config.log, trackers=("tensorboard",)))
    (config.run / "config.toml").write_text(to_toml(other), encoding="utf-8")
    plan_runs(settings_of_rules(SETTINGS, ("soft-min", "uniform")), 2, tmp_path)
    for wrong in (
        dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1.0)),
        dataclasses.replace(config, log=dataclasses.replace(config.log, eval_prompts=4)),
    ):
        (config.run / "config.toml").write_text(to_toml(wrong), encoding="utf-8")
        with pytest.raises(ConfigError, match=r"uniform/seed-1 was made by another configuration"):
            plan_runs(settings_of_rules(SETTINGS, ("soft-min", "uniform")), 2, tmp_path)


def test_a_run_that_was_stopped_and_is_of_another_configuration_is_refused(tmp_path: Path) -> None:
    config = plan_runs(settings_of_rules(SETTINGS, ("uniform",)), 1, tmp_path)["uniform"][0]
    write(config, records(config, (1.0, 1.0, 1.0), cpu=1.0)[:-1])
    (config.run / "config.toml").write_text(to_toml(dataclasses.replace(config, balance="marble")), encoding="utf-8")
    plan_runs(settings_of_rules(SETTINGS, ("uniform",)), 1, tmp_path)  # nothing to go on from: the trainer has its say
    (config.run / "checkpoints").mkdir()
    (config.run / "checkpoints" / "step-00000001.ckpt").touch()
    with pytest.raises(ConfigError, match=r"uniform/seed-0 was made by another configuration"):
        plan_runs(settings_of_rules(SETTINGS, ("uniform",)), 1, tmp_path)
    (config.run / "config.toml").write_text("epoch = 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"uniform/seed-0 is of another version \(config: unknown key epoch"):
        plan_runs(settings_of_rules(SETTINGS, ("uniform",)), 1, tmp_path)


def test_a_run_that_has_gone_further_is_compared_where_it_was_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, "exit 1")  # nothing is to be trained
    made_up(tmp_path)
    rules = settings_of_rules(dataclasses.replace(SETTINGS, epochs=1), ("soft-min", "uniform"))
    text = compare(plan_runs(rules, 2, tmp_path), tmp_path, jobs=1, tables_only=False).text
    assert "+0.125 [+0.125, +0.125] raised" in text
    metrics = tmp_path / "uniform" / "seed-1" / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    message = r"uniform/seed-1 has gone further than 1 epochs, and was evaluated after 0"
    metrics.write_text("".join(x for x in lines if '"eval", "epoch": 1' not in x), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{message}, 2"):
        plan_runs(rules, 2, tmp_path)
    metrics.write_text(lines[0], encoding="utf-8")  # stopped on its way
    plan_runs(rules, 2, tmp_path)
    saved = metrics.parent / "checkpoints"
    saved.mkdir()
    (saved / "step-00000003.ckpt").touch()  # two steps are an epoch
    with pytest.raises(ConfigError, match=f"{message}\\."):
        plan_runs(rules, 2, tmp_path)


def test_rules_that_are_not_judged_alike_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.toml"
    file.write_text("[log]\neval_images = 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="mine has other rewards or another evaluation than uniform"):
        plan_runs(settings_of_rules(SETTINGS, ("uniform", f"mine={file}")), 1, tmp_path)


def test_rules_from_files(tmp_path: Path) -> None:
    file = tmp_path / "cone.toml"
    file.write_text('balance = "cone"\n[solve]\ndecay = 0.5\n', encoding="utf-8")
    plans = plan_runs(settings_of_rules(SETTINGS, (f"mine={file}", "uniform")), 2, tmp_path)
    assert list(plans) == ["mine", "uniform"]
    assert plans["mine"][1].solve.decay == 0.5
    assert plans["mine"][1].run == tmp_path / "mine" / "seed-1"
    assert (plans["mine"][1].seed, plans["mine"][1].log.trackers) == (1, ())
    with pytest.raises(ConfigError, match="distinct names"):  # they would share a folder
        plan_runs(settings_of_rules(SETTINGS, (f"a:b={file}", f"a-b={file}")), 1, tmp_path)


def test_candidates_by_their_paths(tmp_path: Path) -> None:
    path = "reference.experiments.candidates:upgrad"
    plans = plan_runs(settings_of_rules(preset("world"), ("uniform", path)), 1, tmp_path)
    assert plans[path][0].run == tmp_path / path.replace(":", "-") / "seed-0"


def test_rows_behind_a_solve() -> None:
    """12 prompts of 24 images, two steps an epoch, 3 timesteps an image."""
    world = preset("world")
    twelve = dataclasses.replace(world, rollout=dataclasses.replace(world.rollout, prompts_per_epoch=12))

    def rows(balance: str, **switches: Any) -> int | None:
        return rows_a_solve(dataclasses.replace(twelve, balance=balance, solve=SolveConfig(**switches)))

    assert rows("soft-min") is rows("uniform") is rows("weighted-sum") is None
    assert rows("marble-paper") == rows("marble") == 432
    assert rows("cone", decay=0.9) == 8208


@pytest.mark.parametrize(
    ("rules", "seeds", "message"),
    [
        (("uniform", "uniform"), 1, "distinct names"),
        (("=x.toml",), 1, "distinct names"),
        (("a/b=x.toml",), 1, "distinct names"),
        (("..=x.toml",), 1, "distinct names"),
        (("mine=missing.toml",), 1, "cannot read missing.toml"),
        (("marbel",), 1, "Did you mean 'marble'"),
        ((), 1, "at least one of each"),
        (("uniform",), 0, "at least one of each"),
    ],
)
def test_plans_that_cannot_be(tmp_path: Path, rules: tuple[str, ...], seeds: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_runs(settings_of_rules(SETTINGS, rules), seeds, tmp_path)


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let runs be started with a shell script in place of Python."""
    fake = folder / "fake"
    fake.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failed_run_is_named_and_no_other_one_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    plans = plan_runs(settings_of_rules(SETTINGS, ("uniform", "soft-min")), 4, tmp_path)
    begun = tmp_path / "begun"
    fails = f"echo $7 >> {begun}; case $7 in *uniform*) echo out of memory; exit 3;; *) sleep 1; touch $7.ended;; esac"
    stand_in(tmp_path, monkeypatch, fails)
    message = r"uniform/seed-0 ended with status 3; .*seed-0\.log ends with\nout of memory"
    with pytest.raises(TrainingError, match=message):
        compare(plans, tmp_path, jobs=jobs, tables_only=False)
    first = [str(plans["uniform"][0].run), str(plans["soft-min"][0].run)][:jobs]
    assert sorted(begun.read_text(encoding="utf-8").split()) == sorted(first)
    assert all(Path(f"{run}.ended").exists() for run in first[1:])  # the run beside it was waited for


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_sigterm_stops_the_runs_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = plan_runs(settings_of_rules(SETTINGS, ("uniform", "soft-min")), 4, tmp_path)
    saves = f"trap 'echo $7 >> {tmp_path / 'saved'}; exit 130' TERM; sleep 60 & wait"
    stand_in(tmp_path, monkeypatch, f"echo $7 >> {tmp_path / 'begun'}; {saves}")

    def send() -> None:
        while not (tmp_path / "begun").exists() or len((tmp_path / "begun").read_text("utf-8").split()) < 2:
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=send).start()
    with pytest.raises(Interrupted, match="give the same command again"):
        compare(plans, tmp_path, jobs=2, tables_only=False)
    runs = sorted((tmp_path / "begun").read_text(encoding="utf-8").split())
    assert runs == sorted((tmp_path / "saved").read_text(encoding="utf-8").split())
    assert len(runs) == 2
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_the_command_trains_once_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = preset("tiny")
    file = tmp_path / "tiny.toml"
    file.write_text(to_toml(dataclasses.replace(tiny, epochs=1)), encoding="utf-8")
    common = ["compare", "--rules", "soft-min", "uniform", "--seeds", "1", "--config", str(file), "--jobs", "2"]
    common += ["--folder", str(tmp_path / "out")]
    assert main(common) == 0
    first = capsys.readouterr().out
    assert "seed-0: done, 0 left" in first
    stamps = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").glob("*/*/metrics.jsonl"))]
    assert len(stamps) == 2
    assert main(common) == 0
    assert "done" not in capsys.readouterr().out
    assert [p.stat().st_mtime_ns for p in sorted((tmp_path / "out").glob("*/*/metrics.jsonl"))] == stamps


def test_a_run_that_was_begun_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = plan_runs(settings_of_rules(SETTINGS, ("soft-min", "uniform")), 2, tmp_path)
    write(plans["soft-min"][0], records(plans["soft-min"][0], (1.0, 1.0, 1.0), cpu=1.0))
    write(plans["uniform"][0], records(plans["uniform"][0], (1.0, 1.0, 1.0), cpu=1.0)[:-1])
    begun = plans["uniform"][0].run / "checkpoints" / "step-00000000.ckpt"
    begun.parent.mkdir()
    begun.touch()
    stand_in(tmp_path, monkeypatch, 'echo "$@" >> ' + str(tmp_path / "seen"))
    with pytest.raises(ConfigError, match="no seed that every rule has finished"):
        compare(plans, tmp_path, jobs=1, tables_only=False)
    command = "-m reference train --config {0}.toml --run {0}"
    assert (tmp_path / "seen").read_text(encoding="utf-8").splitlines() == [
        command.format(tmp_path / "uniform/seed-0") + " --resume",
        command.format(tmp_path / "soft-min/seed-1"),
        command.format(tmp_path / "uniform/seed-1"),
    ]


def test_a_screening_keeps_the_first_rule_and_the_best_others(tmp_path: Path) -> None:
    """Two epochs a run; after the first of them, and with one of three seeds, the rules have half of their gains."""
    plans = plan_runs(settings_of_rules(SETTINGS, ("soft-min", "uniform", "marble", "weighted-sum")), 3, tmp_path)
    worst = {"soft-min": -0.5, "uniform": 0.1, "marble": 0.3, "weighted-sum": -0.2}
    for label, configs in plans.items():
        for s, config in enumerate(configs):
            late = -9.0 if label == "marble" and s == 1 else 0.0  # a seed that the screening does not see
            write(config, records(config, (1.0, worst[label] + late, 0.0), cpu=1.0))
    once = Screening(seeds=1, epochs=1, finalists=2)
    kept = screened(plans, tmp_path, once, jobs=1, tables_only=True)
    assert list(kept) == ["soft-min", "marble"]
    assert kept["marble"] == plans["marble"]  # all seeds, all epochs
    table = (tmp_path / "screening" / "tables.md").read_text(encoding="utf-8")
    assert table.startswith("1 seed (")
    assert list(screened(plans, tmp_path, once._replace(finalists=9), jobs=1, tables_only=True)) == list(plans)
    assert list(screened(plans, tmp_path, once._replace(finalists=1), jobs=1, tables_only=True)) == ["soft-min"]
    for wrong in (Screening(4, 1, 2), Screening(1, 3, 2), Screening(0, 1, 2), Screening(1, 1, 0)):
        with pytest.raises(ConfigError, match="screening: expected seeds from 1 to 3, epochs from 1 to 2"):
            screened(plans, tmp_path, wrong, jobs=1, tables_only=True)


def test_gains_at_a_budget_between_evaluations() -> None:
    scores: Array = np.array([[[1.0]], [[2.0]], [[4.0]]])
    run = comparison.Run(np.arange(3.0), np.array([0.0, 10.0, 20.0]), scores, np.ones(1), np.zeros(4), 2, 1.0, 0.0)
    assert [float(comparison._at(run, cpu)[0, 0]) for cpu in (5.0, 10.0, 15.0, 20.0, 99.0)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_a_run_without_its_first_evaluation_has_no_gains(tmp_path: Path) -> None:
    config = plan_runs(settings_of_rules(SETTINGS, ("soft-min",)), 1, tmp_path)["soft-min"][0]
    write(config, [r for r in records(config, (1.0, 1.0, 1.0), cpu=1.0) if r["kind"] != "eval" or r["epoch"]])
    with pytest.raises(ConfigError, match="do not begin with an evaluation of the base model"):
        read_run(config)
