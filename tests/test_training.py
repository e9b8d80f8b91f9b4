"""The loss, the optimizer, what is logged, what a checkpoint holds, and what ends a run."""

import csv
import json
import math
import pickle
from pathlib import Path

import lightning
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

import archzoo
from archzoo import block as interface
from archzoo.block import Aux, FeedForward
from archzoo.tasks import Addition, Sorting, Text
from archzoo.tasks.stream import IGNORED
from archzoo.training import optim
from archzoo.training.callbacks import Checkpoints
from archzoo.training.directory import RunDirectory
from archzoo.training.early_stopping import StopEarly
from archzoo.training.files import CheckpointFiles, MetricsFile, replace, write_checkpoint
from archzoo.training.losses import score, total_loss
from archzoo.training.module import LanguageModel
from archzoo.training.optim import decay_groups, learning_rate_schedule, regroup
from archzoo.training.samples import SampleTexts


def addition(**arguments):
    sizes = {"digits": 2, "batch_size": 4, "validation_examples": 10, "test_examples": 6}
    return Addition(**(sizes | arguments))


def make_trainer(directory, *callbacks, **arguments):
    defaults = {
        "accelerator": "cpu",
        "default_root_dir": directory,
        "max_steps": 4,
        "log_every_n_steps": 1,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": MetricsFile(directory / "metrics.csv"),
        "plugins": [CheckpointFiles()],
    }
    return lightning.Trainer(callbacks=[Checkpoints(), *callbacks], **(defaults | arguments))


def log(directory, name="metrics.csv"):
    with open(directory / name) as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------- loss


@pytest.mark.parametrize("chunk", [1, 70, 10**9])
def test_loss_in_chunks_is_the_loss(chunk):
    head, x = nn.Linear(8, 30, bias=False).double(), torch.randn(3, 7, 8).double()
    labels = torch.randint(30, (3, 7))
    labels[0, :4] = labels[2] = IGNORED
    x.requires_grad_()
    expected = F.cross_entropy(
        head(x).transpose(1, 2), labels, ignore_index=IGNORED, reduction="sum"
    )
    wanted = torch.autograd.grad(expected, [x, head.weight])
    loss = total_loss(x, head, labels, chunk)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for got, want in zip(torch.autograd.grad(loss, [x, head.weight]), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    scores = score(x, head, labels, chunk)
    assert scores.losses.sum().item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.equal(scores.predicted, head(x).argmax(-1).flatten())


def test_loss_keeps_only_one_chunk_of_the_logits():
    """In chunks, no tensor that the backward pass keeps is as large as all logits."""
    head, x = nn.Linear(8, 1000, bias=False), torch.randn(2, 32, 8, requires_grad=True)
    labels = torch.randint(1000, (2, 32))
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total_loss(x, head, labels, chunk=8 * 1000)
    assert max(kept) < 8 * 1000 + 1
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total_loss(x, head, labels)
    assert max(kept) >= 64 * 1000


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda labels: None, "the batch holds no labels: give it the token that should follow"),
        (lambda labels: labels.float(), "labels are float32: they are integers, torch.int64"),
        (lambda labels: labels > 0, "labels are bool"),
        (lambda labels: labels[:, :3], r"labels have shape \(2, 3\), the tokens \(2, 6\)"),
        # As many numbers, which went by in silence.
        (lambda labels: labels.t(), r"labels have shape \(6, 2\), the tokens \(2, 6\)"),
        (lambda labels: labels + 9, r"label \d+ is not a token: the model knows 0 .. 8, and -100"),
        (lambda labels: labels - 9, r"label -\d+ is not a token"),
    ],
)
def test_wrong_labels_are_answered_in_one_line(tmp_path, spoil, message):
    tokens = torch.randint(9, (2, 6))
    batch = {"tokens": tokens, "labels": spoil(tokens)}
    model = LanguageModel("transformer_micro", vocab_size=9)
    trainer = make_trainer(tmp_path, max_steps=1)
    loader = torch.utils.data.DataLoader([batch], batch_size=None)
    with pytest.raises(ValueError, match=message):
        trainer.fit(model, loader)
    with pytest.raises(ValueError, match=message):
        trainer.validate(model, loader)


# ---------------------------------------------------------------------------- optimizer


@pytest.mark.parametrize("tie_weights", [False, True])
def test_only_matrices_decay(tie_weights):
    mixer = {"class_path": "Retention", "init_args": {"decay": "learnable"}}
    net = archzoo.create_model("retnet_micro", mixer=mixer, tie_weights=tie_weights)
    matrices, others = decay_groups(net, 0.1)
    assert matrices["weight_decay"] == 0.1 and others["weight_decay"] == 0
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    decayed = {names[id(parameter)] for parameter in matrices["params"]}
    spared = {names[id(parameter)] for parameter in others["params"]}
    assert decayed | spared == set(names.values()) and not decayed & spared
    assert {name for name in decayed if not name.startswith("blocks")} == (
        set() if tie_weights else {"head.weight"}
    )
    assert "embedding.weight" in spared
    assert all("norm" in n or "decay_rate" in n for n in spared - {"embedding.weight"})


@pytest.mark.parametrize(
    ("slot", "parts"),
    [
        ("bias", ["ALiBi", "T5Bias", "KERPLE", "FIRE"]),
        ("embedding", ["LearnedPositions", "AbacusEmbedding", "PositionCoupling"]),
    ],
)
def test_position_tables_do_not_decay(slot, parts):
    for part in parts:
        net = archzoo.create_model("transformer_micro", vocab_size=20, **{slot: part})
        decayed = {id(parameter) for parameter in decay_groups(net, 0.1)[0]["params"]}
        holders = [block.mixer.bias for block in net.blocks] if slot == "bias" else [net.embedding]
        for holder in holders:
            assert not decayed & {id(parameter) for parameter in holder.parameters()}, part
        assert len(decayed) == 9  # four matrices a block, and the head


class Table(FeedForward):
    """A user's part: a table that must not decay, and in it a matrix that must."""

    decays = False

    def __init__(self, dim, width):
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(width, dim))
        self.pair = nn.Linear(dim, dim)
        self.pair.extra = nn.Parameter(torch.zeros(width, dim))
        self.pair.decays = {"weight": True}
        self.matrix = nn.Linear(dim, dim)
        self.matrix.decays = True

    def forward(self, x, context):
        return self.matrix(x) + self.rows[0], {}


def test_a_part_says_what_decays():
    net = archzoo.create_model("transformer_micro", vocab_size=20, feed_forward=Table)
    decayed = {id(parameter) for parameter in decay_groups(net, 0.1)[0]["params"]}
    for block in net.blocks:
        assert id(block.feed_forward.rows) not in decayed
        assert id(block.feed_forward.matrix.weight) in decayed
        assert id(block.feed_forward.pair.weight) in decayed
        assert id(block.feed_forward.pair.extra) not in decayed


@pytest.mark.parametrize("bias", ["T5Bias", "FIRE"])
def test_a_run_from_before_biases_were_spared_resumes(tmp_path, bias, monkeypatch):
    """Each parameter finds its own moments again, in other groups."""

    def groups(decoder, weight_decay, joining=()):
        tables = {id(entry) for entry in decoder.embedding.parameters()}
        matrices, others = optim._split(decoder, tables)
        return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]

    def make():
        return LanguageModel("transformer_micro", bias=bias)

    before = make()
    with monkeypatch.context() as patch:
        patch.setattr("archzoo.training.optimizers.decay_groups", groups)
        trainer = make_trainer(tmp_path, max_steps=2)
        trainer.fit(before, addition())
    (optimizer,) = trainer.optimizers
    names = [name for name, _ in before.net.named_parameters()]
    moments = [optimizer.state[entry]["exp_avg"] for entry in before.net.parameters()]

    after, found = make(), {}

    class Look(lightning.Callback):
        def on_train_start(self, trainer, module):
            (optimizer,) = trainer.optimizers
            for name, parameter in module.net.named_parameters():
                found[name] = optimizer.state[parameter]["exp_avg"].clone()
            found["groups"] = optimizer.param_groups

    resumed = make_trainer(tmp_path / "on", Look(), max_steps=3)
    resumed.fit(after, addition(), ckpt_path=tmp_path / "last.ckpt")
    matrices, others = found.pop("groups")
    assert len(matrices["params"]) == 9 and matrices["weight_decay"] == 0.1
    assert others["weight_decay"] == 0 and resumed.global_step == 3
    for name, moment in zip(names, moments, strict=True):
        assert torch.equal(found[name], moment), name


def test_learning_rate_warms_up_and_falls():
    factor = learning_rate_schedule(10, 110, 0.1)
    assert [factor(step) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert factor(60) == pytest.approx(0.55)
    assert factor(110) == pytest.approx(0.1) and factor(10**6) == pytest.approx(0.1)
    assert learning_rate_schedule(10, math.inf, 0.0)(10**6) == 1.0
    assert learning_rate_schedule(10, 50, 0.0, "constant")(49) == 1.0
    # A run cut short still gets to train at the full rate.
    assert max(map(learning_rate_schedule(100, 20, 0.0), range(20))) == 1.0
    with pytest.raises(ValueError, match="not one of cosine, wsd, constant"):
        learning_rate_schedule(10, 50, 0.0, "linear")


def test_learning_rate_counts_optimizer_steps(tmp_path):
    """With accumulation the schedule ends with the run, not at a third of it."""
    model = LanguageModel("retnet_micro", warmup_steps=2, learning_rate=1.0)
    make_trainer(tmp_path, max_steps=6, accumulate_grad_batches=3).fit(model, addition())
    rates = [float(row["train/learning_rate"]) for row in log(tmp_path) if row["train/loss"]]
    factor = learning_rate_schedule(2, 6, 0.0)
    assert rates == pytest.approx([factor(step) for step in range(6)])


# ---------------------------------------------------------------------------- what is trained


def test_decoder_is_made_for_the_task():
    model, task = LanguageModel("retnet_micro", mixer="Attention"), addition()
    trainer = lightning.Trainer(max_steps=0, logger=False, accelerator="cpu", barebones=True)
    trainer.fit(model, task)
    assert model.net.vocab_size == task.vocab_size
    assert model.net.context_length == task.context_length
    assert type(model.net.blocks[0].mixer).__name__ == "Attention"


def test_without_a_task_the_vocabulary_must_be_given():
    assert LanguageModel("retnet_micro", vocab_size=9).net.vocab_size == 9
    with pytest.raises(RuntimeError, match="setup"):
        _ = LanguageModel("retnet_micro").net
    with pytest.raises(ValueError, match="vocab_size"):
        LanguageModel("retnet_micro").setup("fit")


def test_says_whether_a_swap_is_fair():
    assert LanguageModel("retnet_micro", vocab_size=64).about() == (
        "retnet_micro: 29,856 parameters"
    )
    plain = LanguageModel("retnet_micro", vocab_size=64, mixer="Attention").about()
    assert "another mixer" in plain and "29,856" in plain and plain.endswith("NOT matched")
    model = LanguageModel("retnet_micro", "parameters", vocab_size=64, mixer="Attention")
    assert model.about().endswith(": matched")
    count = model.net.parameter_count()
    assert f"{count:,} parameters" in model.about() and abs(count / 29_856 - 1) < 0.01


def test_gradient_is_that_of_the_labelled_tokens(tmp_path):
    model, batch = LanguageModel("retnet_micro"), addition().train_dataloader().batch(0)
    trainer = make_trainer(tmp_path, max_steps=0)
    trainer.fit(model, addition())
    loss = model.training_step(batch, 0)
    logits = model.net(batch["tokens"], documents=batch["documents"]).logits
    asked = batch["labels"] != IGNORED
    torch.testing.assert_close(loss, F.cross_entropy(logits[asked], batch["labels"][asked]))


class Bookkeeper(FeedForward):
    """A feed-forward with every kind of aux, which remembers what `after_step` gave it."""

    def __init__(self, dim, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.given = []

    def forward(self, x, context):
        aux = Aux(
            losses={"pull": 0.5 * self.weight.sum()},
            metrics={"tokens": context.valid.sum().float()},
            sums={"rows": torch.tensor(float(x.shape[0]))},
        )
        return x * self.weight, aux

    def after_step(self, sums):
        self.given.append({name: value.item() for name, value in sums.items()})


def test_aux_goes_where_its_kind_says(tmp_path):
    task = addition(batch_size=5)
    model = LanguageModel("retnet_micro", feed_forward=Bookkeeper, weight_decay=0.0)
    make_trainer(tmp_path, max_steps=2, accumulate_grad_batches=3).fit(model, task)
    for block in model.net.blocks:
        assert block.feed_forward.given == [{"rows": 15.0}] * 2  # once a step, summed over it
    rows = [row for row in log(tmp_path) if row["train/loss"]]
    valid = [(task.train_dataloader().batch(n)["documents"] >= 0).sum() for n in range(6)]
    for step, row in enumerate(rows):
        mean = sum(valid[3 * step : 3 * step + 3]) / 3
        assert float(row["train/metric/tokens/0"]) == pytest.approx(mean.item())
        assert {name for name in row if name[-2:] in ("/0", "/1")} == {
            f"train/{name}/{layer}" for name in ("loss/pull", "metric/tokens") for layer in (0, 1)
        }
    assert float(rows[0]["train/loss/pull/1"]) == pytest.approx(0.5 * 32)
    # The loss that is logged is the model's own; the pull is in the gradient.
    loss = model.training_step(task.train_dataloader().batch(0), 0)
    (gradient,) = torch.autograd.grad(loss, [model.net.blocks[0].feed_forward.weight])
    pulled = gradient.clone()
    Bookkeeper.forward, forward = (
        lambda self, x, context: (x * self.weight, {}),
        Bookkeeper.forward,
    )
    try:
        loss = model.training_step(task.train_dataloader().batch(0), 0)
    finally:
        Bookkeeper.forward = forward
    (gradient,) = torch.autograd.grad(loss, [model.net.blocks[0].feed_forward.weight])
    torch.testing.assert_close(pulled, gradient + 0.5)


# ---------------------------------------------------------------------------- carried state


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{n} men went to mow, went to mow a meadow; " for n in range(80)))

    def make(**arguments):
        sizes = {"context_length": 8, "batch_size": 3, "carry_state": True}
        return Text(str(path), cache_dir=str(tmp_path / "cache"), **(sizes | arguments))

    return make


def test_state_goes_from_window_to_window(text):
    """Carried through windows, the loss is that of reading each lane at once."""
    task = text()
    task.prepare()
    model = LanguageModel("retnet_micro", vocab_size=task.vocab_size).double()
    loader = task.train_dataloader()
    batches = [loader.batch(number) for number in range(4)]
    windows = [model._hidden(batch, "train")[0] for batch in batches]
    whole = model.net.hidden(torch.cat([batch["tokens"] for batch in batches], dim=1))[0]
    torch.testing.assert_close(torch.cat(windows, dim=1), whole, rtol=1e-10, atol=1e-12)
    # Gradients stop where a window begins.
    windows[1].sum().backward()
    assert not any(
        leaf.requires_grad
        for leaf in torch.utils._pytree.tree_leaves(model._carried["train"])
        if isinstance(leaf, torch.Tensor)
    )


def test_state_starts_anew_where_rows_do_not_continue(text):
    task = text()
    task.prepare()
    model = LanguageModel("retnet_micro", vocab_size=task.vocab_size).double()
    first, second = (task.train_dataloader().batch(number) for number in range(2))
    model._hidden(first, "train")
    second["continues"] = torch.tensor([True, False, True])
    x, _ = model._hidden(second, "train")
    alone = model.net.hidden(second["tokens"])[0]
    torch.testing.assert_close(x[1], alone[1], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(x[0], alone[0])


def test_validation_reads_the_text_in_one_piece(tmp_path, text):
    task = text()
    model = LanguageModel("retnet_micro")
    trainer = make_trainer(tmp_path, max_steps=3, val_check_interval=3)
    trainer.fit(model, task)
    loader = task.val_dataloader()
    batches = [loader.batch(number) for number in range(len(loader))]
    tokens, labels = (torch.cat([b[n] for b in batches], dim=1) for n in ("tokens", "labels"))
    model.eval()
    with torch.no_grad():
        logits = model.net(tokens).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    (row,) = [row for row in log(tmp_path) if row["validation/loss"]]
    assert float(row["validation/loss"]) == pytest.approx(expected.item(), rel=1e-5)
    assert float(row["validation/perplexity"]) == pytest.approx(expected.exp().item(), rel=1e-5)


def test_a_growing_state_is_not_carried(text, tmp_path):
    model = LanguageModel("transformer_micro")
    with pytest.raises(ValueError, match="grows with the text"):
        make_trainer(tmp_path).fit(model, text())


# ---------------------------------------------------------------------------- the log


def test_log_has_a_row_for_everything(tmp_path):
    task, model = addition(), LanguageModel("retnet_micro")
    trainer = make_trainer(
        tmp_path, max_steps=8, log_every_n_steps=2, gradient_clip_val=1.0, val_check_interval=4
    )
    trainer.fit(model, task)
    rows = log(tmp_path)
    trained = [row for row in rows if row["train/loss"]]
    assert [int(row["step"]) for row in trained] == [2, 4, 6, 8]
    for row in trained:
        assert float(row["train/tokens_per_second"]) > 0
        assert 50 < float(row["train/process_memory_mb"]) < 1e5
        assert float(row["train/gradient_norm"]) > 0
    validated = [row for row in rows if row["validation/loss"]]
    assert [int(row["step"]) for row in validated] == [4, 8]
    assert validated[0]["validation/exact_match"] and "validation/perplexity" not in rows[0]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)


def test_logged_loss_is_the_mean_over_tokens_since_the_last_row(tmp_path):
    """With a learning rate that changes nothing, every batch's loss can be had afterwards."""
    task, model = addition(), LanguageModel("retnet_micro", learning_rate=1e-30)
    make_trainer(tmp_path, max_steps=4, log_every_n_steps=2).fit(model, task)
    rows = [row for row in log(tmp_path) if row["train/loss"]]
    for row, numbers in zip(rows, [(0, 1), (2, 3)], strict=True):
        total = count = 0
        for number in numbers:
            batch = task.train_dataloader().batch(number)
            x, _ = model._hidden(batch, "train")
            total += total_loss(x, model.net.head, batch["labels"]).item()
            count += (batch["labels"] != IGNORED).sum().item()
        assert float(row["train/loss"]) == pytest.approx(total / count, rel=1e-6)


def test_scalars_that_come_and_go_are_averaged_over_when_they_came():
    model = LanguageModel("retnet_micro")
    one, two, three = (torch.tensor(float(n)) for n in (1, 2, 3))
    for scalars in ({"a": one, "b": two}, {"a": three}, {}, {"b": three, "a": two}, {"a": one}):
        model.figures.accumulate(scalars)
    found = {name: entry.tolist() for name, entry in model.figures.sums().items()}
    assert found == {"a": [7.0, 4.0], "b": [5.0, 2.0]}


def test_evaluation_counts_each_token_and_row_once(tmp_path):
    """Batches of 4, 4 and 2 rows: the mean over all is not the mean of their means."""
    task, model = addition(), LanguageModel("retnet_micro")
    trainer = make_trainer(tmp_path, max_steps=60, val_check_interval=60)
    trainer.fit(model, task)
    (result,) = trainer.validate(model, task, verbose=False)
    loader, rows, hits, losses = task.val_dataloader(), 0, 0, []
    model.eval()
    with torch.no_grad():
        for number in range(len(loader)):
            batch = loader.batch(number)
            logits = model.net(batch["tokens"], documents=batch["documents"]).logits
            asked = batch["labels"] != IGNORED
            losses.append(F.cross_entropy(logits[asked], batch["labels"][asked], reduction="none"))
            hits += ((logits.argmax(-1) == batch["labels"]) | ~asked).all(1).sum().item()
            rows += len(logits)
    assert rows == 10
    assert result["validation/loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert result["validation/exact_match"] == pytest.approx(hits / rows)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed", "32-true"])
def test_sums_are_exact_whatever_the_precision(tmp_path, precision):
    """Losses of tokens are as coarse as the model makes them, their sum and number are not."""
    task = addition(digits=3, batch_size=64, validation_examples=600)
    seen = []

    class Still(LanguageModel):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    class Look(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append({name: value.clone() for name, value in module.figures.sums().items()})

    trainer = make_trainer(
        tmp_path, Look(), max_steps=3, log_every_n_steps=9, val_check_interval=3,
        precision=precision, gradient_clip_val=1.0,
    )  # fmt: skip
    model = Still("skywork_micro")
    trainer.fit(model, task)
    (result,) = trainer.validate(model, task, verbose=False)

    def losses(batch):
        with trainer.precision_plugin.forward_context(), torch.no_grad():
            x = model.net.hidden(batch["tokens"], documents=batch["documents"])[0]
            found, predicted = score(x, model.net.head, batch["labels"])
        asked = batch["labels"] != IGNORED
        right = (predicted.view_as(asked) == batch["labels"]) | ~asked
        return found.double()[asked.flatten()], right.all(dim=1)

    model.eval()
    loader = task.val_dataloader()
    found = [losses(loader.batch(number)) for number in range(len(loader))]
    wanted = torch.cat([loss for loss, _ in found]).mean().item()
    logged = [float(row["validation/loss"]) for row in log(tmp_path) if row["validation/loss"]]
    assert logged[0] == pytest.approx(wanted, rel=1e-9)
    assert result["validation/loss"] == pytest.approx(wanted, rel=1e-6)  # Lightning's own float32
    assert result["validation/exact_match"] == torch.cat([r for _, r in found]).float().mean()

    batches = [task.train_dataloader().batch(number) for number in range(3)]
    model.train()
    total, count = seen[-1]["loss"].tolist()
    assert count == sum((batch["labels"] != IGNORED).sum().item() for batch in batches)
    wanted = sum(losses(batch)[0].sum().item() for batch in batches)
    assert total == pytest.approx(wanted, rel=1e-6)  # a batch's is summed in float32
    tokens = seen[-1]["tokens"]
    assert tokens == sum((batch["documents"] >= 0).sum() for batch in batches)
    assert tokens.dtype == torch.int64
    for name, entry in seen[-1].items():
        if name != "tokens":
            assert entry.dtype == torch.float64, name
    assert tokens > 256, "more than bfloat16 counts"
    assert model._gradient_norm.dtype == torch.float32


def test_log_file_resumes_after_a_kill(tmp_path):
    file = tmp_path / "metrics.csv"
    logger = MetricsFile(file)
    for step in (1, 2, 3):
        logger.log_metrics({"a": step}, step)
    with open(file, "a") as handle:
        handle.write("4,0.1")  # cut short
    again = MetricsFile(file)
    again.begin(2)
    again.log_metrics({"a": 30, "b": 1.5}, 3)
    assert [(row["step"], row["a"], row["b"]) for row in log(tmp_path)] == [
        ("1", "1", ""),
        ("2", "2", ""),
        ("3", "30", "1.5"),
    ]


def test_training_leaves_the_loop_cheap(tmp_path, monkeypatch):
    """Per step nothing is asked of a device, nothing logged, no metric updated."""
    asked = []
    model = LanguageModel("retnet_micro")
    trainer = make_trainer(tmp_path, max_steps=10, log_every_n_steps=10, val_check_interval=10**6)
    monkeypatch.setattr(LanguageModel, "_log", lambda self, row, step: asked.append(step))
    monkeypatch.setattr(LanguageModel, "log", lambda *a, **k: asked.append("log"))
    trainer.fit(model, addition())
    assert asked == [10]


# ---------------------------------------------------------------------------- checkpoints


@pytest.fixture
def trained(tmp_path):
    mixer = archzoo.Retention
    model = LanguageModel("retnet_micro", mixer=mixer, rotary=archzoo.NoRotation)
    make_trainer(tmp_path, max_steps=4).fit(model, addition())
    return model, tmp_path / "last.ckpt"


def test_checkpoint_is_plain_data(trained):
    _, path = trained
    checkpoint = torch.load(path, weights_only=True)  # refuses all but tensors and plain data
    arguments = checkpoint["hyper_parameters"]
    assert json.loads(json.dumps(arguments)) == arguments
    assert arguments["mixer"] == {"class_path": "Retention", "init_args": {}}
    assert json.loads(json.dumps(checkpoint["task"])) == addition().config()


def test_checkpoint_brings_the_model_back(trained):
    model, path = trained
    again = LanguageModel.load_from_checkpoint(path, map_location="cpu")
    assert again.net.config == model.net.config and again.learning_rate == model.learning_rate
    tokens = torch.randint(14, (2, 9))
    assert torch.equal(again.net.eval()(tokens).logits, model.net.eval()(tokens).logits)
    net, tokenizer = archzoo.from_pretrained(path)
    assert torch.equal(net(tokens).logits, model.net(tokens).logits)
    assert tokenizer.decode([1, 20, 2]) == "1+2"


def test_checkpoint_of_another_model_is_refused(trained, tmp_path):
    _, path = trained
    other = LanguageModel("retnet_micro", rotary=archzoo.NoRotation, depth=3)
    with pytest.raises(ValueError, match="another model: depth is 2 in it and 3 here"):
        make_trainer(tmp_path / "other").fit(other, addition(), ckpt_path=path)


def test_checkpoint_of_the_same_model_said_differently_is_taken(trained, tmp_path):
    """Defaults written out are the same part, and dropout does not make another model."""
    _, path = trained
    mixer = {"class_path": "Retention", "init_args": {"value_factor": 2.0, "gate": True}}
    same = LanguageModel("retnet_micro", mixer=mixer, rotary="NoRotation", dropout=0.1)
    make_trainer(tmp_path / "same", max_steps=5).fit(same, addition(), ckpt_path=path)
    half = {"class_path": "Retention", "init_args": {"value_factor": 1.0}}
    other = LanguageModel("retnet_micro", mixer=half, rotary="NoRotation")
    with pytest.raises(ValueError, match="another model: mixer"):
        make_trainer(tmp_path / "other").fit(other, addition(), ckpt_path=path)


def test_checkpoint_of_another_vocabulary_is_refused(text, tmp_path):
    """As many characters, but others: shapes agree, and nothing would mean the same."""
    first = text(carry_state=False)
    make_trainer(tmp_path).fit(LanguageModel("retnet_micro"), first)
    (tmp_path / "other.txt").write_text((tmp_path / "text.txt").read_text().replace("m", "x"))
    other = Text(str(tmp_path / "other.txt"), context_length=8, cache_dir=str(tmp_path / "cache"))
    other.prepare()
    assert other.vocab_size == first.vocab_size
    with pytest.raises(ValueError, match="another vocabulary"):
        make_trainer(tmp_path / "new").fit(
            LanguageModel("retnet_micro"), other, ckpt_path=tmp_path / "last.ckpt"
        )


def test_model_of_a_smaller_vocabulary_is_refused(tmp_path):
    model = LanguageModel("retnet_micro", vocab_size=10)
    with pytest.raises(ValueError, match="knows 10 tokens and the task has 96"):
        make_trainer(tmp_path).fit(model, addition())


class Bomb:
    def __reduce__(self):
        return (print, ("boom",))


def test_code_in_a_checkpoint_is_refused(trained, tmp_path, capsys):
    _, path = trained
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | {"extra": Bomb()}, tmp_path / "bomb.ckpt")
    model = LanguageModel("retnet_micro", rotary=archzoo.NoRotation)
    with pytest.raises(ValueError, match="holds code"):
        make_trainer(tmp_path).fit(model, addition(), ckpt_path=tmp_path / "bomb.ckpt")
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="refused"):
        make_trainer(tmp_path).fit(model, addition(), ckpt_path=tmp_path / "bare.ckpt")
    assert "boom" not in capsys.readouterr().out


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    write_checkpoint({"step": 1}, path)

    def fails(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("archzoo.training.files.os.fsync", fails)
    with pytest.raises(OSError, match=r"last\.ckpt could not be written: No space left"):
        write_checkpoint({"step": 2}, path)
    assert torch.load(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_takes_the_place_of_a_directory_whole_or_not_at_all(tmp_path, monkeypatch):
    """Of a checkpoint that DeepSpeed wrote, which the run was resumed from."""
    path = tmp_path / "last.ckpt"
    path.mkdir()
    (path / "whole.ckpt").write_text("weights")

    def fails(*arguments):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr("archzoo.training.files.os.replace", fails)
        with pytest.raises(OSError, match=r"last\.ckpt could not be written: Input/output"):
            write_checkpoint({"step": 2}, path)
    assert (path / "whole.ckpt").read_text() == "weights"
    write_checkpoint({"step": 2}, path)
    assert torch.load(path) == {"step": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_that_was_half_replaced_is_not_trained_over(tmp_path, monkeypatch):
    """A kill leaves a directory aside, with nothing in its place; the next run brings it back."""
    path, new = tmp_path / "last.ckpt", tmp_path / "last.ckpt.new"
    for place, content in ((path, "old"), (new, "new")):
        place.mkdir()
        (place / "whole.ckpt").write_text(content)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr("archzoo.training.files.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            replace(new, path)
    assert not path.exists()
    with pytest.raises(ValueError, match=r"killed while it replaced last\.ckpt.*repeat"):
        RunDirectory(tmp_path, resumes=False)
    assert (path / "whole.ckpt").read_text() == "old"
    RunDirectory(tmp_path, resumes=True).lock.release()
    replace(new, path)
    assert (path / "whole.ckpt").read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_best_is_kept_by_its_metric(tmp_path):
    """Validation losses are made up; the checkpoint of the best one stays."""
    scripted = iter([3.0, 1.0, 2.0])

    class Scripted(LanguageModel):
        def _end_evaluation(self, split):
            self.log_dict({"validation/loss": next(scripted)}, logger=False)

    trainer = make_trainer(tmp_path, max_steps=6, val_check_interval=2)
    trainer.fit(Scripted("retnet_micro"), addition())
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 4
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["global_step"] == 6 and last["callbacks"]["Checkpoints"]["best"] == 1.0


def test_unknown_monitor_is_named(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, Checkpoints)]
    trainer.callbacks.append(Checkpoints(monitor="validation/exactmatch"))
    with pytest.raises(ValueError, match=r"no metric validation/exactmatch; .*exact_match"):
        trainer.fit(LanguageModel("retnet_micro"), addition())


# ---------------------------------------------------------------------------- non-finite numbers


class Spoil(lightning.Callback):
    """Makes the loss or the weights nan at a step (counted from 1)."""

    def __init__(self, step, where):
        self.step, self.where = step, where

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step + 1 == self.step and self.where == "loss":
            with torch.no_grad():
                pl_module.net.head.weight.fill_(float("nan"))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step + 1 == self.step and self.where == "weights":
            for parameter in pl_module.parameters():
                parameter.grad.fill_(float("inf"))


@pytest.mark.parametrize(
    ("where", "message"),
    [("loss", "the loss is nan at step 3"), ("weights", "step 3 made weights that are not finite")],
)
def test_nan_ends_the_run_and_spares_the_checkpoint(tmp_path, where, message):
    trainer = make_trainer(tmp_path, Spoil(3, where), max_steps=6)
    for callback in trainer.callbacks:
        if isinstance(callback, Checkpoints):
            callback.every_n_steps = 1
    with pytest.raises(FloatingPointError, match=message):
        trainer.fit(LanguageModel("retnet_micro"), addition())
    good = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert good["global_step"] == 2
    assert all(value.isfinite().all() for value in good["state_dict"].values())


def test_nan_on_a_device_is_dated_to_its_step(tmp_path):
    """Where losses are looked at seldom, the first bad one is still named by its step."""
    model = LanguageModel("retnet_micro")
    make_trainer(tmp_path, max_steps=1).fit(model, addition())
    losses = [1.0, 2.0, math.inf, math.nan]
    model._unchecked = [(7 + n, torch.tensor(loss)) for n, loss in enumerate(losses)]
    with pytest.raises(FloatingPointError, match="the loss is inf at step 9"):
        model.check_losses()
    model.check_losses()  # what was looked at is done with


def deferred(monkeypatch):
    """Rows of the log as on a GPU: written once the step after has been enqueued."""
    monkeypatch.setattr(LanguageModel, "defers_rows", property(lambda _: True))


def rows_of(path):
    """A log without what is another in every run."""
    with open(path / "metrics.csv") as file:
        return [
            {n: v for n, v in row.items() if not n.endswith(("seconds", "per_second", "memory_mb"))}
            for row in csv.DictReader(file)
        ]


def fit_rows(directory, steps=12, **options):
    """Twelve steps, a row every three and validation every four; the rows of the log."""
    trainer = make_trainer(
        directory, max_steps=steps, log_every_n_steps=3, val_check_interval=4, gradient_clip_val=1.0
    )
    model = LanguageModel("retnet_micro", schedule="constant", warmup_steps=0)
    torch.manual_seed(0)
    trainer.fit(model, addition(), **options)
    return rows_of(directory)


def test_rows_that_come_a_step_later_are_the_same(tmp_path, monkeypatch):
    at_once = fit_rows(tmp_path / "at_once")
    assert [int(row["step"]) for row in at_once] == [3, 4, 6, 8, 9, 12, 12]
    deferred(monkeypatch)
    assert fit_rows(tmp_path / "later") == at_once


@pytest.mark.parametrize("step", [6, 7])  # that of a row, which is underway, and the next
def test_a_row_that_was_underway_is_in_the_checkpoint(tmp_path, monkeypatch, step):
    deferred(monkeypatch)
    whole = fit_rows(tmp_path / "whole")
    fit_rows(tmp_path / "cut", steps=step)
    resumed = fit_rows(tmp_path / "cut", ckpt_path=tmp_path / "cut" / "last.ckpt")
    assert [row for row in resumed if row["train/loss"]] == [
        row for row in whole if row["train/loss"]
    ]


def test_nan_is_dated_where_rows_come_later(tmp_path, monkeypatch):
    deferred(monkeypatch)
    trainer = make_trainer(
        tmp_path, Spoil(3, "loss"), max_steps=12, log_every_n_steps=4, val_check_interval=12
    )
    monkeypatch.setattr(LanguageModel, "_watch", watch_as_a_gpu_does)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 3"):
        trainer.fit(LanguageModel("retnet_micro"), addition())
    assert trainer.global_step == 4  # in the step after that of the row


def watch_as_a_gpu_does(self, loss):
    self._unchecked.append((self.trainer.global_step + 1, loss))


def test_an_error_writes_the_row_that_was_underway(tmp_path, monkeypatch):
    deferred(monkeypatch)

    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                raise RuntimeError("stop")

    trainer = make_trainer(tmp_path, Stop(), max_steps=6, log_every_n_steps=3)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(LanguageModel("retnet_micro"), addition())
    assert [int(row["step"]) for row in rows_of(tmp_path)] == [3]


def test_predictions_are_text(tmp_path):
    task, model = addition(), LanguageModel("retnet_micro")
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(model, task)
    rows = [row for batch in trainer.predict(model, task) for row in batch]
    assert len(rows) == 6
    for row, (a, b) in zip(rows, task.pairs("test", 6), strict=True):
        assert task.reverse and row["text"] == f"{a}+{b}=" and row["asked"] == f"{a + b}"
        assert isinstance(row["predicted"], str)


def test_state_helpers_of_the_interface_are_used_as_meant():
    """`_state` consumes what it carried: nothing keeps an old state alive."""
    model = LanguageModel("retnet_micro", vocab_size=9)
    model._carried["train"] = model.net.init_state(2)
    carried = model._carried["train"]
    state = model._state(torch.tensor([True, True]), "train")
    assert "train" not in model._carried
    assert interface.nbytes(state) == interface.nbytes(carried)


@pytest.mark.parametrize("name", archzoo.list_models("*_micro"))
def test_every_family_trains_and_comes_back(tmp_path, name):
    model, task = LanguageModel(name, learning_rate=1e-2, warmup_steps=1), addition()
    make_trainer(tmp_path, max_steps=12, val_check_interval=12).fit(model, task)
    rows = [float(row["train/loss"]) for row in log(tmp_path) if row["train/loss"]]
    assert rows[-1] < rows[0]
    again = LanguageModel.load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu")
    batch = task.val_dataloader().batch(0)
    nets = [module.net.eval() for module in (model, again)]
    logits = [net(batch["tokens"], documents=batch["documents"]).logits for net in nets]
    assert torch.equal(*logits)
    shorter = make_trainer(tmp_path, max_steps=13)
    shorter.fit(LanguageModel(name, learning_rate=1e-2), task, ckpt_path=tmp_path / "last.ckpt")
    assert shorter.global_step == 13


def test_an_optimizers_state_may_number_parameters_otherwise():
    """As FSDP2's does, which numbers them in the model's order and not group by group."""
    net = archzoo.create_model("transformer_micro")
    sizes = [len(group["params"]) for group in decay_groups(net, 0.1)]
    theirs = torch.randperm(sum(sizes)).tolist()  # of the parameters in the order of the groups
    state = {
        "state": {number: {"place": place} for place, number in enumerate(theirs)},
        "param_groups": [{"params": theirs[: sizes[0]]}, {"params": theirs[sizes[0] :]}],
    }
    found = regroup(state, net)
    numbers = [number for group in found["param_groups"] for number in group["params"]]
    assert [found["state"][number]["place"] for number in numbers] == list(range(sum(sizes)))


def test_weights_that_the_strategy_has_loaded_are_not_looked_for(tmp_path):
    """FSDP2 takes them out of the checkpoint before the module sees it."""
    make_trainer(tmp_path, max_steps=1).fit(LanguageModel("retnet_micro"), addition())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del checkpoint["state_dict"]
    model = LanguageModel("retnet_micro", vocab_size=addition().vocab_size)
    with pytest.raises(ValueError, match="the checkpoint holds no weights"):
        model.on_load_checkpoint(checkpoint)
    model.sharded = True
    model.on_load_checkpoint(checkpoint)


def test_an_optimizers_state_lies_as_the_weights_do() -> None:
    """A fused step takes weights and state as they lie, and both lay otherwise before."""
    path = Path(__file__).parent / "checkpoints" / "retnet_micro.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    net, _ = archzoo.from_pretrained(path)
    (old,) = checkpoint["optimizer_states"]
    assert any(not x.is_contiguous() for entry in old["state"].values() for x in entry.values())
    groups = decay_groups(net, 0.1)
    found = []
    for fused in (False, True):
        weights = {id(p): p.detach().clone().requires_grad_() for p in net.parameters()}
        mine = [g | {"params": [weights[id(p)] for p in g["params"]]} for g in groups]
        optimizer = torch.optim.AdamW(mine, fused=fused)
        optimizer.load_state_dict(regroup(old, net))
        torch.manual_seed(0)
        for weight in weights.values():
            assert weight.is_contiguous()
            weight.grad = torch.randn_like(weight)
        optimizer.step()
        found.append(parameters_to_vector(weights.values()))
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_samples_of_a_second_run_ask_what_its_own_task_asks(tmp_path):
    """One callback, two runs in one process."""
    sampling, prompts = SampleTexts(2), []
    for name, task in (("sums", addition()), ("orders", Sorting(digits=2, batch_size=4))):
        module = LanguageModel(preset="transformer_micro", dim=16, heads=2, depth=1)
        make_trainer(tmp_path / name, sampling, max_steps=2).fit(module, task)
        rows = (tmp_path / name / "samples.jsonl").read_text().splitlines()
        prompts.append([json.loads(row)["prompt"] for row in rows])
    assert all("+" in prompt for prompt in prompts[0])
    assert prompts[1] and not any("+" in prompt for prompt in prompts[1])


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_callbacks_of_a_second_run_know_nothing_of_the_first(tmp_path):
    """Two runs in one process; the second never becomes as good, and still has a best."""
    stopping, checkpoints = StopEarly(patience=2), Checkpoints()
    for name, rate in (("first", 1e-2), ("second", 1e-9)):
        torch.manual_seed(0)
        module = LanguageModel(
            preset="transformer_micro", dim=16, heads=2, depth=1, learning_rate=rate
        )
        trainer = make_trainer(tmp_path / name, max_steps=8, val_check_interval=2)
        trainer.callbacks = [checkpoints, stopping]
        if name == "second":
            stopping.wait_count = 2  # as if the first had ended early
        trainer.fit(module, addition())
        assert trainer.global_step == (8 if name == "first" else checkpoints.saved)
        assert (tmp_path / name / "best.ckpt").exists()
        assert (tmp_path / name / "last.ckpt").exists()
    held = torch.load(tmp_path / "second" / "last.ckpt", weights_only=True)["callbacks"]
    assert held["Checkpoints"]["best"] == checkpoints.reached["best"]["validation/loss"]
