"""Training of the world's dual encoder and of its base model: reproducible, resumable, on the right scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reference.config.settings import PretrainConfig, SimilarityConfig
from reference.splits import is_held_out
from reference.world import pretrain as pretrain_module
from reference.world import similarity as similarity_module
from reference.world.model import (
    PromptEncoder,
    decode_latents,
    encode_images,
    load_encoder,
    new_scheduler,
    new_transformer,
    save_base,
    token_ids,
)
from reference.world.pretrain import batch, muon_step, pretrain
from reference.world.render import INK, ink_mask, render
from reference.world.scenes import KINDS, MAX_TOKENS, Scene, parse
from reference.world.similarity import DualEncoder, load_dual_encoder, train_dual_encoder

SHORT = PretrainConfig(steps=6, batch=2, save_every=3)
PROMPTS = ["a red circle", 'the text "CAT"', "a small green triangle above a large blue square"]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(a: Any, b: Any) -> None:
    """Bit for bit, through dicts and sequences."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def saved(folder: Path) -> dict[str, bytes]:
    """The content of every file of weights below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that the two trainings turn into tokens from here on."""
    prompts: list[str] = []

    def record(batch: Sequence[str]) -> Tensor:
        prompts.extend(batch)
        return token_ids(batch)

    for module in (pretrain_module, similarity_module):
        monkeypatch.setattr(module, "token_ids", record)
    return prompts


# --- dual encoder


def test_dual_encoder_gives_unit_vectors() -> None:
    torch.manual_seed(0)
    model = DualEncoder()
    for out in (model.image(rand(3, 3, 32, 32)), model.text(token_ids(PROMPTS))):
        assert out.shape == (3, 64)
        torch.testing.assert_close(out.norm(dim=1), torch.ones(3))


def test_dual_encoder_survives_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DualEncoder()
    save_file({k: v.detach().half().contiguous() for k, v in model.state_dict().items()}, tmp_path / "e.safetensors")
    loaded = load_dual_encoder(tmp_path / "e.safetensors")
    assert not loaded.training
    for (name, a), (other, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a.half().float(), b)
        assert not b.requires_grad
    images = rand(3, 3, 32, 32)
    torch.testing.assert_close(loaded.image(images), model.image(images), rtol=0, atol=2e-3)
    torch.testing.assert_close(loaded.text(token_ids(PROMPTS)), model.text(token_ids(PROMPTS)), rtol=0, atol=2e-3)


def test_similarity_training_repeats_and_sees_nothing_held_out(tmp_path: Path, seen: list[str]) -> None:
    config = SimilarityConfig(steps=4, batch=8)
    for name, run in {"a": config, "b": config, "other": replace(config, seed=1)}.items():
        train_dual_encoder(run, tmp_path / name)
    files = {name: saved(tmp_path / name) for name in ("a", "b", "other")}
    assert list(files["a"]) == ["similarity.safetensors"]
    assert files["a"] == files["b"] != files["other"]
    weights = load_file(tmp_path / "a" / "similarity.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    load_dual_encoder(tmp_path / "a" / "similarity.safetensors")
    assert len(seen) == 3 * 4 * 8
    assert not any(map(is_held_out, seen))
    assert all(len(set(seen[i : i + 8])) == 8 for i in range(0, len(seen), 8))  # no prompt twice in a batch
    assert seen[:32] == seen[32:64] != seen[64:]


# --- base model


def test_encode_and_decode_are_inverse() -> None:
    images = rand(4, 3, 32, 32)
    images[0], images[1] = 0, 1
    latents = encode_images(images)
    assert latents.shape == (4, 12, 16, 16)
    torch.testing.assert_close(decode_latents(latents), images, rtol=0, atol=1e-6)
    torch.testing.assert_close(encode_images(decode_latents(latents)), latents, rtol=0, atol=1e-5)
    # a pixel is one channel of one latent: (2 * row + column of its fold) within its colour
    pixel = torch.zeros(1, 3, 32, 32)
    pixel[0, 1, 6, 9] = 1
    changed = (encode_images(pixel) - encode_images(torch.zeros(1, 3, 32, 32))).nonzero()
    assert changed.tolist() == [[0, 4 + 1, 3, 4]]
    assert decode_latents(torch.full((1, 12, 1, 1), 9.0)).unique().tolist() == [1]  # clamped
    assert decode_latents(torch.full((1, 12, 1, 1), -9.0)).unique().tolist() == [0]


def test_prompt_encoder_and_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformer, encoder = new_transformer(), PromptEncoder()
    save_base(tmp_path, transformer.half(), encoder.half())
    loaded = load_encoder(tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())
    embeds, pooled = loaded(token_ids(PROMPTS))
    assert embeds.shape == (3, MAX_TOKENS, 64)
    assert pooled.shape == (3, 64)
    assert embeds.dtype == pooled.dtype == torch.float32
    assert_same(loaded.float().state_dict(), encoder.float().state_dict())
    again = type(transformer).from_pretrained(tmp_path / "transformer", torch_dtype=torch.float16)
    assert_same(dict(again.state_dict()), dict(transformer.state_dict()))
    assert type(new_scheduler()).from_pretrained(tmp_path / "scheduler").config.shift == 1.0


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain(SHORT, whole)
    pretrain(replace(SHORT, steps=3), parts)
    early = saved(parts)
    assert torch.load(parts / "state.pt", weights_only=True)["step"] == 3
    pretrain(SHORT, parts)
    states = [torch.load(folder / "state.pt", weights_only=True) for folder in (whole, parts)]
    assert states[0]["step"] == 6
    assert_same(*states)
    files = saved(whole)
    assert sorted(files) == ["prompt_encoder.safetensors", "transformer/diffusion_pytorch_model.safetensors"]
    assert files == saved(parts)
    assert all(files[name] != early[name] for name in files)
    pretrain(SHORT, parts)  # nothing is left to do
    assert files == saved(parts)
    # what is kept is the average, in float16
    kept = load_file(whole / "prompt_encoder.safetensors")
    for name, tensor in kept.items():
        assert torch.equal(tensor, states[0]["average"][f"encoder.{name}"].half())


def test_training_lowers_the_loss_on_its_own_batch() -> None:
    torch.manual_seed(0)
    transformer, encoder = new_transformer(), PromptEncoder()
    matrices = [p for name, p in transformer.named_parameters() if "transformer_blocks" in name and p.ndim == 2]
    momenta = [torch.zeros_like(p) for p in matrices]
    rest = [p for p in transformer.parameters() if not any(p is q for q in matrices)]
    optimizer = torch.optim.AdamW(rest, lr=2e-3)
    data = batch(SHORT, 0)
    losses = []
    for _ in range(8):
        loss = pretrain_module._loss(transformer, encoder, *data)
        loss.backward()
        muon_step(matrices, momenta, 2e-3)
        optimizer.step()
        transformer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_batches_are_a_function_of_seed_and_step(seen: list[str]) -> None:
    config = PretrainConfig(batch=16)
    x0, noise, t, ids, weight = batch(config, 3)
    assert x0.shape == noise.shape == weight.shape == (16, 12, 16, 16)
    assert t.shape == (16,)
    assert ids.shape == (16, MAX_TOKENS)
    assert 0 < t.min() < t.max() < 1
    assert weight.unique().tolist() == [1]
    assert_same(batch(config, 3), (x0, noise, t, ids, weight))
    for a, b in zip(batch(config, 4)[:4], (x0, noise, t, ids), strict=True):
        assert not torch.equal(a, b)
    assert not torch.equal(batch(replace(config, seed=1), 3)[3], ids)
    images = render([parse(prompt) for prompt in seen[:16]], seed=3)
    torch.testing.assert_close(decode_latents(x0), images, rtol=0, atol=1e-6)


def test_no_batch_has_a_held_out_prompt(seen: list[str]) -> None:
    for seed in range(3):
        for step in range(10):
            batch(PretrainConfig(batch=32, seed=seed), step)
    assert len(seen) == 960
    assert not any(map(is_held_out, seen))
    scenes = [parse(prompt) for prompt in seen]
    with_text = sum(scene.text is not None for scene in scenes) / 960
    assert with_text == pytest.approx(2 / 11, abs=0.05)  # the weights of KINDS are 3, 3, 3, 1, 1
    assert sum(scene.relation is not None for scene in scenes) / 960 == pytest.approx(3 / 11, abs=0.06)
    assert len(pretrain_module.KIND_WEIGHTS) == len(KINDS)


def test_only_pixels_of_text_weigh_more(seen: list[str]) -> None:
    x0, _, _, _, weight = batch(PretrainConfig(batch=64, ink_weight=5), 2)
    scenes: list[Scene] = [parse(prompt) for prompt in seen]
    pixels = nn.functional.pixel_shuffle(weight, 2)
    ink = ink_mask(scenes, seed=2)
    assert torch.equal(ink, ((decode_latents(x0) - INK).abs() < 1e-6).all(1))
    assert torch.equal(pixels, torch.where(ink, 5.0, 1.0).unsqueeze(1).expand(-1, 3, -1, -1))
    for scene, inked in zip(scenes, ink, strict=True):
        assert bool(inked.any()) == (scene.text is not None)


def test_the_loss_is_the_weighted_error_of_the_velocity() -> None:
    x0, noise, t, ids, _ = batch(SHORT, 0)
    inputs: dict[str, Any] = {}

    class Still(nn.Module):
        def forward(self, **arguments: Any) -> tuple[Tensor]:
            inputs.update(arguments)
            return (torch.zeros_like(arguments["hidden_states"]),)

    weight = 1 + rand(*x0.shape)
    loss = pretrain_module._loss(Still(), PromptEncoder(), x0, noise, t, ids, weight)
    torch.testing.assert_close(loss, (weight * (noise - x0) ** 2).mean())
    assert torch.equal(inputs["timestep"], 1000 * t)
    for i in range(SHORT.batch):
        torch.testing.assert_close(inputs["hidden_states"][i], torch.lerp(x0[i], noise[i], t[i]))


# --- Muon


def muon_update(matrices: list[Tensor], grads: list[Tensor], lr: float, momentum: float) -> list[Tensor]:
    """What one step subtracts, weight decay apart, in units of ``0.2 lr sqrt(max(m, n))``."""
    parameters = [nn.Parameter(matrix.clone()) for matrix in matrices]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    muon_step(parameters, [torch.zeros_like(matrix) for matrix in matrices], lr, momentum)
    return [
        ((1 - 0.01 * lr) * before - after.detach()) / (lr * 0.2 * max(before.shape) ** 0.5)
        for before, after in zip(matrices, parameters, strict=True)
    ]


@pytest.mark.parametrize("shape", [(96, 384), (384, 96), (96, 48), (5, 32)])
@pytest.mark.parametrize("momentum", [0.0, 0.95])
def test_muon_steps_along_the_orthogonal_factor(shape: tuple[int, int], momentum: float) -> None:
    W, G = randn(*shape).double(), 1e-3 * randn(*shape, seed=1).double()
    (step,) = muon_update([W], [G], lr=0.02, momentum=momentum)  # the first step goes along the gradient itself
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    inner = U.mT @ step @ Vh.mT  # the singular vectors are kept, their values all become about 1
    values = inner.diagonal()
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert (inner - values.diag()).abs().max() < 1e-6
    assert (step - U @ inner @ Vh).abs().max() < 1e-6


def test_muon_does_matrices_of_one_shape_together_as_each_alone() -> None:
    shapes = [(96, 96), (24, 96), (96, 96), (24, 96), (96, 24), (96, 96)]
    matrices = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    grads = [10.0 ** (i - 3) * randn(*shape, seed=10 + i) for i, shape in enumerate(shapes)]
    together = muon_update(matrices, grads, 0.02, 0.95)
    for matrix, grad, step in zip(matrices, grads, together, strict=True):
        torch.testing.assert_close(step, muon_update([matrix], [grad], 0.02, 0.95)[0], rtol=0, atol=1e-4)


def test_muon_s_momentum_and_decay() -> None:
    W, G = nn.Parameter(torch.eye(3, 4)), randn(3, 4)
    momentum = randn(3, 4, seed=1)
    expected = 0.95 * momentum + 0.05 * G
    W.grad = G.clone()
    muon_step([W], [momentum], 0.0)
    torch.testing.assert_close(momentum, expected)
    assert torch.equal(W.detach(), torch.eye(3, 4))  # a rate of 0
    assert torch.equal(W.grad, G)
    still = nn.Parameter(torch.eye(3, 4))
    still.grad = torch.zeros(3, 4)
    muon_step([still], [torch.zeros(3, 4)], 0.5)
    torch.testing.assert_close(still.detach(), (1 - 0.005) * torch.eye(3, 4))  # no gradient: decay alone
