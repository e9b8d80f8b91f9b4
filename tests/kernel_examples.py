"""A call of every kernel, and its compilation for a GPU that is not there.

`EXAMPLES` calls what the kernels' packages offer, in the sizes, dtypes and forms that a GPU sees,
and stands in for the launches. So each kernel is compiled for what it is given in earnest. The
tensors lie on the CPU and no kernel runs: whatever one would have written is zero.

As a script (`python tests/kernel_examples.py [--first] [--little] [NAME ...]`) it compiles all of
them for Hopper (sm_90), or with --little for a GPU for games (sm_86), whose programs have less
shared memory; with --first of each module the first kernel alone. No interpreter may have been
asked for.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from archzoo.kernels import launching

ARCHITECTURE = 90  # which kernels are compiled for: Hopper
SHARED = 232_448  # bytes of shared memory that a program may take on an H100
LITTLE = (86, 101_376)  # the same of a GPU for games
KERNELS = Path(launching.__file__).parent
EXAMPLES: dict[str, Callable[[], None]] = {}


def example(function: Callable[[], None]) -> Callable[[], None]:
    """Enter a function into `EXAMPLES`, under its own name."""
    EXAMPLES[function.__name__] = function
    return function


# ---------------------------------------------------------------------------- which kernels


def modules() -> list[str]:
    """The modules of archzoo/kernels that define functions for Triton to compile."""
    found = []
    for path in sorted(KERNELS.rglob("*.py")):
        if _compiled(ast.parse(path.read_text())):
            parts = path.relative_to(KERNELS).with_suffix("").parts
            found.append(".".join(("archzoo.kernels", *parts)))
    return found


def kernels() -> set[tuple[str, str]]:
    """(module, name) of what Python launches: the functions that no other compiled one calls."""
    functions, called = [], set()
    for module in modules():
        path = KERNELS.joinpath(*module.split(".")[2:]).with_suffix(".py")
        for function in _compiled(ast.parse(path.read_text())):
            functions.append((module, function.name))
            for node in ast.walk(function):
                if isinstance(node, ast.Name | ast.Attribute) and node is not function:
                    called.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {(module, name) for module, name in functions if name not in called}


def _compiled(tree: ast.Module) -> list[ast.FunctionDef]:
    """The functions under a decorator named `jit`, with or without arguments."""

    def jit(decorator: ast.expr) -> bool:
        decorator = decorator.func if isinstance(decorator, ast.Call) else decorator
        return getattr(decorator, "attr", getattr(decorator, "id", "")) == "jit"

    return [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any(map(jit, node.decorator_list))
    ]


# ---------------------------------------------------------------------------- instead of a GPU

Launched = Callable[[launching.Launch, tuple[Any, ...]], None]


@contextlib.contextmanager
def launches(see: Launched) -> Iterator[None]:
    """Kernels run on the CPU, so it seems: `see` gets the launches and their tensors instead."""

    def compile_(self: launching.Launch, tensors: tuple[Any, ...]) -> None:
        see(self, tuple(tensors))

    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.object(launching.Launch, "_compile", compile_),
            mock.patch.dict(os.environ, TRITON_INTERPRET="1"),
            # No kernel writes what is read here, as numbers of rows for instance.
            mock.patch.object(torch, "empty", torch.zeros),
            mock.patch.object(torch, "empty_like", torch.zeros_like),
            mock.patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros),
        ):
            stack.enter_context(patch)
        launching._find_launch.cache_clear()
        try:
            yield
        finally:
            launching._find_launch.cache_clear()


def name_of(launch: launching.Launch) -> tuple[str, str]:
    """(module, name) of a launch's kernel."""
    function = launch.kernel.fn
    return function.__module__, function.__name__


def compile_for_hopper(launch: launching.Launch, tensors: tuple[Any, ...]) -> Any:
    """What Triton makes of a launch, up to the machine's code."""
    constants = dict(launch.constants)
    if "UPCAST" in constants:
        constants["UPCAST"] = False  # for the interpreter's sake, who runs on the CPU
    compiled = launch.kernel.warmup(
        *tensors, *launch.numbers, grid=launch.grid, **constants, **launch.options
    )
    shared = compiled.metadata.shared
    assert shared <= SHARED, f"{shared:,} bytes of shared memory, where there are {SHARED:,}"
    return compiled


class _NoDriver:
    """What Triton asks of a GPU's driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCHITECTURE, 32)


# ---------------------------------------------------------------------------- examples


def _retention(
    dk: int, dv: int, *, specialised: bool = False, dtype: Any = torch.bfloat16, **rest: Any
) -> None:
    """Forward and backward; the launches of another GPU's plans are not those kept."""
    from archzoo.kernels import retention
    from archzoo.kernels.retention import launch

    time_, heads = 2048, 4
    q, k = (torch.randn(1, time_, heads, dk, dtype=dtype, requires_grad=True) for _ in "qk")
    v = torch.randn(1, time_, heads, dv, dtype=dtype, requires_grad=True)
    decay = torch.log(1 - 2.0 ** -torch.arange(5.0, 5 + heads))
    launch.find_forward.cache_clear()
    with mock.patch.object(launch, "_warp_specialises", return_value=specialised):
        o, _ = retention.retention(q, k, v, decay, **rest)
        o.sum().backward()
    launch.find_forward.cache_clear()


@example
def retention() -> None:
    """Whole rows by Triton's kernels, cut into segments; and one token."""
    from archzoo.kernels.retention import retention_step

    _retention(64, 64)
    _retention(128, 256)
    q, v, state = torch.randn(2, 4, 64), torch.randn(2, 4, 64), torch.zeros(2, 4, 64, 64)
    retention_step(q.bfloat16(), q.bfloat16(), v.bfloat16(), -torch.rand(4), state)


@example
def retention_wide() -> None:
    """The widest heads, whose maps are split."""
    _retention(256, 512)


@example
def retention_float32() -> None:
    """Products without tensor cores."""
    _retention(64, 128, dtype=torch.float32)


@example
def retention_documents() -> None:
    """Packed documents, padding and a state from before."""
    starts = torch.zeros(1, 2048, dtype=torch.bool)
    starts[:, ::512] = True
    positions = torch.arange(2048).remainder(512)[None]
    valid = torch.ones(1, 2048, dtype=torch.bool)
    valid[:, -100:] = False
    for width in (64, 128):
        _retention(
            64, width, starts=starts, positions=positions, valid=valid,
            state=torch.zeros(1, 4, 64, width), return_state=True,
        )  # fmt: skip


@example
def retention_gluon() -> None:
    """Warp specialisation, as on Hopper."""
    _retention(64, 64, specialised=True)
    _retention(128, 256, specialised=True)


@example
def retention_gluon_wide() -> None:
    """The same of the widest heads."""
    _retention(256, 512, specialised=True)


@example
def retention_layer() -> None:
    from archzoo.kernels.retention import launch
    from archzoo.kernels.retention_layer import gated_retention

    projected = torch.randn(1, 512, 2 * 4 * (64 + 64), dtype=torch.bfloat16, requires_grad=True)
    launch.find_forward.cache_clear()
    y = gated_retention(
        projected, torch.randn(1, 512, 1, 32, 2), -torch.rand(4), None, None, None,
        heads=4, key_width=64, eps=1e-6,
    )  # fmt: skip
    y.sum().backward()
    launch.find_forward.cache_clear()


@example
def rotation() -> None:
    from archzoo.kernels.rotation import split_product, split_rotated

    projected = torch.randn(2, 128, 4 * 64, dtype=torch.bfloat16, requires_grad=True)
    table = torch.randn(1, 128, 1, 32, 2)
    parts = split_rotated(projected, table, 2, 1)
    sum(part.sum() for part in parts).backward()
    x, weight = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((2, 128, 64), (256, 64)))
    split_product(x.requires_grad_(), weight, table, 2, 1)[0].sum().backward()


@example
def low_rank() -> None:
    """Of all rows and of some, in bf16 and in float32."""
    from archzoo.kernels.low_rank import merged

    weight = torch.randn(1536, 512)
    for blocks, dtype in (((0, 512, 1024), torch.bfloat16), ((512,), torch.float32)):
        firsts = [torch.randn(8, 512, requires_grad=True) for _ in blocks]
        seconds = [torch.randn(512, 8, requires_grad=True) for _ in blocks]
        merged(weight, firsts, seconds, blocks, [2.0] * len(blocks), dtype).sum().backward()


@example
def low_rank_joined() -> None:
    """Three blocks, one of a wide matrix, and as many ranks as there can be."""
    from archzoo.kernels.low_rank import joined_gradients

    for rows, columns, blocks, rank in (
        (1536, 512, (0, 512, 1024), 8),
        (512, 1368, (0,), 8),
        (1368, 512, (0,), 32),
    ):
        grad, x = (torch.randn(4096, width, dtype=torch.bfloat16) for width in (rows, columns))
        firsts = [torch.randn(rank, columns) for _ in blocks]
        seconds = [torch.randn(rows // len(blocks), rank) for _ in blocks]
        joined_gradients(grad, x, firsts, seconds, blocks, [2.0] * len(blocks))


@example
def one_bit() -> None:
    """A token's product with packed signs, of one size and of one that fills no program."""
    from archzoo.kernels.one_bit import pack, product

    for width, outputs in ((4096, 4096), (1024, 1000), (96, 40)):
        packed = pack(torch.rand(outputs, width) < 0.5)
        for dtype in (torch.bfloat16, torch.float32):
            scales = torch.ones(width, dtype=dtype), torch.ones(outputs, dtype=dtype)
            with torch.no_grad():
                product(torch.randn(1, width, dtype=dtype), packed, *scales)


@example
def one_bit_hopper() -> None:
    """The same on Hopper: rows of one part, of several, and of more than a program holds."""
    from archzoo.kernels.one_bit import _by_hoppers_kernel, pack

    for width, outputs in ((8192, 8192), (4096, 4096), (128, 40)):
        packed = pack(torch.rand(outputs, width) < 0.5)
        for dtype in (torch.bfloat16, torch.float32):
            for rows in ((), (2,)):
                before, after = torch.ones(*rows, width), torch.ones(*rows, outputs)
                x = torch.randn(2, width, dtype=dtype)
                _by_hoppers_kernel(x, packed, before.to(dtype), after.to(dtype))
            for scales in (3, 4, 8):
                shapes = (scales, width), (scales, outputs), (scales, width)
                mixed = (torch.ones(shape, dtype=dtype) for shape in shapes)
                _by_hoppers_kernel(x, packed, *mixed)


@example
def one_bit_norm() -> None:
    """The norm after it, which on Hopper begins early."""
    from archzoo.kernels.one_bit import _norm

    for outputs in (8192, 4096, 1000):
        for dtype in (torch.bfloat16, torch.float32):
            for early in (True, False):
                _norm(torch.randn(2, outputs), 1e-5, dtype, early)


@example
def one_bit_scales() -> None:
    """BinaryMoS's scales of a token."""
    from archzoo.kernels.one_bit import mixed_scales

    for width, outputs, scales in ((4096, 4096, 4), (96, 40, 3)):
        for dtype in (torch.bfloat16, torch.float32):
            shapes = (1, width), (scales, width), (scales, width), (scales, outputs)
            with torch.no_grad():
                mixed_scales(*(torch.randn(shape, dtype=dtype) for shape in shapes))


@example
def cross_entropy() -> None:
    from archzoo.kernels.cross_entropy import score, total_loss

    x = torch.randn(16, 64, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(16, dtype=torch.int64)
    for vocabulary in (300, 32_000):
        weight = torch.randn(vocabulary, 64, dtype=torch.bfloat16, requires_grad=True)
        total_loss(x, weight, labels).backward()
        score(x, weight, labels)


@example
def experts() -> None:
    from archzoo.kernels.experts import (
        cast_weight,
        collect_rows,
        make_dispatch,
        multiply,
        spread_rows,
    )

    for tokens, kept in ((64, None), (1025, torch.ones(1025, 2, dtype=torch.bool))):
        x = torch.randn(tokens, 256, requires_grad=True)
        weights = torch.rand(tokens, 2, requires_grad=True)
        indices = torch.zeros(tokens, 2, dtype=torch.int64)
        dispatch = make_dispatch(indices, 8, kept, kernels=True)
        rows = spread_rows(x, dispatch, 2, torch.bfloat16)
        collect_rows(rows, weights, dispatch).sum().backward()
    weight = torch.randn(8, 256, 128, requires_grad=True)
    rows = torch.randn(64, 128, dtype=torch.bfloat16, requires_grad=True)
    matrices = cast_weight(weight, torch.bfloat16)
    multiply(rows, matrices, weight, torch.arange(8, 72, 8, dtype=torch.int32)).sum().backward()
    cast_weight(weight, torch.bfloat16).backward(torch.ones_like(matrices))


@example
def swiglu() -> None:
    from archzoo.kernels.swiglu import swiglu, swiglu_product

    for width in (1024, 1408, 2048):
        x = torch.randn(64, 2 * width, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(768, width, dtype=torch.bfloat16, requires_grad=True)
        swiglu(x).sum().backward()
        swiglu_product(x, weight).sum().backward()


@example
def routers() -> None:
    from archzoo.kernels import routers

    x = torch.randn(1024, 512, requires_grad=True)
    for columns in (96, 160):  # one program's, and two
        weight = torch.randn(columns, 512, requires_grad=True)
        projected, again = routers.project(x, weight)
        (projected.sum() + again.sum()).backward()
    for experts, sigmoid in ((32, False), (8, True)):
        logits = torch.randn(64, experts, requires_grad=True)
        weights, indices, probabilities = routers.choose(
            logits, 2, torch.zeros(experts) if sigmoid else None, sigmoid=sigmoid, renormalise=True
        )
        kind = "switch" if sigmoid else "squared_mean"
        _, loss, _ = routers.summarise_load(probabilities, indices, kind, 0.01, 8)
        (weights.sum() + loss).backward()
        routers.largest(logits, 2)
    for experts in (32, 128):
        projected = torch.randn(64, 3 * experts, requires_grad=True)
        routers.attend_experts(projected).sum().backward()


@example
def digits() -> None:
    from archzoo.documents import Context
    from archzoo.kernels.digits import shifted_rows

    tokens = torch.zeros(4, 100, dtype=torch.int64)
    starts = torch.zeros(4, 100, dtype=torch.bool)
    context = Context(tokens, tokens, ~starts, starts)
    kinds = torch.zeros(16, dtype=torch.int8)
    for examples in (None, tokens):
        shifted_rows(
            tokens, kinds, context, coupled=True, last=100, key=1, bound=10, examples=examples
        )


@example
def decoding() -> None:
    """A step of one row, and of 64; kernels begin early on Hopper."""
    from archzoo.kernels import decoding as kernels

    dim, heads, width = 768, 4, 64
    embedding = torch.randn(1000, dim, dtype=torch.bfloat16)
    norm = kernels.Norm(torch.ones(dim, dtype=torch.bfloat16), 1e-6)
    with mock.patch.object(kernels, "_begins_early", return_value=True):
        for batch in (1, 64):
            positions, tokens = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, 1).long()
            frequencies = torch.ones(width // 2, dtype=torch.float64)
            x, table = kernels.start(tokens, embedding, positions, frequencies, 1.0)
            kernels.rotation_table(positions, frequencies, 1.0)
            weight = torch.randn(4 * heads * width, dim, dtype=torch.bfloat16)
            q = heads * width
            rotation = kernels.Rotation(table, width, q, q, 0.125)
            y = kernels.linear(x, weight, norm=norm, rotation=rotation)
            memory = torch.zeros(batch, heads, width, width)
            decay = -torch.rand(heads)
            o = kernels.retain(*y.split(q, 1)[:3], decay, positions, memory)
            gated = kernels.Norm(None, 1e-6, heads, y[:, 3 * q :])
            out = torch.randn(dim, q, dtype=torch.bfloat16)
            x = kernels.linear(o, out, norm=gated, residual=x)
            kernels.linear(x, weight, norm=norm, paired=True)
            kernels.linear(x, embedding, norm=norm)
        experts, rank = 10, 8  # the mixtures of adapters, where they begin and where they end
        first = torch.randn(2 * experts * (rank + 1), dim, dtype=torch.bfloat16)
        seconds = [torch.randn(2 * q, experts * rank, dtype=torch.bfloat16) for _ in range(2)]
        places = [(0, seconds[0]), (2 * q, seconds[1])]
        mixture = kernels.make_mixture(first, places, 4 * q, experts, 2, 0.5, paired=True)
        router = torch.randn(experts, 2 * q, dtype=torch.bfloat16)
        vectors = kernels.make_scaling(router, torch.zeros(experts, 2 * q), None)
        down = torch.randn(dim, 2 * q, dtype=torch.bfloat16)
        head = torch.randn(experts, width, dtype=torch.bfloat16)
        of_heads = kernels.make_blend([(q, head, torch.zeros(heads, experts, width), True)], None)
        for batch in (1, 64):
            x = torch.randn(batch, dim, dtype=torch.bfloat16)
            table = torch.zeros(batch, width // 2, 2)
            z = kernels.linear(x, weight)
            kernels.blend(z, of_heads, z, kernels.Rotation(table, width, q, q, 0.125))
            y, left = kernels.linear_and_next(
                x, weight, vectors, norm=norm, paired=True, mixture=mixture
            )
            kernels.linear(y, down, residual=x, mixture=vectors, left=left)


@example
def cache_attention() -> None:
    """One row of grouped queries that are rotated here, and many of packed documents."""
    from archzoo.kernels.cache_attention import attend_cache, make_arrivals

    for batch, capacity, packed in ((1, 16_384, False), (8, 1024, True)):
        heads, kv_heads, size = 12, 4, 64
        q, k, v = (
            torch.randn(batch, n, size, dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads)
        )
        keys, values = torch.zeros(2, batch, kv_heads, capacity, size, dtype=torch.bfloat16)
        attend_cache(
            q, k, v, keys, values, torch.tensor(5), make_arrivals(batch, heads, 5, "cpu"),
            table=None if packed else torch.randn(1, 1, 1, size // 2, 2),
            documents=torch.zeros(batch, capacity, dtype=torch.int64) if packed else None,
            document=torch.zeros(batch, 1, dtype=torch.int64) if packed else None,
        )  # fmt: skip


# ---------------------------------------------------------------------------- as a script


def main(arguments: list[str]) -> int:
    global ARCHITECTURE, SHARED
    first = "--first" in arguments
    names = [name for name in arguments if not name.startswith("--")] or list(EXAMPLES)
    assert not launching.interpreting()
    import triton

    if "--little" in arguments:
        from archzoo.kernels.retention import launch as retention_launch

        ARCHITECTURE, SHARED = LITTLE
        retention_launch._has_little_memory = lambda device: True
    triton.runtime.driver.set_active(_NoDriver())
    for module in modules():
        importlib.import_module(module)  # before an interpreter is asked for
    seen: set[Any] = set()
    failures = 0

    def see(launch: launching.Launch, tensors: tuple[Any, ...]) -> None:
        nonlocal failures
        of = name_of(launch)
        if first and of[0] in seen:
            return
        seen.add(of[0])
        begin = time.perf_counter()
        try:
            compiled = compile_for_hopper(launch, tensors)
        except Exception:
            failures += 1
            print(f"{'.'.join(of)} {launch.constants} {launch.options}:", file=sys.stderr)
            traceback.print_exc(limit=0, chain=True)
            return
        if (of, compiled.hash) not in seen:
            seen.add((of, compiled.hash))
            seconds = time.perf_counter() - begin
            print(f"{seconds:5.1f} s  {'.'.join(of[0].split('.')[2:])}.{of[1]}", flush=True)

    print(f"triton {triton.__version__}, sm_{ARCHITECTURE}")
    with launches(see):
        for name in names:
            EXAMPLES[name]()
    return min(failures, 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sys.exit(main(sys.argv[1:]))
