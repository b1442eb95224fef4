"""A checkpoint in processes that know nothing of it: it loads, or it fails loudly; never random weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from integration_tests.checkpoint.damage import edit_config, edit_tensors
from integration_tests.checkpoint.reloading import compressed
from integration_tests.fresh_processes import run_python
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer

LOAD = """
import sys
from transformers import AutoModel, AutoModelForCausalLM
import torch
trust = len(sys.argv) > 2 or None
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=trust)
with torch.no_grad():
    print("SUM", model(input_ids=torch.arange(2, 14)[None]).logits.double().sum().item())
print("LAYER", type(model.model.layers[0].mlp.up_proj).__name__, type(model).__name__)
print("PACKAGE", "optimum_dobisvd" in sys.modules)
body = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=trust)
print("BODY", type(body.layers[0].mlp.up_proj).__name__)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "llama"
    config = DobiSVDConfig(method="output_pca", ratio=0.6, dataset=tokens(6, 24))
    model = DobiSVDQuantizer(config).quantize_model(tiny("llama"))
    model.save_pretrained(folder)
    with torch.no_grad():
        return str(folder), model(input_ids=torch.arange(2, 14)[None]).logits.double().sum().item()


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return tmp_path_factory.mktemp("bare")


def loaded(done, expected):
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    return (
        done.returncode == 0
        and float(lines["SUM"]) == expected
        and lines["LAYER"] == "LowRankLinear LlamaForCausalLM"
        and lines["BODY"] == "LowRankLinear"
    )


def test_installed_but_never_imported(checkpoint):
    done = run_python(LOAD, checkpoint[0])
    assert loaded(done, checkpoint[1]), done.stderr[-2000:]
    assert "PACKAGE True" in done.stdout


def test_not_installed_fails_loudly(checkpoint, bare):
    done = run_python(LOAD, checkpoint[0], without_package_in=bare)
    assert done.returncode != 0
    assert "SUM" not in done.stdout
    assert "RuntimeError" in done.stderr
    assert "dobi_svd" in done.stderr, "the message must name what is missing"


def test_not_installed_loads_with_trust_remote_code(checkpoint, bare):
    done = run_python(LOAD, checkpoint[0], "trust", without_package_in=bare)
    assert loaded(done, checkpoint[1]), done.stderr[-2000:]
    assert "PACKAGE False" in done.stdout


def copied(folder, target):
    target.mkdir()
    for path in Path(folder).iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize(
    ("structure", "tensor", "edit", "message"),
    [
        ("low_rank", "first.weight", lambda _: None, "lacks {}, which config.json promises"),
        ("pivoted", "permutation", torch.zeros_like, "{} in {}/model.safetensors is no permutation of the numbers"),
    ],
    ids=["low_rank", "pivoted"],
)
def test_not_installed_a_damaged_checkpoint_is_refused_all_the_same(structure, tensor, edit, message, bare, tmp_path):
    name = f"model.layers.1.mlp.up_proj.{tensor}"
    compressed(tiny("llama"), structure=structure).save_pretrained(tmp_path / "damaged")

    def damage(tensors):
        changed = edit(tensors.pop(name))
        tensors.update({} if changed is None else {name: changed})

    edit_tensors(tmp_path / "damaged", damage)
    done = run_python(LOAD, str(tmp_path / "damaged"), "trust", without_package_in=bare)
    assert done.returncode != 0
    assert message.format(name, tmp_path / "damaged") in done.stderr


@pytest.mark.parametrize(
    ("version", "remedy"), [(1, "compress the model again"), (3, "pip install -U optimum-dobisvd")]
)
def test_not_installed_another_format_is_refused_in_words(checkpoint, bare, tmp_path, version, remedy):
    folder = copied(checkpoint[0], tmp_path / "other")
    edit_config(folder, lambda config: config.update(format_version=version))
    done = run_python(LOAD, str(folder), "trust", without_package_in=bare)
    assert done.returncode != 0
    assert "SUM" not in done.stdout
    assert f"dobi_svd format {version}, and the loader beside it reads format 2 alone" in done.stderr
    assert remedy in done.stderr


def test_autoload_switched_off_fails_loudly_and_an_import_mends_it(checkpoint):
    done = run_python(LOAD, checkpoint[0], TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode != 0
    assert "SUM" not in done.stdout
    for code in ("import optimum_dobisvd\n" + LOAD, LOAD.replace("import torch\n", "import torch, optimum_dobisvd\n")):
        done = run_python(code, checkpoint[0], TORCH_DEVICE_BACKEND_AUTOLOAD="0")
        assert loaded(done, checkpoint[1]), done.stderr[-2000:]


def test_installed_and_trusted_uses_the_package(checkpoint):
    done = run_python(LOAD, checkpoint[0], "trust")
    assert loaded(done, checkpoint[1]), done.stderr[-2000:]
    assert "PACKAGE True" in done.stdout


CHECK = (
    "\nfrom transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as q, AUTO_QUANTIZATION_CONFIG_MAPPING as c\n"
)
CHECK += "import transformers.modeling_utils\nassert 'dobi_svd' in q and 'dobi_svd' in c, 'not registered'\n"


@pytest.mark.parametrize(
    "first",
    [
        "import torch",
        "import transformers",
        "import torch; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import torch",
        "import transformers.modeling_utils",
        "import transformers.quantizers.auto",
        "import accelerate; import peft",
        "import optimum_dobisvd",
        "import transformers.modeling_utils; import optimum_dobisvd",
        "import optimum_dobisvd; import torch; import optimum_dobisvd.config",
        "from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer",
        "import optimum_dobisvd.checkpoint.loading",
        "import optimum_dobisvd.checkpoint.hf_quantizer",
        "import optimum_dobisvd.integrations.compress_on_load",
        "import optimum_dobisvd.encodings.int8_matmul",
    ],
)
def test_registered_in_every_order_of_imports(first):
    if "peft" in first:
        pytest.importorskip("peft", reason="peft is not installed")
    done = run_python(first + CHECK)
    assert done.returncode == 0, done.stderr[-2000:]


def test_importing_torch_alone_does_not_import_transformers():
    done = run_python(
        "import torch, sys; print([m for m in sys.modules if m.split('.')[0] in ('transformers', 'accelerate')])"
    )
    assert done.stdout.strip() == "[]", done.stdout


def test_importing_the_package_alone_imports_neither_torch_nor_transformers():
    done = run_python("import optimum_dobisvd, sys; print('torch' in sys.modules, 'transformers' in sys.modules)")
    assert done.stdout.strip() == "False False"


@pytest.mark.parametrize(
    "sabotage",
    [
        # the plugin's own modules break
        "sys.modules['optimum_dobisvd.config'] = None",
        # transformers has changed beyond recognition
        "import types; sys.modules['transformers.quantizers.auto'] = types.ModuleType('transformers.quantizers.auto')",
    ],
)
def test_nothing_that_goes_wrong_in_the_plugin_breaks_import_torch(sabotage):
    done = run_python(f"import sys\n{sabotage}\nimport torch\nprint('TORCH', torch.ones(2).sum().item())")
    assert "TORCH 2.0" in done.stdout, done.stderr[-2000:]


def test_a_plugin_that_cannot_register_leaves_loading_loud(checkpoint):
    done = run_python("import sys\nsys.modules['optimum_dobisvd.config'] = None\n" + LOAD, checkpoint[0])
    assert done.returncode != 0
    assert "SUM" not in done.stdout
    assert "optimum-dobisvd does not work with the installed transformers" in done.stderr


def test_the_wheel_registers_as_the_editable_install_does(checkpoint, bare, tmp_path):
    pytest.importorskip("build", reason="the `build` package is not installed")
    project = Path(__file__).parents[2]
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(project)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-2000:]
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(next(tmp_path.glob("*.whl"))), str(site)], check=True)
    assert (site / "optimum/commands/register/register_dobisvd.py").exists()
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n" + LOAD
    done = run_python(code, checkpoint[0], without_package_in=bare)
    assert loaded(done, checkpoint[1]), done.stderr[-2000:]
    assert (
        str(site)
        in run_python(
            code + "\nimport optimum_dobisvd; print(optimum_dobisvd.__file__)", checkpoint[0], without_package_in=bare
        ).stdout
    )
