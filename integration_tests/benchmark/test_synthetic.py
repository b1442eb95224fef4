"""Models of random weights, dense and compressed."""

import pytest
import torch

from optimum_dobisvd.benchmark.synthetic import SHAPES, SyntheticModel, offloaded
from optimum_dobisvd.model.footprint import checkpoint_bytes, macs_per_token
from optimum_dobisvd.structures.base import compressed_linears

TINY = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
}


@pytest.mark.parametrize(
    ("structure", "quantization", "keep"),
    [
        ("pivoted", None, 0.5),
        ("low_rank", None, 0.4),
        ("pivoted", "int8", 0.25),
        ("low_rank", "int8", 0.25),
        ("dense", "int8", None),
        ("low_rank", "remap", 0.5),
    ],
)
@pytest.mark.parametrize("shape", ["llama-7b", "llama-1b"])  # one of them has a tied head
def test_it_keeps_the_share_of_bytes_that_is_asked_for_and_computes(
    structure: str, quantization: str | None, keep: float | None, shape: str
) -> None:
    wanted = SyntheticModel(shape, TINY, torch.bfloat16, structure, quantization, keep)
    dense, model = wanted.dense("cpu"), wanted.compressed("cpu")
    matrices = compressed_linears(model)
    assert len(matrices) == 2 * 7
    assert {each.encoding for each in matrices.values()} == {quantization or "float"}
    as_asked = [name for name, each in matrices.items() if each.structure == structure]
    assert len(as_asked) >= 10, "what is left of the bytes may make a small matrix dense in 8 bits"
    assert checkpoint_bytes(model) == wanted.compressed_bytes()
    targets = sum(dense.get_submodule(name).weight.nbytes for name in matrices)
    kept = (targets + checkpoint_bytes(model) - checkpoint_bytes(dense)) / targets
    assert kept <= (keep or 0.51)
    assert kept > 0.9 * (keep or 0.5), "to the nearest rank that the encoding takes"
    ids = torch.arange(6)[None]
    for each in (dense, model):
        assert each.dtype == torch.bfloat16
        assert not any(parameter.device.type == "meta" for parameter in each.parameters())
        with torch.inference_mode():
            logits = each(ids).logits.float()
        assert bool(logits.isfinite().all())
        assert 1e-3 < float(logits.std()) < 1e3


def test_factors_multiply_less() -> None:
    wanted = SyntheticModel("llama-7b", TINY, keep=0.5)
    assert macs_per_token(wanted.compressed("cpu")) < 0.7 * macs_per_token(wanted.dense("cpu"))


def test_the_shapes_are_those_of_the_models_they_are_named_after() -> None:
    def parameters(name: str) -> int:
        return checkpoint_bytes(SyntheticModel(name).meta()) // 2

    assert parameters("llama-7b") == 6_738_415_616
    assert parameters("llama-1b") == 1_235_814_400
    assert SHAPES["llama-8x2048"]["num_hidden_layers"] == 8


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"shape": "llama-9b"}, "there is no synthetic model 'llama-9b'; there are: llama-7b"),
        ({"changes": {"hidden": 64}}, "LlamaConfig has no field 'hidden'"),
        ({"structure": "dense", "keep": 0.5, "quantization": "int8"}, "'dense' has no rank.*leave keep out"),
        ({"structure": "dense"}, "name one with quantization"),
        ({"keep": None}, "say with keep"),
        ({"keep": 0.5, "quantization": "remap"}, "'pivoted' cannot be stored as remap"),
        ({"keep": 0.0001}, "raise ratio to"),
        ({"structure": "piovted", "keep": 0.5}, "pivoted"),
        ({"keep": 0.5, "quantization": "int9"}, "int8"),
    ],
)
def test_what_cannot_be_made_is_refused_before_it_is_made(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SyntheticModel(**{"shape": "llama-7b", "changes": TINY, **settings}).compressed_bytes()


def test_what_is_above_the_limit_is_offloaded_and_computes_the_same(tmp_path) -> None:
    wanted = SyntheticModel("llama-7b", TINY, torch.float32, keep=0.5)
    torch.manual_seed(0)
    model = wanted.dense("cpu")
    ids = torch.arange(6)[None]
    with torch.inference_mode():
        before = model(ids).logits
        placed = offloaded(model, "cpu", checkpoint_bytes(model) // 2, str(tmp_path))
        assert {"cpu", "disk"} == set(map(str, placed.hf_device_map.values()))
        assert torch.equal(placed(ids).logits, before)
