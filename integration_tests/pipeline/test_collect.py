"""The statistics store across runs: reused where it fits, refused where it does not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from integration_tests.pipeline.tiny_model_compression import compress, done, logits, refused
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd.calibration.runner import BlockRunner
from optimum_dobisvd.structures.base import compressed_linears


def test_a_store_serves_other_ratios_and_methods_without_another_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "statistics"
    compress(tiny("llama"), ratio=0.9, statistics=folder)
    expected = {}
    for method in ("output_pca", "asvd", "svd_llm_v2"):
        model = tiny("llama")
        compress(model, method=method, ratio=0.5)
        expected[method] = logits(model)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the text went through the model again")

    monkeypatch.setattr(BlockRunner, "run", never)
    for method, outputs in expected.items():
        model = tiny("llama")
        compress(model, method=method, ratio=0.5, statistics=folder)
        assert torch.equal(logits(model), outputs)


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    refused(tiny("llama"), "is not a statistics store", statistics=tmp_path)


def test_the_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    compress(tiny("llama"), statistics=tmp_path / "s")
    refused(tiny("llama", seed=1), "do not belong to this run.*weights", statistics=tmp_path / "s")
    refused(tiny("llama"), "do not belong to this run.*tokens", dataset=tokens(3, 9), statistics=tmp_path / "s")


def test_statistics_that_lack_a_linear_are_refused_before_anything_changes(tmp_path: Path) -> None:
    compress(tiny("llama"), statistics=tmp_path / "s", modules_to_not_convert=["down_proj"])
    refused(tiny("llama"), r"down_proj.*excluded when", statistics=tmp_path / "s", allocation="uniform")


@pytest.mark.parametrize("method", ["svd_llm_v2", "dobi_ipca"])
def test_activations_that_are_not_finite_are_named(method: str) -> None:
    model = tiny("llama")
    model.model.layers[1].input_layernorm.weight.data[3] = 3e38  # finite itself; its products are not
    refused(model, r"model\.layers\.1: its output has NaN", method=method)


def test_svd_needs_no_dataset_and_measures_nothing_then() -> None:
    model = tiny("llama")
    _, report = done(compress(model, method="svd", dataset=None))
    assert {module.error for module in report.modules} == {None}
    assert report.dataset is None
    assert compressed_linears(model)
