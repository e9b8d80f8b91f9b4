"""One query a row against a preallocated cache of keys and values, in one launch.

    keys[length], values[length] = k, v
    y = softmax(q . keys[: length + 1] / sqrt(head_dim)) values[: length + 1]

The length is a tensor on the device. So a captured graph can be replayed while the cache grows, and
nothing is planned anew for a new length, as cuDNN does (45 ms a step of a model of 12 layers). How
many programs share the keys of a head depends on shapes alone; those that a short cache leaves
without keys return at once, and time follows the bytes that are there.

Each program's sums over its keys are joined by the last of them to be done (flash-decoding: Dao,
Haziza, Massa and Sizov, 2023). The plain form is `attend_plainly`.

Importing this module needs neither Triton nor a GPU.
"""

from __future__ import annotations

import functools
import importlib
import math
import threading
from typing import Any

import torch
from torch import Tensor

from archzoo.derivatives import transformed
from archzoo.kernels.launching import check_dense, interpreting, launch, power_of_2, run_beside

_MODULE = "archzoo.kernels.cache_attention.triton"
MAX_SIZE = 256  # channels of a head
QUERIES = 8  # of one key head that one program takes
RUN_ONE, RUN_MANY = 4, 2  # keys that a thread holds at once, for one query of a head or several
WARPS = 4
# Programs of a multiprocessor that run at once, by their registers, for 1, 2, 4 or 8 queries.
RESIDENT = {1: 4, 2: 4, 4: 3, 8: 2}
WAVES = 8  # programs of each place where places alone fill the GPU, so that few idle at the end
LEAST = 4  # blocks of keys that each of these takes, at least
MAX_SPLITS = 128  # partial results that the last program joins
INTERPRETED = interpreting()  # read once: a step on a CPU shall not lose a hundredth by asking
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def available(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernel takes one token's q, k and v, and this cache; it has no derivative.

    Args:
        q: (batch, heads, head_dim).
        k: (batch, kv_heads, head_dim), kv_heads dividing heads.
        v: As k.
        keys: (batch, kv_heads, capacity, head_dim).
        values: As keys.
    """
    if torch.is_grad_enabled() or transformed() or not runs_beside(keys) or q.device != keys.device:
        return False
    if q.dtype not in _DTYPES or values.dtype != keys.dtype:
        return False
    whole = keys.is_contiguous() and values.is_contiguous() and keys.shape == values.shape
    return whole and q.numel() > 0 and all(x.stride(-1) == 1 for x in (q, k, v))


def may_run(keys: Tensor) -> bool:
    """Whether there is more to ask, beside a cache on this device: of a CPU there is not."""
    return keys.is_cuda or INTERPRETED


def runs_beside(keys: Tensor) -> bool:
    """Whether the kernel reads a cache such as `keys`, (batch, kv_heads, capacity, head_dim)."""
    return run_beside(keys) and keys.dtype in _DTYPES and keys.shape[-1] <= MAX_SIZE


def make_arrivals(batch: int, heads: int, length: int, device: torch.device | str) -> Tensor:
    """Of each place a counter, at 0 between calls, and the cache's length: (batch, heads, 2) int32.

    Beside each other they are read at once, and no place waits for another. Calls that may run at
    the same time need their own.

    Args:
        batch: Rows.
        heads: Of the queries.
        length: Of the cache.
        device: Of the cache.
    """
    arrivals = torch.zeros((batch, heads, 2), dtype=torch.int32, device=device)
    arrivals[..., 1] = length
    return arrivals


@functools.lru_cache(maxsize=64)
def _arrivals_of(
    batch: int, heads: int, device: torch.device, _stream: int, _thread: int
) -> Tensor:
    with torch.inference_mode(False):
        return make_arrivals(batch, heads, 0, device)


def arrivals_here(q: Tensor, length: int) -> Tensor:
    """`make_arrivals` for all calls of this thread on the stream in use, one after another.

    Args:
        q: (batch, heads, ...).
        length: Of the cache of the next call.
    """
    stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0
    arrivals = _arrivals_of(q.shape[0], q.shape[1], q.device, stream, threading.get_ident())
    arrivals[..., 1] = length
    return arrivals


def attend_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    arrivals: Tensor,
    *,
    table: Tensor | None = None,
    documents: Tensor | None = None,
    document: Tensor | None = None,
    early: bool = False,
) -> Tensor:
    """Each row's token against its cache and itself; the cache takes it and is 1 longer.

    ``keys``, ``values``, ``documents``, ``length`` and ``arrivals`` are changed in place.

    Args:
        q: (batch, heads, head_dim).
        k: (batch, kv_heads, head_dim), kv_heads dividing heads.
        v: As k.
        keys: (batch, kv_heads, capacity, head_dim), of which the first `length` are seen.
        values: As keys.
        length: 0-dim int64, below capacity; it is written, and read from `arrivals`.
        arrivals: `make_arrivals` or `arrivals_here`, of the same length.
        table: A rotation of q and k, (batch or 1, 1, 1, pairs) complex, or cosine and sine in a
            last axis; it turns the first 2 * pairs channels. None: they are rotated already.
        documents: (batch, capacity) int64: a row sees the keys of its token's document alone.
            None: all.
        document: (batch, 1) int64, the token's.
        early: Begin while the kernel before this still runs, which nothing but q, k, v, the table
            and `document` may come from (from Hopper on; elsewhere it changes nothing).

    Returns:
        (batch, heads, head_dim).
    """
    if table is not None and table.is_complex():
        table = torch.view_as_real(table)
    found: Tensor = torch.ops.archzoo.attend_cache(
        q, k, v, keys, values, length, arrivals, documents, document, table, early
    )
    return found


def attend_plainly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    *,
    documents: Tensor | None = None,
    document: Tensor | None = None,
) -> Tensor:
    """The same of torch's operations, for q and k that are rotated already.

    Args:
        q: As for `attend_cache`, and so are all others.
        k: The same.
        v: The same.
        keys: The same.
        values: The same.
        length: The same.
        documents: The same.
        document: The same.
    """
    here = length.view(1)
    keys.index_copy_(2, here, k[:, :, None])
    values.index_copy_(2, here, v[:, :, None])
    seen = (torch.arange(keys.shape[2], device=keys.device) <= length)[None]
    if documents is not None and document is not None:
        documents.index_copy_(1, here, document)
        seen = seen & (documents == document)
    length.add_(1)
    group = q.shape[1] // k.shape[1]
    asked = q.unflatten(1, (-1, group)) * q.shape[-1] ** -0.5
    scores = (asked @ keys.mT).masked_fill(~seen[:, None, None], float("-inf"))
    y: Tensor = (scores.softmax(dim=-1) @ values).flatten(1, 2)
    return y


@functools.lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 16  # the interpreter's, so that a test of few heads has several splits
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _splits(places: int, capacity: int, block: int, at_once: int) -> tuple[int, int]:
    """Programs for each of `places`, and how many blocks of keys each takes at the least.

    By shapes alone, so that all lengths launch alike. Few places share what runs at once, so that
    all begin together. Where the places fill that themselves, some more programs even it out.
    """
    wanted, least = (at_once // places, 1) if 4 * places <= at_once else (WAVES, LEAST)
    blocks = -(-capacity // (block * least))
    return max(min(wanted, MAX_SPLITS, blocks), 1), least


@functools.lru_cache(maxsize=8)
def _begins_early(device: torch.device) -> bool:
    """Whether kernels may begin while the one before still runs: from Hopper on."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return bool(importlib.import_module(_MODULE).CAN_BEGIN_EARLY)


_library = torch.library.Library("archzoo", "FRAGMENT")
_library.define(
    "attend_cache(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, "
    "Tensor(c!) length, Tensor(d!) arrivals, Tensor(e!)? documents, Tensor? document, "
    "Tensor? table, bool early) -> Tensor"
)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    arrivals: Tensor,
    documents: Tensor | None,
    document: Tensor | None,
    table: Tensor | None,
    early: bool,
) -> Tensor:
    """The operator."""
    batch, heads, size = q.shape
    kv_heads, capacity = keys.shape[1:3]
    group = heads // kv_heads
    queries = min(power_of_2(group), QUERIES)
    block_d = power_of_2(max(size, 16))
    lanes = max(512 * WARPS // keys.itemsize // block_d, 1)
    places = batch * kv_heads * -(-group // queries)
    run = RUN_ONE if queries == 1 else RUN_MANY
    at_once = RESIDENT[queries] * _multiprocessors(keys.device)
    splits, least = _splits(places, capacity, lanes * run, at_once)
    join = max((2048 if queries <= 4 else 1024) // block_d, 1)  # as many as registers hold
    y = q.new_empty(q.shape)
    check_dense(documents=documents, arrivals=arrivals)
    # Each split's sums, and the largest score and the sum of weights of each of its queries.
    floats = places * splits * queries * (block_d + 2) if splits > 1 else 0
    partial = q.new_empty(floats or 1, dtype=torch.float32)
    pairs = table_row = 0
    if table is not None:
        table = table.contiguous()
        pairs = table.shape[3]
        table_row = 0 if table.shape[0] == 1 else 2 * pairs
    early = early and _begins_early(q.device)
    how = {"launch_pdl": True} if early else {}
    absent = arrivals  # stands for what the kernel does not read
    launch(
        _MODULE, "attend_kernel", (places, splits),
        (
            q, k, v, keys, values, length, arrivals,
            absent if documents is None else documents, absent if document is None else document,
            absent if table is None else table, partial, y,
        ),
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        table_row, 0 if document is None else document.stride(0),
        kv_heads, group, capacity, splits, least, size**-0.5 * math.log2(math.e),
        SIZE=size, PAIRS=pairs, PACKED=documents is not None, EARLY=early,
        GROUP=queries, LANES=lanes, RUN=run, JOIN=join, BLOCK_D=block_d, num_warps=WARPS, **how,
    )  # fmt: skip
    return y


for _key in ("CPU", "CUDA"):
    _library.impl("attend_cache", _attend, _key)


@torch.library.register_fake("archzoo::attend_cache", lib=_library)
def _fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)
