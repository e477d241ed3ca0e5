"""Rewards on CLIP: pixels against the processors, scores against plain models and values by hand, errors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers.models.clip.configuration_clip import CLIPConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from reference.errors import ConfigError
from reference.interfaces import Reward
from reference.rewards import aesthetic, clip, clipscore, hpsv2, pickscore

CPU = torch.device("cpu")
SIZE = 32
PROMPTS = ["a cat", "two red dogs", "a cat", "boat"]
MEAN, STD = clip.normalize(torch.zeros(1, 3, 1, 1)), clip.normalize(torch.ones(1, 3, 1, 1))


def make_images(n: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth colours with edges and some noise, in 8 bits."""
    g = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.rand(n, 3, 5, 5, generator=g), (height, width), mode="bicubic").clamp(0, 1)
    smooth[..., height // 3 : height // 2, :] = 1 - smooth[..., height // 3 : height // 2, :]
    noise = 0.1 * torch.randn(n, 3, height, width, generator=g)
    return (smooth + noise).clamp(0, 1).mul(255).round().div(255)


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy())


def processed(images: Tensor, size: int, **options) -> Tensor:
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **options
    )
    return torch.cat([processor(pil(x), return_tensors="pt").pixel_values for x in images])


def raw(pixels: Tensor) -> Tensor:
    """Normalized pixels back in [0, 1]."""
    return (pixels - MEAN) / (STD - MEAN)


def make_tokenizer() -> CLIPTokenizer:
    """Letters as tokens; the special ones come last, as in CLIP."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + ["&"]
    words = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])


def make_config(act: str = "quick_gelu") -> CLIPConfig:
    V = len(make_tokenizer())
    width = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "hidden_act": act}
    return CLIPConfig(
        text_config={**width, "num_attention_heads": 2, "vocab_size": V, "max_position_embeddings": 20}
        | {"bos_token_id": V - 2, "eos_token_id": V - 1, "pad_token_id": V - 1},
        vision_config={**width, "hidden_size": 24, "num_attention_heads": 3, "image_size": SIZE, "patch_size": 8},
        projection_dim=12,
    )


def scramble(module: nn.Module, seed: int = 0) -> None:
    """Weights large enough for embeddings to depend on the input."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim:
                p.copy_(0.2 * torch.randn(p.shape, generator=g) + (1.0 if "norm" in name or "ln_" in name else 0.0))


@pytest.fixture(scope="module")
def model() -> CLIPModel:
    made = CLIPModel(make_config()).eval()
    scramble(made)
    made.logit_scale.data.fill_(math.log(50))
    return made


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def scores(reward: Reward, images: Tensor, prompts: list[str]) -> Tensor:
    found = reward(images, prompts, [None] * len(prompts))
    assert isinstance(found, Tensor)
    return found


@torch.no_grad()
def plain_embeddings(model: CLIPModel, pixels: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Of unit length, one text at a time and so without padding."""
    tokenizer = make_tokenizer()
    texts = [model.get_text_features(**tokenizer(p, return_tensors="pt")).pooler_output for p in prompts]
    seen = model.get_image_features(pixels).pooler_output
    return seen / seen.norm(dim=-1, keepdim=True), torch.cat([t / t.norm() for t in texts])


# --- pixels


@pytest.mark.parametrize(("height", "width", "size"), [(512, 512, 224), (64, 64, 32), (90, 61, 32), (40, 100, 32)])
def test_clip_pixels_are_the_processors(height, width, size) -> None:
    images = make_images(1, height, width)
    ours, theirs = clip.clip_pixels(images, size), processed(images, size)
    assert ours.shape == theirs.shape == (1, 3, size, size)
    difference = (raw(ours) - raw(theirs)).abs() * 255
    assert difference.max() <= 1.01  # ties of the rounding
    assert difference.mean() <= 0.01
    assert (raw(ours) * 255 - (raw(ours) * 255).round()).abs().max() < 1e-3  # 8 bits


def test_no_resize_is_exactly_the_processors() -> None:
    images = make_images(2, SIZE, SIZE)
    torch.testing.assert_close(clip.clip_pixels(images, SIZE), processed(images, SIZE), rtol=0, atol=2e-6)


def test_half_precision_images_are_prepared_in_float32() -> None:
    images = make_images(1, 64, 64)
    pixels = clip.clip_pixels(images.half(), SIZE)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, clip.clip_pixels(images, SIZE), rtol=0, atol=1e-6)


def test_clipscore_resizes_bilinearly() -> None:
    images = make_images(1, 100, 64)
    resized = pil(images[0]).resize((SIZE, 50), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[:, 9 : 9 + SIZE]
    difference = (raw(clipscore.pixels(images, SIZE))[0] * 255 - expected).abs()
    assert difference.max() <= 1.5  # Pillow rounds twice
    assert (raw(clipscore.pixels(images, SIZE) - clip.clip_pixels(images, SIZE) + MEAN).abs() * 255).max() > 5


def test_hps_pixels_are_an_unrounded_resize_on_a_black_square() -> None:
    images = make_images(1, 60, 100)
    planes = [Image.fromarray(plane.numpy()).resize((32, 19), Image.Resampling.BICUBIC) for plane in images[0]]
    expected = torch.zeros(3, 32, 32)
    expected[:, 6:25] = torch.stack([torch.from_numpy(np.array(plane)) for plane in planes])
    found = raw(hpsv2.pixels(images, 32))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_hps_pixels_may_leave_the_range() -> None:
    images = torch.zeros(1, 3, 64, 64)
    images[..., 32:] = 1
    pixels = raw(hpsv2.pixels(images, 32))
    assert pixels.max() > 1.01
    assert pixels.min() < -0.01


# --- scores


def test_pickscore_is_the_scaled_cosine_over_26(model, folder) -> None:
    images = make_images(4, SIZE, SIZE)
    seen, read = plain_embeddings(model, processed(images, SIZE), PROMPTS)
    found = scores(pickscore.load(CPU, str(folder)), images, PROMPTS)
    torch.testing.assert_close(found, 50 * (seen * read).sum(-1) / 26, rtol=1e-4, atol=1e-5)
    assert found.std() > 0.01  # the comparison above means something


def test_pickscore_of_resized_images_is_that_of_the_processor(model, folder) -> None:
    images = make_images(4, 128, 128)
    seen, read = plain_embeddings(model, processed(images, SIZE), PROMPTS)
    found = scores(pickscore.load(CPU, str(folder)), images, PROMPTS)
    torch.testing.assert_close(found * 26 / 50, (seen * read).sum(-1), rtol=0, atol=2e-4)


def test_clipscore_is_the_logit_over_100(model, folder) -> None:
    images = make_images(3, SIZE, SIZE)
    tokens = make_tokenizer()(PROMPTS[:3], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=processed(images, SIZE), **tokens).logits_per_image
    found = scores(clipscore.load(CPU, str(folder)), images, PROMPTS[:3])
    torch.testing.assert_close(found, logits.diag() / 100, rtol=1e-4, atol=1e-5)


def test_aesthetic_is_the_head_on_the_unit_embedding(model, folder, tmp_path) -> None:
    head = nn.ModuleDict({"layers": clip.linear_head(12)})
    scramble(head, 1)
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    torch.save(head.state_dict(), tmp_path / aesthetic.HEAD)
    assert set(head.state_dict()) == {f"layers.{i}.{p}" for i in (0, 2, 4, 6, 7) for p in ("weight", "bias")}

    images = make_images(3, SIZE, SIZE)
    x, _ = plain_embeddings(model, processed(images, SIZE), PROMPTS[:1])
    for i in (0, 2, 4, 6, 7):  # linear throughout
        x = x @ head.state_dict()[f"layers.{i}.weight"].T + head.state_dict()[f"layers.{i}.bias"]
    found = scores(aesthetic.load(CPU, str(tmp_path)), images, ["", "any", "prompt"])
    torch.testing.assert_close(found, x[:, 0], rtol=1e-3, atol=1e-3)
    assert found.std() > 0.1


def test_batches_do_not_change_scores(folder, monkeypatch) -> None:
    reward = pickscore.load(CPU, str(folder))
    images, prompts = make_images(7, SIZE, SIZE), ["a", "b", "a", "c d", "e", "a", "b"]
    whole = scores(reward, images, prompts)
    monkeypatch.setattr(clip, "BATCH", 2)
    torch.testing.assert_close(scores(reward, images, prompts), whole, rtol=1e-5, atol=1e-5)


def test_a_repeated_prompt_is_encoded_once(folder) -> None:
    loaded = clip.load_clip("pickscore", CPU, str(folder))
    counted: list[int] = []
    loaded.model.text_model.register_forward_hook(lambda _, __, out: counted.append(len(out.pooler_output)))
    rows = clip.embed_texts(loaded, ["b", "a", "b", "b", "a"])
    assert counted == [2]
    assert torch.equal(rows[0], rows[2])
    assert torch.equal(rows[1], rows[4])
    assert not torch.allclose(rows[0], rows[1], atol=1e-3)


def test_long_prompts_are_cut_off(folder) -> None:
    loaded = clip.load_clip("pickscore", CPU, str(folder))
    rows = clip.embed_texts(loaded, ["abc" * 30, "abc" * 40])  # both longer than the model's 20 tokens
    torch.testing.assert_close(rows[0], rows[1])


def test_the_callers_autocast_does_not_matter(folder) -> None:
    reward, images = pickscore.load(CPU, str(folder)), make_images(2, SIZE, SIZE)
    expected = scores(reward, images, PROMPTS[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scores(reward, images, PROMPTS[:2]), expected)
    assert expected.dtype == torch.float32
    assert not expected.requires_grad


# --- HPSv2.1


class Block(nn.Module):
    """A block as open_clip names its weights."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, hidden), "c_proj": nn.Linear(hidden, width)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Blocks(nn.Module):
    def __init__(self, layers: int, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, hidden, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        v = config.vision_config
        W = v.hidden_size
        self.conv1 = nn.Conv2d(3, W, v.patch_size, v.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(W))
        self.positional_embedding = nn.Parameter(torch.zeros((v.image_size // v.patch_size) ** 2 + 1, W))
        self.ln_pre, self.ln_post = nn.LayerNorm(W), nn.LayerNorm(W)
        self.transformer = Blocks(v.num_hidden_layers, W, v.intermediate_size, v.num_attention_heads)
        self.proj = nn.Parameter(torch.zeros(W, config.projection_dim))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x), None)
        return F.normalize(self.ln_post(x[:, 0]) @ self.proj, dim=-1)


class OpenClip(nn.Module):
    """CLIP with the names and the forward pass of open_clip, written from its published architecture."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        t = config.text_config
        W = t.hidden_size
        self.visual = Visual(config)
        self.transformer = Blocks(t.num_hidden_layers, W, t.intermediate_size, t.num_attention_heads)
        self.token_embedding = nn.Embedding(t.vocab_size, W)
        self.positional_embedding = nn.Parameter(torch.zeros(t.max_position_embeddings, W))
        self.ln_final = nn.LayerNorm(W)
        self.text_projection = nn.Parameter(torch.zeros(W, config.projection_dim))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def text(self, tokens: list[int]) -> Tensor:
        L = len(tokens)
        x = self.token_embedding(torch.tensor([tokens])) + self.positional_embedding[:L]
        x = self.transformer(x, torch.full((L, L), -math.inf).triu(1))
        return F.normalize(self.ln_final(x)[0, -1] @ self.text_projection, dim=-1)


def test_hpsv2_is_the_cosine_of_an_open_clip_model(tmp_path) -> None:
    original = OpenClip(make_config("gelu")).eval()
    scramble(original)
    torch.save({"epoch": 1, "state_dict": original.state_dict()}, tmp_path / hpsv2.CHECKPOINT)
    make_config("gelu").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)

    images, prompts = make_images(3, 48, 48), ["a cat", "salt &amp;amp; pepper", "a cat"]
    cleaned = ["a cat", "salt & pepper", "a cat"]
    with torch.no_grad():
        seen = original.visual(hpsv2.pixels(images, SIZE))
        read = torch.stack([original.text(make_tokenizer()(text).input_ids) for text in cleaned])
    found = scores(hpsv2.load(CPU, str(tmp_path)), images, prompts)
    torch.testing.assert_close(found, (seen * read).sum(-1), rtol=1e-4, atol=1e-5)
    assert found.std() > 0.01


def test_hpsv2_text_is_cleaned() -> None:
    clean = hpsv2.cleaner()
    assert clean("schÃ¶n") == "schön"
    assert clean("a &amp;lt; b") == "a < b"


def test_all_names_and_shapes_of_the_published_size() -> None:
    config = hpsv2.sizes(None)
    with torch.device("meta"):
        expected = {name: x.shape for name, x in CLIPModel(config).state_dict().items()}
        found = {name: x.shape for name, x in hpsv2.convert(OpenClip(config).state_dict()).items()}
    assert len(found) == 910
    assert found == expected


# --- errors


@pytest.mark.parametrize("module", [pickscore, clipscore, aesthetic, hpsv2])
def test_a_missing_folder_is_named_with_what_to_do(module, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"no such folder.*hf download.*--scoring.models"):
        module.load(CPU, str(tmp_path / "nothing"))


@pytest.mark.parametrize("module", [pickscore, clipscore, aesthetic])
def test_an_empty_folder_is_no_model(module, tmp_path) -> None:
    with pytest.raises(ConfigError, match=module.__name__.rpartition(".")[2]):
        module.load(CPU, str(tmp_path))


def test_a_folder_without_the_head_or_checkpoint_names_the_file(folder, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"sac\+logos\+ava1-l14-linearMSE\.pth"):
        aesthetic.load(CPU, str(folder))
    with pytest.raises(ConfigError, match=r"HPS_v2\.1_compressed\.pt"):
        hpsv2.load(CPU, str(tmp_path))


def test_a_folder_without_a_tokenizer_is_refused(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="vocabulary"):
        pickscore.load(CPU, str(tmp_path))


@pytest.mark.parametrize("change", ["missing", "cut"])
def test_weights_that_are_missing_are_not_left_random(model, tmp_path, change) -> None:
    weights, name = dict(model.state_dict()), "text_projection.weight"
    if change == "missing":
        del weights[name]
    else:
        weights[name] = weights[name][:3].clone()
    model.save_pretrained(tmp_path, state_dict=weights)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"1 are missing or of another shape, text_projection\.weight"):
        pickscore.load(CPU, str(tmp_path))


def test_a_damaged_checkpoint_is_named(folder, tmp_path) -> None:
    (tmp_path / hpsv2.CHECKPOINT).write_bytes(b"not a checkpoint")
    with pytest.raises(ConfigError, match="damaged"):
        hpsv2.load(CPU, str(tmp_path))


def test_a_head_of_another_width_is_refused(folder, tmp_path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    torch.save(nn.ModuleDict({"layers": clip.linear_head(13)}).state_dict(), tmp_path / aesthetic.HEAD)
    with pytest.raises(ConfigError, match="width 12"):
        aesthetic.load(CPU, str(tmp_path))
