"""Factors stored otherwise afterwards: in 16 bits for healing, in our own 8 bits after it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from integration_tests.integrations.test_round_trip import assert_reloaded_alike, logits
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer, LowRankLinear, adapter_targets
from optimum_dobisvd.model.patterns import matching_names
from optimum_dobisvd.checkpoint.hf_quantizer import store_as
from optimum_dobisvd.nn.compressed_linear import CompressedLinear

ARCHITECTURES = ("llama", "qwen2", "gpt2")
WHOLE = "model.layers.1.self_attn.q_proj"
EXCLUDED = "re:.*0.*(down_proj|mlp.c_proj)"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    for architecture in ARCHITECTURES:
        tiny(architecture).save_pretrained(folder / architecture)
    return folder


def compressed(folder: Path, **options: Any) -> Any:
    config = DobiSVDConfig(method="svd", **{"ratio": 0.6, **options}, modules_to_not_convert=[EXCLUDED])
    return DobiSVDQuantizer(config).quantize_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))


def low_rank(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def matrices(model: Any) -> dict[str, torch.Tensor]:
    shells = {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
    return {name: module.dense_matrix().detach() for name, module in shells.items()}


def test_they_are_near_what_they_were_and_load_bit_for_bit_in_a_new_process(dense: Path, tmp_path: Path) -> None:
    expected = {}
    for architecture in ARCHITECTURES:
        for storage in ("int8", "remap"):
            model = compressed(dense / architecture)
            before = matrices(model)
            store_as(model, storage)
            for name, matrix in matrices(model).items():
                if name in before:
                    assert 0 < float((matrix - before[name]).norm() / before[name].norm()) < 0.02, (name, storage)
            entries = model.config.quantization_config.modules
            assert {entry["storage"] for entry in entries.values()} <= {storage, "dense_int8"}
            assert not any(".0." in name and ("down" in name or "mlp.c_proj" in name) for name in entries)
            name = f"{architecture}-{storage}"
            model.save_pretrained(tmp_path / name)
            expected[name] = logits(model)
    assert_reloaded_alike(tmp_path, expected)


def test_int8_takes_whole_matrices_and_remap_leaves_them(dense: Path) -> None:
    """But for those that were to stay dense."""
    kept = WHOLE.replace("q_proj", "k_proj")
    for storage, taken in (("int8", True), ("remap", False)):
        model = compressed(dense / "llama", ratio=0.99, overrides={kept: {"dense": True}})
        whole = [n for n, module in model.named_modules() if type(module) is torch.nn.Linear and n.endswith("_proj")]
        assert kept in whole
        assert len(whole) > 2, "the plan leaves some whole"
        store_as(model, storage)
        for name in whole:
            excluded = name == kept or matching_names(EXCLUDED, [name])
            assert isinstance(model.get_submodule(name), CompressedLinear) == (taken and not excluded), name


def test_a_model_of_whole_8_bit_matrices_is_healed_like_any_other(dense: Path, tmp_path: Path) -> None:
    model = compressed(dense / "llama", storage="int8", ratio=0.6)
    shells = [name for name, module in model.named_modules() if isinstance(module, CompressedLinear)]
    assert not low_rank(model)
    assert len(shells) > 3
    eight = matrices(model)
    store_as(model, "plain")
    assert not matrices(model)
    assert set(shells) < set(adapter_targets(model))
    model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(again), logits(model))
    store_as(again, "int8")
    after = matrices(again)
    for name, matrix in eight.items():
        assert float((after[name] - matrix).norm()) < 0.01 * float(matrix.norm())


def test_plan_and_report_of_a_compression_do_not_outlive_its_storage(dense: Path, tmp_path: Path) -> None:
    model = compressed(dense / "llama")
    model.save_pretrained(tmp_path / "one")
    store_as(model, "int8").save_pretrained(tmp_path / "two")
    assert (tmp_path / "one" / "dobisvd_plan.json").exists()
    assert not list((tmp_path / "two").glob("dobisvd_*.json"))


def test_there_and_back_keeps_what_8_bits_stand_for(dense: Path) -> None:
    for storage in ("int8", "remap"):
        model = store_as(compressed(dense / "llama"), storage)
        eight = matrices(model)
        store_as(model, "plain")
        assert {entry["storage"] for entry in model.config.quantization_config.modules.values()} == {"plain"}
        again = {name: module.dense_matrix() for name, module in low_rank(model).items()}
        for name, matrix in again.items():
            assert float((matrix - eight[name]).norm() / eight[name].norm()) < 0.004, "bfloat16 and no more"
        model.requires_grad_(True)
        model(input_ids=tokens(1, 8), labels=tokens(1, 8)).loss.backward()
        assert all(module.first.weight.grad is not None for module in low_rank(model).values())


def test_what_another_library_quantized_is_refused_before_anything_is_changed(dense: Path) -> None:
    model = compressed(dense / "llama")
    before = matrices(model)
    list(low_rank(model).values())[-1].storage = "nf4"
    with pytest.raises(ValueError, match="is stored as nf4, which another library reads"):
        store_as(model, "int8")
    assert all(torch.equal(matrix, before[name]) for name, matrix in matrices(model).items())
    with pytest.raises(ValueError, match="one of plain, remap, int8"):
        store_as(model, "int4")


def test_a_model_without_factors_is_refused(dense: Path) -> None:
    model = compressed(dense / "llama", ratio=1.0, overrides={"re:.*": {"dense": True}})
    with pytest.raises(ValueError, match="no matrix to store as int8: compress it first"):
        store_as(model, "int8")
