"""Checkpoints of past releases, see `integration_tests/checkpoints`, reloaded in every way there is."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from integration_tests.checkpoints.write_checkpoints import HERE, KINDS, expected_of, models_of
from integration_tests.fresh_processes import run_python

FOLDERS = sorted(path.parent for path in HERE.rglob("config.json"))
NAMES = {folder: str(folder.relative_to(HERE)) for folder in FOLDERS}
LIBRARIES = {"gptq": "gptqmodel", "nf4": "bitsandbytes", "fp4": "bitsandbytes", "llm": "bitsandbytes"}


def readable() -> list[Path]:
    """The checkpoints whose library is installed."""
    needed = {folder: LIBRARIES.get(folder.name.replace("_", "-").split("-")[0]) for folder in FOLDERS}
    return [folder for folder, name in needed.items() if name is None or importlib.util.find_spec(name) is not None]


def assert_as_expected(found: dict, folder: Path) -> None:
    expected = json.loads((folder / "expected.json").read_text())
    assert found["matrices"] == expected["matrices"], "every matrix to the last bit"
    # Products in bfloat16 are rounded otherwise by other processors.
    assert torch.allclose(torch.tensor(found["logits"]), torch.tensor(expected["logits"]), atol=0.15, rtol=0.05)


def test_every_structure_and_encoding_is_there():
    listed = {
        (entry["structure"], entry["encoding"])
        for folder in FOLDERS
        for entry in json.loads((folder / "config.json").read_text())["quantization_config"]["modules"].values()
    }
    written = {format[:2] for _, formats in KINDS.values() for format in formats} - {("dense", "float")}
    assert written <= listed
    assert {*NAMES.values()} >= {f"{kind}-{model}" for kind in KINDS for model in models_of(kind)}
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file()) < 1_450_000


@pytest.mark.parametrize("folder", readable(), ids=NAMES.get)
def test_with_the_package(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert_as_expected(expected_of(model), folder)
    model.save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name


_READ = """
import hashlib, json, sys, torch
from transformers import AutoModelForCausalLM
ids = torch.tensor(json.loads(sys.argv[1]))
found = {}
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=bool(int(sys.argv[2])))
    matrices = {
        f"{name}.{child}": hashlib.sha256(matrix.contiguous().numpy().tobytes()).hexdigest()
        for name, module in model.named_modules() if hasattr(module, "matrices")
        for child, matrix in module.matrices().items()
    }
    with torch.no_grad():
        logits = model(input_ids=ids).logits.float()[:, -1].tolist()
    found[folder] = {"matrices": matrices, "logits": logits}
assert bool(int(sys.argv[2])) != ("optimum_dobisvd" in sys.modules)
print("found:" + json.dumps(found))
"""


@pytest.mark.parametrize("bundled", [False, True], ids=["without_import", "bundled_loader"])
def test_in_a_process_without_import(bundled, tmp_path):
    """Plain transformers: the package registers itself, or is missing and the checkpoint's own loader is used.

    All in one process, in which an older loader has been used before a newer one.
    """
    from integration_tests.checkpoints.write_checkpoints import IDS

    copies = {}
    for folder in readable():
        copies[str(tmp_path / NAMES[folder])] = folder
        shutil.copytree(folder, tmp_path / NAMES[folder])
        shutil.copy(folder.parent / "modeling_dobisvd.py", tmp_path / NAMES[folder])
    where = {"without_package_in": tmp_path} if bundled else {}
    done = run_python(_READ, json.dumps(IDS.tolist()), str(int(bundled)), *copies, **where, HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    printed = next(line for line in done.stdout.splitlines() if line.startswith("found:"))
    for path, found in json.loads(printed.removeprefix("found:")).items():
        assert_as_expected(found, copies[path])
