"""The policy: an SD3 transformer with LoRA adapters default (trained), old (samples) and none (the base)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from marble_core import SLOW_DECAY, STANDARD_DECAY, ema_tree, old_policy_decay

Adapter = Literal["default", "old", "base"]

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class Policy:
    """A model, and its adapters' layers and tensors, which take long to look for at every step.

    Attributes:
        model: holds both adapters; ``default`` is active and trainable, except inside ``active``.
        layers: those with adapters.
        adapters: the tensors of ``default`` and ``old``, under the names that ``model.named_parameters`` gives to those
            of ``default``, in a fixed order.
        autocast: dtype in which the model computes, whatever its weights are in; None for that of the weights.
        scale: alpha / r, by which the product of the adapters' matrices is multiplied.
        sharded: whether the frozen base is spread over processes, which must then run the same number of passes.
    """

    model: PeftModel
    layers: tuple[LoraLayer, ...]
    adapters: Mapping[str, Mapping[str, torch.nn.Parameter]]
    autocast: torch.dtype | None = None
    scale: float = 1.0
    sharded: bool = False


def target_layers(transformer: SD3Transformer2DModel, targets: Literal["linear", "attention"]) -> list[str]:
    """Names of the linear layers that get an adapter."""
    return [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
        and name.startswith("transformer_blocks.")
        and (targets == "linear" or name.split(".", 2)[2].removeprefix("attn.") in ATTENTION)
    ]


def add_lora(
    transformer: SD3Transformer2DModel,
    *,
    rank: int,
    alpha: float,
    targets: Literal["linear", "attention"],
    seed: int,
    autocast: torch.dtype | None = None,
) -> Policy:
    """Freeze a transformer and give it the adapters ``default`` and ``old``, equal and without effect at first.

    The adapters are float32 at least, whatever the transformer is in.
    """
    transformer.requires_grad_(False)
    layers = target_layers(transformer, targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=layers)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = get_peft_model(transformer, config)
        model.add_adapter("old", config)
    model.set_adapter("default")
    named = dict(model.named_parameters())
    names = [name for name, p in named.items() if p.requires_grad]
    adapters = {
        adapter: {name: named[name.replace(".default.", f".{adapter}.")] for name in names}
        for adapter in ("default", "old")
    }
    found = tuple(module for module in model.modules() if isinstance(module, LoraLayer))
    policy = Policy(model, found, adapters, autocast, alpha / rank)
    load_adapter(policy, "old", adapter_state(policy, "default"))
    model.eval()
    return policy


def compile_blocks(policy: Policy, backend: str = "inductor") -> None:
    """Compile each transformer block, in place: the same kernels serve all blocks of a kind, so this is quick for deep
    models. Every batch size and every adapter makes a variant of its own."""
    # blocks share their code, so torch counts the variants of all of them together; this name is PyTorch 2.6's, too
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    for block in policy.model.get_base_model().transformer_blocks:
        block.compile(dynamic=False, backend=backend)


def parameters(policy: Policy, adapter: Literal["default", "old"] = "default") -> dict[str, torch.nn.Parameter]:
    """The tensors of an adapter, under the names of ``default``, in a fixed order."""
    return dict(policy.adapters[adapter])


def adapter_state(policy: Policy, adapter: Literal["default", "old"]) -> dict[str, Tensor]:
    """A copy of an adapter's tensors."""
    return {name: p.detach().clone() for name, p in parameters(policy, adapter).items()}


@torch.no_grad()
def load_adapter(policy: Policy, adapter: Literal["default", "old"], state: Mapping[str, Tensor]) -> None:
    """Copy tensors into an adapter, in place."""
    for name, p in parameters(policy, adapter).items():
        p.copy_(state[name])


@contextmanager
def active(policy: Policy, adapter: Adapter) -> Iterator[None]:
    """Run with an adapter, or with none (``base``); ``default``, its gradients and modes are back afterwards.

    PEFT's switches turn the gradients of other adapters off, and leave them off. That of a whole model also walks
    through it several times, which takes as long as running it where it is small.
    """
    flags = [(p, p.requires_grad) for named in policy.adapters.values() for p in named.values()]
    try:
        for layer in policy.layers:
            layer.enable_adapters(False) if adapter == "base" else layer.set_adapter(adapter)
        yield
    finally:
        for layer in policy.layers:
            layer.enable_adapters(True) if adapter == "base" else layer.set_adapter("default")
        for p, flag in flags:
            p.requires_grad_(flag)


@contextmanager
def merged(policy: Policy, adapter: Adapter) -> Iterator[None]:
    """Like ``active``, faster, for passes without a gradient: the adapter is added to the weights meanwhile.

    Equal to rounding, so only where the weights are whole and float32 or wider; otherwise it is ``active``. The
    weights' own tensors are put back afterwards, untouched.
    """
    weights = [layer.get_base_layer().weight for layer in policy.layers]
    wide = all(w.dtype in (torch.float32, torch.float64) for w in weights)
    if adapter == "base" or policy.sharded or not wide:
        with active(policy, adapter):
            yield
        return
    own = [w.data for w in weights]
    try:
        with torch.no_grad():
            for layer, w in zip(policy.layers, weights, strict=True):
                w.data = w.data + layer.get_delta_weight(adapter)
        with active(policy, "base"):
            yield
    finally:
        for w, data in zip(weights, own, strict=True):
            w.data = data


@contextmanager
def weights_of(policy: Policy, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Run with other weights in ``default``, such as their moving average; the trained ones are back afterwards."""
    trained = adapter_state(policy, "default")
    load_adapter(policy, "default", state)
    try:
        yield
    finally:
        load_adapter(policy, "default", trained)


def velocity(policy: Policy, x_t: Tensor, t: Tensor, condition: Sequence[Tensor]) -> Tensor:
    """Velocity ``[B, C, H, W]`` of the active adapter, in the dtype of ``x_t``.

    Args:
        x_t: ``[B, C, H, W]``.
        t: ``[B]`` in [0, 1].
        condition: prompt embeddings ``[B, L, D]`` and pooled ones ``[B, D']``.
    """
    embeds, pooled = condition
    with torch.autocast(x_t.device.type, dtype=policy.autocast, enabled=policy.autocast is not None):
        out = policy.model(
            hidden_states=x_t,
            timestep=1000 * t,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )
    return out[0].to(x_t.dtype)  # type: ignore[no-any-return]


def lora_layers(policy: Policy, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapter weights under the names that diffusers gives them, on the CPU.

    ``alpha / r`` is multiplied into ``lora_B``: exact, and independent of metadata that a loader may not read.
    """
    return {
        name.replace("base_model.model.", "transformer.", 1).replace(".default.", "."): x.detach().cpu().contiguous()
        * (policy.scale if ".lora_B." in name else 1.0)
        for name, x in state.items()
    }


def follow_old(policy: Policy, step: int, schedule: Literal["standard", "slow"]) -> None:
    """Let the policy that samples follow the trained one."""
    decay = old_policy_decay(step, SLOW_DECAY if schedule == "slow" else STANDARD_DECAY)
    load_adapter(policy, "old", ema_tree(parameters(policy, "old"), parameters(policy), decay))
