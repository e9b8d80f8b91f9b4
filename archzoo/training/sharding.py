"""FSDP2: a decoder's weights sharded over the ranks (Zhao et al., arXiv 2304.11277)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from archzoo.adapters.attach import adapter_modules
from archzoo.decoder import Decoder
from archzoo.numerics import at_least_float32
from archzoo.training.ranks import check_data_parallel

#: Up to so many parameters are gathered all together. A step waits for them then, 1 ms for 110 M
#: between two H200s, and less than its host would need to gather every block twice.
AT_ONCE = 250_000_000
GATHERED = 12  # bytes of a parameter that is: weight, gradient and what of it is scattered
SHARE = 0.1  # of a GPU's memory, which a model above `AT_ONCE` may take gathered all together


def shard(decoder: Decoder, mesh: DeviceMesh, world_size: int) -> bool:
    """Shard a decoder's weights, all together or, of a large one, block by block.

    Together they are gathered before the first block and kept until the end of the backward pass,
    where their gradients are scattered: 12 bytes a parameter for that time, and one graph of the
    whole model. Block by block each block is gathered twice, and only its weights are whole. See
    `most_together` for which models are large.

    Parameters stay float32 when gathered; autocast casts what is computed, as on one device, so
    that routers and norms see what they see there.

    Args:
        decoder: Its parameters are replaced.
        mesh: Lightning's, of ModelParallelStrategy.
        world_size: Processes in all.

    Returns:
        Whether all weights are gathered together.

    Raises:
        ValueError: The mesh has tensor parallel ranks, which no part here knows, or an adapter
            learns a state, which is read before its block is gathered.
    """
    for path, adapter in adapter_modules(decoder):
        if "state" in type(adapter).kinds:
            raise ValueError(
                f"{type(adapter).__name__} at {path} cannot be sharded: what a document starts "
                "from is read before its block's weights are gathered; take --trainer.strategy ddp"
            )
    ranks = mesh["data_parallel"]
    check_data_parallel(ranks.size(), mesh.size() // ranks.size(), world_size)

    def placement(parameter: nn.Parameter) -> Shard | None:
        """Experts that do not divide evenly are sharded along their widths instead."""
        uneven = parameter.dim() == 3 and parameter.shape[0] % ranks.size()
        return Shard(1) if uneven and parameter.shape[1] % ranks.size() == 0 else None

    for parameter in decoder.parameters():  # some lie in long rows, which cannot be cut
        parameter.data = parameter.data.contiguous()
    together = decoder.parameter_count() <= most_together(ranks)
    for part in (decoder,) if together else (*decoder.blocks, decoder):
        fully_shard(part, mesh=ranks, shard_placement_fn=placement)
    register_fsdp_forward_method(decoder, "hidden")  # what training calls
    return together


def most_together(ranks: DeviceMesh) -> int:
    """The parameters of the largest model that is gathered all together, the same on all ranks.

    Args:
        ranks: Among which it is sharded; of their GPUs the one with the least memory counts.
    """
    if ranks.device_type != "cuda":
        return AT_ONCE
    memory = torch.tensor(torch.cuda.get_device_properties().total_memory, device="cuda")
    torch.distributed.all_reduce(memory, torch.distributed.ReduceOp.MIN, ranks.get_group())
    return max(AT_ONCE, int(SHARE * int(memory) / GATHERED))


def clip_by_norm(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Clip gradients that are sharded to a norm, in place, and hand back the norm that they had.

    Each rank takes the norm of its parts, and one reduction adds their squares; torch reduces the
    norm of every gradient by itself.

    Args:
        parameters: Of `shard`; those without a gradient are left out.
        largest: The norm.
    """
    gradients: list[Any] = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    local = [gradient.to_local() for gradient in gradients]
    norms = [torch.linalg.vector_norm(part, dtype=at_least_float32(part.dtype)) for part in local]
    squares = torch.stack(norms).square().sum()
    torch.distributed.all_reduce(squares, group=gradients[0].device_mesh.get_group())
    norm = squares.sqrt()
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)  # as torch has it
    for dtype in dict.fromkeys(part.dtype for part in local):
        torch._foreach_mul_([part for part in local if part.dtype == dtype], factor.to(dtype))
    return norm
