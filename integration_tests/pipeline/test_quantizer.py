"""All of the pipeline in memory: what `DobiSVDQuantizer` makes of a model, and what it reports of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from integration_tests.pipeline.tiny_model_compression import (
    WINDOWS,
    assert_as_planned,
    assert_function_of_factors,
    compress,
    done,
    logits,
    relative,
)
from integration_tests.statistics.tiny_model_statistics import inputs_by_linear
from integration_tests.tiny_models import MODEL_TYPES, tiny
from optimum_dobisvd import METHODS, DobiSVDConfig, DobiSVDQuantizer
from optimum_dobisvd.calibration.dataset import tokenizer_identity
from optimum_dobisvd.model.experts import linearize
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.model.linears import weight_matrix
from optimum_dobisvd.structures.base import compressed_linears

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2"])
def test_every_method_compresses_as_planned(model_type: str, method: str) -> None:
    model, dense = tiny(model_type), tiny(model_type)
    quantizer = compress(model, method=method)
    plan, report = done(quantizer)
    assert_as_planned(model, dense, plan)
    targets = find_layout(dense).targets
    assert plan.modules.keys() == {target.name for target in targets}
    assert plan.ratio_of(targets) <= 0.7
    # No room for another step: a rank is at most m + n elements of the largest matrix, 16 ranks in 8 bits a quarter.
    step = 128 * (16 / 2 if METHODS.get(method).encoding == "remap" else 4)
    assert plan.ratio_of(targets) > 0.7 - step / sum(target.dense_bytes for target in targets)
    assert report.method == method
    assert_function_of_factors(model, dense)
    errors = [module.error for module in report.modules]
    assert all(error is None for error in errors) or all(error is not None and 0 <= error < 0.9 for error in errors)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_architecture_is_compressed(model_type: str) -> None:
    model, dense = tiny(model_type), tiny(model_type)
    plan, _ = done(compress(model, ratio=0.9, allocation="uniform"))
    assert_as_planned(model, dense, plan)
    assert len(compressed_linears(model)) > 3
    assert_function_of_factors(model, dense)
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    tied = dense.get_input_embeddings().weight is dense.get_output_embeddings().weight
    assert (embeddings[0].weight is embeddings[1].weight) == tied


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "mixtral"])
def test_the_reports_figures_are_what_the_model_shows(model_type: str) -> None:
    model, dense = tiny(model_type), tiny(model_type)
    overrides = {"re:.*0.*(down_proj|fc2|c_proj|o_proj)": {"dense": True}}
    plan, report = done(compress(model, method="svd_llm_v2", overrides=overrides))
    linearize(dense)
    targets = find_layout(dense).linears
    found = compressed_linears(model)

    def nbytes(parameters: Any) -> int:
        return sum(parameter.nbytes for parameter in {id(each): each for each in parameters}.values())

    def macs(of: nn.Module) -> int:
        return sum(module.weight.numel() for module in of.modules() if type(module) in (nn.Linear, Conv1D))

    assert report.dense_model_bytes == nbytes(dense.parameters())
    assert report.compressed_model_bytes == nbytes(model.parameters())
    assert report.dense_target_bytes == sum(module.weight.nbytes for module in targets.values())
    assert report.target_bytes == sum(
        found[name].first.weight.nbytes + found[name].second.weight.nbytes if name in found else module.weight.nbytes
        for name, module in targets.items()
    )
    assert (report.dense_macs, report.compressed_macs) == (macs(dense), macs(model))
    ratios = report.to_dict()["ratios"]
    assert ratios["target_bytes"] == pytest.approx(report.target_bytes / report.dense_target_bytes, abs=1e-6)
    assert ratios["macs_per_token"] == pytest.approx(macs(model) / macs(dense), abs=1e-6)

    inputs = inputs_by_linear(dense, targets, WINDOWS)
    assert [module.name for module in report.modules] == list(targets)
    for module in report.modules:
        planned = plan.modules[module.name]
        assert (module.structure, module.rank, module.encoding) == (planned.structure, planned.rank, planned.encoding)
        weight = weight_matrix(targets[module.name]).double()
        assert (module.out_features, module.in_features) == tuple(weight.shape)
        if module.name not in found:
            assert module.error == 0
            continue
        factors = found[module.name]
        product = factors.second.weight.detach().double() @ factors.first.weight.detach().double()
        x = inputs[module.name]
        assert module.error == pytest.approx(relative(product @ x, weight @ x), rel=1e-3)
        values = torch.linalg.svdvals(weight @ x)
        assert module.error == pytest.approx(float(values[module.rank :].norm() / values.norm()), rel=1e-3)
    assert {module.rank is None for module in report.modules} == {True, False}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_keeps_it(dtype: torch.dtype) -> None:
    model, dense = tiny("llama", dtype=dtype), tiny("llama", dtype=dtype)
    plan, report = done(compress(model, ratio=0.9))
    assert_as_planned(model, dense, plan)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert report.dense_target_bytes == sum(2 * m.weight.numel() for m in find_layout(dense).linears.values())


def test_compression_is_deterministic() -> None:
    one, other = tiny("llama"), tiny("llama")
    compress(one)
    compress(other)
    for name, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


@pytest.mark.parametrize("method", ["svd_llm_v2", "dobi_ipca"])
def test_an_offloaded_model_is_compressed_where_it_lies(method: str) -> None:
    here, away = tiny("qwen2"), tiny("qwen2")
    cpu_offload(away, execution_device=torch.device("cpu"))
    compress(here, method=method)
    plan, _ = done(compress(away, method=method))
    assert {parameter.device.type for parameter in away.parameters()} == {"meta"}
    assert compressed_linears(away).keys() == {name for name, entry in plan.modules.items() if entry.rank is not None}
    assert relative(logits(away), logits(here)) < 1e-5


@NEEDS_CUDA
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("home", "device"), [("cuda", None), ("cpu", "cuda"), ("cuda", "cuda")])
def test_a_gpu_makes_the_same_model(home: str, device: str | None, method: str) -> None:
    expected, model = tiny("llama"), tiny("llama").to(home)
    compress(expected, method=method)
    compress(model, method=method, device=device)
    assert {parameter.device.type for parameter in model.parameters()} == {home}
    # Learned ranks may tip: on a CPU, weights that differ by 1e-7 of themselves move the logits by 0.06, too.
    assert relative(logits(model.cpu()), logits(expected)) < (0.15 if METHODS.get(method).learns else 1e-2)


@pytest.mark.parametrize("home", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_tied_embeddings_stay_tied(home: str, tmp_path: Path) -> None:
    model = tiny("llama_tied").to(home)
    before = dict(model.named_parameters(remove_duplicate=False))
    compress(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after["lm_head.weight"] is after["model.embed_tokens.weight"]
    assert all(after[name] is parameter for name, parameter in before.items() if "_proj" not in name)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_the_quantizer_goes_through_its_own_dictionary() -> None:
    quantizer = DobiSVDQuantizer(method="output_pca", ratio=0.5, seed=3, overrides={"q_proj": {"rank": 4}})
    again = DobiSVDQuantizer.from_dict(json.loads(json.dumps(quantizer.to_dict())))
    assert again.to_dict() == quantizer.to_dict()


def test_either_a_config_or_its_fields() -> None:
    config = DobiSVDConfig(ratio=0.5)
    assert DobiSVDQuantizer(config).config is config
    with pytest.raises(TypeError, match="not both"):
        DobiSVDQuantizer(config, ratio=0.5)
    with pytest.raises(ValueError, match="unknown key 'ration'.*'ratio'"):
        DobiSVDQuantizer(ration=0.5)


def test_a_quantizer_can_be_used_again_with_another_tokenizer(tiny_tokenizer: Any) -> None:
    other = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<eos>")
    other.add_tokens(["republic"])
    quantizer = DobiSVDQuantizer(dataset=["The republic stood on a hill. " * 40], nsamples=2, seqlen=32)
    for tokenizer in (tiny_tokenizer, other):
        quantizer.quantize_model(tiny("llama", vocab_size=400), tokenizer)
        _, report = done(quantizer)
        assert report.dataset is not None
        assert report.dataset["tokenizer"] == tokenizer_identity(tokenizer)


def test_saving_before_compressing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="call quantize_model first"):
        DobiSVDQuantizer(ratio=0.5).save(tiny("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
