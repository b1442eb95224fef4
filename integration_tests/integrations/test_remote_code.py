"""A model whose architecture is code beside its weights: compressed, saved, loaded with and without the package."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from integration_tests.commands.cli_in_process import dobisvd
from integration_tests.fresh_processes import run_python
from integration_tests.tiny_models import tokens
from optimum_dobisvd import DobiSVDConfig
from optimum_dobisvd.structures.base import compressed_linears

CONFIGURATION = """
from transformers import PretrainedConfig

class OwnConfig(PretrainedConfig):
    model_type = "own_architecture"

    def __init__(self, hidden_size=32, vocab_size=300, num_hidden_layers=3, max_position_embeddings=128, **rest):
        self.hidden_size, self.vocab_size, self.num_hidden_layers = hidden_size, vocab_size, num_hidden_layers
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**rest)
"""
MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from .configuration_own import OwnConfig

class OwnBlock(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, hidden):
        return hidden + self.down(torch.tanh(self.up(hidden)))

class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(OwnBlock(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=False, **rest):
        hidden = self.words(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return CausalLMOutputWithPast(logits=self.head(hidden))
"""
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    print("SUM", model(input_ids=torch.arange(2, 14)[None]).logits.double().sum().item())
print("CLASS", type(model).__name__, type(model.layers[0].up).__name__, "optimum_dobisvd" in sys.modules)
if len(sys.argv) > 2:
    model.save_pretrained(sys.argv[2])
"""


@pytest.fixture
def dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "dense"
    folder.mkdir()
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own_architecture", "auto_map": auto_map}))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    from transformers import AutoConfig

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def outputs(model: torch.nn.Module) -> float:
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 14)[None]).logits.double().sum().item()


def test_own_code_is_kept_behind_the_loader(dense: Path, tmp_path: Path) -> None:
    config = DobiSVDConfig(method="svd_llm", ratio=0.6, dataset=tokens(6, 24))
    model = AutoModelForCausalLM.from_pretrained(dense, trust_remote_code=True, quantization_config=config)
    assert compressed_linears(model)
    model.save_pretrained(tmp_path / "out")
    auto_map = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_dobisvd.DobiSVDAutoModelForCausalLM",
        "DenseAutoModelForCausalLM": "modeling_own.OwnModel",
    }
    expected = outputs(model)
    for _ in range(2):  # transformers remembers what it loaded first
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
        assert outputs(again) == expected

    without = {"without_package_in": tmp_path, "HF_MODULES_CACHE": str(tmp_path / "other modules")}
    done = run_python(LOAD, str(tmp_path / "out"), **without)
    assert done.returncode == 0, done.stderr
    assert f"SUM {expected}" in done.stdout
    assert "CLASS OwnModel LowRankLinear False" in done.stdout

    again.save_pretrained(tmp_path / "again")  # loaded, and saved anew
    done = run_python(LOAD, str(tmp_path / "again"), **without)
    assert done.returncode == 0, done.stderr
    assert f"SUM {expected}" in done.stdout

    plain = again.dequantize()
    plain.save_pretrained(tmp_path / "plain")
    auto_map = json.loads((tmp_path / "plain" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_own.OwnModel"
    assert set(auto_map) == {"AutoConfig", "AutoModelForCausalLM"}


def test_the_commands_take_a_model_of_own_code(dense: Path, tmp_path: Path, tiny_tokenizer, monkeypatch) -> None:
    tiny_tokenizer.save_pretrained(dense)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat on the mat while the dog ran over the hill. " * 200)
    common = ("--dataset", "text.txt", "--seqlen", "32")
    assert dobisvd("compress", "--model", "dense", *common, "--nsamples", "4", "--trust-remote-code", "out") == 0
    assert dobisvd("eval", "out", *common, "--windows", "2", "--trust-remote-code", "--json", "found.json") == 0
    assert set(json.loads(Path("found.json").read_text())["perplexity"]["text.txt"]) == {"dense", "compressed"}
