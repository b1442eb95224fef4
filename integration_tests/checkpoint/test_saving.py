"""`save_pretrained` is all or nothing."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from integration_tests.fresh_processes import run_python
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer
from optimum_dobisvd.checkpoint import folder


def compressed(ratio=0.6):
    config = DobiSVDConfig(method="output_pca", ratio=ratio, dataset=tokens(6, 24))
    return DobiSVDQuantizer(config).quantize_model(tiny("llama"))


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 14)[None]).logits


@pytest.fixture
def saved(tmp_path):
    model = compressed()
    model.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    return tmp_path / "out", logits(model)


INTERRUPTED = """
import os, resource, signal, sys
import torch
import transformers.modeling_utils as modeling
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    for parameter in model.parameters():
        parameter.zero_()
real = modeling.safe_save_file
def save_then_die(tensors, filename, metadata=None):
    real(tensors, filename, metadata=metadata)
    with open(filename, "r+b") as file:
        file.truncate(os.path.getsize(filename) // 2)
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "kill":
    modeling.safe_save_file = save_then_die
if sys.argv[2] == "full disk":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
model.save_pretrained(sys.argv[1])
"""


def test_a_kill_in_the_middle_leaves_the_old_folder_valid(saved):
    done = run_python(INTERRUPTED, str(saved[0]), "kill")
    assert done.returncode == -signal.SIGKILL
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(saved[0])), saved[1])
    leftovers = [p.name for p in saved[0].parent.iterdir() if "saving" in p.name]
    assert len(leftovers) == 1
    # the next save clears what the dead process left
    AutoModelForCausalLM.from_pretrained(saved[0]).save_pretrained(saved[0])
    assert [p.name for p in saved[0].parent.iterdir()] == ["out"]


def test_a_full_disk_leaves_the_old_folder_valid_and_nothing_beside_it(saved):
    done = run_python(INTERRUPTED, str(saved[0]), "full disk")
    assert done.returncode == 1, done.stderr[-2000:]
    assert "File too large" in done.stderr
    assert [p.name for p in saved[0].parent.iterdir()] == ["out"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(saved[0])), saved[1])


def test_saving_over_another_compression_keeps_other_files_and_replaces_the_weights(saved):
    (saved[0] / "dobisvd_ranks.png").write_text("of the old ranks")
    model = compressed(0.4)
    model.save_pretrained(saved[0])
    assert not (saved[0] / "dobisvd_ranks.png").exists()
    assert json.loads((saved[0] / "dobisvd_report.json").read_text())["ratio"] == 0.4
    assert (saved[0] / "tokenizer.json").read_text() == "{}"
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(saved[0])), logits(model))


def test_other_processes_of_a_distributed_run_write_nothing(saved):
    before = {path.name: path.read_bytes() for path in saved[0].iterdir()}
    compressed(0.4).save_pretrained(saved[0], is_main_process=False)
    assert {path.name: path.read_bytes() for path in saved[0].iterdir()} == before


def test_saving_an_adapter_into_the_folder_keeps_the_weights(saved):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = AutoModelForCausalLM.from_pretrained(saved[0])
    model.add_adapter(peft.LoraConfig(target_modules=["first", "second"], r=2))
    model.save_pretrained(saved[0])
    assert (saved[0] / "adapter_model.safetensors").exists()
    assert (saved[0] / "model.safetensors").exists()


@pytest.mark.parametrize("exchange", [True, False])
def test_the_swap_with_and_without_the_kernels_exchange(saved, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(folder, "_exchange", lambda one, other: False)
    model = compressed(0.4)
    model.save_pretrained(saved[0])
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(saved[0])), logits(model))
    assert [p.name for p in saved[0].parent.iterdir()] == ["out"]


def test_saving_onto_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        compressed().save_pretrained(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_bytes_on_disk_are_what_the_report_says(saved):
    model = compressed()
    quantizer = DobiSVDQuantizer(DobiSVDConfig(method="output_pca", ratio=0.6, dataset=tokens(6, 24)))
    model = quantizer.quantize_model(tiny("llama"))
    quantizer.save(model, saved[0])
    with open(saved[0] / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    sizes = {
        name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items() if name[0] != "_"
    }
    targets = sum(size for name, size in sizes.items() if ".first." in name or ".second.weight" in name)
    assert targets == quantizer.report.target_bytes
    assert sum(sizes.values()) == quantizer.report.compressed_model_bytes
    assert 10 * targets <= 6 * quantizer.report.dense_target_bytes
    # the guards weigh nothing
    assert sizes["model.layers.0.self_attn.q_proj.weight"] == 0


def test_the_bundled_loader_is_python_that_needs_torch_and_transformers_only(saved, tmp_path):
    source = (saved[0] / "modeling_dobisvd.py").read_text()
    assert "optimum_dobisvd" not in source
    assert "from ." not in source
    (tmp_path / "bundle.py").write_text(source)
    subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,F823", str(tmp_path / "bundle.py")],
        check=True,
    )


def test_deep_copies_save_themselves(saved):
    import copy

    model = compressed()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    twin.save_pretrained(saved[0])
    assert float(logits(AutoModelForCausalLM.from_pretrained(saved[0])).abs().max()) == 0
    assert os.listdir(saved[0].parent) == ["out"]


def test_a_symbolic_link_is_followed(saved, tmp_path):
    (tmp_path / "link").symlink_to(saved[0])
    model = compressed(0.4)
    model.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(saved[0])), logits(model))


@pytest.mark.parametrize("where", [".", "../out"])
def test_the_working_directory_can_be_saved_into(saved, monkeypatch, where):
    monkeypatch.chdir(saved[0])
    (saved[0] / "data").mkdir()
    model = compressed(0.4)
    model.save_pretrained(where)
    assert os.getcwd() == str(saved[0])
    assert sorted(path.name for path in saved[0].iterdir() if path.name[0] == ".") == []
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(".")), logits(model))
    assert (saved[0] / "data").is_dir()
    assert (saved[0] / "tokenizer.json").exists()


def test_permissions_of_the_folder_are_kept(saved):
    saved[0].chmod(0o700)
    compressed(0.4).save_pretrained(saved[0])
    assert saved[0].stat().st_mode & 0o777 == 0o700


def test_the_state_dict_argument_is_what_is_saved(saved):
    model = compressed()
    zeros = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.save_pretrained(saved[0], state_dict=zeros)
    assert float(logits(AutoModelForCausalLM.from_pretrained(saved[0])).abs().max()) == 0


def test_parts_built_into_another_model_carry_their_guards(tmp_path):
    from transformers import LlamaForSequenceClassification

    model = compressed()
    other = LlamaForSequenceClassification(model.config)
    other.model = model.model
    other.save_pretrained(tmp_path / "other")
    model.model.save_pretrained(tmp_path / "body")
    code = "import sys\nfrom transformers import AutoModel\nAutoModel.from_pretrained(sys.argv[1])"
    for name in ("other", "body"):
        done = run_python(code, str(tmp_path / name), TORCH_DEVICE_BACKEND_AUTOLOAD="0")
        assert done.returncode != 0
        assert "RuntimeError" in done.stderr
