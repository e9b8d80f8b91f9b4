"""A mixture of experts against a dense feed-forward of the same active size.

    python benchmarks/moe.py                 # on a GPU: bf16, 16,384 tokens, dim 1024
    python benchmarks/moe.py --device cpu    # float32, 2,048 tokens, dim 256

Forward and backward, router, permutation, casts of float32 weights and the balancing loss included.
A ratio is our time over the dense one's: the smaller the better. On a GPU steps follow each other
without waiting, as layers do in training; `alone_ms` is one step from start to end, with the time
that its launches take. Where scattermoe is installed it is timed on the same routing, experts
alone, which is less than ours does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from harness import in_turn, write_rows
from torch import Tensor, nn

from archzoo.block import make_context
from archzoo.feedforward import balance, moe
from archzoo.feedforward.dense import GatedFeedForward
from archzoo.feedforward.moe import MixtureOfExperts
from archzoo.kernels import experts, routers


class Case(NamedTuple):
    """A mixture to time, and the most it may take over the dense one."""

    experts: int
    top_k: int
    width: int
    allowed: float


CASES = {
    "cuda": (Case(8, 2, 2048, 1.25), Case(32, 2, 2048, 1.25), Case(64, 8, 512, 1.6)),
    "cpu": (Case(8, 2, 512, 2.2),),
}
ROUTERS = ("LinearRouter", "AttentionRouter")
IN_A_ROW = 20  # steps on a GPU before it is waited for


def step(part: nn.Module, x: Tensor, context: Any, cotangent: Tensor, mixed: bool) -> Any:
    """Forward and backward of one feed-forward, as a closure to be timed."""
    device = x.device.type

    def run() -> None:
        for parameter in part.parameters():
            parameter.grad = None
        x.grad = None
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            y, aux = part(x, context)
        tensors, gradients = [y], [cotangent.to(y.dtype)]
        if not isinstance(part, GatedFeedForward):
            tensors.append(aux.losses["balance"])
            gradients.append(torch.ones_like(aux.losses["balance"]))
        torch.autograd.backward(tensors, gradients)

    return run


def in_a_row(run: Callable[[], None], times: int) -> Callable[[], None]:
    """So many steps, and the wait for the last of them."""

    def run_all() -> None:
        for _ in range(times):
            run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run_all


def without_kernels(run: Callable[[], None]) -> Callable[[], None]:
    """The same by plain PyTorch around the grouped products."""

    def run_plain() -> None:
        with (
            patch.object(experts, "fused", lambda *given: False),
            patch.object(routers, "fused", lambda *given: False),
            patch.object(moe, "fused", lambda *given: False),
            patch.object(balance, "fused", lambda *given: False),
        ):
            run()

    return run_plain


def scattermoe(case: Case, x: Tensor, mixture: MixtureOfExperts, context: Any) -> Any:
    """scattermoe's experts on our routing, or None where it is not installed."""
    try:
        from scattermoe.mlp import GLUMLP
    except ImportError:
        return None
    peer = GLUMLP(
        input_size=x.shape[-1],
        hidden_size=case.width,
        num_experts=case.experts,
        top_k=case.top_k,
        activation=nn.SiLU(),
    ).to(x.device)
    routing = mixture.router(x.detach(), context)
    weights, indices = routing.weights.detach(), routing.indices
    cotangent = torch.randn_like(x[0])

    def run() -> None:
        peer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            y = peer(x.flatten(0, 1), weights, indices)
        y.backward(cotangent.to(y.dtype))

    return run


def measure(case: Case, device: str, tokens: int, dim: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of one case: each router, the plain loop and the peer against dense."""
    mixed = device == "cuda"
    torch.manual_seed(0)
    x = torch.randn(1, tokens, dim, device=device).requires_grad_()
    cotangent = torch.randn(1, tokens, dim, device=device)
    context, _ = make_context(1, tokens, device=device)

    def mixture(router: str = "LinearRouter") -> MixtureOfExperts:
        with torch.device(device):
            return MixtureOfExperts(
                dim, case.width, experts=case.experts, top_k=case.top_k, router=router
            )

    dense = GatedFeedForward(dim, case.top_k * case.width).to(device)
    sides: dict[str, Callable[[], None]] = {"dense": step(dense, x, context, cotangent, mixed)}
    for router in ROUTERS:
        sides[router] = step(mixture(router), x, context, cotangent, mixed)
    loop = mixture()
    loop.experts.choose_backend = lambda *facts: "loop"  # type: ignore[method-assign]
    sides["loop"] = step(loop, x, context, cotangent, mixed)
    if mixed:
        plain = step(mixture(), x, context, cotangent, mixed)
        sides["no kernels of ours"] = without_kernels(plain)
    peer = scattermoe(case, x, loop, context) if device == "cuda" else None
    if peer is not None:
        sides["scattermoe, experts alone"] = peer
    alone = in_turn({name: in_a_row(run, 1) for name, run in sides.items()}, rounds, warmup=3)
    times = alone
    if device == "cuda":
        row = in_turn(
            {name: in_a_row(run, IN_A_ROW) for name, run in sides.items()}, max(rounds // 4, 3)
        )
        times = {name: taken / IN_A_ROW for name, taken in row.items()}
    rows = []
    what = f"experts {case.experts}, top {case.top_k}, hidden {case.width}"
    for name, taken in times.items():
        ratio = taken / times["dense"]
        row = {
            "case": what,
            "tokens": tokens,
            "dim": dim,
            "dtype": "bfloat16, float32 weights" if mixed else "float32",
            "side": name,
            "ms": round(taken, 3),
            "alone_ms": round(alone[name], 3),
            "over_dense": round(ratio, 3),
            "allowed": case.allowed if name in ROUTERS else "",
        }
        verdict = ("" if ratio <= case.allowed else "  MISSED") if name in ROUTERS else ""
        print(
            f"{what:34s} {name:28s}{taken:10.3f} ms {ratio:7.2f} x   "
            f"alone {alone[name]:.3f} ms{verdict}",
            flush=True,
        )
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    available = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=tuple(CASES), default=available)
    parser.add_argument("--tokens", type=int, help="default: 16,384 on a GPU, else 2,048")
    parser.add_argument("--dim", type=int, help="default: 1,024 on a GPU, else 256")
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    on_gpu = given.device == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)
    tokens = given.tokens or (16_384 if on_gpu else 2_048)
    dim = given.dim or (1_024 if on_gpu else 256)
    rows = []
    for case in CASES[given.device]:
        rows += measure(case, given.device, tokens, dim, given.rounds)
    write_rows(f"{'bfloat16' if on_gpu else 'float32'}-moe", rows, on_gpu=on_gpu)


if __name__ == "__main__":
    main()
