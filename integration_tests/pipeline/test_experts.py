"""Experts are compressed as if they were written as separate linears: each on the tokens routed to it."""

from typing import Any

import pytest
import torch
from torch import nn

from integration_tests.pipeline.separate_experts import with_separate_experts
from integration_tests.pipeline.tiny_model_compression import (
    WINDOWS,
    assert_as_planned,
    assert_function_of_factors,
    assert_untouched,
    compress,
    done,
    logits,
    relative,
    snapshot,
)
from integration_tests.statistics.tiny_model_statistics import inputs_by_linear
from integration_tests.tiny_models import MIXTURE_TYPES, tiny, tokens
from optimum_dobisvd import METHODS, DobiSVDQuantizer
from optimum_dobisvd.model.experts import linearize, linearized_experts
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.pipeline import factorize as factorizing
from optimum_dobisvd.structures.base import compressed_linears

SMALL = tokens(2, 24)  # of which experts see too few tokens


@pytest.mark.parametrize("method", ["svd_llm_v2", "global"])
@pytest.mark.parametrize("model_type", MIXTURE_TYPES)
def test_mixtures_are_compressed_as_planned_and_to_the_byte(model_type: str, method: str) -> None:
    model, dense = tiny(model_type), tiny(model_type)
    plan, report = done(compress(model, method=method, ratio=0.6, min_coverage=0.9))
    assert_as_planned(model, dense, plan)
    assert_function_of_factors(model, dense)
    assert report.coverage >= 0.99
    assert "in routers, which choose among experts" in report.left_dense
    assert any(".experts." in name for name in compressed_linears(model))
    targets = find_layout(dense).targets
    kept, whole = report.target_bytes, sum(target.dense_bytes for target in targets)
    assert kept <= 0.6 * whole
    assert kept > 0.6 * whole - 4 * 80  # no room for another rank
    assert report.dense_model_bytes == sum(each.nbytes for each in tiny(model_type).state_dict().values())
    assert report.compressed_model_bytes == sum(each.nbytes for each in model.state_dict().values())


def test_a_budget_in_bytes_is_met_with_experts_in_it() -> None:
    model = tiny("qwen3_moe")
    dense = sum(each.nbytes for each in model.parameters())
    _, report = done(compress(model, ratio=None, budget=int(0.7 * dense)))
    assert 0.7 * dense - 4 * 80 < report.compressed_model_bytes <= 0.7 * dense


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text"])
def test_theorem_3_1_holds_for_every_expert_over_its_own_tokens(model_type: str) -> None:
    model, dense = tiny(model_type), tiny(model_type)
    _, report = done(compress(model, method="svd_llm_v2", ratio=0.5, dataset=tokens(16, 48)))
    linearize(dense)
    linears = find_layout(dense).linears
    inputs = inputs_by_linear(dense, linears, tokens(16, 48))
    assert report.borrowed == []
    assert len({x.shape[1] for x in inputs.values()}) > 4  # experts are chosen unequally often
    for module in report.modules:
        x, weight = inputs[module.name], linears[module.name].weight.detach().double()
        if module.rank is None:
            continue
        lost = relative(compressed_linears(model)[module.name].dense_matrix().double() @ x, weight @ x)
        values = torch.linalg.svdvals(weight @ x)
        assert lost == pytest.approx(float(values[module.rank :].norm() / values.norm()), rel=1e-3, abs=1e-6)
        assert module.error == pytest.approx(lost, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("method", ["svd_llm_v2", "global", "output_pca", "asvd"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_separate_linears_give_the_same(model_type: str, method: str, few: bool) -> None:
    settings: dict[str, Any] = {"method": method, "ratio": 0.6, "dataset": SMALL if few else WINDOWS}
    stacked, separate = tiny(model_type), with_separate_experts(model_type)
    assert relative(logits(stacked), logits(separate)) < 1e-6
    (one, of_one), (other, of_other) = (done(compress(each, **settings)) for each in (stacked, separate))
    assert one.modules == other.modules
    assert bool(of_one.borrowed) == few
    assert sorted(of_one.borrowed) == sorted(of_other.borrowed)
    found = compressed_linears(separate)
    for name, module in compressed_linears(stacked).items():
        assert relative(module.dense_matrix(), found[name].dense_matrix()) < 1e-5, name
    assert relative(logits(stacked), logits(separate)) < 1e-5


@pytest.mark.parametrize(("module", "quantization"), [("bitsandbytes", "nf4"), ("gptqmodel", "gptq4_g32")])
@pytest.mark.parametrize("windows", [8, 1])
def test_a_stacked_quantizer_gives_the_same_for_separate_linears(module: str, quantization: str, windows: int) -> None:
    """Of one window experts see too few tokens, and are rounded by what all of them see."""
    pytest.importorskip(module)
    wide: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 8}
    settings: dict[str, Any] = {"ratio": 0.2, "quantization": quantization, "dataset": tokens(windows, 40)}
    stacked, separate = tiny("mixtral", **wide), with_separate_experts("mixtral", **wide)
    (one, of_one), (other, _) = (done(compress(each, **settings)) for each in (stacked, separate))
    assert one.modules == other.modules
    assert of_one.borrowed or windows > 1
    assert quantization in {each.encoding for each in of_one.modules if ".experts." in each.name}
    assert relative(logits(stacked), logits(separate)) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_experts(method: str) -> None:
    model, dense = tiny("qwen3_moe"), tiny("qwen3_moe")
    plan, _ = done(compress(model, method=method, ratio=0.6))
    assert_as_planned(model, dense, plan)
    assert_function_of_factors(model, dense)


def test_experts_that_borrow_are_named(caplog: pytest.LogCaptureFixture) -> None:
    _, report = done(compress(tiny("mixtral"), dataset=SMALL))
    assert "model.layers.0.mlp.experts.0.down_proj" in report.borrowed
    assert "model.layers.0.mlp.experts.0.down_proj" in caplog.text
    assert "tokens" in caplog.text


def test_experts_that_stay_dense_are_stacked_again() -> None:
    model, dense = tiny("mixtral"), tiny("mixtral")
    compress(model, modules_to_not_convert=["experts"])
    assert not linearized_experts(model)
    for name, parameter in dense.named_parameters():
        if "experts" in name:
            assert torch.equal(model.get_parameter(name), parameter)


def test_experts_beside_compressed_ones_stay_linears() -> None:
    model, dense = tiny("mixtral"), tiny("mixtral")
    plan, _ = done(compress(model, modules_to_not_convert=["re:.*experts[.][12][.].*", "layers.1"]))
    assert_as_planned(model, dense, plan)
    assert type(model.get_submodule("model.layers.0.mlp.experts.1.up_proj")) is nn.Linear
    kept = model.get_submodule("model.layers.0.mlp.experts.1.up_proj").weight
    assert kept.untyped_storage().nbytes() == kept.nbytes  # and holds no neighbor's memory


@pytest.mark.parametrize("undo", [True, False])
def test_an_error_half_way_puts_the_stacked_experts_back(undo: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, real, count = tiny("mixtral"), factorizing.replace_linear, 0
    before = snapshot(model)

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 30:
            raise RuntimeError("out of luck")
        return real(*args, **kwargs)

    monkeypatch.setattr(factorizing, "replace_linear", failing)
    quantizer = DobiSVDQuantizer(ratio=0.6, method="svd_llm_v2", dataset=WINDOWS)
    with pytest.raises(RuntimeError, match="out of luck"):
        quantizer.quantize_model(model, undo_on_error=undo)
    if undo:
        assert_untouched(model, before)
