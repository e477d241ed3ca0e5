"""Files from elsewhere that are odd or hostile: an error that names them, nothing run, nothing written outside."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import pickle
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from marble_core.__main__ import main as core_main
from reference.__main__ import main
from reference.config.presets import preset
from reference.config.toml import from_toml
from reference.errors import ConfigError
from reference.prompts.files import read_mixture
from reference.run.reading import records
from reference.run.report import write_report
from reference.train import train
from tests.faults.test_runs import config as tiny_run

DEEP, DIGITS = "[" * 100_000, "9" * 10_000
PROMPTS = {
    "deep.jsonl": '{"prompt": ' + DEEP,
    "deep.json": DEEP + "]" * 100_000,
    "deep-entries.json": f"[{DEEP}{']' * 100_000}\n, 1]",
    "digits.jsonl": f'{{"prompt": "a", "tag": "counting", "include": [{{"class": "dog", "count": {DIGITS}}}]}}',
    "field.csv": "prompt\n" + "a" * 200_000,
    "quote.csv": 'prompt\n"' + "a\n" * 100_000,
    "null.txt": "a\0b",
    "surrogate.json": '["\\ud800"]',
}


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("form", ["", "text:", "ocr:", "geneval:"])
def test_odd_prompt_files_are_read_or_refused(tmp_path: Path, name: str, form: str) -> None:
    path = tmp_path / name
    path.write_text(PROMPTS[name], encoding="utf-8")
    try:
        read_mixture([f"{form}{path}"])
    except ConfigError as refusal:
        message = str(refusal)
    else:
        message = str(path)
    assert str(path) in message


def test_half_of_a_surrogate_pair_is_no_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a cat"}\n{"prompt": "a \\ud83d"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"line 2: .*surrogates not allowed"):
        read_mixture([f"text:{path}"])


@pytest.mark.parametrize("text", [f"epochs = {DIGITS}", f"rewards = {DEEP}", f"x = {'{a=' * 5000}", "[" * 5000])
def test_odd_configurations_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"odd\.toml"):
        from_toml(path, preset("tiny"))
    assert main(["train", "--preset", "tiny", "--config", str(path), "--run", str(tmp_path / "run")]) == 2


@pytest.mark.parametrize(
    "line", [DEEP, f'{{"kind": {DIGITS}}}', "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")]
)
def test_odd_records_are_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n{{}}\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: expected a JSON object"):
        records(tmp_path)
    assert main(["report", "--run", str(tmp_path)]) == 2


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.target,)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    train(tiny_run(run, epochs=1))
    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Trying the one before it")
def test_planted_pickles_do_not_run(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever a run, a model or a set of gradients is read, a pickle in its place is refused."""
    target = tmp_path / "planted"
    data = pickle.dumps(Planted(target), protocol=2)
    torch.save(Planted(target), tmp_path / "gradients.pt")
    for name in ("raw.pt", "gradients.safetensors"):
        (tmp_path / name).write_bytes(data)
    for name in ("gradients.pt", "raw.pt", "gradients.safetensors"):
        assert core_main([str(tmp_path / name)]) != 0
    listed = io.BytesIO()
    torch.save([1], listed)
    contents = [data, *(b"MARBLE1\n" + hashlib.sha256(x).digest() + x for x in (data, listed.getvalue()))]
    for checkpoint, content in itertools.product(list((finished / "checkpoints").iterdir()), contents):
        kept = checkpoint.read_bytes()
        checkpoint.write_bytes(content)
        for command in ("generate", "evaluate"):
            main([command, "--run", str(finished)])
        main(["train", "--preset", "tiny", "--run", str(finished), "--resume"])
        checkpoint.write_bytes(kept)
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert not target.exists()


@pytest.mark.slow
def test_a_run_from_elsewhere_writes_into_its_own_folder_alone(finished: Path, tmp_path: Path) -> None:
    """What a planted configuration says about paths does not lead out of the folder that is given."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for path in finished.rglob("*"):
        if path.is_file():
            copy = run / path.relative_to(finished)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    toml = (run / "config.toml").read_text(encoding="utf-8")
    lines = [f'run = "{elsewhere}"' if line.startswith("run =") else line for line in toml.splitlines()]
    (run / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert main(["report", "--run", str(run)]) == 0
    assert main(["generate", "--run", str(run), "--images", "1", "--count", "1", "--steps", "1"]) == 0
    assert main(["evaluate", "--run", str(run), "--steps", "1"]) == 0
    assert not elsewhere.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images", "0"], "--images: expected at least 1, got 0."),
        (["--count", "-1"], "--count: expected at least 1, got -1."),
        (["--steps", "-1"], "--steps: expected at least 0, got -1."),
        (["--prompts", "a red circle", "a purple cow"], "--prompts: 'a purple cow' is nothing of the small world: "),
        (["--out", "FOLDER"], "--out: expected the file of a picture, such as grid.png, got "),
        (["--out", "FOLDER/grid.psd"], "--out: expected the file of a picture, such as grid.png, got "),
        (["--out", "FOLDER/config.toml/grid.png"], "--out: cannot write to "),
    ],
)
def test_a_grid_that_cannot_be_made_is_refused_before_it_is_sampled(
    finished: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [flag.replace("FOLDER", str(finished)) for flag in flags]
    assert main(["generate", "--run", str(finished), *given]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_a_zip_that_leads_elsewhere_is_no_set_of_gradients(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "gradients.pt", "w") as archive:
        archive.writestr("../../outside", "x")
    assert core_main([str(tmp_path / "gradients.pt")]) != 0
    assert not (tmp_path.parent.parent / "outside").exists()


EVIL = '"><img src=x onerror=alert(1)><script>alert(1)</script>'


def test_names_of_every_kind_are_text_in_a_report(tmp_path: Path) -> None:
    """Rewards, phases, rules, warnings, configuration, folder: planted markup is shown, and is no markup."""
    run = tmp_path / "run <b>"
    run.mkdir()
    number = {"mean": 0.5, "low": 0.4, "high": 0.6}
    lines = [
        {"kind": "eval", "step": 0, "epoch": 0, "rewards": {EVIL: number}, "per_prompt": {EVIL: [0.5]}},
        {"kind": "eval", "step": 2, "epoch": 1, "rewards": {EVIL: number}, "per_prompt": {EVIL: [0.7]}},
        {"kind": "step", "step": 1, "loss": 1.0, "coefficients": {EVIL: 1.0}, "grad_norm": 1.0},
        {"kind": "refresh", "step": 1, "min_cosine": -0.1, "weights": {EVIL: 1.0}, "norms": {EVIL: 1.0}}
        | {"signal_cosines": {EVIL: {EVIL: 1.0}}, "signal_share": {EVIL: 0.5}, "null": 0.4, "mean_cosine": 0.1},
        {
            "kind": "epoch",
            "step": 2,
            "epoch": 0,
            "rewards": {EVIL: number},
            "gains": {EVIL: 0.1},
            "seconds": {EVIL: 1.0},
        }
        | {"warnings": [EVIL]},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    (run / "config.toml").write_text(f"balance = '{EVIL}'\n", encoding="utf-8")
    html = write_report(run).read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(html)
    assert "&lt;script&gt;" in html
    assert not {"script", "iframe", "object", "embed", "form"} & tags.names
    assert not [name for name in tags.attributes if name.startswith("on")]
    assert "Content-Security-Policy" in html


class Tags(HTMLParser):
    """Names of tags and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
