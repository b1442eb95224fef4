"""DobiSVDConfig: what it accepts, what it refuses, what it writes."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_dobisvd import METHODS, DobiSVDConfig, Plan
from optimum_dobisvd.allocation import PlannedModule


@pytest.mark.parametrize("key", ["rato", "nsample", "modules_to_not_covert"])
def test_unknown_keys_are_errors_with_a_hint(key):
    with pytest.raises(ValueError, match=f"unknown key '{key}'.*did you mean"):
        DobiSVDConfig.from_dict({key: 1})
    with pytest.raises(TypeError, match=key):
        DobiSVDConfig(**{key: 1})


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
    [{"method": "svdllm"}, {"allocation": "greedy"}, {"factorization": "qr"}, {"storage": "int3"}],
)
def test_unknown_names_list_the_known_ones(settings):
    with pytest.raises(ValueError, match=r"known|registered"):
        DobiSVDConfig(**settings)


def test_columns_of_a_method_can_be_replaced():
    method = DobiSVDConfig(method="svd_llm_v2", allocation="uniform").resolved_method()
    assert method.allocation == "uniform"
    assert method.factorization == METHODS["svd_llm_v2"].factorization


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
        modules={name: PlannedModule(rank, "plain") for name, rank in ranks.items()}
        | {"z": PlannedModule(None, "dense")},
        method=method,
        ratio=ratio,
        allocation="uniform",
    )
    config = DobiSVDConfig(method=method, ratio=ratio).with_plan(plan, dataset="wikitext2")
    again = DobiSVDConfig.from_dict(json.loads(config.to_json_string()))
    assert again == config
    assert again.modules == {name: {"rank": rank, "storage": "plain"} for name, rank in ranks.items()}


def test_with_plan_leaves_the_original_alone():
    config = DobiSVDConfig(dataset=["text"], tokenizer="name")
    before = copy.deepcopy(config)
    plan = Plan(modules={"a": PlannedModule(3, "plain")}, method="svd", ratio=0.5, allocation="uniform")
    assert config.with_plan(plan).tokenizer is None
    assert config == before
