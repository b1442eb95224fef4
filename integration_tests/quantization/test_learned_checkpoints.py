"""Learned codes in every encoding and structure: nearer to the dense model, and the same after a reload."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoRoundConfig, GPTQConfig

from integration_tests.checkpoint.reloading import LOAD_ALL, assert_reloaded_alike, logits
from integration_tests.fresh_processes import run_python
from integration_tests.quantization.quantized_models import SETTINGS, needs_bnb, needs_gptq, planned, wide
from integration_tests.statistics.tiny_model_statistics import windows_of
from integration_tests.tiny_architectures import tiny_architecture
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer, Plan, convert
from optimum_dobisvd.allocation.plan import PlannedModule
from optimum_dobisvd.encodings.learned_rounding import SignedDescent
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.structures.base import compressed_linears

LEARNED = {"rounding": "learned", "rounding_settings": {"steps": 12, "learning_rate": 0.05}}
ASKED: dict[str, tuple[Any, list[tuple[str, int | None]]]] = {
    "int8": (lambda: "int8", [("int8", 16), ("int8", None), ("int8", 16)]),
    "nf4": (SETTINGS["nf4"], [("nf4", 64), ("nf4", None), ("int8", 16), ("float", 9)]),
    "nf4_dq": (SETTINGS["nf4_dq"], [("nf4_dq", 64), ("nf4_dq", None)]),
    "gptq": (
        lambda: GPTQConfig(bits=3, group_size=32, sym=False),
        [("gptq3_g32", 32), ("gptq2_g32", None), ("int8", None), ("gptq4_g32", 32)],
    ),
    "gptq_desc_act": (SETTINGS["gptq_desc_act"], [("gptq4_g32", 32), ("gptq4_g32", None)]),
}


def made(folder: Path, key: str, dtype: torch.dtype = torch.float32, **rounding: Any) -> Any:
    """The dense model in a folder, as `ASKED` says, rounded so."""
    setting, encodings = ASKED[key]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = DobiSVDConfig(
        method="output_pca",
        dataset=tokens(6, 24),
        plan=planned(model, encodings),
        quantization=setting(),
        **rounding,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


@needs_gptq
@needs_bnb
def test_checkpoints_reload_bit_for_bit_with_and_without_the_package(tmp_path: Path) -> None:
    wide("qwen2").save_pretrained(tmp_path / "dense")
    expected = {}
    for key in ASKED:
        for dtype, rounding in (
            (torch.float32, LEARNED),
            (torch.bfloat16, LEARNED),
            (torch.float32, {"rounding": "nearest"}),
        ):
            model = made(tmp_path / "dense", key, dtype, **rounding)
            path = tmp_path / f"{key}-{str(dtype)[6:]}-{rounding['rounding']}"
            model.save_pretrained(path)
            expected[path.name] = logits(model)
            settled = model.config.quantization_config
            assert settled.rounding is None, "a reader need not know how codes were chosen"
            assert settled.rounding_settings == {}
            assert {"low_rank", "dense"} <= {entry["structure"] for entry in settled.modules.values()}
    assert_reloaded_alike(tmp_path, expected)
    code = LOAD_ALL.replace("from_pretrained(path)", "from_pretrained(path, trust_remote_code=True)")
    jobs = json.dumps([(str(tmp_path / name), str(tmp_path / f"{name}.bare")) for name in expected])
    done = run_python(code, jobs, without_package_in=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, wanted in expected.items():
        assert torch.equal(load_file(tmp_path / f"{name}.bare")["logits"], wanted), name
    assert "auto_round" not in sys.modules


@pytest.mark.parametrize("structure", ["dense", "low_rank", "pivoted"])
@pytest.mark.parametrize("name", [pytest.param("gptq2_g32", marks=needs_gptq), pytest.param("nf4", marks=needs_bnb)])
def test_learned_codes_are_nearer_to_the_dense_model_in_every_structure(name: str, structure: str) -> None:
    """Pivoted rows and the rows that are written in terms of them are learned in sequence, through each other."""
    ids, dense = tokens(8, 24), wide("llama")
    modules = {}
    for target in find_layout(dense).targets:
        rank = None if structure == "dense" or target.out_features <= 64 else 64
        modules[target.name] = PlannedModule("dense" if rank is None else structure, name, rank)
    lost = {}
    for rounding in ("nearest", "learned"):
        settings = {"steps": 40, "learning_rate": 0.02} if rounding == "learned" else {}
        config = DobiSVDConfig(
            method="output_pca",
            dataset=ids,
            plan=Plan(modules, method="output_pca", ratio=None, allocation="by hand"),
            quantization="gptq2_g32" if name == "gptq2_g32" else SETTINGS["nf4"](),
            rounding=rounding,
            rounding_settings=settings,
        )
        model = DobiSVDQuantizer(config).quantize_model(wide("llama"))
        assert {module.encoding for module in compressed_linears(model).values()} == {name}
        lost[rounding] = float((logits(model, ids) - logits(dense, ids)).square().mean())
    assert lost["learned"] < 0.9 * lost["nearest"]


@needs_gptq
def test_in_a_mixture_8_bits_are_learned_along(tmp_path: Path) -> None:
    wide("llama").save_pretrained(tmp_path / "dense")
    one, other = (made(tmp_path / "dense", "gptq", **each) for each in (LEARNED, {"rounding": "nearest"}))
    names = [name for name, module in compressed_linears(one).items() if module.encoding == "int8"]
    assert names
    for name in names:
        here, there = (each.get_submodule(name).linear.weight for each in (one, other))
        moved = (here.int() - there.int()).abs()
        assert bool(moved.any()), name
        assert float((here.float() / here.float().norm() - there.float() / there.float().norm()).norm()) < 0.1


REST = {**LEARNED, "rounding_settings": {"steps": 12, "learning_rate": 0.02, "rest_learning_rate": 0.01}}


@needs_bnb
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_rounded_trains_along_and_is_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    """Norms, biases and 16-bit factors, of the blocks alone."""
    wide("qwen2").save_pretrained(tmp_path / "dense")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    models = {name: made(tmp_path / "dense", "nf4", dtype, **each) for name, each in (("a", LEARNED), ("b", REST))}
    for name in ("model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(models["b"].get_parameter(name), before.get_parameter(name))
    norm = "model.layers.1.input_layernorm.weight"
    assert torch.equal(models["a"].get_parameter(norm), before.get_parameter(norm)), "off by default"
    assert not torch.equal(models["b"].get_parameter(norm), before.get_parameter(norm))
    floats = [n for n, module in compressed_linears(models["b"]).items() if module.encoding == "float"]
    assert floats
    for name in floats:
        one, other = (models[key].get_submodule(name).second for key in "ab")
        assert not torch.equal(one.weight, other.weight), name
        assert other.weight.requires_grad
    for model in models.values():
        assert model.get_parameter(norm).requires_grad
        assert model.get_parameter(norm).dtype == dtype
    models["b"].save_pretrained(tmp_path / "out")
    assert_reloaded_alike(tmp_path, {"out": logits(models["b"])})


@needs_bnb
def test_what_is_frozen_is_not_trained_along() -> None:
    model = wide("llama")
    norm = model.model.layers[0].input_layernorm.weight.requires_grad_(False)
    values, other = norm.clone(), model.model.layers[0].post_attention_layernorm.weight.detach().clone()
    config = DobiSVDConfig(
        method="svd", dataset=tokens(6, 24), ratio=0.25, quantization=SETTINGS["nf4"](), min_coverage=0.5, **REST
    )
    DobiSVDQuantizer(config).quantize_model(model)
    assert torch.equal(norm, values)
    assert not norm.requires_grad
    assert not torch.equal(model.model.layers[0].post_attention_layernorm.weight, other)
    frozen = wide("llama").requires_grad_(False)
    with pytest.raises(ValueError, match=r"every parameter of LlamaForCausalLM is frozen: call .*requires_grad_"):
        DobiSVDQuantizer(config).quantize_model(frozen)


@pytest.mark.parametrize("step", [0, 15])
def test_an_error_on_the_way_leaves_the_dense_model(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first block or the second; what was trained along is put back, too."""
    model, steps = wide("llama"), [0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    take = SignedDescent.step

    def failing(self: SignedDescent, loss: torch.Tensor) -> None:
        if steps[0] == step:
            raise KeyboardInterrupt
        steps[0] += 1
        take(self, loss)

    monkeypatch.setattr(SignedDescent, "step", failing)
    config = DobiSVDConfig(method="output_pca", ratio=0.4, dataset=tokens(6, 24), quantization="int8", **REST)
    with pytest.raises(KeyboardInterrupt):
        DobiSVDQuantizer(config).quantize_model(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_experts_learn_their_codes(tmp_path: Path) -> None:
    model = tiny("mixtral")
    config = DobiSVDConfig(method="output_pca", ratio=0.5, dataset=tokens(6, 24), quantization="int8", **LEARNED)
    DobiSVDQuantizer(config).quantize_model(model).save_pretrained(tmp_path / "out")
    assert any("experts" in name for name in compressed_linears(model))
    assert_reloaded_alike(tmp_path, {"out": logits(model)})


@needs_gptq
@pytest.mark.parametrize("size", [32, 64])
def test_ranks_are_such_that_groups_divide_them_and_the_size_is_kept(size: int) -> None:
    settings = AutoRoundConfig(bits=4, group_size=size, sym=False, iters=1)
    config = DobiSVDConfig(
        method="output_pca", ratio=0.13, dataset=tokens(6, 24), quantization=settings, structure="low_rank"
    )
    model = DobiSVDQuantizer(config).quantize_model(wide("llama"))
    ranks = {module.rank for module in compressed_linears(model).values() if module.encoding != "int8"} - {None}
    assert ranks
    assert all(rank % size == 0 for rank in ranks)
    stored = sum(
        tensor.nbytes
        for module in compressed_linears(model).values()
        for name, tensor in module.state_dict().items()
        if not name.endswith("bias")
    )
    assert stored <= model.dobisvd_report.target_bytes


@needs_gptq
def test_groups_that_fit_no_input_are_refused_with_the_size_that_fits() -> None:
    settings = AutoRoundConfig(bits=4, group_size=256, iters=1)
    config = DobiSVDConfig(method="output_pca", ratio=0.2, dataset=tokens(6, 24), quantization=settings)
    with pytest.raises(ValueError, match=r"cannot be stored as gptq4_g256.*take group_size=128"):
        DobiSVDQuantizer(config).quantize_model(wide("llama"))


@pytest.mark.parametrize(
    "quantization", ["int8", pytest.param("nf4", marks=needs_bnb), pytest.param("gptq4_g32", marks=needs_gptq)]
)
def test_learning_without_text_is_refused_and_changes_nothing(quantization: str) -> None:
    config = DobiSVDConfig(method="svd", ratio=0.4, quantization=quantization, rounding="learned")
    with pytest.raises(ValueError, match=r"needs calibration text for its rounding \(learned\).*rounding='nearest'"):
        DobiSVDQuantizer(config).quantize_model(wide("llama"))
    model = DobiSVDQuantizer(DobiSVDConfig(method="svd", ratio=0.8)).quantize_model(wide("llama"))
    before = [id(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"needs calibration text for its rounding \(learned\): pass windows"):
        convert(model, quantization, rounding="learned")
    assert [id(module) for module in model.modules()] == before


@pytest.mark.parametrize("rounding", ["nearest", "learned"])
def test_a_saved_model_is_rounded_as_asked(rounding: str, tmp_path: Path) -> None:
    model = DobiSVDQuantizer(DobiSVDConfig(method="svd", ratio=0.6)).quantize_model(wide("llama"))
    ids = tokens(6, 24)
    settings = {"steps": 30} if rounding == "learned" else {}
    expected = logits(model, ids)
    convert(model, "int8", windows=windows_of(ids), rounding=rounding, rounding_settings=settings)
    assert {module.encoding for module in compressed_linears(model).values()} == {"int8"}
    assert float((logits(model, ids) - expected).norm() / expected.norm()) < 0.05
    with pytest.raises(ValueError, match="it is stored as int8"):
        convert(model, "int8", windows=windows_of(ids), rounding="learned")
    model.save_pretrained(tmp_path / "out")
    assert_reloaded_alike(tmp_path, {"out": logits(model)})


def test_blocks_that_cannot_be_run_one_by_one_are_refused_before_any_work(tmp_path: Path) -> None:
    model = tiny_architecture("t5")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = DobiSVDConfig(
        method="output_pca",
        ratio=0.4,
        dataset=tokens(6, 24),
        quantization="int8",
        statistics=tmp_path / "statistics",
        **LEARNED,
    )
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration passes state between its blocks, and rounding"):
        DobiSVDQuantizer(config).quantize_model(model)
    assert not (tmp_path / "statistics").exists()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
