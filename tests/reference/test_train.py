"""The training loop end to end on the small world: resuming bit-exactly, and everything that can go wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from marble_core import SharedRows, shared_cotangent_rows
from reference import interfaces as scoring
from reference import train as train_module
from reference.config.presets import preset
from reference.config.settings import BUILT_IN_RULES, Config, SolveConfig
from reference.config.toml import to_toml
from reference.errors import CheckpointError, ConfigError, Interrupted, RewardError, TrainingError
from reference.interfaces import Scores
from reference.policy.adapters import Policy, velocity
from reference.rewards import scorer
from reference.run import checkpoint
from reference.run import report as report_module
from reference.run import state as state_module
from reference.step import balance
from reference.step import gradients as rows
from reference.train import train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
REWARDS = ("objects", "colour", "jpeg")


def config(run: Path, **changes: Any) -> Config:
    """Three epochs of two steps each, refreshed every second step; a few seconds."""
    tiny = preset("tiny")
    given = {"epochs": 3, "rewards": REWARDS, **changes}
    return dataclasses.replace(tiny, run=run, log=dataclasses.replace(tiny.log, watch=(), measure_every=2), **given)


def records(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [r for r in map(json.loads, lines) if kind in (None, r["kind"])]


def without_times(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in ("seconds", "cpu_seconds")} for r in records(run)]


def final_state(run: Path) -> dict[str, Any]:
    state = checkpoint.latest(run / "checkpoints")
    assert state is not None
    return {k: v for k, v in state.items() if k not in ("metrics", "config")}  # byte counts contain times


def assert_same(a: Any, b: Any) -> None:
    """Equal bit for bit, through nested dicts and lists."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(nan=-7.0), b.nan_to_num(nan=-7.0))
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    train(config(run))
    return run


def test_a_run_writes_everything_it_promises(unbroken: Path) -> None:
    for name in ("config.toml", "metrics.jsonl", "report.html", "grids/before.png", "grids/after.png"):
        assert (unbroken / name).stat().st_size > 0
    assert (unbroken / "config.toml").read_text() == to_toml(config(unbroken))
    assert [r["step"] for r in records(unbroken, "step")] == [1, 2, 3, 4, 5, 6]
    assert [r["refresh"] for r in records(unbroken, "step")] == [True, False] * 3
    assert [r["step"] for r in records(unbroken, "refresh")] == [1, 3, 5]
    assert [r["next_cosines"] is not None for r in records(unbroken, "refresh")] == [False, True, True]
    assert [r["step"] for r in records(unbroken, "eval")] == [0, 6]
    assert set(records(unbroken, "epoch")[0]["rewards"]) == set(REWARDS)
    state = final_state(unbroken)
    assert any(not torch.equal(state["default"][n], state["old"][n]) for n in state["default"])


def test_training_moves_the_adapter_only(unbroken: Path) -> None:
    state = final_state(unbroken)
    still = [name for name, x in state["default"].items() if "lora_B" in name and not x.any()]
    # The last block drops its text stream, and with it the queries of the text.
    assert [name.split(".transformer_blocks.")[1] for name in still] == ["3.attn.add_q_proj.lora_B.default.weight"]


def stop_after(steps: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send a signal from inside the step with this number."""
    original = balance.step_gradient
    seen = [0]

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        if seen[0] == steps:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(train_module, "step_gradient", spy)


@pytest.mark.parametrize("phase", ["sample_epoch", "evaluate_held_out"])
def test_sigterm_while_sampling_or_evaluating_stops_before_another_step(
    tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    run, steps, original = tmp_path / "run", [0], getattr(train_module, phase)

    def told(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    def spy(*args: Any, **kwargs: Any) -> Any:
        steps[0] += 1

    with monkeypatch.context() as patch:
        patch.setattr(train_module, phase, told)
        patch.setattr(train_module, "step_gradient", spy)
        with pytest.warns(UserWarning, match="stopping after this step"), pytest.raises(Interrupted, match="step 0"):
            train(config(run))
    assert steps == [0]
    train(config(run), resume=True)
    assert_same(final_state(run), final_state(unbroken))
    assert without_times(run) == without_times(unbroken)


@pytest.mark.parametrize(("steps", "number"), [(1, signal.SIGINT), (4, signal.SIGTERM)])
def test_ctrl_c_and_sigterm_finish_the_step_save_and_go_on_bit_exactly(
    tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch, steps: int, number: signal.Signals
) -> None:
    run, before = tmp_path / "run", signal.getsignal(number)  # a shell's background jobs ignore Ctrl-C
    with monkeypatch.context() as patch:
        stop_after(steps, number, patch)
        with pytest.warns(UserWarning, match="stopping after this step"), pytest.raises(Interrupted):
            train(config(run))
    assert final_state(run)["step"] == steps
    assert signal.getsignal(number) is before
    train(config(run), resume=True)
    assert_same(final_state(run), final_state(unbroken))
    assert without_times(run) == without_times(unbroken)


STATEFUL = {
    "cone": SolveConfig(decay=0.5, refresh_every=2),
    "marble": SolveConfig(refresh_every=2),
    "marble-paper": SolveConfig(refresh_every=2),
    "reference.experiments.candidates:soft_min_cone": SolveConfig(decay=0.9, refresh_every=1),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_rules_with_a_memory_go_on_bit_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    unbroken, run = (config(tmp_path / folder, balance=name, solve=STATEFUL[name]) for folder in ("unbroken", "run"))
    train(unbroken)
    with monkeypatch.context() as patch:
        stop_after(3, signal.SIGINT, patch)
        with pytest.warns(UserWarning, match="stopping after this step"), pytest.raises(Interrupted):
            train(run)
    train(run, resume=True)
    assert_same(final_state(run.run), final_state(unbroken.run))
    assert without_times(run.run) == without_times(unbroken.run)


def test_gains_tilt_the_weights(tmp_path: Path) -> None:
    soft = config(tmp_path / "run", epochs=5, solve=SolveConfig(strength=4.0, keep=0.25))
    train(soft)
    epochs, steps = records(soft.run, "epoch"), records(soft.run, "step")
    assert all(gain == 0 for gain in epochs[0]["gains"].values())
    assert all(any(abs(gain) > 1e-3 for gain in e["gains"].values()) for e in epochs[1:])
    for epoch, pair in zip(epochs, zip(steps[::2], steps[1::2], strict=True), strict=True):
        gains = torch.tensor([epoch["gains"][k] for k in REWARDS])
        w = 0.25 / 3 + 0.75 * torch.softmax(-4.0 * gains.double(), 0)
        first, second = (torch.tensor(list(step["coefficients"].values())).double() for step in pair)
        assert torch.equal(first, second)  # the spread that is restored is that of the epoch
        assert 1 < float(first.sum()) <= 3
        assert (first / first.sum()).tolist() == pytest.approx(w.tolist(), rel=1e-5)


def test_a_killed_run_goes_on_bit_exactly(tmp_path: Path, unbroken: Path) -> None:
    run = tmp_path / "run"
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); import tests_config as t; from pathlib import Path;"
        "from reference.train import train; train(t.config(Path(sys.argv[1])))"
    )
    (tmp_path / "tests_config.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-c", code, str(run), str(tmp_path)], env=environment)
    deadline = time.monotonic() + 120
    while not list((run / "checkpoints").glob("*.ckpt")):  # the first epoch is saved
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (run / "report.html").exists()
    train(config(run), resume=True)
    assert_same(final_state(run), final_state(unbroken))
    assert without_times(run) == without_times(unbroken)


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, unbroken: Path) -> None:
    run = tmp_path / "run"
    train(config(run, epochs=2))
    newest = max((run / "checkpoints").glob("*.ckpt"))
    newest.write_bytes(newest.read_bytes()[:-100])
    (run / "report.html").unlink()
    with pytest.warns(UserWarning, match=r"step-00000004.ckpt is damaged.*before it"):
        train(config(run), resume=True)
    assert_same(final_state(run), final_state(unbroken))


def test_a_run_is_not_written_over_and_not_resumed_as_another(unbroken: Path) -> None:
    before = (unbroken / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"already holds a run.*--resume"):
        train(config(unbroken))
    toml = (unbroken / "config.toml").read_text()
    with pytest.raises(ConfigError, match="another configuration"):
        train(config(unbroken, balance="uniform"), resume=True)
    assert (unbroken / "metrics.jsonl").read_bytes() == before
    assert (unbroken / "config.toml").read_text() == toml


def contents(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_a_resume_without_a_checkpoint_refuses_and_touches_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(to_toml(config(run)))
    (run / "metrics.jsonl").write_text('{"kind": "eval", "st')
    before = contents(run)
    with pytest.raises(ConfigError, match=r"--resume: .* has no checkpoint to go on from; nothing was changed"):
        train(config(run), resume=True)
    with pytest.raises(ConfigError, match=r"already holds the records .* no checkpoint .*Choose another --run"):
        train(config(run))
    assert contents(run) == before
    with pytest.raises(ConfigError, match="no checkpoint to go on from"):
        train(config(tmp_path / "typo"), resume=True)
    assert not (tmp_path / "typo").exists()


def test_a_resume_with_damaged_checkpoints_alone_refuses_and_touches_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(run, epochs=1))
    before = contents(run)
    (run / "config.toml").unlink()
    rank = dataclasses.replace(preset("tiny").model, lora_rank=4)
    for other in (config(run), config(run, model=rank)):
        with pytest.raises(ConfigError, match=r"config\.toml is missing, .*nothing was changed\. Put it back"):
            train(other, resume=True)
    assert contents(run) | {"config.toml": b""} == before | {"config.toml": b""}
    (run / "config.toml").write_bytes(before["config.toml"])
    for path in (run / "checkpoints").glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:-1])
    before = contents(run)
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ConfigError, match=r"no checkpoint in .* can be used; nothing was changed"),
    ):
        train(config(run), resume=True)
    assert contents(run) == before


@pytest.mark.parametrize("version", [1, 4])
def test_an_older_or_a_newer_format_is_refused(tmp_path: Path, version: int) -> None:
    run = tmp_path / "run"
    train(config(run, epochs=1))
    state = checkpoint.latest(run / "checkpoints")
    assert state is not None
    if version == 1:
        del state["version"]
    else:
        state["version"] = version
    checkpoint.save(run / "checkpoints", 99, state)
    wanted = rf"have format {version}, this version reads 3\. Go on with the version that wrote"
    with pytest.raises(ConfigError, match=wanted):
        train(config(run), resume=True)


def test_a_resume_with_other_prompts_in_the_file_is_refused(tmp_path: Path) -> None:
    prompts, run = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("a red circle\na blue square\na small green triangle\n")
    rollout = dataclasses.replace(preset("tiny").rollout, prompts=(str(prompts),))
    train(config(run, epochs=1, rollout=rollout))
    prompts.write_text("a red circle\na blue square\na small yellow triangle\n")
    before = contents(run)
    with pytest.raises(ConfigError, match=r"--resume: the training prompts are not those .* content of a file"):
        train(config(run, epochs=2, rollout=rollout), resume=True)
    assert contents(run) == before
    prompts.write_text("a red circle\na blue square\na small green triangle\n")
    train(config(run, epochs=2, rollout=rollout), resume=True)
    assert final_state(run)["step"] == 4


def test_resuming_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(run, epochs=1))
    before = without_times(run)
    train(config(run, epochs=1), resume=True)
    assert without_times(run) == before
    (run / "metrics.jsonl").unlink()  # and without its records it is judged again, so that there is a report
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: .* records are lost"):
        train(config(run, epochs=1), resume=True)
    assert without_times(run) == before[-1:]


def test_a_resume_with_fewer_epochs_than_were_trained_is_refused(unbroken: Path) -> None:
    before = contents(unbroken)
    with pytest.raises(ConfigError, match=r"expected epochs to be at least the 3 that .*, got 1; nothing was changed"):
        train(config(unbroken, epochs=1), resume=True)
    assert contents(unbroken) == before


def reward(change: Callable[[Tensor], Any], calls: int) -> Callable[..., Any]:
    """A reward that is well for so many calls, and then is not."""
    seen = [0]

    def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Any:
        seen[0] += 1
        good = images.mean((1, 2, 3))
        return good if seen[0] <= calls else change(good)

    return score


def fail(good: Tensor) -> Tensor:
    raise RuntimeError("no server")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fail, "reward 'mine:own' raised RuntimeError: no server"),
        (lambda x: x[:-1], r"expected scores of shape \[8\].*got \[7\]"),
        (lambda x: x * torch.tensor([1.0] * 7 + [torch.nan]), "finite scores, got nan for image 7"),
        (lambda x: x / 0, "finite scores, got inf for image 0"),
        (lambda x: [0.0] * 7, r"expected scores of shape \[8\].*got \[7\]"),
    ],
)
def test_a_bad_reward_stops_the_run_with_everything_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Any], message: str
) -> None:
    run, calls = tmp_path / "run", 2  # the first evaluation and the first epoch
    mine = config(run, rewards=("colour", "mine:own"))
    monkeypatch.setattr(train_module, "validate", lambda config: None)
    monkeypatch.setattr(scorer, "load_callable", lambda path, argument: reward(change, calls))
    with pytest.raises(RewardError, match=message):
        train(mine)
    assert final_state(run)["step"] == 2
    monkeypatch.setattr(scorer, "load_callable", lambda path, argument: reward(change, 99))
    train(mine, resume=True)
    assert final_state(run)["step"] == 6


def watched(run: Path, **log: Any) -> Config:
    """Evaluated and saved every second of four epochs, with a reward that is only watched."""
    found = config(run, epochs=4)
    return dataclasses.replace(found, log=dataclasses.replace(found.log, eval_every=2, save_every=4, **log))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("evaluated") / "run"
    train(watched(run, watch=("similarity",)))
    return run


def test_a_reward_that_fails_in_an_evaluation_loses_nothing(
    tmp_path: Path, evaluated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second evaluation comes two epochs before the next checkpoint would."""
    original, seen = scoring.score, [0]

    def broken(rewards: Any, *args: Any, **kwargs: Any) -> Any:
        seen[0] += "similarity" in rewards
        if seen[0] == 2 and "similarity" in rewards:
            raise RewardError("reward 'similarity' raised RuntimeError: no server")
        return original(rewards, *args, **kwargs)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(scorer, "score", broken)
        message = r"no server\. The state of step 4 is saved: go on with --resume\."
        with pytest.raises(RewardError, match=message):
            train(watched(run, watch=("similarity",)))
    assert (final_state(run)["step"], final_state(run)["evaluated"]) == (4, 0)
    train(watched(run, watch=("similarity",)), resume=True)
    assert [r["epoch"] for r in records(run, "eval")] == [0, 2, 4]
    assert_same(final_state(run), final_state(evaluated))
    assert without_times(run) == without_times(evaluated)


def test_pictures_that_cannot_be_written_stop_nothing(tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "grids").write_text("in the way")
    train(watched(run))
    assert "Training goes on without this picture" in "".join(capsys.readouterr())
    assert final_state(run)["step"] == 8


def test_an_error_that_nobody_foresaw_leaves_the_newest_state(
    tmp_path: Path, evaluated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = balance.step_gradient, [0]

    def broken(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        if seen[0] == 6:
            raise MemoryError("out of memory")
        return original(*args, **kwargs)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "step_gradient", broken)
        with pytest.raises(TrainingError, match=r"MemoryError: out of memory\. The state of step 5 is saved"):
            train(watched(run, watch=("similarity",)))
    assert (final_state(run)["step"], final_state(run)["part"]) == (5, 1)
    train(watched(run, watch=("similarity",)), resume=True)
    assert_same(final_state(run), final_state(evaluated))
    assert without_times(run) == without_times(evaluated)


def test_an_export_or_a_report_that_fails_leaves_the_newest_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(state_module, "save_file", full)
        with pytest.raises(CheckpointError, match=r"cannot write .*pytorch_lora_weights"):
            train(config(run, epochs=1))
    assert final_state(run)["step"] == 2
    with monkeypatch.context() as patch:
        patch.setattr(report_module, "write_report", full)
        with pytest.raises(TrainingError, match=r"report could not be written: .* python -m reference report --run"):
            train(config(run, epochs=1), resume=True)
    train(config(run, epochs=1), resume=True)
    assert (run / "report.html").exists()
    assert [r["epoch"] for r in records(run, "eval")] == [0, 1]


def test_training_that_comes_apart_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    original = balance.step_gradient

    def longer(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        return result._replace(metrics=result.metrics | {"v_norm": 1.07, "v_norm_base": 1.0})

    monkeypatch.setattr(train_module, "step_gradient", longer)
    run = tmp_path / "run"
    train(config(run))
    said = [r["warnings"] for r in records(run, "epoch")]
    assert [len(w) for w in said] == [1, 0, 0]
    assert said[0][0].startswith("the velocity is 1.07 times as long as the base model's.")
    assert "1.07 times" in "".join(capsys.readouterr())
    assert "1.07 times" in (run / "report.html").read_text(encoding="utf-8")


def test_a_constant_reward_is_warned_about_and_keeps_its_coefficient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(train_module, "validate", lambda config: None)
    monkeypatch.setattr(scorer, "load_callable", lambda path, argument: reward(torch.ones_like, 0))
    train(config(run, rewards=("colour", "jpeg", "mine:own"), epochs=1, balance="marble"))
    (epoch,) = records(run, "epoch")
    assert epoch["warnings"] == ["reward 'mine:own' was constant within every group; its coefficient is carried over"]
    refresh = records(run, "refresh")[0]
    assert refresh["active"] == {"colour": True, "jpeg": True, "mine:own": False}
    assert refresh["weights"]["mine:own"] == 0.0


def test_steps_without_a_finite_gradient_are_skipped_and_ten_in_a_row_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = balance.step_gradient
    seen = [0]

    def broken(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        result = original(*args, **kwargs)
        if 1 < seen[0] < 9:  # 2..8: seven in a row, then one good one, then bad for good
            return result._replace(gradient={k: x * torch.nan for k, x in result.gradient.items()})
        if seen[0] > 9:
            return result._replace(gradient={k: x * torch.inf for k, x in result.gradient.items()})
        return result

    monkeypatch.setattr(train_module, "step_gradient", broken)
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match="not finite 10 steps in a row"):
        train(config(run, epochs=20))
    steps = records(run, "step")
    assert [r["skipped"] for r in steps] == [False] + [True] * 7 + [False] + [True] * 10
    found = final_state(run)
    assert (found["step"], found["skipped"]) == (19, 0)  # the second step of its epoch would have been the 20th
    assert all(x.isfinite().all() for x in found["default"].values())
    assert all(x.isfinite().all() for x in found["ema"].values())


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run = tmp_path / "run"
    original = checkpoint.save
    seen = [0]

    def full(*args: Any) -> Path:
        seen[0] += 1
        if seen[0] == 2:
            raise CheckpointError("cannot save: No space left on device. Earlier checkpoints are untouched.")
        return original(*args)

    monkeypatch.setattr(checkpoint, "save", full)
    train(config(run))
    assert "Training goes on" in "".join(capsys.readouterr())
    assert final_state(run)["step"] == 6
    monkeypatch.setattr(checkpoint, "save", lambda *args: (_ for _ in ()).throw(CheckpointError("cannot save")))
    with pytest.raises(CheckpointError, match="cannot save"):
        train(config(tmp_path / "other", epochs=1))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"cannot write to .*Choose another --run"):
        train(config(tmp_path / "file" / "run"))


def test_what_cannot_be_started_leaves_the_folder_free_for_the_next_try(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"transformer/config\.json"):
        train(config(run, model=dataclasses.replace(preset("tiny").model, base=str(tmp_path))))
    log = dataclasses.replace(preset("tiny").log, watch=(), trackers=("nope",))
    with pytest.raises(ConfigError, match=r"log\.trackers"):
        train(dataclasses.replace(config(run, epochs=1), log=log))
    with pytest.raises(ConfigError, match="balance: expected the dotted path"):
        train(config(run, epochs=1, balance="no.such.module:rule"))
    train(config(run, epochs=1))


def test_prompts_that_cannot_be_used_stop_before_anything_is_done(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na purple cow\n")
    rollout = dataclasses.replace(preset("tiny").rollout, prompts=(str(prompts),))
    with pytest.raises(ConfigError, match=r"lines of .*:\n  line 3: prompt: expected a scene"):
        train(config(tmp_path / "run", rollout=rollout))
    assert not (tmp_path / "run").exists()


def test_the_same_seed_gives_the_same_run_and_micro_batches_change_nothing(tmp_path: Path, unbroken: Path) -> None:
    small = dataclasses.replace(preset("tiny").optim, micro_batch=3)
    train(config(tmp_path / "small", optim=small))
    a, b = (final_state(run)["default"] for run in (tmp_path / "small", unbroken))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0.02, atol=2e-4)
    train(config(tmp_path / "other", seed=1, epochs=1))
    assert records(tmp_path / "other", "epoch")[0]["rewards"] != records(unbroken, "epoch")[0]["rewards"]


@pytest.mark.parametrize("balance", sorted(set(BUILT_IN_RULES) - {"soft-min"}))
def test_every_rule_trains(tmp_path: Path, balance: str) -> None:
    train(config(tmp_path / "run", balance=balance, epochs=2))
    assert all(r["min_cosine"] is not None for r in records(tmp_path / "run", "refresh"))


def test_the_first_refresh_of_a_process_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def counted(*args: Any, verify: bool, **kwargs: Any) -> SharedRows:
        seen.append(verify)
        return shared_cotangent_rows(*args, verify=verify, **kwargs)

    monkeypatch.setattr(rows, "shared_cotangent_rows", counted)
    train(config(tmp_path / "run", epochs=2))
    assert seen[0]
    assert seen.count(True) == 1
    seen.clear()
    train(config(tmp_path / "run", epochs=3), resume=True)
    assert seen[0]
    assert seen.count(True) == 1


def test_rows_that_move_in_the_model_stop_the_first_refresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rolled(policy: Policy, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        return velocity(policy, x_t.roll(1, 0), t.roll(1), tuple(x.roll(1, 0) for x in condition)).roll(-1, 0)

    monkeypatch.setattr(rows, "velocity", rolled)
    with pytest.raises(TrainingError, match=r"expected rows that agree with autograd.*go on with --resume"):
        train(config(tmp_path / "run"))
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") is not None


def nowhere(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Scores:
    return Scores(torch.zeros(len(images)), torch.zeros(len(images), dtype=torch.bool))


def test_rewards_that_apply_to_nothing_are_said_or_stop_the_run(tmp_path: Path, capsys: Any) -> None:
    name = f"{__name__}:nowhere"
    train(config(tmp_path / "run", rewards=("colour", name), epochs=2))
    said = [text for record in records(tmp_path / "run", "epoch") for text in record["warnings"]]
    assert [text for text in said if "has applied to no image" in text] == [
        f"reward {name!r} has applied to no image in {n} epochs: nothing is learnt from it and its share of the "
        "weights is lost. Give prompts that it applies to, or leave it out"
        for n in (1, 2)
    ]
    with pytest.raises(TrainingError, match=r"none of the rewards applies to any prompt.*go on with --resume"):
        train(config(tmp_path / "none", rewards=(name,)))
