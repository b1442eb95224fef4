"""Factors in the place of linears: equal for equivalent factorizers, finite where inputs are deficient."""

from typing import Any

import pytest
import torch

from integration_tests.pipeline.tiny_model_compression import compress, done, logits, refused, relative
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd import METHODS
from optimum_dobisvd.pipeline.factorize import Replacement
from optimum_dobisvd.structures.pivoted import PivotedLinear


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_three_optimal_methods_make_the_same_model(model_type: str) -> None:
    outputs = {}
    for method in ("svd", "asvd", "svd_llm", "svd_llm_v2", "output_pca"):
        model = tiny(model_type)
        compress(model, method=method, allocation="uniform", ratio=0.6)
        outputs[method] = logits(model)
    for method in ("svd_llm", "output_pca"):
        assert relative(outputs[method], outputs["svd_llm_v2"]) < 2e-3
    for method in ("svd", "asvd"):
        assert relative(outputs[method], outputs["svd_llm_v2"]) > 0.05


@pytest.mark.parametrize("method", [name for name in METHODS if name != "svd_llm" and not METHODS.get(name).learns])
def test_fewer_tokens_than_features_are_enough(method: str) -> None:
    model, dense = tiny("llama"), tiny("llama")
    few = tokens(1, 9)
    _, report = done(compress(model, method=method, dataset=few, ratio=0.7))
    assert torch.isfinite(logits(model)).all()
    if method in ("svd_llm_v2", "output_pca"):
        # Nine tokens span nine directions, and no matrix here gets a smaller rank: nothing of them is lost.
        assert min(module.rank or 9 for module in report.modules) >= 7
        assert relative(logits(model, few), logits(dense, few)) < 0.3
        assert all(module.error < 0.05 for module in report.modules if (module.rank or 0) >= 9)


def test_dead_channels_and_silent_linears_are_no_trouble() -> None:
    model = tiny("opt")
    layer = model.model.decoder.layers[1]
    layer.final_layer_norm.weight.data[:5] = 0
    layer.final_layer_norm.bias.data[:5] = 0
    layer.self_attn.v_proj.weight.data.zero_()
    for method in ("asvd", "svd_llm_v2", "output_pca"):
        copy = tiny("opt")
        copy.load_state_dict(model.state_dict())
        compress(copy, method=method, allocation="uniform")
        assert torch.isfinite(logits(copy)).all()


def test_an_error_half_way_leaves_the_model_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with some factors and no mark of them would be saved as one that cannot be loaded."""
    model, put = tiny("llama"), Replacement.put

    def fails(replacement: Replacement, name: str, *args: Any) -> None:
        put(replacement, name, *args)
        if name == "model.layers.2.self_attn.q_proj":
            raise ValueError(f"{name}: its factors would be zero")

    monkeypatch.setattr(Replacement, "put", fails)
    for method in ("svd_llm_v2", "dobi_ipca"):
        refused(model, r"model\.layers\.2\.self_attn\.q_proj: .*zero", method=method, allocation="uniform")


def test_a_compression_refits_pivoted_rows_on_its_calibration_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that lost the Gram on the way would work as well, and be less exact."""

    def errors() -> dict[str, float]:
        quantizer = compress(tiny("llama"), structure="pivoted", quantization="int8", ratio=0.2, rank_multiple=1)
        _, report = done(quantizer)
        return {m.name: m.error for m in report.modules if m.structure == "pivoted" and m.error is not None}

    refitted = errors()
    assert refitted
    monkeypatch.setattr(PivotedLinear, "refitted", classmethod(lambda cls, linear, weights, *_: weights[linear]))
    left = errors()
    assert left.keys() == refitted.keys()
    assert sum(refitted.values()) < sum(left.values())
