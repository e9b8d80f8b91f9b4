"""Linears of 1 bit a weight: golden numbers, where they start, packed products, files, commands."""

import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import MICRO, micro
from safetensors.torch import load_file
from torch.nn import functional as F

import archzoo
from archzoo.checkpoint import load
from archzoo.cli import main
from archzoo.contract import CHECKS, run_check
from archzoo.contract.measure import relative_error
from archzoo.conversion.binarise import binarise, bits_a_weight, pack
from archzoo.kernels import launching, one_bit
from archzoo.kernels.one_bit import native
from archzoo.linears.binary import BinaryLinear, svid
from archzoo.tasks import Addition
from archzoo.training.optim import decay_groups

GOLDEN = Path(__file__).parent / "golden"
ONE, MOS = (
    load_file(GOLDEN / f"adaptation_{name}.safetensors") for name in ("onebit", "binarymos")
)
SHAPES = ("sq", "wide", "tall")
CLASSES = (archzoo.OneBitLinear, archzoo.BinaryMoSLinear)
METHODS = ({"method": "OneBit"}, {"method": "OneBit", "norm": True}, {"method": "BinaryMoS"})


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("rule", CHECKS["linear"])
@pytest.mark.parametrize("packed", [False, True])
def test_they_keep_the_rules_of_a_linear(cls, rule, packed):
    finding = run_check(cls, rule, packed=packed)
    assert finding.passed, finding.detail


# ---------------------------------------------------------------------------- golden numbers


def put(values):
    with torch.no_grad():
        for parameter, value in values:
            parameter.copy_(value.view_as(parameter))


def gradients(linear, golden, case):
    x = golden[f"{case}.x"].clone().requires_grad_()
    y = linear(x)
    (y * golden[f"{case}.gy"]).sum().backward()
    return y, x.grad


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("norm", [True, False])
def test_onebit_gives_the_golden_numbers_and_gradients(case, norm):
    at = f"{case}." if norm else f"{case}.no_norm."
    rows, columns = ONE[f"{case}.latent"].shape
    bias = f"{case}.bias" in ONE
    linear = archzoo.OneBitLinear(columns, {"a": rows}, norm=norm, bias=bias).double()
    put([(linear.weight, ONE[f"{case}.latent"]), (linear.input_scale, ONE[f"{case}.g"])])
    put([(linear.output_scale, ONE[f"{case}.h"])])
    if bias:
        put([(linear.bias, ONE[f"{case}.bias"])])
    y, d_x = gradients(linear, ONE, case)
    assert relative_error(y, ONE[f"{at}y"]) < 1e-12
    found = {"x": d_x, "latent": linear.weight.grad, "h": linear.output_scale.grad}
    found["g"] = linear.input_scale.grad[0]
    for name, gradient in found.items():
        assert relative_error(gradient, ONE[f"{at}grad.{name}"]) < 1e-12, name


@pytest.mark.parametrize("case", SHAPES)
def test_binarymos_gives_the_golden_numbers_and_gradients(case):
    scales, columns = MOS[f"{case}.S_in"].shape
    rows, bias = MOS[f"{case}.S_out"].shape[1], f"{case}.bias" in MOS
    arguments = {"scales": scales, "bias": bias}
    linear = archzoo.BinaryMoSLinear(columns, {"a": rows}, **arguments).double()
    put([(linear.weight, MOS[f"{case}.latent"]), (linear.input_scales, MOS[f"{case}.S_in"])])
    put([(linear.output_scales, MOS[f"{case}.S_out"]), (linear.router, MOS[f"{case}.router"])])
    if bias:
        put([(linear.bias, MOS[f"{case}.bias"])])
    y, d_x = gradients(linear, MOS, case)
    assert relative_error(y, MOS[f"{case}.y_f64"]) < 1e-12
    assert relative_error(y, MOS[f"{case}.y"]) < 1e-5
    found = {"x": d_x, "latent": linear.weight.grad, "router": linear.router.grad[0]}
    found |= {"S_in": linear.input_scales.grad[0], "S_out": linear.output_scales.grad}
    for name, gradient in found.items():
        assert relative_error(gradient, MOS[f"{case}.f64.grad.{name}"]) < 1e-12, name
        assert relative_error(gradient, MOS[f"{case}.grad.{name}"]) < 1e-5, name


@pytest.mark.parametrize(("cls", "golden"), [*zip(CLASSES, (ONE, MOS), strict=True)])
def test_the_estimator_is_the_papers_and_zero_counts_as_it_is_packed(cls, golden):
    weight, sign = golden["ste.w"], golden["ste.sign"]
    linear = cls(len(weight), {"a": 1}).double()
    put([(linear.weight, weight)])
    signs = linear._signs()
    assert torch.equal(signs[0], torch.where(sign == 0, 1.0, sign))  # theirs is 0, until packed
    signs.sum().backward()
    assert relative_error(linear.weight.grad[0], golden["ste.grad"]) < 1e-12


@pytest.mark.parametrize("case", SHAPES)
def test_the_decomposition_is_the_golden_one_and_better_than_scales_of_rows(case):
    dense = ONE[f"{case}.dense"]
    h, g = svid(dense)
    outer = h[:, None] * g
    assert (h >= 0).all() and (g >= 0).all()
    want = ONE[f"{case}.svd_h"][:, None] * ONE[f"{case}.svd_g"]
    assert relative_error(outer, want.abs()) < 1e-12
    nmf = ONE[f"{case}.nmf_h"][:, None] * ONE[f"{case}.nmf_g"]
    assert relative_error(outer, nmf) < 1e-5
    signs, size = torch.where(dense < 0, -1.0, 1.0).double(), dense.abs()
    u, values, v = torch.linalg.svd(dense)
    approximations = [
        signs * outer,
        signs * size.mean(),
        signs * size.mean(dim=1, keepdim=True),
        values[0] * u[:, :1] * v[:1],
    ]
    errors = torch.tensor([relative_error(found, dense) for found in approximations]).double()
    golden = ONE[f"{case}.errors_nmf_svd_scalar_row_rank1"]
    assert (errors - golden[1:]).abs().max() < 1e-6
    decomposed, scalar, row, rank_1 = errors
    assert decomposed < row < scalar < rank_1
    for n in (f"{case}.S_in_init", f"{case}.S_out_init"):  # the mixture's are n copies of it
        assert MOS[n].std(dim=0).max() < 1e-6
    h, g = svid(MOS[f"{case}.dense"])
    theirs = MOS[f"{case}.S_out_init"][0][:, None] * MOS[f"{case}.S_in_init"][0]
    assert relative_error(h[:, None] * g, theirs.double()) < 1e-5


def test_a_matrix_of_zeros_has_scales_of_zeros():
    h, g = svid(torch.zeros(3, 5))
    assert not h.any() and not g.any()


# ---------------------------------------------------------------------------- packing, products


def test_bits_are_packed_as_onebits_own_code_has_it():
    packed = one_bit.pack(ONE["sq.latent"] < 0)
    assert torch.equal(packed, ONE["sq.packed"].view(torch.uint8))


@pytest.mark.parametrize("width", [1, 7, 8, 9, 64, 100])
def test_what_is_packed_is_unpacked_bit_for_bit(width):
    negative = torch.rand(2, 5, width) < 0.5
    packed = one_bit.pack(negative)
    assert packed.shape == (2, 5, -(-width // 8)) and packed.dtype == torch.uint8
    assert torch.equal(one_bit.unpack(packed, width, torch.float32) < 0, negative)
    assert torch.equal(one_bit.pack(one_bit.unpack(packed, width, torch.int8) < 0), packed)


def check_product(rows, width, outputs, shared, dtype, allowed, device="cpu"):
    x = torch.randn(rows, width, device=device).to(dtype)
    packed = one_bit.pack(torch.rand(outputs, width, device=device) < 0.5)
    before = torch.rand(*(() if shared else (rows,)), width, device=device).to(dtype)
    after = torch.rand(*(() if shared else (rows,)), outputs, device=device).to(dtype)
    with torch.no_grad():
        y = one_bit.product(x[None], packed, before if shared else before[None], after)
    wide = (tensor.double() for tensor in (x, before, after))
    x, before, after = wide
    want = one_bit.product_plainly(x, packed, before, after)
    assert y.dtype == dtype
    # Over what a sum of these terms usually is: a single one may be near 0, its rounding is not.
    usual = (x * before).norm(dim=-1, keepdim=True) * after
    assert (y[0].double() - want).norm() < allowed * usual.norm()


needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("width", [1, 8, 20, 49, 64, 1000])
def test_the_cpu_product_gives_the_plain_forms_numbers(width, shared, dtype):
    allowed = 1e-6 if dtype == torch.float32 else 1e-2
    for outputs in (1, 4, 33):
        for rows in (1, 3):
            check_product(rows, width, outputs, shared, dtype, allowed)


@needs_compiler
def test_several_threads_give_the_same_numbers():
    x, signs = torch.randn(1, 1024), one_bit.pack(torch.rand(1030, 1024) < 0.5)
    scales = torch.rand(1024), torch.rand(1030)
    alone = one_bit._by_library(x, signs, *scales)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(one_bit._by_library(x, signs, *scales), alone)
    finally:
        torch.set_num_threads(threads)


def test_a_build_that_fails_is_said_once_and_the_plain_form_runs(monkeypatch):
    def fails():
        raise RuntimeError("Ninja is required\nand more")

    monkeypatch.setattr(native, "_loaded", fails)
    native._library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="plain form.*Ninja is required\\)"):
            assert not one_bit.available(torch.ones(1))
        check_product(1, 20, 6, True, torch.float32, 1e-6)  # a second warning would be an error
    finally:
        native._library.cache_clear()


def test_a_library_is_there_when_it_is_whole(monkeypatch, tmp_path):
    """What another process loads while one builds: nothing, or all of it."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    there = []

    def built(name, sources, build_directory, **options):
        library = Path(build_directory, f"{name}.so")
        library.write_text("half")
        there.append(list(tmp_path.glob("*/*.so")))
        library.write_text("whole")

    loaded = []
    monkeypatch.setattr("torch.utils.cpp_extension.load", built)
    monkeypatch.setattr(
        native.ctypes,
        "CDLL",
        lambda path: (
            loaded.append(Path(path).read_text())
            or SimpleNamespace(archzoo_one_bit=SimpleNamespace())
        ),
    )
    native._loaded()
    native._loaded()
    assert there == [[]] and loaded == ["whole", "whole"]
    assert [path.name for path in tmp_path.glob("*/*")] == ["archzoo_one_bit.so"]


def device_of_kernels(monkeypatch):
    """Where kernels run: on a GPU, or by the interpreter."""
    if torch.cuda.is_available():
        return "cuda"
    if not launching.TRITON_FOUND:
        pytest.skip("no Triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return "cpu"


@pytest.mark.parametrize("width", [32, 96, 160])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_gives_the_plain_forms_numbers(width, dtype, monkeypatch):
    device = device_of_kernels(monkeypatch)
    monkeypatch.setattr(one_bit, "WORDS", 4)  # so that a row takes several turns
    monkeypatch.setattr(one_bit, "TWO_FROM", 9)
    allowed = 1e-6 if dtype == torch.float32 else 1e-2
    for shared in (True, False):
        for outputs in (6, 9):
            check_product(2, width, outputs, shared, dtype, allowed, device)


needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="Gluon has no interpreter: needs a Hopper GPU",
)


def no_other(*_, **__):
    raise AssertionError("Hopper's kernel did not run alone")


@needs_hopper
@pytest.mark.parametrize("width", [128, 384, 1024, 4096, 11008])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hoppers_kernel_gives_the_plain_forms_numbers(width, dtype, monkeypatch):
    monkeypatch.setattr(one_bit, "TWO_TILES_FROM", 100)
    monkeypatch.setattr(one_bit, "_by_tritons_kernel", no_other)
    allowed = 1e-6 if dtype == torch.float32 else 1e-2
    for shared in (True, False):
        for outputs in (6, 333):
            check_product(3, width, outputs, shared, dtype, allowed, "cuda")


@needs_hopper
@pytest.mark.parametrize("width", [128, 1024, 4096, 11008])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scales", [1, 3, 4, 8])
def test_hoppers_kernel_mixes_scales_as_the_plain_form_does(scales, dtype, width, monkeypatch):
    monkeypatch.setattr(one_bit, "TWO_TILES_FROM", 100)
    monkeypatch.setattr(one_bit, "FOUR_TILES_FROM", 300)
    monkeypatch.setattr(one_bit, "product", no_other)
    for outputs in (6, 111, 333):
        check_mixture(2, width, outputs, scales, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_mixture_gives_the_plain_forms_numbers(dtype, monkeypatch):
    check_mixture(2, 96, 9, 3, dtype, device_of_kernels(monkeypatch))


def check_mixture(rows, width, outputs, scales, dtype, device):
    shapes = (rows, 1, width), (scales, width), (scales, width), (scales, 2 * outputs)
    x, router, before, after = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    router *= width**-0.5
    packed = one_bit.pack(torch.rand(outputs, width, device=device) < 0.5)
    after = after[:, outputs:]  # a block's rows
    with torch.no_grad():
        y = one_bit.mixed_product(x, packed, router, before, after)
    assert y.dtype == dtype and y.shape == (rows, 1, outputs)
    x, router, before, after = (tensor.double() for tensor in (x, router, before, after))
    before, after = one_bit.mixed_scales_plainly(x, router, before, after)
    want = one_bit.product_plainly(x, packed, before, after)
    usual = (x * before).norm(dim=-1, keepdim=True) * after
    allowed = 1e-6 if dtype == torch.float32 else 1e-2
    assert (y.double() - want).norm() < allowed * usual.norm()


@pytest.mark.parametrize("width", [128, 160, 1024])
@pytest.mark.parametrize("outputs", [6, 333])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ours", [True, False])
def test_the_kernels_norm_is_torchs(ours, dtype, outputs, width, monkeypatch):
    device = device_of_kernels(monkeypatch)
    if not ours:
        monkeypatch.setattr(one_bit, "NORMED", 0)
        monkeypatch.setattr(one_bit, "_norm", None)
    x = torch.randn(2, width, device=device).to(dtype)
    packed = one_bit.pack(torch.rand(outputs, width, device=device) < 0.5)
    before, after = torch.rand(width, device=device), torch.rand(outputs, device=device)
    before, after = before.to(dtype), after.to(dtype) + 1
    with torch.no_grad():
        y = one_bit.product(x, packed, before, after, 0.5)  # an eps that is seen
    want = one_bit.product_plainly(x.double(), packed, before.double(), after.double())
    want = F.layer_norm(want, (outputs,), eps=0.5)
    assert y.dtype == dtype
    assert relative_error(y.double(), want) < (3e-6 if dtype == torch.float32 else 1e-2)


def test_a_norm_under_autocast_keeps_the_products_dtype(monkeypatch):
    norm = F.layer_norm  # whose result a GPU's autocast makes float32
    monkeypatch.setattr(F, "layer_norm", lambda y, *given, **more: norm(y, *given, **more).float())
    x, packed = torch.randn(1, 64), one_bit.pack(torch.rand(32, 64) < 0.5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = one_bit.product(x.bfloat16(), packed, torch.ones(64), torch.ones(32), 1e-5)
    assert y.dtype == torch.bfloat16


def test_without_hoppers_kernel_the_other_runs_and_that_is_said_once(monkeypatch):
    device = device_of_kernels(monkeypatch)

    def fails(*_, **__):
        raise RuntimeError("no such layout\nand more")

    monkeypatch.setattr(one_bit, "_runs_hoppers", True)
    monkeypatch.setattr(one_bit, "on_hopper", lambda x: True)
    monkeypatch.setattr(one_bit, "_by_hoppers_kernel", fails)
    with pytest.warns(UserWarning, match=r"RuntimeError no such layout\).*1\.5 times"):
        check_product(1, 128, 6, True, torch.float32, 1e-6, device)
    check_product(1, 128, 6, True, torch.float32, 1e-6, device)  # a second one would be an error
    monkeypatch.setattr(one_bit, "_runs_hoppers", True)
    with pytest.warns(UserWarning, match=r"RuntimeError no such layout\)"):
        check_mixture(1, 128, 6, 2, torch.float32, device)


def test_hoppers_kernel_stays_where_the_other_form_fails_too(monkeypatch):
    device = device_of_kernels(monkeypatch)

    def fails(*_, **__):
        raise ValueError("sizes differ")

    monkeypatch.setattr(one_bit, "_runs_hoppers", True)
    monkeypatch.setattr(one_bit, "on_hopper", lambda x: True)
    monkeypatch.setattr(one_bit, "_by_hoppers_kernel", fails)
    monkeypatch.setattr(one_bit, "mixed_scales", fails)
    x, scales = torch.ones(1, 128, device=device), torch.ones(2, 128, device=device)
    packed = one_bit.pack(torch.ones(6, 128, dtype=torch.bool, device=device))
    with torch.no_grad(), pytest.raises(ValueError, match="sizes differ"):
        one_bit.mixed_product(x, packed, scales, scales, torch.ones(2, 6, device=device))
    assert one_bit._runs_hoppers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scales", [1, 3, 4])
def test_the_kernel_mixes_scales_as_the_plain_form_does(scales, dtype, monkeypatch):
    device = device_of_kernels(monkeypatch)
    monkeypatch.setattr(one_bit, "MIXED", 16)
    shapes = (2, 1, 40), (scales, 40), (scales, 40), (scales, 23)
    given = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    with torch.no_grad():
        found = one_bit.mixed_scales(*given)
    want = one_bit.mixed_scales_plainly(*(tensor.double() for tensor in given))
    for got, exact in zip(found, want, strict=True):
        assert got.dtype == torch.float32 and got.shape == exact.shape
        assert relative_error(got.double(), exact) < 1e-6


def test_the_kernels_words_follow_a_change_of_the_bytes():
    packed = one_bit.pack(torch.rand(3, 64) < 0.5)
    first = one_bit.words_of(packed)
    assert one_bit.words_of(packed) is first
    packed.bitwise_not_()
    assert torch.equal(one_bit.words_of(packed)[0, :, :3], ~first[0, :, :3])


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "inference"])
def test_the_kernels_words_follow_what_is_loaded(how, monkeypatch):
    """Into a copy of a linear that has computed, and one that counts no versions, too."""
    monkeypatch.setattr(one_bit, "product", lambda x, packed, *_: one_bit.words_of(packed))
    with torch.inference_mode(how == "inference"):
        linear, other = (archzoo.OneBitLinear(64, {"a": 8}, packed=True) for _ in range(2))
    x = torch.randn(1, 64)
    with torch.inference_mode():
        linear(x)
        if how == "deepcopy":
            linear = copy.deepcopy(linear)
        elif how == "pickle":
            linear = pickle.loads(pickle.dumps(linear))
        linear(x)
        linear.load_state_dict(other.state_dict())
        assert torch.equal(linear(x), other(x))


# ---------------------------------------------------------------------------- in a decoder


@pytest.mark.parametrize("how", METHODS, ids=str)
@pytest.mark.parametrize("name", MICRO)
def test_every_family_is_made_binary_and_packed(name, how, tmp_path):
    dense = micro(name, init_std=0.2).double()
    kept = {n: tensor.clone() for n, tensor in dense.state_dict().items()}
    binary = binarise(dense, **how)
    assert all(torch.equal(tensor, kept[n]) for n, tensor in dense.state_dict().items())
    linears = {n: m for n, m in binary.named_modules() if isinstance(m, BinaryLinear)}
    assert linears and not any("router" in n.split(".")[-2:] for n in linears)
    tokens = torch.randint(64, (2, 15))
    binary(tokens).logits.square().sum().backward()
    missing = [n for n, p in binary.named_parameters() if p.grad is None]
    assert not missing  # experts', too
    binary.zero_grad()
    packed = pack(binary).eval()
    archzoo.save_pretrained(tmp_path / "packed", packed)
    loaded, _ = archzoo.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        want, found, again = (net.eval()(tokens).logits for net in (binary, packed, loaded))
    assert relative_error(found, want) < 1e-12
    assert torch.equal(again, found)
    held = load_file(tmp_path / "packed" / "model.safetensors")
    for path, module in linears.items():
        assert f"{path}.weight" not in held
        assert torch.equal(held[f"{path}.signs"], one_bit.pack(module.weight < 0))
        assert held[f"{path}.signs"].dtype == torch.uint8
    assert loaded.parameter_count() == binary.parameter_count()
    archzoo.generate(loaded.float(), [[1, 2, 3]], max_tokens=4, check=True)
    archzoo.generate(binary.float(), [[1, 2, 3]], max_tokens=4, check=True)  # packed on the way


@pytest.mark.parametrize("straight_through", ["tanh", "clip"])
def test_a_mixture_starts_as_onebit_without_its_norm(straight_through):
    dense = micro("retnet_micro", init_std=0.2).double()
    tokens = torch.randint(64, (2, 9))
    one = binarise(dense, "OneBit", straight_through=straight_through)
    mos = binarise(dense, "BinaryMoS", straight_through=straight_through, scales=3)
    assert relative_error(mos(tokens).logits, one(tokens).logits) < 1e-12
    mos(tokens).logits.square().sum().backward()
    linears = [m for m in mos.modules() if isinstance(m, BinaryLinear)]
    assert max(m.router.grad.abs().max() for m in linears) < 1e-10
    assert min(m.input_scales.grad.abs().max() for m in linears) > 1e-6


def test_latent_weights_start_where_they_are_asked_to():
    dense = micro("transformer_micro", init_std=0.2)
    path = "blocks.0.feed_forward.down"
    weight = dense.get_submodule(path).weight
    kept = binarise(dense).get_submodule(path)
    assert torch.equal(kept.weight, weight)
    signs = binarise(dense, latent="signs").get_submodule(path)
    assert torch.equal(signs.weight, 0.01 * weight.sign())
    assert torch.equal(signs.output_scale, kept.output_scale)  # of the dense one's size


@pytest.mark.parametrize("cls", CLASSES)
def test_from_scratch_the_scales_are_those_of_the_drawn_weights(cls):
    net = archzoo.create_model("retnet_micro", linear=cls)
    linear = net.blocks[0].mixer.query_key_value_gate
    after, before = linear._mean_scales()
    for block, name in enumerate(linear.blocks):
        rows = linear.rows(name)
        h, g = svid(linear.weight[rows].detach())
        outer = after[rows, None] * before[block]
        assert relative_error(outer, h[:, None] * g) < 1e-5
    emptied = archzoo.create_model("retnet_micro", linear=cls)
    with torch.device("meta"):
        bare = archzoo.create_model("retnet_micro", linear=cls)
    bare.to_empty(device="cpu")
    for model in (emptied, bare):
        torch.manual_seed(0)
        model.reset_parameters()
    pairs = zip(emptied.state_dict().values(), bare.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("cls", CLASSES)
def test_nothing_of_them_decays(cls):
    net = archzoo.create_model("skywork_micro", linear=cls)
    decayed = {id(p) for p in decay_groups(net, 0.1)[0]["params"]}
    binary = [m for m in net.modules() if isinstance(m, BinaryLinear)]
    assert decayed and not any(id(p) in decayed for m in binary for p in m.parameters())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("how", METHODS, ids=str)
def test_an_adapter_beside_them_changes_what_it_says(how, packed):
    """Of experts, too, which are called where they are more than a matrix."""
    net = binarise(micro("skywork_micro").double().eval(), **how)
    for name, parameter in net.named_parameters():  # apart, so that tokens mix them
        if "_scale" in name:
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)
    net = pack(net) if packed else net
    tokens = torch.randint(64, (2, 9))
    before = net(tokens).logits
    adapted = archzoo.adapt(net, archzoo.LoRA(rank=2, targets=["mixer.value", "experts.down"]))
    assert relative_error(adapted(tokens).logits, before) < 1e-12
    lora = adapted.blocks[0].feed_forward.experts.down.adapter_modules["default"]["down"]
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter)
    changed = adapted(tokens).logits
    assert relative_error(changed, before) > 1e-3
    with adapted.weights_held(), torch.no_grad():  # as whoever decodes has it
        assert relative_error(adapted(tokens).logits, changed) < 1e-12
    with pytest.raises(ValueError, match="cannot be merged"):
        archzoo.merge_adapter(adapted)


def test_experts_called_under_a_transform_give_the_same():
    net = binarise(micro("skywork_micro").double().eval(), "BinaryMoS")
    experts = net.blocks[0].feed_forward.experts
    x, weights = torch.randn(7, experts.dim).double(), torch.rand(7, 2).double()
    indices = torch.stack([torch.randperm(experts.experts)[:2] for _ in range(7)])
    kept = torch.rand(7, 2) < 0.7
    for mask in (None, kept):
        want = experts(x, weights, indices, kept=mask)
        every = torch.stack([experts.down.member(F.silu(g) * u, e) for e in range(experts.experts)
                             for g, u in [experts.gate_up.member(x, e).chunk(2, -1)]])  # fmt: skip
        gates = weights if mask is None else weights * mask
        by_hand = sum(gates[:, [j]] * every[indices[:, j], torch.arange(7)] for j in range(2))
        assert relative_error(want, by_hand) < 1e-12
        mapped = torch.func.vmap(lambda one, m=mask: experts(one, weights, indices, kept=m))(
            x[None]
        )
        assert relative_error(mapped[0], want) < 1e-12


def test_bits_a_weight():
    linear = archzoo.OneBitLinear(64, {"a": 32, "b": 32}).bfloat16()
    assert bits_a_weight(linear) == 1 + 16 * (2 * 64 + 64) / 64**2  # each block has its own g


# ---------------------------------------------------------------------------- the command


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    task = Addition(digits=1)
    net = archzoo.create_model("retnet_micro", vocab_size=task.vocab_size)
    archzoo.save_pretrained("dense", net, task.tokenizer, task.config())


def succeeds(arguments):
    assert main(arguments.split()) == 0


def fails(capsys, arguments, *said):
    capsys.readouterr()
    assert main(arguments.split()) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert all(text in error for text in said), error


@pytest.mark.usefixtures("here")
def test_the_command_makes_and_packs_and_refuses(capsys):
    succeeds("binarise dense --out binary --method BinaryMoS --init_args.scales 2")
    assert "bits a weight" in capsys.readouterr().out
    binary = load("binary").model
    assert binary.config["linear"]["init_args"]["scales"] == 2
    succeeds("binarise binary --out packed --packed --dtype bfloat16")
    succeeds("binarise dense --out at_once --packed --method OneBit")
    assert main(["generate", "packed", "1+2="]) == 0
    tokens = torch.randint(binary.vocab_size, (1, 6))
    with torch.no_grad():
        found = load("packed").model(tokens).logits
        want = load("binary").model.bfloat16()(tokens).logits
    assert relative_error(found.float(), want.float()) < 2e-2
    before = Path("packed/model.safetensors").read_bytes()
    fails(capsys, "binarise dense --out packed --method OneBit", "packed exists")
    fails(capsys, "binarise binary --out new --method OneBit", "binary already", "--packed alone")
    fails(capsys, "binarise binary --out new", "binary already")
    fails(capsys, "binarise packed --out new --packed", "packed already")
    said = "is not exported: its weights are not matrices; export the dense model that it was made"
    for model in ("binary", "packed"):
        fails(capsys, f"export {model} model.py", said, "archzoo.save_pretrained writes it")
        fails(capsys, f"export {model} --to transformers --out new", said)
    fails(capsys, "binarise dense --out new", "is dense", "--method OneBit")
    fails(capsys, "binarise dense --out new --method OneBit --init_args.scales 2", "no argument")
    assert not Path("new").exists() and Path("packed/model.safetensors").read_bytes() == before
    fails(capsys, "binarise binary --out new --packed --latent signs", "--packed alone writes it")
    line = "binarise dense --out new --method OneBit --init_args.norm maybe"
    fails(capsys, line, "new: OneBitLinear: norm='maybe' is not valid: it takes bool")
    assert not Path("new").exists()
    for place in ("binary", "packed"):
        fails(capsys, f"upcycle {place} --out new", "BinaryMoSLinear cannot be upcycled")
    adapted = archzoo.adapt(load("dense").model, archzoo.LoRA(rank=2))
    with pytest.raises(ValueError, match="adapters cannot be made binary"):
        binarise(adapted)


@pytest.mark.usefixtures("here")
def test_models_of_a_run_that_diverged_are_named(capsys):
    found = load("dense")
    with torch.no_grad():
        found.model.blocks[0].feed_forward.down.weight[0, 0] = torch.nan
    archzoo.save_pretrained("diverged", found.model, found.tokenizer, found.task)
    said = "diverged: 1 of the", "numbers of blocks.0.feed_forward.down.weight are not finite"
    steps = "--trainer.max_steps 1 --trainer.accelerator cpu"
    fails(capsys, "binarise diverged --out new --method OneBit", *said)
    fails(capsys, "upcycle diverged new", *said)
    fails(capsys, f"fit --name new --model.weights diverged {steps}", *said)
    teacher = "--model.distil.teacher diverged"
    fails(capsys, f"fit --name new --model.weights dense {teacher} {steps}", *said)
    assert not Path("new").exists() and not Path("runs/new").exists()
    with torch.no_grad():
        found.model.blocks[0].feed_forward.down.weight[0, 0] = 1e6
    archzoo.save_pretrained("large", found.model, found.tokenizer, found.task)
    line = "binarise large --out new --method OneBit --dtype float16"
    fails(capsys, line, "dtype=float16 does not hold all numbers of large: omit it")
    assert not Path("new").exists()


@pytest.mark.usefixtures("here")
def test_a_packed_file_that_is_cut_or_changed_is_refused_in_a_line(capsys):
    succeeds("binarise dense --out packed --packed --method OneBit")
    file = Path("packed/model.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    fails(capsys, "generate packed 1+2=", "truncated or damaged")
    header = 8 + int.from_bytes(whole[:8], "little")
    start = json.loads(whole[8:header])["blocks.0.mixer.output.signs"]["data_offsets"][0]
    flipped = bytearray(whole)
    flipped[header + start] ^= 1
    file.write_bytes(flipped)
    fails(capsys, "generate packed 1+2=", "not those that were written", "digest")
    file.write_bytes(whole)
    config = json.loads(Path("packed/config.json").read_text())
    config["decoder"]["linear"]["init_args"]["packed"] = False
    Path("packed/config.json").write_text(json.dumps(config))
    fails(capsys, "generate packed 1+2=", "do not fit the configuration")
