"""A compressed model built from its configuration alone, for programs that load the tensors themselves (vLLM's)."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from integration_tests.checkpoint.reloading import compressed
from integration_tests.mixed_checkpoint import mixed_checkpoint
from integration_tests.tiny_models import tiny
from optimum_dobisvd.structures.base import is_compressed


@pytest.mark.parametrize("told_in_config", [True, False])
def test_tensors_of_the_file_fit_into_it(tmp_path, monkeypatch, told_in_config):
    """Without `quantization_config`, which vLLM has to be told to forget, the checkpoint's own is read."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = mixed_checkpoint(tmp_path / "mixed", "llama")
    config = AutoConfig.from_pretrained(folder)
    if not told_in_config:
        config.quantization_config = None
    built = AutoModel.from_config(config, trust_remote_code=True, dtype=torch.float32).eval()
    assert {parameter.device.type for parameter in built.layers[0].self_attn.q_proj.parameters()} == {"meta"}
    tensors = load_file(folder / "model.safetensors")
    base = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    built.load_state_dict(base, assign=True)
    with torch.no_grad():
        ids = torch.arange(2, 26).view(2, 12)
        found = built(input_ids=ids).last_hidden_state
        expected = AutoModel.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, expected)


def test_every_encoding_of_ours_is_built(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = compressed(tiny("llama"), quantization="remap", ratio=0.5)
    model.save_pretrained(tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    built = AutoModel.from_config(config, trust_remote_code=True, dtype=model.dtype).eval()
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in model.model.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in built.state_dict().items()} == shapes


def test_without_trust_it_is_the_dense_architecture(tmp_path):
    compressed(tiny("llama")).save_pretrained(tmp_path)
    assert not is_compressed(AutoModel.from_config(AutoConfig.from_pretrained(tmp_path)))


def test_what_another_library_loads_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = compressed(tiny("llama", hidden_size=128, intermediate_size=128), quantization="nf4", ratio=0.2)
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(
        ValueError, match="matrices in nf4.* are loaded by another library: pip install optimum-dobisvd"
    ):
        AutoModel.from_config(AutoConfig.from_pretrained(tmp_path / "out"), trust_remote_code=True)
