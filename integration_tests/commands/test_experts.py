"""The commands on a mixture of experts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from integration_tests.commands.cli_in_process import dobisvd
from integration_tests.commands.conftest import COMPRESS
from integration_tests.tiny_models import tiny


@pytest.fixture
def mixture(work: Path) -> Path:
    """A working directory whose `dense/` is a Mixtral, with its tokenizer."""
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (work / "dense" / name).unlink()
    tiny("mixtral").save_pretrained(work / "dense")
    shutil.rmtree(work / "small")
    return work


def shown(capfd: Any, *arguments: str) -> dict[str, Any]:
    capfd.readouterr()
    assert dobisvd(*arguments, "--json", "-") == 0
    return json.loads(capfd.readouterr().out)


def test_plan_compress_inspect_and_quantize_agree_on_a_mixture(mixture: Path, capfd: Any) -> None:
    settings = ["--method", "svd_llm_v2", "--ratio", "0.6"]
    draw = ("--nsamples", "2", "--seqlen", "24")
    planned = shown(capfd, "plan", "--model", "dense", "--dataset", "text.txt", *draw, *settings)
    assert dobisvd(*COMPRESS, *settings, "out") == 0
    reported = shown(capfd, "inspect", "out")
    assert reported["coverage"] == planned["coverage"] >= 0.99
    assert len(reported["modules"]) == len(planned["modules"]) == 3 * (4 + 4 * 3)
    assert reported["dense_macs"] == planned["dense_macs"]
    assert reported["dense_model_bytes"] == planned["dense_model_bytes"]
    (mixture / "out" / "dobisvd_report.json").unlink()
    found = shown(capfd, "inspect", "out")
    assert found["modules"] == [{**module, "error": None} for module in reported["modules"]]
    for figure in ("ratios", "dense_macs", "compressed_macs", "dense_model_bytes", "coverage", "left_dense"):
        assert found[figure] == reported[figure], figure
    assert dobisvd("quantize", "out", "--quantization", "int8", "--out", "int8") == 0
    smaller = shown(capfd, "inspect", "int8")
    assert {module["encoding"] for module in smaller["modules"]} == {"int8"}


def test_linears_that_borrow_are_named_on_the_screen(mixture: Path, capfd: Any) -> None:
    assert dobisvd(*COMPRESS, "--nsamples", "1", "--seqlen", "24", "out") == 0
    printed = " ".join(capfd.readouterr().out.split())
    assert "were given too few calibration tokens" in printed
    assert "model.layers.0.mlp.experts.0.gate_proj" in printed
