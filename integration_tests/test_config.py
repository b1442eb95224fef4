"""DobiSVDConfig: what it accepts, what it refuses, what it writes."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_dobisvd import METHODS, DobiSVDConfig, Plan
from optimum_dobisvd.allocation.plan import PlannedModule
from optimum_dobisvd.config import FORMAT_VERSION, RENAMED, default_of


@pytest.mark.parametrize("key", ["rato", "nsample", "modules_to_not_covert"])
def test_unknown_keys_are_errors_with_a_hint(key):
    with pytest.raises(ValueError, match=f"unknown key '{key}'.*did you mean"):
        DobiSVDConfig.from_dict({key: 1})
    with pytest.raises(ValueError, match=f"unknown key '{key}'.*did you mean"):
        DobiSVDConfig(**{key: 1})


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("storage", "int8", r"write quantization \('int8', 'remap'\), or mixed=True for every matrix its own"),
        ("inner", {"bits": 4}, "write quantization"),
        (
            "dense_storage",
            "dense_int8",
            "write quantization: 'int8' stores matrices that are not factorized",
        ),
    ],
)
def test_options_of_earlier_versions_are_refused_with_what_says_the_same_now(key, value, remedy):
    message = f"the dobi_svd quantization config has no '{key}' any more; {remedy}"
    with pytest.raises(ValueError, match=message):
        DobiSVDConfig(**{key: value})
    with pytest.raises(ValueError, match=message):
        DobiSVDConfig.from_dict({key: value})
    assert key in RENAMED


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (1, "has dobi_svd format 1, of a version that was never released: it named 'storage' and 'inner' .* compress"),
        (FORMAT_VERSION + 1, f"has dobi_svd format 3, .* reads up to {FORMAT_VERSION}; upgrade it: pip install -U"),
        (0, "format_version must be a positive integer, got 0"),
        ("2", "format_version must be a positive integer, got '2'"),
        (None, "format_version must be a positive integer, got None"),
    ],
)
def test_other_versions_of_the_format_are_refused_before_their_keys_are_read(version, message):
    with pytest.raises(ValueError, match=message):
        DobiSVDConfig.from_dict({"format_version": version, "unheard_of": 1})


@pytest.mark.parametrize(
    ("ratio", "hint"),
    [
        (0, "nothing removed is ratio=1"),
        (-0.2, "0.2 removed is ratio=0.8"),
        (20, "20 % removed is ratio=0.8"),
        (80, "80 % kept is ratio=0.8"),
        (1.5, "KEPT"),
        (float("nan"), "KEPT"),
    ],
)
def test_a_ratio_that_is_no_kept_fraction_is_refused_with_a_hint(ratio, hint):
    with pytest.raises(ValueError, match=hint):
        DobiSVDConfig(ratio=ratio)


@pytest.mark.parametrize("value", ["0.8", True])
def test_a_ratio_that_is_no_number(value):
    with pytest.raises(TypeError, match="ratio must be a number"):
        DobiSVDConfig(ratio=value)


@pytest.mark.parametrize("name", ["nsamples", "seqlen", "batch_size", "rank_multiple", "min_rank"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True])
def test_counts_are_positive_integers(name, value):
    with pytest.raises((ValueError, TypeError), match=name):
        DobiSVDConfig(**{name: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "svdllm"},
        {"allocation": "greedy"},
        {"factorization": "qr"},
        {"structure": "lowrank"},
        {"quantization": "int3"},
    ],
)
def test_unknown_names_list_the_known_ones(settings):
    with pytest.raises(ValueError, match=r"known: |int8, remap, gptq2"):
        DobiSVDConfig(**settings)


def test_columns_of_a_method_can_be_replaced():
    method = DobiSVDConfig(method="svd_llm_v2", allocation="uniform").resolved_method()
    assert method.allocation == "uniform"
    assert method.factorization == METHODS.get("svd_llm_v2").factorization
    assert DobiSVDConfig(structure="dense", quantization="int8").resolved_method().structure == "dense"


def test_nothing_of_the_run_is_written():
    config = DobiSVDConfig(
        dataset=torch.zeros(3, 4, dtype=torch.long), tokenizer=object(), statistics="/home/me/store", device="cpu"
    )
    text = json.dumps(config.to_dict())
    assert "/home/me" not in text
    assert json.loads(text)["dataset"] == "Tensor given in memory"
    assert json.loads(DobiSVDConfig(dataset="/home/me/text.txt").to_json_string())["dataset"] == "text.txt"


@given(
    ratio=st.floats(min_value=0.01, max_value=1),
    method=st.sampled_from(sorted(METHODS)),
    ranks=st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 500), min_size=1),
)
def test_round_trip_through_json(ratio, method, ranks):
    plan = Plan(
        modules={name: PlannedModule("low_rank", "float", rank) for name, rank in ranks.items()}
        | {"y": PlannedModule("dense", "int8"), "z": PlannedModule("dense", "float")},
        method=method,
        ratio=ratio,
        allocation="uniform",
    )
    config = DobiSVDConfig(method=method, ratio=ratio).with_plan(plan, dataset="wikitext2")
    again = DobiSVDConfig.from_dict(json.loads(config.to_json_string()))
    assert again == config
    assert again.modules == {
        name: {"structure": "low_rank", "rank": rank, "encoding": "float"} for name, rank in ranks.items()
    } | {"y": {"structure": "dense", "encoding": "int8"}}


def test_with_plan_leaves_the_original_alone():
    config = DobiSVDConfig(dataset=["text"], tokenizer="name")
    before = copy.deepcopy(config)
    plan = Plan(modules={"a": PlannedModule("low_rank", "float", 3)}, method="svd", ratio=0.5, allocation="uniform")
    assert config.with_plan(plan).tokenizer is None
    assert config == before


@pytest.mark.parametrize(
    ("settings", "structures", "names"),
    [
        ({}, ["low_rank", "pivoted"], ["float"]),
        ({"structure": "pivoted"}, ["pivoted"], ["float"]),
        ({"method": "dobi"}, ["low_rank"], ["remap"]),
        ({"method": "svd_llm_v2", "structure": "pivoted"}, ["pivoted"], ["float"]),
        ({"allocation": "uniform"}, ["low_rank"], ["float"]),
        ({"factorization": "svd_llm"}, ["low_rank"], ["float"]),
        ({"quantization": "int8"}, ["low_rank", "pivoted"], ["int8"]),
        ({"quantization": "remap"}, ["low_rank"], ["remap"]),
        ({"quantization": "int8", "structure": "dense"}, ["dense"], ["int8"]),
        ({"mixed": True}, ["low_rank", "pivoted"], ["int8", "float"]),
        (
            {"mixed": True, "quantization": "gptq4_g32", "ratio": 0.4},
            ["low_rank", "pivoted"],
            ["gptq4_g32", "gptq2_g32", "gptq3_g32", "gptq8_g32", "int8", "float"],
        ),
        ({"mixed": True, "quantization": "nf4", "ratio": 0.4}, ["low_rank", "pivoted"], ["nf4", "int8", "float"]),
    ],
)
def test_a_quantization_is_a_format_and_a_mixture_several(settings, structures, names):
    formats = DobiSVDConfig(**settings).formats
    assert [format.key for format in formats] == [(structure, name) for name in names for structure in structures]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"structure": "pivotal"},
            "unknown structure 'pivotal'; known: pivoted, dense, low_rank, auto",
        ),
        (
            {"structure": "auto", "method": "svd_llm_v2"},
            "structure 'auto' weighs .* allocation 'svd_llm_v2'.*'low_rank'",
        ),
        ({"structure": "auto", "factorization": "svd"}, "structure 'auto' weighs .* scores of 'svd' does not"),
        (
            {"structure": "pivoted", "quantization": "remap"},
            "remap is for factors that can be scaled, and structure 'pivoted' fixes them: take",
        ),
    ],
)
def test_a_structure_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DobiSVDConfig(**settings)


@pytest.mark.parametrize("method", ["dobi", "svd_llm_v2", "svd"])
def test_a_mixture_needs_a_method_that_knows_what_encodings_cost_the_loss(method):
    with pytest.raises(ValueError, match=f"which only method 'global' knows, not '{method}'.*take method='global'"):
        DobiSVDConfig(method=method, mixed=True)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, "a: expected a structure, an encoding and perhaps a rank, got 3"),
        ({"rank": 3, "storage": "plain"}, "a: expected a structure, an encoding and perhaps a rank"),
        ({"structure": "low_rank", "encoding": "float", "rank": 3, "directions": "1"}, "a: expected a structure"),
        ({"structure": "monarch", "encoding": "float", "rank": 3}, "a: unknown structure 'monarch'; .*upgrade"),
        ({"structure": "low_rank", "encoding": "int2", "rank": 3}, "a: unknown encoding 'int2'; .*upgrade"),
        ({"structure": "low_rank", "encoding": "float", "rank": 0}, "a: rank must be at least 1, got 0"),
        (
            {"structure": "dense", "encoding": "int8", "rank": 3},
            "a: structure 'dense' has no rank, config.json says",
        ),
    ],
)
def test_modules_of_a_checkpoint_that_make_no_sense_are_named(entry, message):
    with pytest.raises(ValueError, match=message):
        DobiSVDConfig.from_dict({"modules": {"a": entry}})


@pytest.mark.parametrize("rank", [None, "3", True, 3.0])
def test_a_rank_in_a_checkpoint_is_an_integer(rank):
    with pytest.raises(TypeError, match="a: rank must be an integer"):
        DobiSVDConfig.from_dict({"modules": {"a": {"structure": "low_rank", "encoding": "float", "rank": rank}}})


def test_a_method_of_a_newer_version_does_not_keep_a_checkpoint_from_being_read():
    modules = {"a": {"structure": "low_rank", "encoding": "int8", "rank": 3}}
    assert DobiSVDConfig.from_dict({"method": "brand_new", "modules": modules}).modules == modules
    with pytest.raises(ValueError, match="unknown method 'brand_new'"):
        DobiSVDConfig(method="brand_new")


@pytest.mark.parametrize(
    ("name", "value"), [("method", "global"), ("nsamples", 128), ("overrides", {}), ("quantization", None)]
)
def test_defaults_can_be_asked_for(name, value):
    assert default_of(name) == value
