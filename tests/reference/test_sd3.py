"""Stable Diffusion 3 pipelines, tiny and with random weights: loading, embeddings, precision, and a run end to end."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import errors as hub
from safetensors.torch import load_file
from torch import Tensor

from reference.__main__ import main, train_flags
from reference.config.presets import preset
from reference.config.settings import Config, ModelConfig
from reference.errors import ConfigError
from reference.interfaces import Scores, plain_prompts
from reference.policy import embeddings, sd3
from reference.policy.adapters import (
    Adapter,
    Policy,
    adapter_state,
    compile_blocks,
    load_adapter,
    parameters,
    velocity,
    weights_of,
)
from reference.policy.base import Base
from reference.policy.load import load_model
from reference.processes.peers import ALONE
from reference.quiet import quiet_libraries
from reference.run import checkpoint
from reference.run import plan as plan_module
from reference.step.balance import Step, init_balance, step_gradient
from reference.step.batch import Weighed, advantages, step_rows
from reference.step.gradients import Rows, Whole
from reference.step.method import method_of
from reference.step.rollout import Rollout, Sampling, generate_batches

CPU = torch.device("cpu")
Refresh = Callable[[str, bool], tuple[Policy, dict[str, Tensor]]]
PROMPTS = ["a red cat", "two dogs", "7 cups", "a blue cup"]


def model_of(folder: Path, cache: Path, **changes: Any) -> ModelConfig:
    return ModelConfig(base=str(folder), resolution=16, t5_tokens=12, cache=cache, lora_rank=4, **changes)


def config_of(folder: Path, cache: Path, **changes: Any) -> Config:
    tiny = preset("tiny")
    return dataclasses.replace(tiny, device="cpu", model=model_of(folder, cache, **changes))


def pipeline_of(folder: Path, **parts: Any) -> Any:
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_pretrained(folder, **parts)


# --- loading


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_embeddings_and_images_are_the_pipeline_s(tiny_sd3: Path, cache: Path) -> None:
    base = sd3.load_sd3(model_of(tiny_sd3, cache), PROMPTS, CPU)
    pipeline = pipeline_of(tiny_sd3)
    wanted = [PROMPTS[2], PROMPTS[0], PROMPTS[2]]
    embeds, _, pooled, _ = pipeline.encode_prompt(
        wanted, None, None, do_classifier_free_guidance=False, max_sequence_length=12
    )
    found = base.encode(wanted)
    torch.testing.assert_close(found[0], embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], pooled, rtol=0, atol=1e-5)
    assert found[0].shape == (3, 16 + 12, 32)
    assert base.latent_shape == (4, 8, 8)
    latents = torch.randn(11, 4, 8, 8)  # more than are decoded at a time
    vae = pipeline.vae
    with torch.no_grad():
        raw = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    expected = pipeline.image_processor.postprocess(raw, output_type="pt")
    torch.testing.assert_close(base.decode(latents), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_prompts_are_encoded_once(tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    original = sd3._encoder

    def spy(*args: Any) -> Any:
        encode = original(*args)

        def noted(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
            encoded.extend(texts)
            return encode(texts)

        return noted

    monkeypatch.setattr(sd3, "_encoder", spy)
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_sd3, folder)
    model = model_of(folder, tmp_path / "cache")

    def encode(prompts: list[str], model: ModelConfig = model) -> Tensor:
        return sd3.load_sd3(model, prompts, CPU).encode(prompts)[0]

    first = encode(["a cat", "a dog", "a cat"])
    assert encoded == ["a cat", "a dog"]
    assert torch.equal(encode(["a dog", "a cat"]), first[[1, 0]])
    assert encoded == ["a cat", "a dog"]
    encode(["a cat", "a cup"])
    assert encoded == ["a cat", "a dog", "a cup"]
    (next(iter((folder / "text_encoder").glob("*.safetensors")))).touch()  # another encoder: nothing is known
    encode(["a cat"])
    assert encoded[3:] == ["a cat"]
    encode(["a cat"], dataclasses.replace(model, t5_tokens=5))
    assert encoded[4:] == ["a cat"]
    files = sorted((tmp_path / "cache").rglob("*.*"))
    assert {path.suffix for path in files} == {".safetensors"}  # no temporary file is left
    for path in files:
        path.write_bytes(b"cut")
    with pytest.raises(ConfigError, match=r"model\.cache: .*\.safetensors is damaged.*Delete it"):
        encode(["a cat"])


def test_it_works_without_the_t5_encoder(tiny_sd3_without_t5: Path, tmp_path: Path) -> None:
    embeds, pooled = sd3.load_sd3(model_of(tiny_sd3_without_t5, tmp_path), ["a cat"], CPU).encode(["a cat"])
    assert embeds.shape == (1, 16 + 12, 32)
    assert not embeds[:, 16:].any()
    assert embeds[:, :16].any()
    assert pooled.shape == (1, 24)


@pytest.mark.parametrize(("resolution", "ok"), [(48, True), (4, True), (0, False), (18, False), (52, False)])
def test_a_resolution_that_does_not_fit_is_named(tiny_sd3: Path, cache: Path, resolution: int, ok: bool) -> None:
    model = dataclasses.replace(model_of(tiny_sd3, cache), resolution=resolution)
    if ok:
        assert sd3.load_sd3(model, [], CPU).latent_shape == (4, resolution // 2, resolution // 2)
    else:
        with pytest.raises(ConfigError, match=r"model\.resolution: expected a multiple of 4 up to 48"):
            sd3.load_sd3(model, [], CPU)


def test_files_that_are_missing_are_named(tiny_sd3: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_sd3, folder)
    model = model_of(folder, tmp_path / "cache")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.base: cannot load transformer of .*pipeline: .*Complete the files"):
        sd3.load_sd3(model, [], CPU)
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"but vae/config\.json is missing\. Save one there with save_pretrained"):
        sd3.load_sd3(model, [], CPU)


def raised(kind: type[Exception]) -> Exception:
    """An error of the hub's client, made without the answer of a server."""
    error = kind.__new__(kind)
    error.args = ("the hub's words",)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub.GatedRepoError, r"asks for its licence to be accepted.*huggingface\.co/org/name.*hf auth login.*HF_TOKEN"),
        (hub.RepositoryNotFoundError, r"org/name is neither, or is private: then give a token"),
        (hub.RevisionNotFoundError, r"model\.revision: org/name has no revision 'main'"),
        (hub.LocalEntryNotFoundError, r"the Hugging Face hub cannot be reached.*hf download org/name.*their folder"),
        (hub.EntryNotFoundError, r"no model_index\.json"),
        (hub.HFValidationError, r"there is no folder org/name"),
        (ConnectionError, r"cannot download org/name: "),
    ],
)
def test_what_the_hub_refuses_is_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: type[Exception], message: str
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise raised(error)

    monkeypatch.setattr(sd3, "hf_hub_download", refuse)
    with pytest.raises(ConfigError, match=message):
        sd3.load_sd3(ModelConfig(base="org/name", cache=tmp_path), [], CPU)


# --- precision


def rows_of(config: Config, base: Base) -> Rows:
    """The rows of a step on random latents: four prompts at two timesteps each."""
    g = torch.Generator().manual_seed(0)
    values = torch.randn(4, 5, generator=g, dtype=torch.float64)
    latents = torch.randn(4, *base.latent_shape, generator=g)
    rollout = Rollout(plain_prompts(PROMPTS), latents, Scores(values, values.isfinite()))
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, images_per_prompt=2))
    A, A_sum = advantages(rollout.scores, config)
    return step_rows(base, Weighed(rollout, A, A_sum, 0), torch.arange(4), config, 0)


def drifted(policy: Policy) -> Policy:
    for i, adapter in enumerate(("default", "old")):
        g = torch.Generator().manual_seed(i)
        state = {k: 0.1 * torch.randn(v.shape, generator=g) for k, v in adapter_state(policy, "default").items()}
        load_adapter(policy, adapter, state)  # type: ignore[arg-type]
    return policy


@pytest.fixture(scope="module")
def refresh(tiny_sd3: Path, cache: Path) -> Refresh:
    """A policy, and the gradient of a step that solves, by precision and with or without checkpointing."""

    @functools.cache
    def taken(precision: str, checkpointing: bool) -> tuple[Policy, dict[str, Tensor]]:
        config = config_of(tiny_sd3, cache, precision=precision, gradient_checkpointing=checkpointing)
        base, policy = load_model(config, PROMPTS)
        drifted(policy)
        method, rows = method_of(dataclasses.replace(config, balance="marble")), rows_of(config, base)
        nothing = torch.full((5,), torch.nan, dtype=torch.float64)
        whole = Whole(ALONE, int((rows.half == 0).sum()), len(rows.half))
        step = Step(True, nothing, rows.A, rows.A_sum, None, 8, whole)
        loss = dataclasses.replace(config.loss, kl_weight=1e-2)
        balance = init_balance(5, method, parameters(policy))
        result = step_gradient(policy, rows, balance, method, loss, step)
        return policy, result.gradient

    return taken


def test_bf16_keeps_adapters_and_gradients_in_float32(refresh: Refresh) -> None:
    exact, wanted = refresh("float32", False)
    policy, found = refresh("bf16", False)
    dtypes = {name: p.dtype for name, p in policy.model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "lora_" not in name} == {torch.bfloat16}
    same = adapter_state(exact, "default")
    assert all(torch.equal(x, same[name]) for name, x in adapter_state(policy, "default").items())
    assert {x.dtype for x in found.values()} == {torch.float32}
    a, b = (torch.cat([g[name].flatten() for name in wanted]) for g in (wanted, found))
    assert 0.98 < float(torch.cosine_similarity(a, b, dim=0)) < 1.0
    condition = torch.randn(2, 28, 32), torch.randn(2, 24)
    v = velocity(policy, torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.9]), condition)
    assert v.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_checkpointing_changes_nothing_but_memory(refresh: Refresh, precision: str) -> None:
    (_, plain), (policy, again) = (refresh(precision, checkpointing) for checkpointing in (False, True))
    assert policy.model.get_base_model().is_gradient_checkpointing
    for name, x in plain.items():
        torch.testing.assert_close(again[name], x, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the compiler warns about while it traces is not ours
def test_compiled_blocks_compute_the_same(tiny_sd3: Path, cache: Path) -> None:
    base, policy = load_model(config_of(tiny_sd3, cache), PROMPTS)
    drifted(policy)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.9]), base.encode(PROMPTS[:2])

    def taken() -> list[Tensor]:
        v = velocity(policy, *inputs)
        return [v.detach(), *torch.autograd.grad(v.square().mean(), list(parameters(policy).values()))]

    plain = taken()
    compile_blocks(policy, backend="eager")
    frames = torch._dynamo.utils.counters["frames"]
    before = frames["ok"]
    for x, y in zip(taken(), plain, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    assert frames["ok"] > before
    torch._dynamo.reset()


# --- a run

MY_REWARD = """
def bright(images, prompts, metadata):
    assert images.shape[1:] == (3, 16, 16) and 0 <= images.min() and images.max() <= 1
    return images.mean((1, 2, 3))

def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))
"""

PIPELINE = """
import sys, torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
folder, run, given, out = sys.argv[1:]
pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
pipeline.set_progress_bar_config(disable=True)
given = torch.load(given)
def images():
    return pipeline(given["prompts"], latents=given["noise"].clone(), num_inference_steps=given["steps"],
        guidance_scale=1.0, height=16, width=16, max_sequence_length=12, output_type="pt").images
base = images()
pipeline.load_lora_weights(run)
torch.save({"base": base, "trained": images()}, out)
"""


@pytest.fixture(scope="module")
def flags(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A few steps of the preset sd35m on a tiny pipeline, with files of prompts and rewards of one's own."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "my_sd3_reward.py").write_text(MY_REWARD)
    (folder / "train.txt").write_text("a red cat\ntwo dogs\n7 cups\n")
    (folder / "test.txt").write_text("a blue cup\na cat\n")
    return [
        *["--preset", "sd35m", "--model.base", str(tiny_sd3), "--model.resolution", "16", "--model.t5-tokens", "12"],
        *["--model.cache", str(folder / "cache"), "--model.precision", "float32", "--run", str(folder / "run")],
        *["--device", "cpu", "--rollout.prompts", str(folder / "train.txt"), "--rollout.sampler", "euler"],
        *["--rollout.held-out", str(folder / "test.txt"), "--rollout.prompts-per-epoch", "2"],
        *["--rollout.images-per-prompt", "3", "--rollout.steps", "3", "--rollout.batch", "4", "--scoring.batch", "4"],
        *["--rewards", "my_sd3_reward:bright", "my_sd3_reward:red", "--log.watch", "--log.trackers", "--epochs", "2"],
        *["--log.eval-steps", "2", "--log.eval-every", "0", "--log.save-every", "1", "--optim.lr", "0.05"],
    ]


@pytest.fixture(scope="module")
def trained(flags: list[str]) -> Path:
    run = Path(flags[flags.index("--run") + 1])
    sys.path.insert(0, str(run.parent))
    try:
        assert main(["train", *flags]) == 0
    finally:
        sys.path.remove(str(run.parent))
    return run


@pytest.mark.slow
def test_the_preset_trains_any_pipeline_with_rewards_of_one_s_own(trained: Path, flags: list[str]) -> None:
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2]
    assert {"my_sd3_reward:bright", "my_sd3_reward:red"} == set(records[0]["rewards"])
    settings = train_flags(flags).settings
    plain = preset("sd35m")
    assert (settings.loss, settings.balance) == (plain.loss, plain.balance)
    for name in ("grids/before.png", "grids/after.png", "report.html", "pytorch_lora_weights.safetensors"):
        assert (trained / name).stat().st_size > 0


def broken(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
    raise KeyError("weights")


def test_a_broken_reward_shows_before_anything_is_sampled(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = flags.index("--rewards")
    given = [*flags[:at], "--rewards", f"{__name__}:broken", *flags[at + 3 :], "--run", str(tmp_path / "run")]
    assert main(["train", *given]) == 1
    assert re.fullmatch(
        rf"reward '{__name__}:broken' raised KeyError: 'weights' \(test_sd3\.py, line \d+\)\n", capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_diffusers_loads_the_run_and_draws_our_images(
    tiny_sd3: Path, trained: Path, flags: list[str], tmp_path: Path
) -> None:
    config, prompts, steps = train_flags(flags).settings, ["a red cat", "a blue cup"], 5
    base, policy = load_model(config, prompts)
    noise = torch.randn(2, *base.latent_shape, generator=torch.Generator().manual_seed(3))
    state = checkpoint.latest(trained / "checkpoints")
    assert state is not None
    with weights_of(policy, state["ema"]):

        def drawn(adapter: Adapter) -> Tensor:
            return next(generate_batches(policy, base, prompts, noise, adapter, Sampling("euler", steps, 2)))[1]

        ours = {"base": drawn("base"), "trained": drawn("default")}
    torch.save({"prompts": prompts, "noise": noise, "steps": steps}, tmp_path / "given.pt")
    paths = [str(path) for path in (tiny_sd3, trained, tmp_path / "given.pt", tmp_path / "out.pt")]
    command = [sys.executable, "-W", "ignore", "-c", PIPELINE, *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(tmp_path / "out.pt")
    for kind, images in ours.items():
        torch.testing.assert_close(images, theirs[kind], rtol=0, atol=2e-5)
    assert float((ours["trained"] - ours["base"]).abs().max()) > 1e-2


def test_a_run_goes_on_where_it_was_stopped(trained: Path, flags: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    sys.path.insert(0, str(trained.parent))
    try:
        more = ["--run", str(run), "--epochs", "3", "--scoring.batch", "5", "--model.gradient-checkpointing"]
        assert main(["train", *flags, *more, "--resume"]) == 0
        assert main(["train", *flags, "--run", str(run), "--rollout.steps", "4", "--resume"]) == 2
    finally:
        sys.path.remove(str(trained.parent))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2, 3]
    before, after = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (trained, run))
    assert any(not torch.equal(x, after[name]) for name, x in before.items())


def test_the_exported_file_has_the_scale_in_it(trained: Path) -> None:
    state = checkpoint.latest(trained / "checkpoints")
    assert state is not None
    exported = load_file(trained / "pytorch_lora_weights.safetensors")
    assert len(exported) == len(state["ema"])
    name = "transformer_blocks.1.attn.to_out.0"
    ema = {part: state["ema"][f"base_model.model.{name}.{part}.default.weight"] for part in ("lora_A", "lora_B")}
    assert torch.equal(exported[f"transformer.{name}.lora_A.weight"], ema["lora_A"])
    assert torch.equal(exported[f"transformer.{name}.lora_B.weight"], 2.0 * ema["lora_B"])  # alpha 64 / rank 32


def test_a_grid_of_a_run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    shapes, pixels = [], []
    for name, more in (("a", ["--prompts", "a cat"]), ("b", []), ("c", ["--prompts", "a cat", "--untrained"])):
        out = tmp_path / f"{name}.png"
        given = ["--run", str(trained), "--images", "2", "--out", str(out), "--device", "cpu", *more]
        assert main(["generate", *given]) == 0
        with Image.open(out) as image:
            shapes.append(image.size)
            pixels.append(image.tobytes())
    assert shapes == [(192, 96), (192, 192), (192, 96)]  # 16 pixels enlarged to 96; two held-out prompts
    assert pixels[0] != pixels[2]
    assert main(["generate", "--run", str(tmp_path)]) == 2
    assert "config.toml" in capsys.readouterr().err


def test_the_plan_counts_without_weights(
    tiny_sd3: Path,
    flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(Path(flags[flags.index("--run") + 1]).parent)
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_sd3, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert main(["train", *flags, "--model.base", str(folder), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    _, policy = load_model(train_flags(flags).settings, [])
    assert f"# trained     {sum(p.numel() for p in parameters(policy).values())} parameters" in printed
    assert "# prompts     3 for training, 2 held out" in printed
    assert "GB of transformer weights in float32\n" in printed
    assert re.search(r"# time +about .* here: [\d.]+ s an epoch", printed)  # with random weights
    assert main(["train", *flags, "--model.base", str(folder), "--model.shard", "--dry-run"]) == 0
    assert "GB of transformer weights in float32, spread over all processes\n" in capsys.readouterr().out
    assert main(["train", *flags, "--model.base", str(folder), "--rollout.prompts", "none.txt", "--dry-run"]) == 1
    out, err = capsys.readouterr()
    assert "# missing     prompts: see below" in out
    assert "this run cannot start yet:\nprompts: rollout.prompts: cannot read none.txt" in err
    (folder / "model_index.json").write_text("{")
    assert main(["train", *flags, "--model.base", str(folder), "--dry-run"]) == 1
    assert "model: model.base: cannot read " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.resolution", "17"], "model: model.resolution: expected a multiple of 4 up to 48"),
        (["--model.resolution", "20000"], "model: model.resolution: expected a multiple of 4 up to 48"),
        (["--rollout.held-out", "TRAIN"], "prompts: rollout.held_out: all 3 held-out prompts are training prompts too"),
        (["--log.watch", "my_sd3_reward:nothing"], "rewards: rewards: expected the dotted path of a callable, got "),
        (["--log.watch", "unifiedreward"], "rewards: reward unifiedreward: expected the URL of a server"),
        (
            ["--log.watch", "geneval", "--scoring.models", "geneval=facebook/mask2former,/nowhere"],
            "rewards: scoring.models: geneval: expected a folder or an id on the hub, got /nowhere.",
        ),
        (["--log.trackers", "wnb"], "trackers: log.trackers: expected names among "),
        (["--scoring.device", "cuda:99"], "rewards: scoring.device: "),
    ],
)
def test_the_plan_is_refused_for_what_a_run_would_be(
    flags: list[str],
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(Path(flags[flags.index("--run") + 1]).parent)
    monkeypatch.delenv("MARBLE_UNIFIEDREWARD_URL", raising=False)
    monkeypatch.setattr(plan_module, "_TRIED_ANYWHERE", 0)  # no time is needed here
    given = [flags[flags.index("--rollout.prompts") + 1] if flag == "TRAIN" else flag for flag in more]
    assert main(["train", *flags, *given, "--dry-run"]) == 1
    out, err = capsys.readouterr()
    assert err.startswith(f"this run cannot start yet:\n{message}")
    assert err.count("\n") == 2
    assert f"# missing     {message.partition(':')[0]}: see below" in out


def test_the_plan_of_a_large_model_has_no_time_without_a_gpu(
    tiny_sd3: Path, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(flags[flags.index("--run") + 1]).parent)
    monkeypatch.setattr(plan_module, "_TRIED_ANYWHERE", 1000)
    assert main(["train", *flags, "--model.base", str(tiny_sd3), "--device", "cpu", "--dry-run"]) == 0
    assert "# time        not estimated: there is no GPU here\n" in capsys.readouterr().out


def test_the_plan_says_that_a_model_does_not_fit(
    tiny_sd3: Path, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.syspath_prepend(Path(flags[flags.index("--run") + 1]).parent)
    monkeypatch.setattr(plan_module, "_measure", full)
    assert main(["train", *flags, "--model.base", str(tiny_sd3), "--dry-run"]) == 0
    assert "do not fit here; lower optim.micro_batch" in capsys.readouterr().out


@pytest.mark.parametrize("operation", ["mkdir", "mkstemp", "save_file", "replace"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_full_disk_leaves_a_cache_that_can_be_filled_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, number: int
) -> None:
    """One operation fails on the way through three files: it is said, and the next run adds what is missing."""
    owners: dict[str, Any] = {"mkdir": Path, "mkstemp": tempfile, "save_file": embeddings, "replace": os}
    owner, calls = owners[operation], list[int]()
    plain = getattr(owner, operation)

    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(*args, **kwargs)

    def fill() -> list[float]:
        found = embeddings.open_embeddings(tmp_path / "cache")
        found = embeddings.add_prompts(found, embeddings.missing_prompts(found, list("abcdef")), encode)
        pooled = embeddings.read_embeddings(found, list("abcdef"), CPU)[1]
        return [float(x) for x in pooled.flatten()]

    def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        numbers = torch.tensor([float(ord(text)) for text in texts])
        return numbers[:, None, None].expand(-1, 2, 3), numbers[:, None]

    monkeypatch.setattr(embeddings, "_SHARD", 2)
    with monkeypatch.context() as disk:
        disk.setattr(owner, operation, full)
        with pytest.raises(ConfigError, match=r"model\.cache: cannot write .*No space left.*Choose another"):
            fill()
    assert not list(tmp_path.rglob("*.tmp"))
    assert fill() == [float(ord(text)) for text in "abcdef"]


def test_several_runs_fill_one_cache_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each finds its own prompts, whole, whoever wrote a file last."""
    monkeypatch.setattr(embeddings, "_SHARD", 4)
    monkeypatch.setattr(embeddings, "_TOGETHER", 2)
    faults: list[BaseException] = []

    def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        time.sleep(0.001)
        numbers = torch.tensor([float(text.split()[-1]) for text in texts])
        return numbers[:, None, None].expand(-1, 2, 3), numbers[:, None]

    def fill(prompts: list[str]) -> None:
        try:
            for _ in range(3):
                found = embeddings.open_embeddings(tmp_path)
                found = embeddings.add_prompts(found, embeddings.missing_prompts(found, prompts), encode)
                embeds, pooled = embeddings.read_embeddings(found, prompts, CPU)
                assert [f"a cat of {x:.0f}" for x in pooled.flatten().tolist()] == prompts
                assert embeds.shape == (30, 2, 3)
        except BaseException as error:
            faults.append(error)

    runs = [[f"a cat of {i}" for i in range(start, start + 30)] for start in (0, 20, 0, 10)]
    threads = [threading.Thread(target=fill, args=(prompts,)) for prompts in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert not list(tmp_path.rglob("*.tmp"))


def test_prompts_can_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "prompts" / "geneval.jsonl"
    assert main(["make-prompts", "geneval", "--seed", "3", "--count", "20", "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 20
    assert main(["make-prompts", "geneval", "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err


def test_what_is_cut_off_is_one_line_and_libraries_are_silent(
    tiny_sd3: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = model_of(tiny_sd3, tmp_path / "cache")
    with quiet_libraries():
        sd3.load_sd3(model, ["a cat", "a dog and " + 90 * "very " + "big"], CPU)
    lines = [line for line in capfd.readouterr().err.splitlines() if line and "encoding prompts" not in line]
    assert lines == [
        "1 of 2 prompts are cut off after the 16 tokens that the CLIP encoders read",
        "1 of 2 prompts are cut off after the model.t5_tokens = 12 that the T5 encoder reads",
    ]


def test_libraries_speak_again_after_a_load() -> None:
    before = diffusers_logging.get_verbosity(), diffusers_logging.is_progress_bar_enabled()
    with quiet_libraries():
        assert not diffusers_logging.is_progress_bar_enabled()
    assert (diffusers_logging.get_verbosity(), diffusers_logging.is_progress_bar_enabled()) == before


def test_a_scheduler_that_shifts_by_resolution_is_refused(tiny_sd3: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_sd3, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dynamic_shifting": True}))
    with pytest.raises(ConfigError, match=r"model\.base: expected a scheduler .* got use_dynamic_shifting"):
        sd3.load_sd3(model_of(folder, tmp_path / "cache"), [], CPU)
