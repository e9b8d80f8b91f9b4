"""Bits per byte: nats of all targets over ln 2 and the bytes of the text that they stand for."""

import csv
import math
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from torch.nn import functional as F

import archzoo
from archzoo.cli import main
from archzoo.tasks import Mixed, Text
from archzoo.tasks.stream import IGNORED
from archzoo.tasks.tokenizers import (
    CharacterTokenizer,
    Tokenizer,
    WordTokenizer,
    from_files,
    learn_bpe,
    learn_unigram,
)
from archzoo.training.log import EvaluationFigures
from archzoo.training.module import LanguageModel

DATA = Path(__file__).parents[1] / "data"
PARTS = ("validation", "test")


@pytest.fixture
def text(tmp_path):
    def make(content, **arguments):
        path = tmp_path / "text.txt"
        path.write_text(content, encoding="utf-8", newline="")
        sizes = {"context_length": 32, "batch_size": 4} | arguments
        return Text(str(path), cache_dir=str(tmp_path / "cache"), **sizes)

    return make


def evaluated(task, net, split="test", **settings):
    """What an evaluation of a decoder logs."""
    model = LanguageModel("retnet_micro")
    task.prepare()
    model.decoder = net
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        **settings,
    )  # fmt: skip
    run = trainer.test if split == "test" else trainer.validate
    found = run(model, task, verbose=False)[0]
    return {name.removeprefix(f"{split}/"): value for name, value in found.items()}


def micro(task, uniform=False):
    torch.manual_seed(0)
    net = archzoo.create_model("retnet_micro", vocab_size=task.vocab_size, init_std=0.3)
    if uniform:
        torch.nn.init.zeros_(net.head.weight)
    return net


def test_a_number_computed_by_hand(text):
    """The test part is `añ漢🙂b`: four targets after the `a`, of 2 + 3 + 4 + 1 bytes.

    A model that takes all 6 characters for equally likely needs 4 log2 6 bits for 10 bytes.
    """
    content = "xañ漢🙂b" * 40 + "añ漢🙂b"
    size = len("añ漢🙂b".encode())
    task = text(content, test_fraction=(size - 0.5) / len(content.encode()), context_length=8)
    found = evaluated(task, micro(task, uniform=True))
    assert (
        task.tokenizer.decode(task.test_dataloader().batch(0)["tokens"][0, :5].tolist())[0] == "a"
    )
    assert found["bits_per_byte"] == pytest.approx(4 * math.log2(6) / 10, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(1.0340, abs=5e-5)
    assert found["perplexity"] == pytest.approx(6, rel=1e-6)


@pytest.mark.parametrize("name", ["shakespeare.txt", "three_kingdoms.txt"])
@pytest.mark.parametrize("split", PARTS)
def test_tokenizers_compare(text, name, split):
    """Models that know nothing need log2 of their vocabulary a token; bytes are the text's own."""
    content = (DATA / name).read_text(encoding="utf-8")[5000:25_000]
    found = {}
    for tokenizer, size in (("characters", None), ("bpe", 500), ("unigram", 2500)):
        task = text(content, tokenizer=tokenizer, vocab_size=size)
        values = evaluated(task, micro(task, uniform=True), split)
        tokens = np.fromfile(task._cache / f"{split}.bin", task._meta["dtype"]).tolist()
        part = task.tokenizer.decode(tokens)
        # Byte-level BPE may begin with a part of a character.
        first = _bytes if tokenizer == "bpe" else lambda own, token: own.decode([token]).encode()
        bytes_of_first = len(first(task.tokenizer, tokens[0]))
        targets, length = len(tokens) - 1, len(part.encode()) - bytes_of_first
        expected = targets * math.log2(task.vocab_size) / length
        assert values["bits_per_byte"] == pytest.approx(expected, rel=1e-6)
        found[tokenizer] = part
    # All of them read the same part of the text.
    assert len(set(found.values())) == 1


@pytest.mark.parametrize("settings", [{}, {"carry_state": True}, {"context_length": 500}])
def test_it_is_the_sum_over_all_targets(text, settings):
    """Of windows and lanes, padded ones too, whatever of it is looked at."""
    content = (DATA / "three_kingdoms.txt").read_text(encoding="utf-8")[:6000]
    task = text(content, tokenizer="bpe", vocab_size=300, **settings)
    net = micro(task).eval()
    for limit in (1.0, 2):
        nats = size = 0.0
        carried = None
        for number, batch in enumerate(task.test_dataloader()):
            if number == limit and limit != 1.0:
                break
            state = None
            if "continues" in batch:
                state = carried if carried is not None else net.init_state(len(batch["tokens"]))
            with torch.no_grad():
                out = net(batch["tokens"], state, documents=batch.get("documents"))
            carried = out.state
            labels = batch["labels"]
            nats += float(
                F.cross_entropy(
                    out.logits.double().flatten(0, 1),
                    labels.flatten(),
                    ignore_index=IGNORED,
                    reduction="sum",
                )
            )
            for row in labels:
                asked = row[row != IGNORED].tolist()
                size += sum(len(_bytes(task.tokenizer, token)) for token in asked)
        found = evaluated(task, net, limit_test_batches=limit)
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def _bytes(tokenizer, token):
    """The bytes of a byte-level token, by the table of the `tokenizers` library."""
    from tokenizers import pre_tokenizers

    word = tokenizer.library.id_to_token(token)
    assert set(word) <= set(pre_tokenizers.ByteLevel.alphabet())
    return word


def test_ranks_add_up():
    losses, labelled = torch.rand(2, 3).double(), torch.tensor([[True, True, False]] * 2)
    lengths = torch.tensor([[1, 2, 50], [3, 4, 50]])
    whole, first, second = (EvaluationFigures(torch.device("cpu")) for _ in range(3))
    whole.add(losses[labelled], labelled, labelled, lengths=lengths)
    for row, figures in enumerate((first, second)):
        figures.add(
            losses[row][labelled[row]],
            labelled[row : row + 1],
            labelled[row : row + 1],
            lengths=lengths[row : row + 1],
        )
    summed = {name: first.sums[name] + second.sums[name] for name in first.sums}
    assert first.means(summed) == whole.means(whole.sums)
    expected = float(losses[labelled].sum()) / math.log(2) / 10
    assert whole.means(whole.sums)["bits_per_byte"] == pytest.approx(expected)
    # Problems stand for no text: there is no such number, asked for or not.
    none = EvaluationFigures(torch.device("cpu"))
    none.add(losses[labelled], labelled, labelled)
    assert "bits_per_byte" not in none.means(none.sums)
    assert "bits_per_byte" not in none.means(none.sums, ("bits_per_byte", "exact_match"))


def strangers():
    """Tokenizers as others make them, which change what they read."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    words = {word: n for n, word in enumerate(["[UNK]", "to", "be", "##e", "or", ",", "élan"])}
    pieces = Library(models.WordPiece(words, unk_token="[UNK]"))
    pieces.normalizer = normalizers.Lowercase()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    spaced = Library(
        models.Unigram([("▁to", -1.0), ("▁be", -2.0), ("▁", -9.0), ("<unk>", -10.0)], 3, False)
    )
    spaced.pre_tokenizer = pre_tokenizers.Metaspace()
    spaced.decoder = decoders.Metaspace()
    return [
        from_files({"tokenizer.json": library.to_str().encode()}) for library in (pieces, spaced)
    ]


@pytest.mark.parametrize(
    "tokenizer",
    [
        CharacterTokenizer("bet or,élan漢TOBE\u2581", special=True),
        learn_bpe(["to be or"], 260),
        learn_unigram(["to be or not to be, that is the question 漢字 " * 20], 300),
        WordTokenizer(["to", "be", "or", "TO", "BE"]),
        *strangers(),
    ],
    ids=["characters", "bpe", "unigram", "words", "word pieces", "metaspace"],
)
def test_the_bytes_of_a_text_s_tokens_are_all_of_the_text(tokenizer):
    texts = ["to be or", "to  be", "TO BE"]
    if not isinstance(tokenizer, WordTokenizer):
        texts += ["bee, élan", "漢to", "to\u2581be"]
    for content in texts:
        tokens = np.asarray(tokenizer.encode(content))
        told = tokenizer.bytes_of(content, tokens)
        assert told.sum() == len(content.encode()) and len(told) == len(tokens)
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)


def test_special_tokens_stand_for_no_bytes():
    characters = CharacterTokenizer("añ漢", special=True)
    assert characters.token_bytes.tolist() == [1, 2, 3, 0, 0]
    from tokenizers import AddedToken

    learned = learn_bpe(["abab abab"], 258)
    learned.library.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    learned.library.add_tokens(["añ"])
    lengths = learned.token_bytes
    assert lengths[learned.library.token_to_id("<|endoftext|>")] == 0
    assert lengths[learned.library.token_to_id("añ")] == 3
    assert (lengths == 1).sum() == 256


class Bare(Tokenizer):
    """A tokenizer of one's own, with nothing but what the base class asks for."""

    vocab_size = 3

    def encode(self, text):
        return ["añ ".index(letter) for letter in text]

    def decode(self, tokens):
        return "".join("añ "[token] for token in tokens)

    def files(self):
        return {}


def test_a_tokenizer_of_ones_own_needs_nothing_more():
    assert Bare().token_bytes.tolist() == [1, 2, 1]
    assert Bare().bytes_of("a ñ", np.array([0, 2, 1])).tolist() == [1, 1, 2]


def test_the_number_is_printed_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"{n:04} bottles: grün\n" for n in range(300)))
    arguments = {
        "model.preset": "retnet_micro", "data": "Text", "data.path": "text.txt",
        "data.context_length": 16, "data.batch_size": 4, "data.cache_dir": "cache",
        "trainer.max_steps": 2, "trainer.val_check_interval": 2, "trainer.accelerator": "cpu",
        "name": "bits",
    }  # fmt: skip
    given = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    assert main(["fit", *given]) == 0
    assert "validation bits/byte " in capsys.readouterr().out
    rows = read("runs/bits/metrics.csv")
    last = [row for row in rows if row["validation/loss"]][-1]
    assert float(last["validation/bits_per_byte"]) > 1
    assert main(["test", "--ckpt_path", "runs/bits", "--data.cache_dir", "cache"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "test perplexity" in shown and "test bits/byte" in shown and "of the test part" in shown
    (row,) = read("runs/bits/test.csv")
    assert row["part"] == "test"
    ratio = math.log(float(row["test/perplexity"])) / float(row["test/bits_per_byte"]) / math.log(2)
    assert ratio == pytest.approx(24 / 23, rel=0.01)  # bytes of a character: ü has two

    # Rows that were written before there were parts are of the validation part.
    old = "step,seconds,test/loss,test/perplexity\n2,0.1,3.0,20.1\n"
    Path("runs/bits/test.csv").write_text(old)
    command = ["test", "--ckpt_path", "runs/bits", "--data.cache_dir", "cache"]
    with pytest.warns(UserWarning, match="read other parts than in the run") as heard:
        assert main([*command, "--data.test_fraction", "0"]) == 0
    assert "of the validation part" in capsys.readouterr().out
    said = [str(warning.message) for warning in heard]
    assert any("test reads the validation part, which also chose" in line for line in said)
    assert [row["part"] for row in read("runs/bits/test.csv")] == ["validation", "validation"]


def read(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_mixed_texts_are_measured_by_their_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{n:04} green bottles\n" for n in range(600)))
    sizes = {"context_length": 64, "batch_size": 8, "lines": 1}
    examples = {"validation_examples": 20, "test_examples": 30}
    task = Mixed(problem_arguments=examples, path=str(path), cache_dir=str(tmp_path), **sizes)
    found = evaluated(task, micro(task, uniform=True))
    assert found["bits_per_byte"] == pytest.approx(math.log2(task.vocab_size), rel=1e-6)
    assert found["exact_match/problems"] >= 0
