"""`inspect`: with a report, without one, and on things that are not a checkpoint of ours."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from integration_tests.commands.cli_in_process import dobisvd, names_in
from integration_tests.commands.conftest import COMPRESS
from optimum_dobisvd.report.report import CompressionReport


def inspected(capfd: Any, *arguments: str) -> dict[str, Any]:
    capfd.readouterr()
    assert dobisvd("inspect", *arguments, "--json", "-") == 0
    return json.loads(capfd.readouterr().out)


def test_the_report_is_shown_with_every_matrix(work: Path, capfd: Any) -> None:
    report = CompressionReport.load(work / "small")
    assert inspected(capfd, "small") == report.to_dict()
    assert dobisvd("inspect", "small") == 0
    out = capfd.readouterr().out
    for module in report.modules:
        assert module.name in out
        assert module.error is not None
        assert f"{module.error:.2%}" in out
    assert "statistics" in out


def test_without_a_report_the_files_tell_ranks_and_bytes(work: Path, capfd: Any) -> None:
    settings = ["--override", 'layers.1.mlp.up_proj:{"dense": true}', "--modules-to-not-convert", "k_proj"]
    assert dobisvd("compress", "out", *COMPRESS[1:], *settings) == 0
    reported = inspected(capfd, "out")
    for name in ("dobisvd_report.json", "dobisvd_plan.json", "dobisvd_recipe.yaml"):
        (work / "out" / name).unlink()
    found = inspected(capfd, "out")
    for module in reported["modules"]:
        module["error"] = None
    assert found["modules"] == reported["modules"]
    for figure in ("ratios", "dense_macs", "compressed_macs", "dense_model_bytes", "coverage", "left_dense", "method"):
        assert found[figure] == reported[figure], figure
    assert dobisvd("inspect", "out") == 0
    assert "dobisvd_report.json is missing" in capfd.readouterr().out


@pytest.mark.parametrize(("encoding", "ratio"), [("remap", 0.3), ("int8", 0.2)])
def test_structure_and_encoding_of_every_matrix_are_shown(work: Path, capfd: Any, encoding: str, ratio: float) -> None:
    settings = ["--quantization", encoding, "--method", "output_pca", "--ratio", ratio, "--rank-multiple", "4"]
    assert dobisvd("compress", "out", *COMPRESS[1:], *settings) == 0
    reported = inspected(capfd, "out")
    assert {module["encoding"] for module in reported["modules"]} >= {encoding}
    assert {module["structure"] for module in reported["modules"] if module["rank"] is not None} == {"low_rank"}
    (work / "out" / "dobisvd_report.json").unlink()
    found = inspected(capfd, "out")
    assert [{**module, "error": None} for module in reported["modules"]] == found["modules"]
    assert found["ratios"] == reported["ratios"]
    assert dobisvd("inspect", "out") == 0
    out = capfd.readouterr().out
    assert out.count(f" {encoding} ") >= sum(module["encoding"] == encoding for module in found["modules"])
    for module in found["modules"]:
        (cells,) = [line.split() for line in out.splitlines() if line.split()[:1] == [module["name"]]]
        assert {module["structure"], module["encoding"]} <= {*cells}
    tensors = load_file(work / "out" / "model.safetensors")
    names = tuple(f"{module['name']}." for module in found["modules"])
    on_disk = sum(tensor.nbytes for key, tensor in tensors.items() if key.startswith(names))
    assert on_disk == sum(module["bytes"] for module in found["modules"])
    assert on_disk <= ratio * sum(module["dense_bytes"] for module in found["modules"])


def test_more_arithmetic_than_dense_is_said(work: Path, capfd: Any) -> None:
    settings = ["--quantization", "remap", "--method", "output_pca", "--ratio", "0.45", "--rank-multiple", "4"]
    assert dobisvd("compress", "out", *COMPRESS[1:], *settings) == 0
    assert dobisvd("inspect", "out") == 0
    assert "take more arithmetic as factors than dense" in capfd.readouterr().out


def test_pictures_are_drawn_where_asked(work: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result = inspected(capfd, "small", "--pictures", "drawn")
    assert names_in(work / "drawn") == ["dobisvd_errors.png", "dobisvd_formats.png", "dobisvd_ranks.png"]
    assert result["pictures"] == ["drawn/dobisvd_formats.png", "drawn/dobisvd_ranks.png", "drawn/dobisvd_errors.png"]
    monkeypatch.setattr("optimum_dobisvd.report.figure.matplotlib_is_installed", lambda: False)
    assert dobisvd("inspect", "small", "--pictures", "drawn") == 1
    assert "optimum-dobisvd[plots]" in capfd.readouterr().err


def test_what_is_not_ours_is_named(work: Path, capfd: Any) -> None:
    for folder, message in (("nowhere", "no config.json"), ("dense", "not compressed by optimum-dobisvd")):
        assert dobisvd("inspect", folder) == 1
        assert message in capfd.readouterr().err


def test_a_missing_factor_is_named(work: Path, capfd: Any) -> None:
    (work / "small" / "dobisvd_report.json").unlink()
    path = work / "small" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.2.mlp.up_proj.second.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert dobisvd("inspect", "small") == 1
    assert "model.layers.2.mlp.up_proj" in capfd.readouterr().err
    path.write_bytes(b"\x00" * 100)
    assert dobisvd("inspect", "small") == 1
    assert "is damaged" in capfd.readouterr().err
    path.unlink()
    assert dobisvd("inspect", "small") == 1
    assert "no .safetensors files" in capfd.readouterr().err


def test_a_damaged_report_is_named(work: Path, capfd: Any) -> None:
    (work / "small" / "dobisvd_report.json").write_text('{"model": 3}')
    assert dobisvd("inspect", "small") == 1
    assert "dobisvd_report.json is damaged" in capfd.readouterr().err
