"""FSDP2: a decoder's weights sharded over the ranks (Zhao et al., arXiv 2304.11277)."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from archzoo.adapters.attach import adapter_modules
from archzoo.decoder import Decoder


def shard(decoder: Decoder, mesh: DeviceMesh, world_size: int) -> None:
    """Shard a decoder's weights, block by block.

    Parameters stay float32, gathered a block at a time; autocast casts what is computed, as on
    one device, so that routers and norms see what they see there.

    Args:
        decoder: Its parameters are replaced.
        mesh: Lightning's, of ModelParallelStrategy.
        world_size: Processes in all.

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
    if ranks.size() < world_size:
        raise ValueError(
            f"the strategy has data_parallel_size={ranks.size()} for {world_size} "
            "processes: no part here is tensor parallel, so set data_parallel_size to the "
            "number of processes and tensor_parallel_size to 1"
        )

    def placement(parameter: nn.Parameter) -> Shard | None:
        """Experts that do not divide evenly are sharded along their widths instead."""
        uneven = parameter.dim() == 3 and parameter.shape[0] % ranks.size()
        return Shard(1) if uneven and parameter.shape[1] % ranks.size() == 0 else None

    for parameter in decoder.parameters():  # some lie in long rows, which cannot be cut
        parameter.data = parameter.data.contiguous()
    for part in (*decoder.blocks, decoder):
        fully_shard(part, mesh=ranks, shard_placement_fn=placement)
    register_fsdp_forward_method(decoder, "hidden")  # what training calls
