"""A tensor or a model that may be in shards over the processes (FSDP2): told apart, gathered, cut, written into."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """True if the parameters are shards (FSDP2), so that every process must take part in every forward."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def reshard(model: nn.Module) -> None:
    """Give back what a forward pass left gathered, so that the model's parameters are this process's shards again.

    Without a backward pass after it, the head and what is sharded with it stay whole: the parameters that the model then
    names are not those that the optimizer knows, and what is written into them is lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard, or all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor) -> int:
    """Where in the whole tensor the rows that this process holds begin."""
    if not isinstance(tensor, DTensor):
        return 0
    assert tensor.placements == (Shard(0),), f"sharded as {tensor.placements}"
    each = -(-len(tensor) // tensor.device_mesh.size())  # as torch.chunk cuts
    return min(tensor.device_mesh.get_local_rank() * each, len(tensor))


def gather(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU, whether it is a shard or not. Every process must call it, in the same order.

    One that is there already is not copied: it changes with the tensor.
    """
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().to("cpu")


def scatter_into(target: Tensor, whole: Tensor) -> None:
    """Set `target` (a shard or not) from the whole tensor, in place."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            source = whole.to(target.device, target.dtype)
            target.copy_(distribute_tensor(source, target.device_mesh, target.placements))
        else:
            target.copy_(whole.to(target.device, target.dtype))
