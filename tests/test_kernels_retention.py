"""The retention kernels against a float64 recurrence, gradients by autograd.

On a machine without a GPU the kernels run through Triton's interpreter, in a process of its own
(the interpreter is chosen when the kernels are defined); on a GPU the sizes grow. Relative error
is ||out - reference|| / ||reference||.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if not torch.cuda.is_available():
    if "archzoo.kernels.retention_triton" in sys.modules:
        pytest.skip("the kernels were already defined for a GPU", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"

from archzoo.kernels.retention import available, retention, retention_step, unavailable

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def reference(
    q, k, v, log_decay, state=None, positions=None, starts=None, valid=None, scale=True
):
    """The recurrence itself, token by token, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    decay = log_decay.double().exp()[None, :, None, None]
    batch, time, heads, dk = q.shape
    if state is None:
        state = q.new_zeros(batch, heads, dk, v.shape[-1])
    state = state.double()
    outputs = []
    for n in range(time):
        kept = state
        if starts is not None:
            kept = torch.where(starts[:, n, None, None, None], torch.zeros_like(kept), kept)
        new = decay * kept + k[:, n, :, :, None] * v[:, n, :, None, :]
        out = torch.einsum("bhk,bhkv->bhv", q[:, n], new)
        if scale:
            position = torch.full((batch,), n) if positions is None else positions[:, n].cpu()
            if positions is None and valid is not None:
                position = (valid.long().cumsum(1)[:, n] - 1).clamp(min=0).cpu()
            count = (position.double() + 1).to(q.device)[:, None]
            lg = log_decay.double()[None]
            total = torch.where(lg == 0, count, torch.expm1(count * lg) / torch.expm1(lg))
            out = out / torch.where(lg == 0, count, total).sqrt()[..., None]
        if valid is not None:
            alive = valid[:, n, None, None]
            out = torch.where(alive, out, torch.zeros_like(out))
            new = torch.where(alive[..., None], new, state)
        state = new
        outputs.append(out)
    return torch.stack(outputs, 1), state


def error(out, expected):
    out, expected = out.double(), expected.double()
    return ((out - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def slopes(heads, first=0):
    """RetNet's decays, head indices first, first + 1, ..."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(first, first + heads).double())).to(DEVICE)


def case(batch, time, heads, dk, dv, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, time, heads, dk), (batch, time, heads, dk), (batch, time, heads, dv))
    q, k, v = (torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes)
    return q, k * dk**-0.5, v


def check(q, k, v, log_decay, state=None, tolerance=None, **facts):
    """Outputs, states and all gradients."""
    tolerance = TOLERANCE[q.dtype] if tolerance is None else tolerance
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    states = (None, None)
    if state is not None:
        states = (state.clone().requires_grad_(), state.double().requires_grad_())
    out, last = retention(*leaves, log_decay, states[0], **facts, return_state=True)
    want, want_last = reference(*doubles, log_decay, states[1], **facts)
    generator = torch.Generator().manual_seed(1)
    d_out = torch.randn(want.shape, generator=generator).to(DEVICE).to(q.dtype)
    d_last = torch.randn(want_last.shape, generator=generator).to(DEVICE)
    assert out.dtype == v.dtype and last.dtype == torch.float32
    torch.autograd.backward((out, last), (d_out, d_last))
    torch.autograd.backward((want, want_last), (d_out.double(), d_last.double()))
    errors = {"o": error(out, want), "state": error(last, want_last)}
    for name, mine, theirs in zip("qkv", leaves, doubles, strict=True):
        errors["d" + name] = error(mine.grad, theirs.grad)
    if state is not None:
        errors["dstate"] = error(states[0].grad, states[1].grad)
    bad = {name: value for name, value in errors.items() if not value <= tolerance}
    assert not bad, f"{bad} beyond {tolerance}; all: {errors}"
    return errors


TIMES = (1, 2, 31, 64, 65, 1000, 4097, 32768) if GPU else (1, 31, 65, 150)
WIDTHS = (
    [(64, 64), (128, 128), (128, 256), (256, 512), (80, 48)] if GPU else [(16, 16), (24, 40)]
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("time", [t for t in TIMES if t <= 1000])
@pytest.mark.parametrize("dk, dv", WIDTHS)
def test_matches_the_recurrence(dk, dv, time, dtype):
    q, k, v = case(2, time, 2, dk, dv, dtype)
    state = torch.randn(2, 2, dk, dv, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    check(q, k, v, slopes(2), state)
