"""Operations, MFU and bytes of models, against values computed by hand."""

import pytest
import torch

import archzoo
from archzoo.analysis import operations
from archzoo.analysis.operations import (
    decoding_bytes,
    mixing_operations,
    multiplied_parameters,
    peak_operations,
    training_operations,
    utilisation,
)
from archzoo.training import module
from archzoo.training.callbacks import phrases
from archzoo.training.log import TrainingFigures


def made(name, **changed):
    with torch.device("meta"):
        return archzoo.create_model(name, **changed)


def test_parameters_that_a_token_is_multiplied_by():
    # 12 layers of 12 dim^2 and two norms, the last norm, and the head once: it is tied.
    expected = 12 * (12 * 768**2 + 2 * 768) + 768 + 32_000 * 768
    assert multiplied_parameters(made("transformer_base")) == (expected, expected)
    assert expected == made("transformer_base").parameter_count() == 109_529_856
    # Untied, the embedding is looked up and counts nothing.
    assert multiplied_parameters(made("transformer_base", tie_weights=False))[0] == expected
    # 2 layers of 4 + 3 * 1.5 dim^2 at 48 wide, norms; the head.
    micro = made("transformer_micro", width=48)
    assert multiplied_parameters(micro)[0] == 2 * (4 * 1024 + 3 * 1536 + 64) + 32 + 64 * 32
    looped = made("transformer_micro", width=48, loops=3)
    assert multiplied_parameters(looped)[0] == 6 * (4 * 1024 + 3 * 1536 + 64) + 32 + 64 * 32


def test_experts_count_as_they_are_used():
    model = made("yuan_base")
    part = model.blocks[0].feed_forward
    unused = part.experts.experts - part.top_k
    one = 3 * model.dim * part.experts.width
    found = multiplied_parameters(model)
    table = 0 if model.tie_weights else model.embedding.weight.numel()
    assert found.active == model.parameter_count() - table - model.depth * unused * one
    assert found.trained == found.active


def test_weights_that_do_not_learn_take_no_gradient_of_their_own():
    model = made("transformer_micro", adapter="LoRA")
    found = multiplied_parameters(model)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.trained == learning < found.active
    mixed = 3 * 2 * mixing_operations(model.blocks[0].mixer, 64)
    assert training_operations(model, 64) == 4 * found.active + 2 * learning + mixed


def test_operations_of_attention_and_retention():
    attention, retention = made("transformer_base"), made("retnet_base")
    # 12 heads of 64 channels: 2 * 12 * 64 * 2,049, and three times that with the backward pass.
    assert mixing_operations(attention.blocks[0].mixer, 2_048) == 2 * 768 * 2_049
    assert training_operations(attention, 2_048) == 6 * 109_529_856 + 36 * 2 * 768 * 2_049
    # 3 heads, keys of 256 channels and values of 512: 4 * 3 * 256 * 512, whatever the length ...
    for length in (2_048, 32_768):
        assert mixing_operations(retention.blocks[0].mixer, length) == 1_572_864
        expected = 6 * 109_529_856 + 36 * 1_572_864
        assert training_operations(retention, length) == expected == 713_802_240
    # ... but of a short text the parallel form takes fewer.
    assert mixing_operations(retention.blocks[0].mixer, 9) == 3 * 768 * 10
    twice = made("retnet_micro", loops=2)
    active = multiplied_parameters(twice).active
    assert training_operations(twice, 8) == 6 * active + 3 * 4 * mixing_operations(
        twice.blocks[0].mixer, 8
    )


def test_a_mixer_of_ones_own_says_what_it_takes():
    class Own(archzoo.Attention):
        def operations(self, time):
            return 7.0 * time

    assert mixing_operations(Own(32, 2), 10) == 70
    assert mixing_operations(torch.nn.Linear(2, 2), 10) == 0


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-16GB", None),
        ("AMD EPYC", None),
    ],
)
def test_peaks_of_gpus_by_name(name, teraflops):
    found = peak_operations(name)
    assert found == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_no_cpu_has_a_peak(monkeypatch):
    assert operations.peak_of("cpu") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert operations.peak_of("cuda") == 989e12


def test_utilisation_in_the_log_and_on_the_screen():
    assert utilisation(713_802_240, 500_000, 989e12) == pytest.approx(0.36087, rel=1e-4)
    sums = {"tokens": torch.tensor(1_000_000.0)}
    row = TrainingFigures.means(sums, 2.0, 713_802_240, 989e12)
    assert row == {"tokens_per_second": 500_000, "mfu": pytest.approx(0.36087, rel=1e-4)}
    assert phrases({f"train/{n}": v for n, v in row.items()}, "train") == [
        "500,000 tokens/s",
        "MFU 36.1 %",
    ]
    assert "mfu" not in TrainingFigures.means(sums, 2.0)


def test_fit_logs_it_for_a_gpu_that_is_known(monkeypatch, tmp_path):
    """The peak is of all ranks, and the length that of the batch."""
    import lightning

    from archzoo.tasks import Addition

    rows = []
    monkeypatch.setattr(module.LanguageModel, "_log", lambda self, row, step: rows.append(row))

    def train(**settings):
        rows.clear()
        trainer = lightning.Trainer(
            accelerator="cpu", max_steps=2, log_every_n_steps=2, limit_val_batches=0, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        net = module.LanguageModel("retnet_micro", **settings)
        trainer.fit(net, Addition(digits=1, batch_size=2, validation_examples=4, test_examples=4))
        return net, rows[0]

    assert "train/mfu" not in train()[1]  # on a CPU
    monkeypatch.setattr(module, "peak_of", lambda device: 1e9)
    net, row = train()
    needed = training_operations(net.net, net._length)
    speed = row["train/tokens_per_second"]
    assert row["train/mfu"] == pytest.approx(needed * speed / 1e9)
    assert "train/mfu" not in train(loops=2, progressive_loss=0.5)[1]


def test_bytes_of_a_step_of_decoding():
    retention, attention = made("retnet_base").bfloat16(), made("transformer_base").bfloat16()
    weights = 2 * 109_529_856
    state = 12 * 3 * 256 * 512 * 4  # float32, and 18 MiB
    place = decoding_bytes(retention, 1, 1_024) - weights - 2 * state
    assert 0 <= place < 100  # where each row is
    assert decoding_bytes(retention, 8, 64) == decoding_bytes(retention, 8, 16_384)
    cache = 12 * 2 * 768 * 2 * 16_385  # read, and one token written
    assert 0 <= decoding_bytes(attention, 1, 16_384) - weights - cache < 100
    more = decoding_bytes(attention, 3, 16_384) - weights
    assert more == 3 * (decoding_bytes(attention, 1, 16_384) - weights)
