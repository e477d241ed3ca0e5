"""ImageReward against a plain BLIP with the official names, written from its published architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.bert.tokenization_bert import BertTokenizer
from transformers.models.blip.configuration_blip import BlipConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from reference.errors import ConfigError
from reference.rewards import clip, imagereward

CPU = torch.device("cpu")
PROMPTS = ["a cat", "two red dogs", "a cat " * 30]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention of [L, D] to [M, D], without padding and without a causal mask."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1)


class ViTBlock(nn.Module):
    def __init__(self, D: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(D, eps=1e-6), nn.LayerNorm(D, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(D, 3 * D), "proj": nn.Linear(D, D)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(D, hidden), "fc2": nn.Linear(hidden, D)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).chunk(3, -1)
        x = x + self.attn["proj"](attend(q, k, v, self.heads))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class ViT(nn.Module):
    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        v = config.vision_config
        D, patch = v.hidden_size, v.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, (v.image_size // patch) ** 2 + 1, D))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, D, patch, patch)})
        self.blocks = nn.ModuleList(
            ViTBlock(D, v.intermediate_size, v.num_attention_heads) for _ in range(v.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(D, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        """One image, [3, H, W] -> [L, D]."""
        patches = self.patch_embed["proj"](pixels[None])[0].flatten(1).T
        x = torch.cat([self.cls_token[0], patches]) + self.pos_embed[0]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Attention(nn.Module):
    def __init__(self, D: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        linear = {"query": nn.Linear(D, D), "key": nn.Linear(width, D), "value": nn.Linear(width, D)}
        self.self = nn.ModuleDict(linear)
        self.output = nn.ModuleDict({"dense": nn.Linear(D, D), "LayerNorm": nn.LayerNorm(D, eps=1e-12)})

    def forward(self, x: Tensor, to: Tensor) -> Tensor:
        y = attend(self.self["query"](x), self.self["key"](to), self.self["value"](to), self.heads)
        return self.output["LayerNorm"](self.output["dense"](y) + x)


class BertLayer(nn.Module):
    def __init__(self, D: int, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.attention, self.crossattention = Attention(D, D, heads), Attention(D, width, heads)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(D, hidden)})
        self.output = nn.ModuleDict({"dense": nn.Linear(hidden, D), "LayerNorm": nn.LayerNorm(D, eps=1e-12)})

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        x = self.crossattention(self.attention(x, x), image)
        y = self.output["dense"](F.gelu(self.intermediate["dense"](x)))
        return self.output["LayerNorm"](y + x)


class Embeddings(nn.Module):
    def __init__(self, V: int, D: int, positions: int) -> None:
        super().__init__()
        self.word_embeddings, self.position_embeddings = nn.Embedding(V, D), nn.Embedding(positions, D)
        self.LayerNorm = nn.LayerNorm(D, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(positions)[None])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.LayerNorm(self.word_embeddings(tokens) + self.position_embeddings.weight[: len(tokens)])


class Bert(nn.Module):
    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        t = config.text_config
        D, width = t.hidden_size, config.vision_config.hidden_size
        self.embeddings = Embeddings(t.vocab_size, D, t.max_position_embeddings)
        layers = (BertLayer(D, width, t.intermediate_size, t.num_attention_heads) for _ in range(t.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        x = self.embeddings(tokens)
        for layer in self.encoder["layer"].children():
            x = layer(x, image)
        return x


class Blip(nn.Module):
    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.visual_encoder, self.text_encoder = ViT(config), Bert(config)
        self.vision_proj = nn.Linear(config.vision_config.hidden_size, 256)
        self.text_proj = nn.Linear(config.text_config.hidden_size, 256)


class ImageReward(nn.Module):
    """The model whose state dict is ImageReward.pt."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.blip = Blip(config)
        self.mlp = nn.ModuleDict({"layers": clip.linear_head(config.text_config.hidden_size)})

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        text = self.blip.text_encoder(tokens, self.blip.visual_encoder(pixels))
        return (self.mlp["layers"](text[0]) - 0.16717363) / 1.0333395


def make_tokenizer() -> BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "two", "red", "dogs"]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def make_config() -> BlipConfig:
    width = {"intermediate_size": 24, "num_hidden_layers": 2}
    tokens = {"vocab_size": 12, "bos_token_id": 10, "eos_token_id": 2, "sep_token_id": 3, "pad_token_id": 0}
    return BlipConfig(
        text_config={**width, **tokens, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 40},
        vision_config={**width, "hidden_size": 24, "num_attention_heads": 3, "image_size": 32, "patch_size": 8},
    )


@pytest.fixture(scope="module")
def original() -> ImageReward:
    made = ImageReward(make_config()).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=g) + ("norm" in name.lower()))
    return made


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("imagereward")
    torch.save(original.state_dict(), path / imagereward.CHECKPOINT)
    make_config().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def test_score_is_that_of_the_plain_model(original, folder) -> None:
    images = torch.rand(3, 3, 48, 40, generator=torch.Generator().manual_seed(1))
    tokenizer = make_tokenizer()
    with torch.no_grad():
        pixels = clip.clip_pixels(images, 32)
        tokens = [tokenizer(p, truncation=True, max_length=35, return_tensors="pt").input_ids[0] for p in PROMPTS]
        assert [len(t) for t in tokens] == [4, 5, 35]
        expected = torch.cat([original(x, t) for x, t in zip(pixels, tokens, strict=True)])
    found = imagereward.load(CPU, str(folder))(images, PROMPTS, [None] * 3)
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert found.std() > 0.05


def test_batches_do_not_change_scores(folder, monkeypatch) -> None:
    reward = imagereward.load(CPU, str(folder))
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    prompts = ["a", "cat", "a", "red dogs", "two"]
    whole = reward(images, prompts, [None] * 5)
    monkeypatch.setattr(imagereward, "BATCH", 2)
    torch.testing.assert_close(reward(images, prompts, [None] * 5), whole, rtol=1e-4, atol=1e-4)


def test_all_names_and_shapes_of_the_published_size() -> None:
    config = imagereward.sizes(None)
    with torch.device("meta"):
        found = imagereward.convert(ImageReward(config).state_dict())
        vision, text = BlipVisionModel(config.vision_config), BlipTextModel(config.text_config, add_pooling_layer=False)
    for part, model in ((found.vision, vision), (found.text, text)):
        assert {name: x.shape for name, x in part.items()} == {name: x.shape for name, x in model.state_dict().items()}
    assert found.vision["embeddings.position_embedding"].shape == (1, 197, 1024)
    assert found.text["encoder.layer.11.crossattention.self.key.weight"].shape == (768, 1024)
    assert found.head["layers.0.weight"].shape == (1024, 768)


def test_a_missing_layer_is_an_error(original, folder, tmp_path) -> None:
    for file in folder.iterdir():
        if file.name != imagereward.CHECKPOINT:
            (tmp_path / file.name).symlink_to(file)
    weights = {name: x for name, x in original.state_dict().items() if "crossattention.self.key.weight" not in name}
    torch.save(weights, tmp_path / imagereward.CHECKPOINT)
    with pytest.raises(ConfigError, match=r"2 are missing.*crossattention\.self\.key\.weight"):
        imagereward.load(CPU, str(tmp_path))


def test_missing_files_are_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"no such folder.*hf download"):
        imagereward.load(CPU, str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"ImageReward\.pt"):
        imagereward.load(CPU, str(tmp_path))
