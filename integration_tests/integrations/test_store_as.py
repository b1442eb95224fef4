"""Factors stored otherwise afterwards: in 16 bits for healing, in our own 8 bits after it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from integration_tests.integrations.test_round_trip import assert_reloaded_alike, logits
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer, LowRankLinear
from optimum_dobisvd.integrations.transformers_quantizer import store_as
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
    for storage, left in (("int8", 0), ("remap", 1)):
        model = compressed(dense / "llama", overrides={WHOLE: {"dense": True}})
        assert not isinstance(model.get_submodule(WHOLE), CompressedLinear)
        store_as(model, storage)
        is_shell = isinstance(model.get_submodule(WHOLE), CompressedLinear)
        assert is_shell == (left == 0)


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


def test_what_another_library_quantised_is_refused_before_anything_is_changed(dense: Path) -> None:
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
    with pytest.raises(ValueError, match="no factors to store otherwise: compress it first"):
        store_as(model, "int8")
