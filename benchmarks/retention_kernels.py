"""Times the retention kernels against flash-linear-attention and cuDNN attention on one GPU.

    python benchmarks/retention_kernels.py --output results --machine H200

Every contender sees the same inputs in turn, within one run; times are medians over CUDA events.
Two ways of launching are timed. `eager` is what a training step without a compiler pays, Python
and launches included, once the queue is full; `graph` replays a captured CUDA graph and leaves
only the device's time. A peer that is absent, or fails, is skipped with the reason. A peer that
tunes itself does so anew at every length, at the size that is timed.

The floors: the fewest bytes (every input read once, every output written once; backward: q, k, v,
do in, dq, dk, dv out) at the copy rate measured in this run, and the operations of chunks of 64
tokens at the matrix rate measured in this run, 2 C (dk + dv) + 4 dk dv a token and head forward,
C (6 dk + 4 dv) + 10 dk dv backward.
"""

from __future__ import annotations

import argparse
import csv
import functools
import gc
import importlib
import sys
import time as clock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from archzoo.kernels.retention import retention, retention_step

# heads, dk, dv and the lengths at which the batch is tokens / length.
SHAPES = (
    ((16, 64, 64), (2048, 8192, 32768)),
    ((8, 128, 128), (2048, 8192, 32768)),
    ((8, 128, 256), (2048, 8192, 32768)),
    ((4, 256, 512), (2048, 8192, 32768)),
)
STEP_BATCHES = (16, 64, 256)
Forward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def log_decays(heads: int, device: str = "cuda") -> Tensor:
    """RetNet's decays, log(1 - 2^(-5-h))."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(heads).double())).float().to(device)


def inputs(batch: int, time: int, heads: int, dk: int, dv: int) -> tuple[Tensor, ...]:
    """q, k (scaled), v and the gradient of o, bfloat16."""

    def draw(width: int) -> Tensor:
        return torch.randn(batch, time, heads, width, device="cuda")

    q, k, v, do = draw(dk), draw(dk) * dk**-0.5, draw(dv), draw(dv)
    return tuple(x.bfloat16() for x in (q, k, v, do))


def older(against: str) -> tuple[str, Any]:
    """What ``COMMIT=FOLDER`` names: the contender's name, and its module of retention kernels.

    The folder holds the package of that commit as ``archzoo_old``, so that one process takes turns:
    git archive COMMIT archzoo | tar x -C FOLDER; mv FOLDER/archzoo FOLDER/archzoo_old; and
    grep -rl archzoo FOLDER | xargs sed -i -E 's/\\barchzoo\\b/archzoo_old/g'.
    """
    commit, _, folder = against.partition("=")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return f"archzoo {commit}", importlib.import_module("archzoo_old.kernels.retention")


def find_peers(against: str | None = None) -> tuple[dict[str, Forward], dict[str, str]]:
    """Contenders by name, and why a peer is missing."""
    peers: dict[str, Forward] = {"archzoo": lambda q, k, v, decay: retention(q, k, v, decay)[0]}
    missing: dict[str, str] = {}
    if against:
        name, module = older(against)
        peers[name] = lambda q, k, v, decay: module.retention(q, k, v, decay)[0]
        return peers, missing
    try:
        from fla.ops.simple_gla import chunk_simple_gla
        from fla.ops.simple_gla.fused_chunk import fused_chunk_simple_gla

        peers["fla chunk"] = lambda q, k, v, decay: chunk_simple_gla(
            q, k, v, g_gamma=decay, scale=1.0
        )[0]
        peers["fla fused"] = lambda q, k, v, decay: fused_chunk_simple_gla(
            q, k, v, g_gamma=decay, scale=1.0
        )[0]
    except Exception as reason:  # an import may fail in any way: say which
        missing["flash-linear-attention"] = f"{type(reason).__name__}: {reason}"

    def attention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
            ).transpose(1, 2)

    peers["cuDNN attention"] = attention
    return peers, missing


def reference(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, do: Tensor) -> list[Tensor]:
    """o / sqrt(s_n) times sqrt(s_n), that is, plain o, and its gradients, in float64."""
    q, k, v = (x.double().detach().requires_grad_() for x in (q, k, v))
    n = torch.arange(q.shape[1], device=q.device).double()
    gap = n[:, None] - n[None]
    weights = torch.where(gap >= 0, torch.exp(gap.clamp(min=0) * decay.double()[:, None, None]), 0)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * weights
    out = torch.einsum("bhij,bjhd->bihd", scores, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), do.double())]


def worst_error(call: Forward, heads: int, dk: int, dv: int, normalised: bool) -> float:
    """Largest relative error of o, dq, dk, dv against float64 at 1,000 tokens."""
    q, k, v, do = inputs(1, 1000, heads, dk, dv)
    decay = log_decays(heads)
    scale = torch.ones(1, 1000, heads, 1, device="cuda", dtype=torch.float64)
    if normalised:
        n = torch.arange(1000, device="cuda").double()[:, None]
        lg = decay.double()[None]
        scale = (torch.expm1((n + 1) * lg) / torch.expm1(lg)).rsqrt()[None, :, :, None]
    want = reference(q, k, v, decay, do.double() * scale)
    want[0] = want[0] * scale
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = call(q, k, v, decay)
    got = [out, *torch.autograd.grad(out, (q, k, v), do)]
    return max(((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True))


def eager_samples(call: Callable[[], Any], count: int) -> list[float]:
    """Milliseconds of each of `count` calls, queued without waiting."""
    events = []
    for _ in range(count):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def capture(call: Callable[[], Any], repeats: int = 1) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph


def median(samples: list[float]) -> float:
    return sorted(samples)[len(samples) // 2]


def time_in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[tuple[str, str], float]:
    """Median milliseconds by (contender, way of launching), the contenders taking turns."""
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        try:
            graphs[name] = capture(call)
        except Exception as reason:  # a peer that cannot be captured is timed eagerly alone
            torch.cuda.synchronize()
            print(f"    {name}: no graph, {type(reason).__name__}: {str(reason)[:80]}")
    samples: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for name, call in calls.items():
            samples.setdefault((name, "eager"), []).extend(eager_samples(call, 6)[1:])
            if name in graphs:
                samples.setdefault((name, "graph"), []).extend(
                    eager_samples(graphs[name].replay, 5)[1:]
                )
    return {key: median(values) for key, values in samples.items()}


def ceilings() -> tuple[float, float]:
    """Bytes a second of a large copy and operations a second of a large bfloat16 product."""
    source = torch.empty(2**31, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    target.copy_(source)
    copy = median(eager_samples(lambda: target.copy_(source), 10))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = a @ b
    product = median(eager_samples(lambda: torch.mm(a, b, out=out), 10))
    return 2 * source.nbytes / copy * 1e3, 2 * 8192**3 / product * 1e3


def floors(tokens: int, heads: int, dk: int, dv: int, rates: tuple[float, float]) -> dict[str, Any]:
    """Milliseconds by bytes and by operations, for forward and forward + backward."""
    n = tokens * heads
    forward_bytes, both_bytes = 2 * n * (2 * dk + 2 * dv), 2 * n * (6 * dk + 5 * dv)
    forward_ops = n * (2 * 64 * (dk + dv) + 4 * dk * dv)
    both_ops = forward_ops + n * (64 * (6 * dk + 4 * dv) + 10 * dk * dv)
    return {
        "forward": (forward_bytes / rates[0] * 1e3, forward_ops / rates[1] * 1e3),
        "forward+backward": (both_bytes / rates[0] * 1e3, both_ops / rates[1] * 1e3),
    }


def compare_sequences(
    arguments: argparse.Namespace,
    stamp: dict[str, str],
    rates: tuple[float, float],
    rows: list[dict[str, Any]],
    write: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Adds rows to `rows` and writes them after every line: a peer may tune itself for minutes."""
    peers, missing = find_peers(arguments.against)
    for name, reason in missing.items():
        print(f"skipped {name}: {reason}")
    if arguments.contenders:
        peers = {name: call for name, call in peers.items() if name in arguments.contenders}
    for (heads, dk, dv), times in SHAPES:
        if arguments.shapes and f"{heads}x{dk}x{dv}" not in arguments.shapes:
            continue
        errors: dict[str, float] = {}
        usable = dict(peers)
        for time in times:
            if arguments.times and time not in arguments.times:
                continue
            batch = arguments.tokens // time
            q, k, v, do = inputs(batch, time, heads, dk, dv)
            narrow, narrow_do = v[..., :dk].contiguous(), do[..., :dk].contiguous()
            decay = log_decays(heads)
            bounds = floors(arguments.tokens, heads, dk, dv, rates)
            forget_tuning()
            for name, forward in list(usable.items()):
                if name == "cuDNN attention":
                    continue
                try:  # before its check, so that it is tuned for what is timed
                    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
                    make_call(forward, leaves, do, decay, "forward+backward")()
                    if name not in errors:
                        errors[name] = worst_error(forward, heads, dk, dv, name == "archzoo")
                except Exception as reason:
                    print(f"skipped {name} at {heads}x{dk}x{dv}: {type(reason).__name__}: {reason}")
                    del usable[name]
            for direction in ("forward", "forward+backward"):
                calls: dict[str, Callable[[], Any]] = {}
                for name, forward in usable.items():
                    value, gradient = v, do
                    if name == "cuDNN attention":  # attention of the same query width
                        value, gradient = narrow, narrow_do
                    leaves = [x.detach().requires_grad_() for x in (q, k, value)]
                    calls[name] = make_call(forward, leaves, gradient, decay, direction)
                try:
                    medians = time_in_turn(calls, arguments.rounds)
                except torch.cuda.OutOfMemoryError as reason:
                    print(f"skipped {heads}x{dk}x{dv} at {time}: {reason}")
                    continue
                for (name, way), milliseconds in medians.items():
                    rows.append(
                        {
                            **stamp,
                            "heads": heads, "dk": dk, "dv": dv, "time": time, "batch": batch,
                            "pass": direction, "contender": name, "launch": way,
                            "milliseconds": f"{milliseconds:.4f}",
                            "times_archzoo": f"{milliseconds / medians['archzoo', way]:.3f}",
                            "floor_bytes_ms": f"{bounds[direction][0]:.4f}",
                            "floor_operations_ms": f"{bounds[direction][1]:.4f}",
                            "relative_error": f"{errors[name]:.2e}" if name in errors else "",
                        }
                    )  # fmt: skip
            report(rows, heads, dk, dv, time)
            write(rows)
            del q, k, v, do, narrow, narrow_do


def forget_tuning() -> None:
    """Lets every kernel that tunes itself do so again, at the sizes of its next call."""
    from triton.runtime.autotuner import Autotuner

    # By type, for isinstance would ask proxies, some of which warn, what they stand for.
    for tuner in (x for x in gc.get_objects() if issubclass(type(x), Autotuner)):
        tuner.cache.clear()
        tuner.cache_results = False


def make_call(
    forward: Forward, leaves: list[Tensor], gradient: Tensor, decay: Tensor, direction: str
) -> Callable[[], Any]:
    def only_forward() -> Tensor:
        with torch.no_grad():
            return forward(*leaves, decay)

    def both() -> Any:
        return torch.autograd.grad(forward(*leaves, decay), leaves, gradient)

    return only_forward if direction == "forward" else both


def report(rows: list[dict[str, Any]], heads: int, dk: int, dv: int, time: int) -> None:
    """One line a way of launching: forward / forward + backward, and the ratios."""
    here = [r for r in rows if (r["heads"], r["dk"], r["dv"], r["time"]) == (heads, dk, dv, time)]
    if not here:  # there was no memory for either pass
        return
    for way in ("eager", "graph"):
        found = {
            (r["contender"], r["pass"]): float(r["milliseconds"])
            for r in here
            if r["launch"] == way
        }
        names = sorted({name for name, _ in found})
        parts = []
        for name in names:
            forward = found.get((name, "forward"), float("nan"))
            both = found.get((name, "forward+backward"), float("nan"))
            parts.append(f"{name} {forward:.3f}/{both:.3f}")
        mine = found.get(("archzoo", "forward+backward"), float("nan"))
        fla = [found[n, p] for n, p in found if n.startswith("fla") and p == "forward+backward"]
        cudnn = found.get(("cuDNN attention", "forward+backward"), float("nan"))
        ratio = f"fla/ours {min(fla) / mine:.2f}" if fla else "fla absent"
        print(
            f"{heads:2}x{dk}x{dv} T {time:5} {way}: {', '.join(parts)} ms | {ratio}, "
            f"cuDNN/ours {cudnn / mine:.2f}",
            flush=True,
        )
    bound = here[-1]
    print(f"    floors, forward + backward: bytes {bound['floor_bytes_ms']}, operations "
          f"{bound['floor_operations_ms']} ms", flush=True)  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: by shape and length both ways of launching, forward / forward + backward in ms.

    fla is the better of its forms in each pass; the ratios are of forward + backward.
    """
    ratios = ["fla / archzoo", "cuDNN / archzoo"]
    head = ["heads x dk x dv", "T"]
    for way in ("eager", "graph"):
        head += [f"{way}: archzoo", "fla", "cuDNN", *ratios]
    head.append("over the floor")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    whole = [r for r in rows if r["pass"] != "step"]
    both_passes = [r for r in whole if r["pass"] == "forward+backward"]
    for shape in dict.fromkeys((r["heads"], r["dk"], r["dv"], r["time"]) for r in both_passes):
        here = [r for r in whole if (r["heads"], r["dk"], r["dv"], r["time"]) == shape]
        cells = [" x ".join(map(str, shape[:3])), f"{int(shape[3]):,}"]
        for way in ("eager", "graph"):
            found: dict[str, dict[str, float]] = {}
            for r in here:
                if r["launch"] == way:
                    found.setdefault(r["contender"], {})[r["pass"]] = float(r["milliseconds"])
            forms = [found.pop(name) for name in list(found) if name.startswith("fla")]
            if forms:
                passes = ("forward", "forward+backward")
                found["fla"] = {which: min(form[which] for form in forms) for which in passes}
            names = ("archzoo", "fla", "cuDNN attention")
            both = {name: found[name]["forward+backward"] for name in names if name in found}
            mine = both["archzoo"]
            cells += [
                f"{found[name]['forward']:.3f} / {both[name]:.3f}" if name in both else "absent"
                for name in names
            ]
            cells += [f"{both[name] / mine:.2f}" if name in both else "" for name in names[1:]]
        bound = max(
            float(here[-1]["floor_bytes_ms"]), float(here[-1]["floor_operations_ms"])
        )  # of forward + backward, which is measured last
        cells.append(f"{mine / bound:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare_steps(stamp: dict[str, str], rates: tuple[float, float]) -> list[dict[str, Any]]:
    """One token of decoding, graph replay; states rotate so that no cache holds them."""
    rows = []
    peer = None
    try:
        from fla.ops.simple_gla import fused_recurrent_simple_gla as peer
    except Exception as reason:
        print(f"skipped flash-linear-attention's step: {type(reason).__name__}: {reason}")
    for heads, dk, dv in (shape for shape, _ in SHAPES):
        decay = log_decays(heads)
        for batch in STEP_BATCHES:
            size = batch * heads * dk * dv * 4
            count = max(2, -(-(2**29) // size))
            states = [torch.randn(batch, heads, dk, dv, device="cuda") for _ in range(count)]
            q, k, v, _ = inputs(batch, 1, heads, dk, dv)
            position = torch.full((batch,), 100, device="cuda")

            def ours(states=states, q=q, k=k, v=v, decay=decay, position=position):
                for state in states:
                    retention_step(q, k, v, decay, state, position)

            def theirs(states=states, q=q, k=k, v=v, decay=decay):
                for state in states:
                    peer(
                        q, k, v, g_gamma=decay, scale=1.0, initial_state=state,
                        output_final_state=True,
                    )  # fmt: skip

            contenders = {"archzoo": ours} if peer is None else {"archzoo": ours, "fla": theirs}
            found = {}
            for name, call in contenders.items():
                try:
                    call()
                    graph = capture(call)
                    graph.replay()
                    found[name] = median(eager_samples(graph.replay, 9)) / count * 1e3
                except Exception as reason:
                    print(f"skipped {name}'s step: {type(reason).__name__}: {str(reason)[:80]}")
            floor = 2 * size / rates[0] * 1e6
            for name, microseconds in found.items():
                rows.append(
                    {
                        **stamp,
                        "heads": heads, "dk": dk, "dv": dv, "time": 1, "batch": batch,
                        "pass": "step", "contender": name, "launch": "graph",
                        "milliseconds": f"{microseconds / 1e3:.5f}",
                        "times_archzoo": f"{microseconds / found['archzoo']:.3f}",
                        "floor_bytes_ms": f"{floor / 1e3:.5f}", "floor_operations_ms": "",
                        "relative_error": "",
                    }
                )  # fmt: skip
            line = ", ".join(f"{name} {value:.1f}" for name, value in found.items())
            print(f"step {heads}x{dk}x{dv} batch {batch}: {line} us, state read and written "
                  f"{floor:.1f} us", flush=True)  # fmt: skip
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time against length, one panel a shape, forward + backward by graph replay."""
    from archzoo.analysis.figures import legend, pyplot, save

    plt = pyplot()
    shapes = [shape for shape, _ in SHAPES]
    figure, panels = plt.subplots(
        1, len(shapes), figsize=(17, 4.2), sharey=True, layout="constrained"
    )
    for panel, (heads, dk, dv) in zip(panels, shapes, strict=True):
        mine = [
            r for r in rows
            if (r["heads"], r["dk"], r["dv"]) == (heads, dk, dv)
            and r["pass"] == "forward+backward" and r["launch"] == "graph"
        ]  # fmt: skip
        for name in dict.fromkeys(r["contender"] for r in mine):
            line = sorted(
                (r["time"], float(r["milliseconds"])) for r in mine if r["contender"] == name
            )
            width = 2.5 if name == "archzoo" else 1.2
            panel.plot(*zip(*line, strict=True), "o-", label=name, linewidth=width)
        if mine:
            floor = max(float(mine[0]["floor_bytes_ms"]), float(mine[0]["floor_operations_ms"]))
            panel.axhline(floor, color="grey", linestyle=":", label="floor")
        panel.set(
            xscale="log", yscale="log", xlabel="tokens a sequence",
            title=f"{heads} heads, dk {dk}, dv {dv}",
        )  # fmt: skip
        panel.set_xticks([2048, 8192, 32768], ["2k", "8k", "32k"])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("forward + backward, ms\n(32,768 tokens, graph replay)")
    low, high = panels[0].get_ylim()
    ticks = [step * 10.0**power for power in range(-3, 4) for step in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    panels[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    [*_, last] = (panel for panel in panels if panel.lines)
    legend(last, beside=True)
    save(figure, path)
    print(f"drew {path}")


def compare_sides(rows: list[dict[str, Any]]) -> None:
    """Prints how much longer ours takes than the older one, line by line and in the median."""
    for way in ("graph", "eager"):
        old = [r for r in rows if r["launch"] == way and r["contender"] != "archzoo"]
        ratios = []
        for row in old:
            ratios.append(1 / float(row["times_archzoo"]))
            where = f"{row['heads']}x{row['dk']}x{row['dv']} T {row['time']} {row['pass']}"
            print(f"{way} {where}: {ratios[-1]:.3f}")
        print(f"{way}: median {median(ratios):.3f}, largest {max(ratios):.3f} of {len(ratios)}")


def compare_hosts(against: str, calls: int = 300, rounds: int = 40) -> None:
    """Prints microseconds of Python for forward and backward, the kernels' launches left out."""
    name, module = older(against)
    modules = {"archzoo": importlib.import_module("archzoo.kernels.retention"), name: module}
    launchers = [
        importlib.import_module(f"{package}.kernels.launching").Launch
        for package in ("archzoo", "archzoo_old")
    ]
    q, k, v, do = inputs(1, 128, 2, 64, 64)
    decay = log_decays(2)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    sides = {
        side: functools.partial(make_call, lambda *x, m=m: m.retention(*x)[0])(
            leaves, do, decay, "forward+backward"
        )
        for side, m in modules.items()
    }
    for call in sides.values():
        call()
    kept = [launcher.__call__ for launcher in launchers]
    for launcher in launchers:
        launcher.__call__ = lambda self, *arguments: None
    samples: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, call in sides.items():
            begin = clock.perf_counter()
            for _ in range(calls):
                call()
            samples[side].append((clock.perf_counter() - begin) / calls * 1e6)
    for launcher, before in zip(launchers, kept, strict=True):
        launcher.__call__ = before
    for side, values in samples.items():
        print(
            f"host, forward and backward: {side} {min(values):.1f} us, median {median(values):.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768, help="batch times length")
    parser.add_argument("--shapes", nargs="*", help="only these, such as 16x64x64")
    parser.add_argument("--times", type=int, nargs="*", help="only these lengths")
    parser.add_argument("--contenders", nargs="*", help="only these, archzoo among them")
    parser.add_argument("--rounds", type=int, default=5, help="turns each contender takes")
    parser.add_argument("--output", type=Path, help="folder for the CSV and the figure")
    parser.add_argument("--machine", help="name in the file names; default: the GPU's")
    parser.add_argument("--against", help="COMMIT=FOLDER: take turns with an older archzoo alone")
    parser.add_argument("--no-step", action="store_true", help="skip the recurrent step")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: these kernels are timed on a CUDA device, and there is none")
        return
    import triton

    stamp = {
        "machine": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": harness.commit(),
        "command": " ".join(["python", "benchmarks/retention_kernels.py", *sys.argv[1:]]),
    }
    rates = ceilings()
    print(f"{stamp['machine']}: copies {rates[0] / 1e12:.2f} TB/s, multiplies "
          f"{rates[1] / 1e12:.0f} TFLOP/s in bfloat16")  # fmt: skip
    machine = arguments.machine or stamp["machine"].replace(" ", "-").lower()
    name = f"{machine}-torch{torch.__version__.split('+')[0]}-bf16-retention-kernels"

    def write(rows: list[dict[str, Any]]) -> None:
        if not (arguments.output and rows):
            return
        arguments.output.mkdir(parents=True, exist_ok=True)
        with (arguments.output / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    if arguments.against:
        compare_hosts(arguments.against)
    rows = [] if arguments.no_step or arguments.against else compare_steps(stamp, rates)
    write(rows)
    compare_sequences(arguments, stamp, rates, rows, write)
    if arguments.output:
        print(f"wrote {arguments.output / name}.csv")
    if arguments.against:
        compare_sides(rows)
    elif any(row["pass"] != "step" for row in rows):
        if arguments.output:
            draw(rows, arguments.output / f"{name}.png")
        print(table(rows))


if __name__ == "__main__":
    main()
