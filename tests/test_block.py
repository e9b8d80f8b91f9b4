"""Contexts, places and states: what every part is told, and what it hands on."""

import itertools
import weakref
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import pytest
import torch
from families import MICRO, micro
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import archzoo
from archzoo import block
from archzoo.block import KeepsFloat32, Mixer, make_context, of_this_call, once_per_call


def rows(*lists):
    return torch.tensor(lists)


def one_by_one(documents):
    """Positions and starts of rows, token by token: what `make_context` computes at once."""
    positions, starts = torch.zeros_like(documents), torch.zeros_like(documents, dtype=torch.bool)
    for row, numbers in enumerate(documents.tolist()):
        current, position = -1, -1
        for t, number in enumerate(numbers):
            if number < 0:
                continue
            starts[row, t] = number != current
            position = 0 if number != current else position + 1
            current = number
            positions[row, t] = position
    return positions, starts


# ---------------------------------------------------------------------------- contexts


def test_without_documents_a_row_is_one():
    context, cursor = make_context(2, 4)
    assert context.positions.tolist() == [[0, 1, 2, 3]] * 2
    assert context.starts.tolist() == [[True, False, False, False]] * 2
    assert context.valid.all() and not context.packed
    context, cursor = make_context(2, 3, cursor=cursor)
    assert context.positions.tolist() == [[4, 5, 6]] * 2
    assert not context.starts.any() and not context.packed


def test_padding_and_packing():
    documents = rows([-1, -1, 3, 3, 3], [0, 0, 7, 7, -1])
    context, cursor = make_context(2, 5, documents=documents)
    assert context.positions.tolist() == [[0, 0, 0, 1, 2], [0, 1, 0, 1, 0]]
    assert context.starts.tolist() == [
        [False, False, True, False, False],
        [True, False, True, False, False],
    ]
    assert torch.equal(context.valid, documents >= 0) and context.packed
    assert cursor["documents"].tolist() == [3, 7] and cursor["positions"].tolist() == [2, 1]


def test_a_document_continues_where_none_is_named():
    _, cursor = make_context(2, 5, documents=rows([-1, -1, 3, 3, 3], [0, 0, 7, 7, -1]))
    context, cursor = make_context(2, 2, cursor=cursor)
    assert context.documents.tolist() == [[0, 0], [1, 1]]  # counted along the row
    assert context.positions.tolist() == [[3, 4], [2, 3]]
    assert not context.starts.any() and context.packed


def test_a_document_continues_behind_padding():
    """Pieces of different lengths in one batch are padded on the left, the second one too."""
    _, cursor = make_context(2, 3, documents=rows([-1, 0, 0], [0, 0, 0]))
    context, cursor = make_context(2, 3, documents=rows([0, 0, 0], [-1, -1, 0]), cursor=cursor)
    assert context.positions.tolist() == [[2, 3, 4], [0, 0, 3]]
    assert not context.starts.any()
    assert cursor["positions"].tolist() == [4, 3]


def test_a_row_of_padding_moves_nothing():
    _, cursor = make_context(2, 2, documents=rows([5, 5], [6, 6]))
    context, after = make_context(2, 2, documents=rows([-1, -1], [6, 8]), cursor=cursor)
    assert after["documents"].tolist() == [5, 8] and after["positions"].tolist() == [1, 0]
    assert context.starts.tolist() == [[False, False], [False, True]]


def test_runs_decide_what_a_document_is_and_not_their_numbers():
    """A number that comes again is another document, in one segment and in the next."""
    context, cursor = make_context(1, 7, documents=rows([4, 4, 7, 4, 4, -1, 4]))
    assert context.documents.tolist() == [[0, 0, 1, 2, 2, -1, 2]]
    assert context.positions.tolist() == [[0, 1, 0, 0, 1, 0, 2]]
    context, cursor = make_context(1, 4, documents=rows([0, 0, 4, 4]), cursor=cursor)
    assert context.documents.tolist() == [[3, 3, 4, 4]]
    context, _ = make_context(1, 2, cursor=cursor)
    assert context.documents.tolist() == [[4, 4]] and not context.starts.any()


def test_padding_alone_before_the_first_token():
    _, cursor = make_context(1, 2, documents=rows([-1, -1]))
    context, _ = make_context(1, 2, cursor=cursor)
    assert context.documents.tolist() == [[0, 0]]
    assert context.positions.tolist() == [[0, 1]] and context.starts.tolist() == [[True, False]]


@hypothesis.given(st.data())
def test_segments_are_the_whole(data):
    """Cut anywhere, a text has the same positions and starts, whatever its documents are."""
    lengths = st.lists(st.integers(1, 7), max_size=4)
    texts = []
    for _ in range(2):
        left = data.draw(st.integers(0, 5))
        numbers = [n for n, length in enumerate(data.draw(lengths)) for _ in range(length)]
        texts.append([-1] * left + numbers)
    time = max(*map(len, texts), 1)
    documents = torch.tensor([text + [-1] * (time - len(text)) for text in texts])
    whole, end_cursor = make_context(2, time, documents=documents)
    want_positions, want_starts = one_by_one(documents)
    assert torch.equal(whole.positions, want_positions)
    assert torch.equal(whole.starts, want_starts)
    cuts = data.draw(st.lists(st.integers(1, time), max_size=3))
    ends = sorted({0, time, *cuts})
    cursor = block.init_cursor(2)
    for begin, end in itertools.pairwise(ends):
        context, cursor = make_context(
            2, end - begin, documents=documents[:, begin:end], cursor=cursor
        )
        for field in ("documents", "positions", "valid", "starts"):
            assert torch.equal(getattr(context, field), getattr(whole.segment(begin, end), field))
    assert torch.equal(cursor["documents"], end_cursor["documents"])
    assert torch.equal(cursor["positions"], end_cursor["positions"])


@pytest.mark.parametrize("name", ["documents", "examples"])
def test_numbers_of_another_shape_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name} has shape \(2, 3\), the tokens \(2, 4\)"):
        make_context(2, 4, **{name: torch.zeros(2, 3, dtype=torch.int64)})


# ---------------------------------------------------------------------------- states


def example_state():
    return {
        "length": 3,
        "none": None,
        "layers": [{"memory": torch.arange(6.0).view(3, 2)}, {"count": torch.tensor([1, 2, 3])}],
    }


def test_fork_is_a_copy():
    state = example_state()
    copied = block.fork(state)
    state["layers"][0]["memory"].zero_()
    assert copied["layers"][0]["memory"].sum() == 15
    assert copied["length"] == 3 and copied["none"] is None
    assert block.fork(None) is None


def test_reorder_picks_rows_of_every_tensor():
    picked = block.reorder(example_state(), torch.tensor([2, 2, 0, 1]))
    assert picked["layers"][0]["memory"].tolist() == [[4, 5], [4, 5], [0, 1], [2, 3]]
    assert picked["layers"][1]["count"].tolist() == [3, 3, 1, 2]


def test_nbytes_detach_and_to():
    state = example_state()
    assert block.nbytes(state) == 6 * 4 + 3 * 8
    leaf = torch.ones(2, 2, requires_grad=True)
    assert not block.detach([leaf * 2])[0].requires_grad
    assert block.to(state, "meta")["layers"][0]["memory"].device.type == "meta"


def test_select_rows():
    chosen = block.select_rows(
        torch.tensor([True, False]), {"a": torch.ones(2, 3, 1)}, {"a": torch.zeros(2, 3, 1)}
    )
    assert chosen["a"][:, 0, 0].tolist() == [1, 0]


# ---------------------------------------------------------------------------- parts


def test_a_mixer_without_a_step_says_what_it_lacks():
    context, _ = make_context(1, 1)
    with pytest.raises(NotImplementedError, match=r"Mixer needs init_state"):
        Mixer()(torch.zeros(1, 1, 4), None, context)
    with pytest.raises(NotImplementedError, match=r"Mixer needs step"):
        Mixer().step(torch.zeros(1, 1, 4), {}, context)


def test_constants_are_no_inference_tensors():
    """Made under inference_mode first, as a sanity check of validation does, then in training."""
    values = (0.123, 0.456)
    with torch.inference_mode():
        made = block.constant(values, torch.device("cpu"), torch.float32)
    assert made is block.constant(values, torch.device("cpu"), torch.float32)
    weight = torch.ones(2, requires_grad=True)
    (weight * made).sum().backward()
    assert torch.equal(weight.grad, made)


def test_constants_stay_where_a_captured_graph_reads_them():
    cpu = torch.device("cpu")
    first = block.constant((0.25, 0.75), cpu, torch.float32)
    for number in range(1000):  # of many models in one process
        block.constant((float(number), 0.5), cpu, torch.float32)
    assert block.constant((0.25, 0.75), cpu, torch.float32) is first


def test_once_per_call_forgets_with_the_tensor():
    tensor, calls = of_this_call(torch.zeros(2)), []
    for _ in range(2):
        once_per_call(tensor, "a key", lambda: calls.append(1))
    assert len(calls) == 1
    once_per_call(tensor, "another key", lambda: calls.append(1))
    for other in (of_this_call(tensor.clone()), of_this_call(torch.zeros(2)), torch.zeros(2)):
        once_per_call(other, "a key", lambda: calls.append(1))
    assert len(calls) == 5
    assert of_this_call(tensor) is tensor
    kept = once_per_call(tensor, "a tensor", lambda: torch.zeros(1))
    assert once_per_call(tensor, "a tensor", lambda: torch.ones(1)) is kept
    gone = weakref.ref(kept)
    del kept, tensor
    assert gone() is None


def test_head_size_names_numbers_that_divide():
    assert block.head_size(32, 4) == 8
    with pytest.raises(ValueError, match=r"heads=5 does not divide dim=32: take one of 1, 2, 4, 8"):
        block.head_size(32, 5)
    with pytest.raises(ValueError, match="does not divide"):
        block.head_size(32, 0)


def test_keeps_float32():
    class Balanced(KeepsFloat32):
        float32_names = ("coefficient", "rate")

        def __init__(self):
            super().__init__()
            self.register_buffer("coefficient", torch.tensor(1 / 3))
            self.rate = nn.Parameter(torch.tensor(1 / 7))
            self.linear = nn.Linear(2, 2)

    for cast in (lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16)):
        model = nn.Sequential(Balanced())
        cast(model)
        assert model[0].coefficient == torch.tensor(1 / 3)
        assert model[0].rate.dtype == torch.float32 and model[0].rate == torch.tensor(1 / 7)
        assert model[0].linear.weight.dtype in (torch.bfloat16, torch.float16)
        assert isinstance(model[0].rate, nn.Parameter)
        model.double()
        assert model[0].coefficient.dtype == model[0].rate.dtype == torch.float64
        assert nn.Sequential(Balanced()).to("meta")[0].rate.device.type == "meta"


def test_an_aux_of_another_kind_is_told_how_to_be_written():
    part, said = block.FeedForward(), block.Aux({"z": torch.ones(())})
    assert block.check_aux(part, said) is said
    assert block.check_aux(part, {}) == block.Aux()
    for given, words in (
        ({"loss/z": 0}, r"FeedForward returns a dict of \['loss/z'\] .* Aux\(losses={\"NAME\":"),
        (None, "FeedForward returns a NoneType as its aux"),
    ):
        with pytest.raises(TypeError, match=words) as caught:
            block.check_aux(part, given)
        assert "\n" not in str(caught.value)


def test_dropout_and_placement_of_a_block():
    class Double(block.FeedForward):
        def forward(self, x, context):
            return 2 * x, block.Aux(metrics={"seen": x.mean()})

    class Same(Mixer):
        def init_state(self, batch_size, **options):
            return {}

        def step(self, x, state, context):
            return x, state

    norms = (nn.LayerNorm(4, elementwise_affine=False), nn.LayerNorm(4, elementwise_affine=False))
    x, (context, _) = torch.randn(1, 3, 4), make_context(1, 3)
    norm = norms[0]
    pre, _, aux = block.Block(Same(), Double(), norms)(x, None, context)
    h = x + norm(x)
    assert torch.allclose(pre, h + 2 * norm(h)) and set(aux.metrics) == {"seen"}
    post, _, _ = block.Block(Same(), Double(), norms, placement="post")(x, None, context)
    h = norm(x + x)
    assert torch.allclose(post, norm(h + 2 * h))
    injected, _, _ = block.Block(Same(), Double(), norms)(x - 1, None, context, torch.ones_like(x))
    assert torch.allclose(injected, pre, atol=1e-5)
    dropped = block.Block(Same(), Double(), norms, dropout=0.999)
    assert torch.equal(dropped.eval()(x, None, context)[0], pre)
    assert not torch.equal(dropped.train()(x, None, context)[0], pre)


# ---------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("name", MICRO)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_positions_changed_in_place_are_read_again(name, mode):
    """Tables were kept on the caller's own tensor: the next call's logits were up to 100 % off."""
    net = micro(name).double()
    tokens = torch.randint(0, 16, (2, 6))
    with mode():
        counted = torch.arange(6).repeat(2, 1)
        given = counted.clone()
        first = net(tokens, positions=given).logits
        given.mul_(9)
        again = net(tokens, positions=given).logits
        assert torch.equal(again, net(tokens, positions=counted * 9).logits)
        rotates = not isinstance(net.blocks[0].mixer.rotary, archzoo.NoRotation)
        assert torch.equal(again, first) != rotates
    # The same tensor in another mode: what was made in inference mode is of no use to gradients.
    net(tokens, positions=given).logits.sum().backward()


def test_a_state_does_not_hold_the_callers_positions():
    net = archzoo.create_model("transformer_micro").double().eval()
    tokens, following = torch.randint(0, 16, (2, 4)), torch.randint(0, 16, (2, 1))
    found = []
    for changed in (False, True):
        given = torch.arange(4).repeat(2, 1) * 3
        with torch.no_grad():
            _, state, _ = net(tokens, net.init_state(2), positions=given)
            given.mul_(1 + changed)
            found.append(net(following, state).logits)
    assert torch.equal(*found)


def test_a_part_called_alone_reads_the_positions_it_is_given():
    """A rotation of no decoder has no call after which its tables could be forgotten."""
    rotary = archzoo.RotaryEmbedding(8)
    q, positions = torch.randn(1, 3, 2, 8), torch.arange(3)[None].clone()
    first, _ = rotary(q, q, positions, positions)
    positions.add_(5).mul_(2)
    again, _ = rotary(q, q, positions, positions)
    assert not torch.equal(first, again)
    assert torch.equal(again, rotary(q, q, positions.clone(), positions.clone())[0])


def test_contexts_that_share_positions_keep_their_own_documents():
    """Decays were kept beside the positions, whatever the documents."""
    mixer = archzoo.Retention(16, 2).double()
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])
    context, _ = make_context(1, 6, documents=documents)
    other, _ = make_context(1, 6, documents=torch.tensor([[0, 0, 0, 0, 1, 1]]))
    shared = other._replace(positions=context.positions)
    alone = other._replace(positions=context.positions.clone())
    mixer(x, None, context)
    assert torch.equal(mixer(x, None, shared)[0], mixer(x, None, alone)[0])


def test_a_context_serves_inference_and_gradients():
    mixer = archzoo.Retention(16, 2)
    x = torch.randn(1, 6, 16)
    context, _ = make_context(1, 6)
    with torch.inference_mode():
        want, _ = mixer(x, None, context)
    found, _ = mixer(x, None, context)
    found.sum().backward()
    assert torch.equal(found, want)


def test_constants_of_a_transform_or_a_mode_end_with_it():
    """They were kept: a fake tensor, or one of a transform that was over, served later calls."""
    values, cpu = (0.1234, 0.5), torch.device("cpu")

    def use(x):
        return (block.constant(values, cpu, torch.float32) * x).sum()

    x = torch.ones(2)
    torch.func.grad(use)(x)
    with FakeTensorMode() as mode:
        assert isinstance(use(mode.from_tensor(x)), FakeTensor)
    made = block.constant(values, cpu, torch.float32)
    assert type(made) is torch.Tensor
    assert not torch._C._functorch.is_functorch_wrapped_tensor(made)
    with FakeTensorMode() as mode:  # and one that was kept before is none of a mode's
        assert isinstance(use(mode.from_tensor(x)), FakeTensor)


def test_threads_that_share_a_model_share_no_tables():
    """Each call has its own: lengths, positions and modes of one are nothing to another."""
    net = archzoo.create_model("retnet_micro").double().eval()
    texts = [torch.randint(0, 16, (2, 5 + number)) for number in range(4)]

    def read(number):
        positions = torch.arange(texts[number].shape[1]).repeat(2, 1).add_(number)
        with torch.inference_mode() if number % 2 else torch.no_grad():
            return [net(texts[number], positions=positions.add_(1)).logits for _ in range(5)]

    wanted = [read(number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for found, want in zip(pool.map(read, range(4)), wanted, strict=True):
            assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))
