"""Another encoding for a compressed model afterwards: 16 bits for healing, our own 8 bits after it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from integration_tests.checkpoint.reloading import OFFLOADED, assert_reloaded_alike, logits
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer, LowRankLinear, adapter_targets, convert
from optimum_dobisvd.model.patterns import matching_names
from optimum_dobisvd.structures.base import compressed_linears, is_compressed

ARCHITECTURES = ("llama", "qwen2", "gpt2")
KEPT_DENSE = "model.layers.1.self_attn.k_proj"
EXCLUDED = "re:.*0.*(down_proj|mlp.c_proj)"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    for architecture in ARCHITECTURES:
        tiny(architecture).save_pretrained(folder / architecture)
    return folder


def compressed(folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    config = DobiSVDConfig(method="svd", **{"ratio": 0.6, **options}, modules_to_not_convert=[EXCLUDED])
    return DobiSVDQuantizer(config).quantize_model(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


def low_rank(model: Any) -> dict[str, Any]:
    return {name: module for name, module in compressed_linears(model).items() if isinstance(module, LowRankLinear)}


def matrices(model: Any) -> dict[str, torch.Tensor]:
    return {name: module.dense_matrix().detach() for name, module in compressed_linears(model).items()}


def encodings(model: Any) -> set[str]:
    """The encodings that its config names, which must be those that its modules have."""
    entries = model.config.quantization_config.modules
    described = {
        name: {
            "structure": module.structure,
            **({} if module.rank is None else {"rank": module.rank}),
            "encoding": module.encoding,
        }
        for name, module in compressed_linears(model).items()
    }
    assert entries == described
    return {entry["encoding"] for entry in entries.values()}


def test_they_are_near_what_they_were_and_load_bit_for_bit_in_a_new_process(dense: Path, tmp_path: Path) -> None:
    expected = {}
    for architecture in ARCHITECTURES:
        for encoding in ("int8", "remap"):
            model = compressed(dense / architecture)
            before = matrices(model)
            convert(model, encoding)
            for name, matrix in matrices(model).items():
                if name in before:
                    assert 0 < float((matrix - before[name]).norm() / before[name].norm()) < 0.02, (name, encoding)
            assert encodings(model) == {encoding}
            assert model.config.quantization_config.quantization == encoding
            entries = model.config.quantization_config.modules
            structures = {entry["structure"] for entry in entries.values()}
            assert structures <= ({"low_rank", "dense"} if encoding == "int8" else {"low_rank"})
            assert not any(".0." in name and ("down" in name or "mlp.c_proj" in name) for name in entries)
            name = f"{architecture}-{encoding}"
            model.save_pretrained(tmp_path / name)
            expected[name] = logits(model)
    assert_reloaded_alike(tmp_path, expected)


def test_a_model_that_is_not_compressed_is_refused(dense: Path) -> None:
    never = AutoModelForCausalLM.from_pretrained(dense / "llama")
    for model in (never, compressed(dense / "llama").dequantize()):
        for quantization in (None, "int8"):
            with pytest.raises(ValueError, match=r"the model is not compressed: pass what from_pretrained loads"):
                convert(model, quantization)


def test_int8_takes_dense_matrices_and_remap_leaves_them(dense: Path) -> None:
    """But for those that were to stay dense."""
    for encoding, taken in (("int8", True), ("remap", False)):
        model = compressed(dense / "llama", ratio=0.99, overrides={KEPT_DENSE: {"dense": True}})
        left = [n for n, module in model.named_modules() if type(module) is torch.nn.Linear and n.endswith("_proj")]
        assert KEPT_DENSE in left
        assert len(left) > 2, "the plan leaves some dense"
        convert(model, encoding)
        for name in left:
            excluded = name == KEPT_DENSE or matching_names(EXCLUDED, [name])
            assert (name in compressed_linears(model)) == (taken and not excluded), name


def test_a_model_of_dense_8_bit_matrices_is_healed_like_any_other(dense: Path, tmp_path: Path) -> None:
    model = compressed(dense / "llama", quantization="int8", ratio=0.6)
    assert not low_rank(model)
    eight = matrices(model)
    assert len(eight) > 3
    convert(model)
    assert not is_compressed(model)
    assert set(eight) < set(adapter_targets(model))
    model.save_pretrained(tmp_path / "float")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    assert torch.equal(logits(again), logits(model))
    convert(again, "int8")
    after = matrices(again)
    for name, matrix in eight.items():
        assert float((after[name] - matrix).norm()) < 0.01 * float(matrix.norm())


def test_plan_and_report_of_a_compression_do_not_outlive_its_encoding(dense: Path, tmp_path: Path) -> None:
    model = compressed(dense / "llama")
    model.save_pretrained(tmp_path / "one")
    convert(model, "int8").save_pretrained(tmp_path / "two")
    assert (tmp_path / "one" / "dobisvd_plan.json").exists()
    assert not list((tmp_path / "two").glob("dobisvd_*.json"))


def test_there_and_back_keeps_what_8_bits_stand_for(dense: Path) -> None:
    for encoding in ("int8", "remap"):
        model = convert(compressed(dense / "llama"), encoding)
        eight = matrices(model)
        convert(model)
        assert encodings(model) == {"float"}
        assert model.config.quantization_config.quantization is None
        again = {name: module.dense_matrix() for name, module in low_rank(model).items()}
        for name, matrix in again.items():
            assert float((matrix - eight[name]).norm() / eight[name].norm()) < 0.004, "bfloat16 and no more"
        model.requires_grad_(True)
        model(input_ids=tokens(1, 8), labels=tokens(1, 8)).loss.backward()
        assert all(module.first.weight.grad is not None for module in low_rank(model).values())


def test_what_another_library_quantized_is_refused_before_anything_is_changed(dense: Path) -> None:
    model = compressed(dense / "llama")
    before = matrices(model)
    list(low_rank(model).values())[-1].encoding = "nf4"
    with pytest.raises(ValueError, match="is stored as nf4, which another library reads"):
        convert(model, "int8")
    assert all(torch.equal(matrix, before[name]) for name, matrix in matrices(model).items())
    with pytest.raises(ValueError, match="unknown quantization 'int4': int8, remap, gptq2"):
        convert(model, "int4")


def test_a_model_without_factors_is_refused(dense: Path) -> None:
    model = compressed(dense / "llama", ratio=1.0, overrides={"re:.*": {"dense": True}})
    with pytest.raises(ValueError, match="no matrix to store as int8: compress it first"):
        convert(model, "int8")


def test_what_is_stored_so_already_stays_as_it_is(dense: Path) -> None:
    for encoding in ("int8", "remap", None):
        model = convert(compressed(dense / "llama", ratio=0.9), encoding)
        before, stored = logits(model), encodings(model)
        convert(model, encoding)
        assert torch.equal(logits(model), before)
        assert encodings(model) == stored


def test_what_is_offloaded_is_refused_before_anything_is_changed(dense: Path, tmp_path: Path) -> None:
    compressed(dense / "llama").save_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map=OFFLOADED, offload_folder=tmp_path / "offload"
    )
    before = logits(model)
    with pytest.raises(ValueError, match=r"_proj is offloaded, .* load the model without cpu or disk offload"):
        convert(model, "int8")
    assert encodings(model) == {"float"}
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_from_two_factors_to_pivots_and_back(
    dense: Path, tmp_path: Path, architecture: str, quantization: str | None
) -> None:
    model = compressed(dense / architecture, torch.float32, ratio=0.4)
    exact, expected = matrices(model), logits(model)
    convert(model, quantization, structure="pivoted")
    assert {module.structure for module in compressed_linears(model).values() if module.rank} == {"pivoted"}
    assert encodings(model) == {quantization or "float"}
    close = {"atol": 1e-5, "rtol": 1e-4} if quantization is None else {"atol": 0.02, "rtol": 0.2}
    for name, matrix in matrices(model).items():
        torch.testing.assert_close(matrix, exact.get(name, matrix), **close)
    if quantization is None:
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-3)
    model.save_pretrained(tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(reloaded), logits(model))
    assert {module.structure for module in compressed_linears(reloaded).values() if module.rank} == {"pivoted"}
    convert(reloaded, structure="low_rank")
    assert low_rank(reloaded)
    assert not any(module.structure == "pivoted" for module in compressed_linears(reloaded).values())
    for name, matrix in matrices(reloaded).items():
        torch.testing.assert_close(matrix, exact[name], **close)


def test_two_factors_as_large_as_the_matrix_are_taken_whole(dense: Path) -> None:
    model = compressed(dense / "llama", structure="pivoted", ratio=0.9)
    exact = {name: module.dense_matrix() for name, module in compressed_linears(model).items()}
    large = {name for name, module in compressed_linears(model).items() if module.rank * 2 > module.in_features}
    assert large
    convert(model, structure="low_rank")
    assert not large & compressed_linears(model).keys()
    for name in large:
        assert torch.equal(model.get_submodule(name).weight, exact[name].to(torch.bfloat16))


def test_structures_can_be_taken_off(dense: Path) -> None:
    model = compressed(dense / "llama")
    expected = matrices(model)
    convert(model, "int8", structure="dense")
    assert {module.structure for module in compressed_linears(model).values()} == {"dense"}
    for name, matrix in expected.items():
        torch.testing.assert_close(compressed_linears(model)[name].dense_matrix(), matrix, atol=1e-2, rtol=0.1)


def test_a_structure_that_cannot_be_is_refused_before_anything_is_changed(dense: Path) -> None:
    model = compressed(dense / "llama", structure="pivoted")
    before = {name: id(module) for name, module in compressed_linears(model).items()}
    with pytest.raises(ValueError, match="unknown structure 'pivot'; known: pivoted"):
        convert(model, structure="pivot")
    with pytest.raises(ValueError, match=r"q_proj: remap is for factors .*; pass structure='low_rank', too"):
        convert(model, "remap")
    assert {name: id(module) for name, module in compressed_linears(model).items()} == before
    convert(model, "remap", structure="low_rank")
    assert encodings(model) == {"remap"}
