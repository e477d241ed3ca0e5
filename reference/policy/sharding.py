"""The frozen base spread over processes, for cards that do not hold it: PyTorch's FSDP2."""

from __future__ import annotations

import dataclasses
import inspect

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from reference.errors import ConfigError
from reference.policy.adapters import Policy
from reference.processes.peers import Peers


def can_shard() -> bool:
    """Whether this PyTorch can leave adapters out; 2.6 cannot."""
    return "ignored_params" in inspect.signature(fully_shard).parameters


def shard_base(policy: Policy, peers: Peers) -> Policy:
    """Give each process a share of every frozen tensor, in place; a block is whole only while it runs.

    Adapters stay whole everywhere: gradients, Gram matrices, optimiser and checkpoints are what they are without this.
    Every forward and backward pass waits for all processes, so all must run the same number of them.

    Args:
        policy: on the CPU, or anywhere; the shares move to this process's device block by block.
        peers: the processes; alone, nothing happens.

    Raises:
        ConfigError: this PyTorch cannot leave adapters out.
    """
    if peers.size == 1:
        return policy
    if not can_shard():
        raise ConfigError(
            f"model.shard: PyTorch {torch.__version__} cannot leave the adapters whole. Update it, or do not shard."
        )
    mesh = init_device_mesh(peers.device.type, (peers.size,))
    adapters = {p for tensors in policy.adapters.values() for p in tensors.values()}
    transformer = policy.model.get_base_model()
    for module in (*transformer.transformer_blocks, transformer):
        fully_shard(module, mesh=mesh, ignored_params=adapters)
    return dataclasses.replace(policy, sharded=True)
