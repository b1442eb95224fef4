"""What ranks are priced by: the singular values of every matrix in a metric, computed once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from integration_tests.statistics.tiny_model_statistics import collect, collect_gradients, inputs_by_linear
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd.factorization.decompositions import PreparedInputs, compute_spectra
from optimum_dobisvd.factorization.registry import FACTORIZATIONS, Factorization
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.model.linears import weight_matrix
from optimum_dobisvd.statistics.store import full_gram

METRICS = ("svd", "asvd", "svd_llm_v2", "output_pca")


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_spectrum_is_that_of_the_outputs(model_type: str) -> None:
    model = tiny(model_type)
    layout = find_layout(model)
    ids = tokens(6, 32)
    store = collect(model, ids)
    inputs = inputs_by_linear(model, layout.linears, ids)
    spectra = compute_spectra(layout, FACTORIZATIONS.get("svd_llm_v2"), store, None)
    assert spectra.keys() == layout.linears.keys()
    for name, x in inputs.items():
        weight = weight_matrix(layout.linears[name]).double()
        expected = torch.linalg.svdvals(weight @ x)[: min(weight.shape)]
        torch.testing.assert_close(spectra[name], expected, rtol=0, atol=1e-3 * float(expected[0]))


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_prices_every_rank_even_where_tokens_are_fewer_than_features(metric: str) -> None:
    """An allocator reads min(m, n) values, descending: directions without inputs are free, and not missing."""
    model = tiny("llama")
    layout = find_layout(model)
    spectra = compute_spectra(layout, FACTORIZATIONS.get(metric), collect(model, tokens(1, 7)), None)
    for name, module in layout.linears.items():
        values = spectra[name]
        assert values.shape == (min(weight_matrix(module).shape),)
        assert values.dtype == torch.float64
        assert bool((values[1:] <= values[:-1]).all())
        assert float(values[-1]) >= 0
        if metric in ("svd_llm_v2", "output_pca"):
            assert float(values[7:].norm()) <= 1e-3 * float(values[0])


def test_no_data_needs_no_store() -> None:
    model = tiny("llama")
    layout = find_layout(model)
    spectra = compute_spectra(layout, FACTORIZATIONS.get("svd"), None, None)
    name = "model.layers.1.mlp.up_proj"
    torch.testing.assert_close(spectra[name], torch.linalg.svdvals(layout.linears[name].weight.detach().double()))


def counting(name: str, calls: list[Any]) -> Factorization:
    row = FACTORIZATIONS.get("svd_llm_v2")

    def prepare(statistic: Tensor) -> Any:
        calls.append("prepare")
        return row.prepare(statistic)

    def spectrum(weight: Tensor, prepared: Any) -> Tensor:
        calls.append("spectrum")
        return row.spectrum(weight, prepared)

    return Factorization(name, "gram", prepare, row.decompose, spectrum)


def test_a_shared_input_is_prepared_once_and_spectra_are_computed_once(tmp_path: Path) -> None:
    model = tiny("llama")
    layout = find_layout(model)
    calls: list[str] = []
    row = counting("counted", calls)
    first = compute_spectra(layout, row, collect(model, tokens(2, 40), folder=tmp_path), None)
    assert calls.count("prepare") == 4 * 3
    assert calls.count("spectrum") == 7 * 3
    calls.clear()
    again = compute_spectra(layout, row, collect(model, tokens(2, 40), folder=tmp_path), None)
    assert calls == []
    assert all(torch.equal(again[name], first[name]) for name in first)
    compute_spectra(layout, counting("another", calls), collect(model, tokens(2, 40), folder=tmp_path), None)
    assert calls


def test_spectra_that_lack_a_linear_are_computed_again() -> None:
    model = tiny("llama")
    store = collect(model, tokens(2, 40))
    row = FACTORIZATIONS.get("svd_llm_v2")
    some = compute_spectra(find_layout(model, ["down_proj"]), row, store, None)
    layout = find_layout(model)
    complete = compute_spectra(layout, row, store, None)
    assert complete.keys() == layout.linears.keys()
    assert all(torch.equal(complete[name], values) for name, values in some.items())


def test_errors_name_the_linear() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: .* needs calibration statistics"):
        compute_spectra(find_layout(model), FACTORIZATIONS.get("svd_llm_v2"), None, None)
    fewer = collect(model, tokens(2, 16), exclude=["v_proj"])
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.v_proj: .* excluded when they were collected"):
        compute_spectra(find_layout(model), FACTORIZATIONS.get("svd_llm_v2"), fewer, None)


def test_prepared_inputs_give_the_gram_or_nothing() -> None:
    model = tiny("llama")
    block, name = "model.layers.0", "model.layers.0.mlp.down_proj"
    store = collect(model, tokens(2, 16))
    for metric in METRICS:
        assert PreparedInputs(FACTORIZATIONS.get(metric), store, block, None).gram(name).shape == (48, 48)
    assert PreparedInputs(FACTORIZATIONS.get("svd"), None, block, None).gram(name) is None
    assert PreparedInputs(FACTORIZATIONS.get("svd"), None, block, None).of(name) is None


def test_squares_of_the_loss_metric_are_nats_per_token() -> None:
    """The sum over a matrix is the K-FAC estimate of what the loss gains when the matrix is taken away."""
    model, ids = tiny("llama"), tokens(6, 16)
    store = collect(model, ids)
    gradients = collect_gradients(model, ids[:4])
    store.open_gradients({"tokens": 4 * 16})
    layout = find_layout(model)
    for block in layout.blocks:
        store.put_gradients(block, gradients.gradients(block))
    spectra = compute_spectra(layout, FACTORIZATIONS.get("kfac"), store, None)
    for block in layout.blocks:
        for name, module in layout.linears_of(block).items():
            h = full_gram(store.block(block).inputs[store.block(block).input_key[name]]) / (6 * 16)
            g = full_gram(gradients.gradients(block)[name]) / (4 * 16)
            g += 0.01 * g.diagonal().mean() * torch.eye(len(g))
            weight = weight_matrix(module).double()
            expected = 0.5 * torch.trace(g @ weight @ h @ weight.T)
            assert float(spectra[name].square().sum()) == pytest.approx(float(expected), rel=1e-5)
    assert store.spectra("kfac") is not None


def test_the_loss_metric_needs_gradients() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"have no gradients, which this method.s importance scores need"):
        compute_spectra(find_layout(model), FACTORIZATIONS.get("kfac"), collect(model, tokens(2, 16)), None)
