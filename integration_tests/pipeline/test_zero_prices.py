"""Matrices that the loss does not feel on the calibration text are worth nothing, under every method alike."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd import DobiSVDQuantizer
from optimum_dobisvd.factorization.decompositions import compute_spectra, decompositions
from optimum_dobisvd.pipeline.collect import collect
from optimum_dobisvd.statistics.fingerprint import fingerprint
from optimum_dobisvd.structures.base import compressed_linears

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
FEEDFORWARD = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def wide() -> Any:
    return tiny("llama", hidden_size=64, intermediate_size=128, num_attention_heads=4)


class HandsOn(LlamaDecoderLayer):
    """A block that was taken out of the model, but for its weights."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:  # type: ignore[override]
        return hidden_states


class Unfelt(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0


def with_block_that_hands_on() -> Any:
    model = wide()
    model.model.layers[1].__class__ = HandsOn
    return model


def with_identity_block() -> Any:
    """As LLaMA Pro grows models: what a new block adds is zero at first."""
    model = wide()
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    return model


def with_silent_inputs() -> Any:
    model = wide()
    model.model.layers[1].input_layernorm.weight.data.zero_()
    return model


def with_unfelt_outputs() -> Any:
    """The feed-forward part is multiplied by zero: its inputs are not."""
    model = wide()
    model.model.layers[1].mlp.__class__ = Unfelt
    return model


# What is worth nothing: to the loss, and of that what has no outputs on the text either.
MODELS = {
    "hands on": (with_block_that_hands_on, ATTENTION + FEEDFORWARD, ATTENTION + FEEDFORWARD),
    "identity": (with_identity_block, ATTENTION + FEEDFORWARD, ("self_attn.o_proj", "mlp.down_proj")),
    "silent inputs": (with_silent_inputs, ATTENTION, ATTENTION),
    "unfelt outputs": (with_unfelt_outputs, FEEDFORWARD, ()),
}
TRAINING = {"steps": 2, "held_out": 2, "evaluate_every": 1}
METHODS: dict[str, dict[str, Any]] = {
    name: {"method": name} for name in ("global", "svd", "asvd", "svd_llm", "svd_llm_v2", "output_pca", "dobi_ipca")
} | {
    "low_rank": {"method": "global", "structure": "low_rank"},
    "dobi": {"method": "dobi", "training": TRAINING},
    "fixed basis": {"method": "global", "allocation": "dobi_fixed_basis", "training": TRAINING},
    "int8": {"method": "global", "quantization": "int8", "ratio": 0.4},
    "nf4": {"method": "global", "quantization": "nf4", "ratio": 0.3},
    "gptq": {"method": "global", "quantization": "gptq4_g32", "ratio": 0.3},
    "mixed": {"method": "global", "quantization": "gptq4_g32", "ratio": 0.2, "mixed": True},
}


def quantizer(**settings: Any) -> DobiSVDQuantizer:
    return DobiSVDQuantizer(**{"ratio": 0.8, **settings}, dataset=tokens(16, 24))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MODELS)
def test_every_method_compresses_the_model(kind: str, method: str) -> None:
    if method in ("gptq", "mixed"):
        pytest.importorskip("gptqmodel")
    model, ids = MODELS[kind][0](), tokens(2, 24, seed=7)
    done = quantizer(**METHODS[method], min_coverage=0)
    done.quantize_model(model)
    assert done.report is not None
    assert all(module.error is None or 0 <= module.error < 1 for module in done.report.modules)
    with torch.no_grad():
        assert bool(torch.isfinite(model(ids).logits).all())
    assert all(bool(torch.isfinite(each.dense_matrix()).all()) for each in compressed_linears(model).values())


@pytest.mark.parametrize("kind", MODELS)
def test_their_importance_is_zero_and_their_rank_the_lowest(kind: str) -> None:
    make, unfelt, silent = MODELS[kind]
    model = make()
    done = quantizer(method="global", structure="low_rank", ratio=0.5)
    job = done.prepare(model)
    assert job.windows is not None
    store = collect(model, job, job.windows, fingerprint(model, job.windows))
    done.run(model, job)
    assert done.plan is not None
    for name, module in done.plan.modules.items():
        worthless = name.startswith("model.layers.1.") and name.removeprefix("model.layers.1.") in unfelt
        assert (module.rank == 1) is worthless, name
    block = store.block("model.layers.1")
    for name in unfelt:
        linear = f"model.layers.1.{name}"
        assert store.gradients("model.layers.1")[linear].energy == 0 or name in silent
        assert not bool(block.inputs[block.input_key[linear]].gram.any()) or name not in silent or kind == "identity"


@pytest.mark.parametrize("method", ["asvd", "svd_llm", "svd_llm_v2", "output_pca"])
@pytest.mark.parametrize("kind", ["hands on", "silent inputs"])
def test_what_has_no_outputs_costs_nothing_in_any_metric(kind: str, method: str) -> None:
    make, _, silent = MODELS[kind]
    model = make()
    done = quantizer(method=method)
    job = done.prepare(model)
    assert job.windows is not None
    store = collect(model, job, job.windows, fingerprint(model, job.windows))
    row, weights = job.method.factorizer, dict(model.named_parameters())
    spectra = compute_spectra(job.layout, row, store, job.device)
    found = dict(decompositions(job.layout, row, store, job.device, job.layout.linears))
    for name, spectrum in spectra.items():
        assert bool(spectrum.any()) is (name.removeprefix("model.layers.1.") not in silent), name
        assert torch.equal(found[name].singular_values > 0, spectrum[: len(found[name].singular_values)] > 0)
        product = found[name].truncate(min(weights[f"{name}.weight"].shape)).product()
        torch.testing.assert_close(product, weights[f"{name}.weight"].double(), rtol=0, atol=1e-4)


def test_a_text_that_excites_nothing_is_an_error() -> None:
    model = wide()
    for layer in model.model.layers:
        layer.input_layernorm.weight.data.zero_()
        layer.post_attention_layernorm.weight.data.zero_()
    with pytest.raises(ValueError, match="no matrix has an importance score above zero.*calibrate on other text"):
        quantizer(method="global").quantize_model(model)


def test_a_linear_that_a_block_never_calls_beside_others_is_left_dense_and_counted() -> None:
    model = wide()
    model.model.layers[1].mlp.spare = torch.nn.Linear(64, 64)
    compressed = quantizer(method="svd_llm_v2").quantize_model(model)
    assert type(compressed.model.layers[1].mlp.spare) is torch.nn.Linear
    assert "4,096 parameters not called on a text" in compressed.dobisvd_report.left_dense
    assert 0.9 < compressed.dobisvd_report.coverage < 1
