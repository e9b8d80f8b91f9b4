"""Presets: found by name, built, swapped, matched; bad names are answered with the nearest."""

import functools
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch

import archzoo
from archzoo import parts, registry, tasks
from archzoo.mixers.retention import Retention
from archzoo.public import names_of
from archzoo.tasks.stream import import_all

PACKAGE = Path(archzoo.__file__).parent

SIZES = ("micro", "tiny", "small", "base")


def count(name, **overrides):
    with torch.device("meta"):
        return archzoo.create_model(name, **overrides).parameter_count()


def test_listing_takes_wildcards():
    assert archzoo.list_models("ret*") == [f"retnet_{size}" for size in SIZES]
    assert archzoo.list_models("nothing*") == []


@pytest.mark.parametrize("size", SIZES[1:])  # in micro, a width rounded up to 8 is coarse
def test_retention_and_attention_are_compared_at_one_size(size):
    counts = [count(f"transformer_{size}"), count(f"retnet_{size}")]
    assert abs(counts[0] - counts[1]) <= 0.01 * max(counts)


@pytest.mark.parametrize("mixer", ["Attention", "Retention"])
@pytest.mark.parametrize("name", archzoo.list_models())
def test_matched_swaps_agree_within_one_percent(name, mixer):
    swap = {"mixer": mixer, "bias": "none" if mixer == "Retention" else None}
    want = count(name)
    if (
        count(name, width=1, **swap) > 1.01 * want
    ):  # a narrow feed-forward, which cannot be narrower
        with pytest.raises(ValueError, match="no feed-forward width gives"):
            count(name, match="parameters", **swap)
        return
    matched = count(name, match="parameters", **swap)
    assert abs(matched - want) <= 0.01 * want
    if registry.get_preset(name).arguments["mixer"] != mixer:
        assert count(name, **swap) != want, "a swap changes the count unless it is matched"


@pytest.mark.parametrize("value_factor", [1.0, 2.0])
def test_matching_goes_by_the_given_sizes(value_factor):
    spec = functools.partial(Retention, value_factor=value_factor)
    want = count("transformer_tiny", vocab_size=99, dim=96)
    got = count("transformer_tiny", vocab_size=99, dim=96, mixer=spec, match="parameters")
    assert abs(got - want) <= 0.01 * want


def test_matching_that_cannot_be_had_says_so():
    wide = functools.partial(Retention, value_factor=16.0)
    with pytest.raises(ValueError, match="no feed-forward width gives"):
        archzoo.create_model("transformer_micro", mixer=wide, match="parameters")
    with pytest.raises(ValueError, match="only thing to match is 'parameters'"):
        archzoo.create_model("transformer_micro", match="flops")


@pytest.mark.parametrize(
    "mixer",
    [
        functools.partial(Retention, decay="paper_lm"),
        {"class_path": "Retention", "init_args": {"decay": "paper_lm"}},
        {
            "class_path": "archzoo.mixers.retention.Retention",
            "init_args": {"decay": "paper_lm"},
        },
        {"class_path": "archzoo.Retention", "init_args": {"decay": "paper_lm"}},
    ],
)
def test_ways_to_say_the_same_part(mixer):
    model = archzoo.create_model("transformer_micro", mixer=mixer)
    want = {"class_path": "Retention", "init_args": {"decay": "paper_lm"}}
    assert model.config["mixer"] == want
    assert (
        model.blocks[0].mixer.fixed_log_decay == Retention(32, 2, decay="paper_lm").fixed_log_decay
    )


@pytest.mark.parametrize("mixer", [Retention, "Retention", {"class_path": "Retention"}])
def test_ways_to_say_a_part_without_arguments(mixer):
    config = archzoo.create_model("transformer_micro", mixer=mixer).config
    assert config == archzoo.create_model("transformer_micro", mixer=archzoo.Retention).config
    assert config["mixer"] == {"class_path": "Retention", "init_args": {}}


def test_none_means_what_the_preset_says():
    plain = archzoo.create_model("retnet_micro")
    assert archzoo.create_model("retnet_micro", mixer=None, dim=None).config == plain.config


def test_naming_a_mixer_replaces_a_presets_pattern(monkeypatch):
    name = "pattern_for_a_test"
    arguments = registry.get_preset("retnet_micro").arguments
    monkeypatch.setattr(registry, "_presets", dict(registry._presets))  # and forget it afterwards
    archzoo.register_model(name, arguments | {"pattern": ["Retention", "Attention"]})
    assert len(archzoo.create_model(name).config["pattern"]) == 2
    swapped = archzoo.create_model(name, mixer="Attention")
    assert swapped.config["pattern"] is None
    assert {type(block.mixer).__name__ for block in swapped.blocks} == {"Attention"}
    with pytest.raises(ValueError, match="registered already"):
        archzoo.register_model(name, {})
    archzoo.register_model(name, dict(registry.get_preset(name).arguments))  # the same: no other


def test_overriding_a_preset_leaves_the_preset():
    before = dict(registry.get_preset("retnet_micro").arguments)
    archzoo.create_model("retnet_micro", dim=64, mixer="Attention")
    assert registry.get_preset("retnet_micro").arguments == before


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("retnet_tny", {}, "no model 'retnet_tny'; nearest: retnet_tiny(, | or )[^;]*$"),
        ("RetNet_tiny", {}, "nearest: retnet_tiny"),
        ("mine_tiny", {}, "no model 'mine_tiny'; nearest: .*its module is: --import MODULE"),
        ("retnet_micro", {"mixr": "Attention"}, "no argument 'mixr'; nearest: mixer"),
        ("retnet_micro", {"n_head": 2}, "no argument 'n_head'"),
        ("retnet_micro", {"mixer": "Atention"}, "no mixer 'Atention'; nearest: Attention"),
        ("retnet_micro", {"mixer": "attention"}, "nearest: Attention"),
        ("retnet_micro", {"mixer": "no.such.Thing"}, "is not imported.*--import no.such"),
        ("retnet_micro", {"mixer": "archzoo.mixers.attention.Attn"}, "has no class of that name"),
        ("retnet_micro", {"mixer": "GatedFeedForward"}, "no mixer 'GatedFeedForward'"),
        ("retnet_micro", {"mixer": archzoo.GatedFeedForward}, "is not a Mixer"),
        ("retnet_micro", {"mixer": torch.nn.Linear}, "is not a Mixer"),
        ("retnet_micro", {"feed_forward": "archzoo.Retention"}, "is not a FeedForward"),
        ("retnet_micro", {"mixer": functools.partial(print, 1)}, "not a partial of a class"),
        ("retnet_micro", {"mixer": {"class": "Attention"}}, "must hold class_path"),
        (
            "retnet_micro",
            {"mixer": {"class_path": "Attention", "init_args": {"kv_head": 1}}},
            "Attention has no argument 'kv_head'; nearest: kv_heads",
        ),
        (
            "retnet_micro",
            {"mixer": {"class_path": "Attention", "init_args": {"kv_heads": object()}}},
            "not plain data",
        ),
        ("retnet_micro", {"heads": 5}, "heads=5 does not divide dim=32"),
        ("retnet_micro", {"dim": 0}, "dim=0"),
        ("retnet_micro", {"depth": 0}, "depth=0"),
        ("retnet_micro", {"depth": 2.5}, "depth=2.5: a decoder needs an integer"),
        ("retnet_micro", {"dim": "32"}, "dim='32': a decoder needs an integer"),
        ("retnet_micro", {"width": 0}, "width=0 must be an integer"),
        ("retnet_micro", {"width": -8}, "width=-8 must be an integer"),
        ("retnet_micro", {"norm_eps": -1.0}, "norm_eps=-1.0 must be at least 0"),
        ("retnet_micro", {"init_std": -1.0}, "init_std=-1.0 must be at least 0"),
        ("retnet_micro", {"pattern": "Retention"}, r"such as \[Retention\]"),
        (
            "retnet_micro",
            {"mixer": {"class_path": "Attention", "init_args": {"kv_heads": -2}}},
            "kv_heads=-2 does not divide heads=2",
        ),
        (
            "retnet_micro",
            {"feed_forward": {"class_path": "GatedFeedForward", "init_args": {"activation": "x"}}},
            "activation='x' is not one of silu, gelu, relu",
        ),
        ("retnet_micro", {"match": "parameters", "width": 64}, "omit width=64"),
        ("retnet_micro", {"norm": "batch"}, "neither rms nor layer"),
        ("retnet_micro", {"norm_placement": "mid"}, "neither pre nor post"),
        ("retnet_micro", {"dropout": 1.0}, r"must lie in \[0, 1\)"),
        ("retnet_micro", {"bias": "NoSuchBias"}, "no bias 'NoSuchBias'"),
        ("retnet_micro", {"pattern": ["Retention", "Atention"]}, "nearest: Attention"),
    ],
)
def test_bad_input_gets_one_clear_line(name, overrides, words):
    with pytest.raises(ValueError, match=words) as caught:
        archzoo.create_model(name, **overrides)
    assert "\n" not in str(caught.value)


def test_two_layouts_of_the_same_class_are_one():
    """A class with the name of one of ours is not taken for it."""

    class Retention(archzoo.Attention):
        pass

    described = parts.describe("mixer", Retention)
    # Others in this process ask for Retention by its name, as long as this one is not collected.
    Retention.__name__ = Retention.__qualname__ = "Other"
    assert described["class_path"] != "Retention"
    assert described["class_path"].endswith("Retention")


@pytest.mark.parametrize("slot", parts.SLOTS)
def test_parts_are_found_by_name(slot):
    for name, found in parts.list_parts(slot).items():
        assert parts.find(slot, name) is found
        assert found.__doc__ and issubclass(found, parts.SLOTS[slot])


def own_classes(package, base):
    """Classes of a package of the zoo that derive from one, whether or not they are finished."""
    for module in pkgutil.walk_packages([str(PACKAGE / package)], f"archzoo.{package}."):
        for name, found in vars(importlib.import_module(module.name)).items():
            mine = inspect.isclass(found) and found.__module__ == module.name
            if mine and not name.startswith("_") and issubclass(found, base):
                yield name, found


@pytest.mark.parametrize("slot", parts.SLOTS)
def test_every_part_has_a_public_name(slot):
    """One that is forgotten in archzoo/__init__.pyi is no part of the zoo: no name finds it."""
    listed = parts.list_parts(slot)
    public = [parts.SLOTS[slot], *listed.values()]
    assert [getattr(archzoo, found.__name__, None) for found in public] == public
    # What others derive from: it takes more than its slot gives, or lacks a method.
    unfinished = {"RowEmbedding", "DigitEmbedding", "TopKRouter", "LearnedState", "BinaryLinear"}
    for package in parts.HOMES:
        if (PACKAGE / package).is_dir():
            found = dict(own_classes(package, parts.SLOTS[slot]))
            assert found.keys() - unfinished - {parts.SLOTS[slot].__name__} <= listed.keys()


def test_every_task_has_a_public_name():
    import_all()
    found = dict(own_classes("tasks", tasks.Task))
    unfinished = {"Task", "SyntheticTask", "TwoNumbers", "SequenceTask"}  # what others derive from
    assert found.keys() - unfinished <= set(tasks.__all__)
    assert all(getattr(tasks, name) is found[name] for name in found.keys() - unfinished)
    assert {"Addition", "Sorting", "Text", "Mixed", "Arithmetic"} <= found.keys()


def test_public_names_are_what_type_checkers_read():
    for package in (archzoo, tasks):
        lines = Path(package.__file__).with_suffix(".pyi").read_text().splitlines()
        assert lines == [
            f"from {m} import {n} as {n}" for n, m in names_of(package.__name__).items()
        ]
        assert {name: getattr(package, name) for name in package.__all__}
        with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
            package.no_such_name  # noqa: B018


def test_a_partial_with_positional_arguments_is_refused() -> None:
    with pytest.raises(ValueError, match="give them by name"):
        archzoo.create_model("retnet_micro", mixer=functools.partial(archzoo.Retention, 64))


def test_sizes_are_looked_at_before_anything_is_built():
    for sizes in ({"vocab_size": 10**12}, {"dim": 2**24}, {"depth": 10**5}, {"width": 10**12}):
        with pytest.raises(ValueError, match=f"{next(iter(sizes))}={next(iter(sizes.values()))}"):
            archzoo.create_model("retnet_micro", **sizes)
    with pytest.raises(ValueError, match="tie_weights='yes' must be true or false"):
        archzoo.create_model("retnet_micro", tie_weights="yes")
    with pytest.raises(ValueError, match="None is not a model's name"):
        archzoo.create_model(None)


ALONE = [s for s in parts.SLOTS if s not in ("router", "linear", "convolution")]


@pytest.mark.parametrize("slot", ALONE)
def test_an_interface_alone_is_not_a_part(slot):
    home = parts.SLOTS[slot].__module__
    arguments = {"mixer": "Attention", slot: f"{home}.{parts.SLOTS[slot].__name__}"}
    with pytest.raises(ValueError, match="is the interface alone: name a class that derives"):
        archzoo.create_model("retnet_micro", **arguments)


def test_a_missing_argument_of_a_part_is_named():
    with pytest.raises(ValueError, match="RowEmbedding: missing a required argument: 'rows': give"):
        archzoo.create_model("retnet_micro", embedding="archzoo.embeddings.rows.RowEmbedding")
