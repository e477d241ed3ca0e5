"""A run's model: the base model by its name, in the precision asked for, with its adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import SD3Transformer2DModel

from reference.config.settings import Config, is_world
from reference.policy.adapters import Policy, add_lora, compile_blocks
from reference.policy.base import Base, load_base
from reference.policy.sharding import shard_base
from reference.processes.alive import first_on_machine
from reference.processes.devices import device_of
from reference.processes.peers import ALONE, Peers


def load_model(config: Config, prompts: Sequence[str], peers: Peers = ALONE) -> tuple[Base, Policy]:
    """Load the base model and add adapters, which have no effect yet.

    The adapters' first weights are drawn on the CPU, so that they do not depend on the device.

    Args:
        config: of the run.
        prompts: all that will be encoded.
        peers: the processes that load it; each has its own, or with ``model.shard`` a share of the frozen tensors.

    Raises:
        ConfigError: the device or the model cannot be used, and what to do.
        PeerError: another process has failed.
    """
    m, device = config.model, device_of(config.device)
    with first_on_machine(peers):
        if is_world(m.base):
            base = load_base(m.base, device)
        else:
            from reference.quiet import quiet_libraries  # seconds of imports, which the small world does without

            with quiet_libraries():
                from reference.policy.sd3 import load_sd3

                base = load_sd3(m, prompts, device)
    policy = adapted(base.transformer, config)
    if m.shard:
        policy = shard_base(policy, peers)
    policy.model.to(device)
    if m.compile:
        compile_blocks(policy)
    return base, policy


def adapted(transformer: SD3Transformer2DModel, config: Config) -> Policy:
    """A transformer in the precision asked for, frozen, with its adapters."""
    m, dtype = config.model, torch.bfloat16 if config.model.precision == "bf16" else None
    if dtype is not None:
        transformer.to(dtype)
    if m.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return add_lora(
        transformer, rank=m.lora_rank, alpha=m.lora_alpha, targets=m.lora_targets, seed=config.seed, autocast=dtype
    )
