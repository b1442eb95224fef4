"""Requests that cannot be met: refused before any long computation, and the model is left untouched."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from integration_tests.pipeline.tiny_model_compression import DOWN2, Q0, compress, refused
from integration_tests.tiny_models import tiny
from optimum_dobisvd import METHODS, DobiSVDQuantizer, Plan
from optimum_dobisvd.allocation.plan import PlannedModule
from optimum_dobisvd.config import default_of
from optimum_dobisvd.model.layout import find_layout


def plan_for(model: nn.Module, changes: dict[str, PlannedModule | None]) -> Plan:
    """Rank 5 for every linear, some entries changed or (None) left out."""
    modules = dict.fromkeys(find_layout(model).linears, PlannedModule("low_rank", "float", 5))
    for name, entry in changes.items():
        if entry is None:
            del modules[name]
        else:
            modules[name] = entry
    return Plan(modules, method="svd_llm_v2", ratio=None, allocation="by hand")


@pytest.mark.parametrize("method", [name for name in METHODS if name != "svd"])
def test_no_dataset_is_refused(method: str) -> None:
    refused(tiny("llama"), f"method '{method}' needs calibration text", method=method, dataset=None)


@pytest.mark.parametrize(
    ("dataset", "match"),
    [
        ([], "empty list"),
        (["too short"], r"tokens, which is 0 windows"),
        (torch.zeros(0, 4), "empty"),
        ([""], "no text|empty"),
    ],
)
def test_a_dataset_too_short_is_refused(tiny_tokenizer: Any, dataset: Any, match: str) -> None:
    refused(tiny("llama"), match, dataset=dataset, tokenizer=tiny_tokenizer, nsamples=4, seqlen=32)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"model.layers.9.self_attn.q_proj": PlannedModule("low_rank", "float", 3)},
            r"model\.layers\.9\.self_attn\.q_proj.*not one",
        ),
        ({"lm_head": PlannedModule("low_rank", "float", 3)}, "'lm_head', which is not one of the 21"),
        ({Q0: None}, "says nothing about 'model.layers.0.self_attn.q_proj'"),
        ({Q0: PlannedModule("low_rank", "float", 33)}, "rank 33 is above 32"),
        ({Q0: PlannedModule("low_rank", "float", 16)}, "not smaller than the dense matrix; use at most 15"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(changes: dict[str, PlannedModule | None], match: str) -> None:
    model = tiny("llama")
    refused(model, match, plan=plan_for(model, changes))


def test_a_plan_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refused(tiny("llama"), "no plan at", FileNotFoundError, plan=tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("{")
    refused(tiny("llama"), r"plan\.json, line 1", plan=tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"modules_to_not_convert": ["q_porj"]}, "'q_porj' matches no module; near names: 'q_proj'"),
        ({"overrides": {"re:.*dwn_proj": {"rank": 3}}}, "matches no module"),
        ({"overrides": {"q_proj": {"rnak": 3}}}, "unknown key 'rnak'"),
        ({"overrides": {"q_proj": {"rank": 99}}}, "rank 99 is above"),
        ({"ratio": 0.3, "min_rank": 12}, "the smallest reachable"),
        ({"ratio": 0.5, "overrides": {"mlp": {"dense": True}}}, "the smallest reachable"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(settings: dict[str, Any], match: str) -> None:
    refused(tiny("llama"), match, **settings)


def test_a_mixture_whose_experts_are_no_linears_is_refused_by_default() -> None:
    model = tiny("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.scale = nn.Parameter(torch.ones(4))  # of unknown meaning
    refused(
        model, r"only 14\.2% of the weights .* parameters in MixtralExperts", min_coverage=default_of("min_coverage")
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model = tiny("llama")
    model.get_submodule(DOWN2).weight.data[3, 4] = value
    refused(model, rf"{DOWN2.replace('.', '[.]')}\.weight has NaN")


def test_a_compressed_model_is_refused() -> None:
    model = tiny("llama")
    first = compress(model)
    refused(model, "compressed already; load the dense model")
    with pytest.raises(ValueError, match="describes a compressed model"):
        DobiSVDQuantizer(model.config.quantization_config)
    assert first.plan is not None


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), lambda: nn.Sequential(nn.Embedding(4, 4))])
def test_a_model_without_blocks_is_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match="no repeated blocks"):
        compress(make())
