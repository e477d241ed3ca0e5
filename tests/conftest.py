"""Fixtures that several test files share."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Stable Diffusion 3 pipeline of 60,000 random weights, with all three text encoders."""
    return save_tiny_sd3(tmp_path_factory.mktemp("sd3") / "pipeline", t5=True)


@pytest.fixture(scope="session")
def tiny_sd3_without_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without the T5 encoder."""
    return save_tiny_sd3(tmp_path_factory.mktemp("sd3") / "pipeline", t5=False)


def save_tiny_sd3(folder: Path, *, t5: bool) -> Path:
    """Save a pipeline whose every part is of the class of Stable Diffusion 3.5 Medium's."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=24,
            pos_embed_max_size=12, dual_attention_layers=(0,), qk_norm="rms_norm",
        )  # fmt: skip
        vae = AutoencoderKL(
            in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8), layers_per_block=1, latent_channels=4,
            norm_num_groups=4, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
        clips = [
            CLIPTextModelWithProjection(
                CLIPTextConfig(
                    vocab_size=len(_CLIP_VOCAB), hidden_size=width, intermediate_size=32, num_hidden_layers=2,
                    num_attention_heads=2, max_position_embeddings=16, projection_dim=width,
                    bos_token_id=_CLIP_VOCAB["<|startoftext|>"], eos_token_id=_CLIP_VOCAB["<|endoftext|>"],
                    pad_token_id=_CLIP_VOCAB["<|endoftext|>"],
                )
            )
            for width in (8, 16)
        ]  # fmt: skip
        # T5 must be as wide as both CLIPs together, or its embeddings are cropped
        wide = T5Config(
            vocab_size=len(_T5_VOCAB), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
            feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        t5_encoder = T5EncoderModel(wide) if t5 else None
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae,
        text_encoder=clips[0], tokenizer=clip_tokenizer(), text_encoder_2=clips[1], tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder, tokenizer_3=t5_tokenizer() if t5 else None,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


_LETTERS = string.ascii_lowercase + string.digits
_CLIP_VOCAB = {
    token: i for i, token in enumerate([*_LETTERS, *(c + "</w>" for c in _LETTERS), "<|startoftext|>", "<|endoftext|>"])
}
_T5_VOCAB = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in _LETTERS)]


def clip_tokenizer():
    """A tokenizer of single letters."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=_CLIP_VOCAB, merges=[], model_max_length=16)


def t5_tokenizer():
    """A tokenizer of single letters."""
    from transformers import T5TokenizerFast

    return T5TokenizerFast(vocab=_T5_VOCAB, extra_ids=0, model_max_length=64)


def tiny_transformer() -> Any:
    """Two SD3 blocks of 16 channels with random weights, the same ones at every call."""
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=3, out_channels=3, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=6, caption_projection_dim=16, pooled_projection_dim=5,
        pos_embed_max_size=4, dual_attention_layers=(0,), qk_norm="rms_norm",
    ).eval()  # fmt: skip
