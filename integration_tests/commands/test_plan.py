"""`plan`: its figures against what a compression then does, and its refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from integration_tests.commands.cli_in_process import dobisvd, names_in
from integration_tests.commands.conftest import COMPRESS
from optimum_dobisvd import Plan
from optimum_dobisvd.report.report import CompressionReport

PLAN = ("plan", *COMPRESS[1:])


def planned(capfd: Any, *arguments: str, code: int = 0) -> dict[str, Any]:
    capfd.readouterr()
    assert dobisvd(*arguments, "--json", "-") == code
    return json.loads(capfd.readouterr().out)


@pytest.mark.parametrize("method", ["output_pca", "svd"])
def test_the_figures_are_those_of_the_checkpoint(work: Path, capfd: Any, method: str) -> None:
    result = planned(capfd, *PLAN, "--method", method, "--ratio", "0.7")
    assert dobisvd(*COMPRESS, "--method", method, "--ratio", "0.7", "out") == 0
    report = CompressionReport.load(work / "out").to_dict()
    for figure in (
        "ratios",
        "dense_macs",
        "compressed_macs",
        "dense_model_bytes",
        "compressed_model_bytes",
        "coverage",
    ):
        assert result[figure] == report[figure], figure
    assert [row["rank"] for row in result["modules"]] == [row["rank"] for row in report["modules"]]
    (folder,) = result["needs"]["disk_bytes"].values()
    assert 0 < (work / "out" / "model.safetensors").stat().st_size - folder < 20_000  # the header


def test_no_weight_is_loaded(work: Path, capfd: Any) -> None:
    (work / "dense" / "model.safetensors").unlink()
    assert planned(capfd, *PLAN)["needs"]["seconds"]["factorization"] >= 0
    assert dobisvd("plan", "--model", "dense") == 0
    assert "peak memory" in capfd.readouterr().out


def test_the_statistics_are_as_large_as_said(work: Path, capfd: Any) -> None:
    result = planned(capfd, *PLAN)
    assert dobisvd(*COMPRESS, "--statistics", "stats", "out") == 0
    stored = 0
    for path in (work / "stats").glob("[bg]*-*.safetensors"):  # blocks and gradients, no spectra
        with safe_open(path, framework="pt") as file:
            stored += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118 - not a dict
    assert result["needs"]["statistics_bytes"] == stored


def test_spectra_are_used_where_there_are_some(work: Path, capfd: Any) -> None:
    first = planned(capfd, *PLAN, "--statistics", "stats")
    assert first["allocation"] == "uniform"
    assert "global needs spectra" in first["note"]
    assert first["needs"]["seconds"]["importance scores"] >= 0
    assert "stats" in first["needs"]["disk_bytes"]
    assert "stats" not in names_in(work)
    assert dobisvd(*COMPRESS, "--statistics", "stats", "out") == 0
    second = planned(capfd, *PLAN, "--statistics", "stats")
    assert second["allocation"] == "global"
    assert "importance scores" not in second["needs"]["seconds"]
    assert "calibration, forward" not in second["needs"]["seconds"]
    made = CompressionReport.load(work / "out")
    assert [row["rank"] for row in second["modules"]] == [row.rank for row in made.modules]


def test_statistics_of_another_model_are_refused(work: Path, capfd: Any) -> None:
    assert dobisvd(*COMPRESS, "--statistics", "stats", "out") == 0
    index = json.loads((work / "stats" / "statistics.json").read_text())
    index["fingerprint"]["model_class"] = "OPTForCausalLM"
    (work / "stats" / "statistics.json").write_text(json.dumps(index))
    assert dobisvd(*PLAN, "--statistics", "stats") == 1
    assert "are of a OPTForCausalLM" in capfd.readouterr().err
    (work / "stats" / "statistics.json").write_text("{")
    assert dobisvd(*PLAN, "--statistics", "stats") == 1
    assert "damaged" in capfd.readouterr().err


def test_a_saved_plan_is_taken_by_compress_and_by_plan(work: Path, capfd: Any) -> None:
    assert dobisvd(*PLAN, "--ratio", "0.6", "--override", 'o_proj:{"dense": true}', "--save-plan", "ranks.json") == 0
    plan = Plan.load(work / "ranks.json")
    assert plan.modules["model.layers.0.self_attn.o_proj"].rank is None
    assert dobisvd(*COMPRESS, "--plan", "ranks.json", "out") == 0
    assert Plan.load(work / "out" / "dobisvd_plan.json").modules == plan.modules
    assert planned(capfd, *PLAN, "--plan", "ranks.json")["note"] == "ranks: from ranks.json"


def test_what_cannot_fit_is_refused_with_numbers(work: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum_dobisvd.commands.machine.available_memory", lambda: 400_000_000)
    result = planned(capfd, *PLAN, code=1)
    assert "memory needs" in result["needs"]["lacking"][0]
    assert dobisvd(*PLAN) == 1
    captured = capfd.readouterr()
    assert "peak memory" in captured.out
    assert "error: this cannot fit: memory needs 50" in captured.err
    assert "400 MB are free" in captured.err


def test_a_full_disk_is_refused(work: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum_dobisvd.commands.machine.available_disk", lambda folder: 160_000)
    assert dobisvd(*PLAN, "--out", "o") == 0
    # 151 kB of checkpoint fit and 31 kB of statistics fit, both together do not.
    assert dobisvd(*PLAN, "--out", "o", "--statistics", "stats") == 1
    assert "the disk of o and stats needs" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (["--nsamples", "100000"], "hidden states of all windows"),
        (["--seqlen", "4096", "--batch-size", "64"], "one block's activations"),
    ],
)
def test_the_remedy_is_for_what_takes_most(
    work: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch, settings: list[str], part: str
) -> None:
    monkeypatch.setattr("optimum_dobisvd.commands.machine.available_memory", lambda: 1000)
    monkeypatch.setattr("optimum_dobisvd.commands.estimate._LIBRARIES", 0)
    assert dobisvd("plan", "--model", "dense", "--nsamples", "4", "--dataset", "x", *settings) == 1
    assert f"most of it for the {part}: lower" in capfd.readouterr().err


def test_learned_ranks_are_planned_as_they_start_and_trained_by_compress(work: Path, capfd: Any) -> None:
    training = json.dumps({"steps": 2, "held_out": 1})
    learning = ("--allocation", "dobi_fixed_basis", "--training", training, "--ratio", "0.5")
    first = planned(capfd, *PLAN, *learning, "--statistics", "stats")
    assert {"rank training", "calibration, gradients"} <= first["needs"]["seconds"].keys()
    assert first["needs"]["memory_bytes"]["rank training"] > 0
    assert dobisvd(*COMPRESS, *learning, "--statistics", "stats", "out") == 0
    assert (work / "out" / "dobisvd_training.json").exists()
    second = planned(capfd, *PLAN, *learning, "--statistics", "stats")
    assert "ranks: dobi_fixed_basis, before training, from the spectra in stats" in second["note"]
    assert "calibration, gradients" not in second["needs"]["seconds"]
    capfd.readouterr()
    assert dobisvd("inspect", "out", "--pictures", "drawn") == 0
    assert {"dobisvd_training.png", "dobisvd_ranks_learned.png"} <= set(names_in(work / "drawn"))


def test_a_bad_plan_or_pattern_is_refused(work: Path, capfd: Any) -> None:
    assert dobisvd(*PLAN, "--modules-to-not-convert", "q_porj") == 1
    assert "q_proj" in capfd.readouterr().err
    data = json.loads((work / "small" / "dobisvd_plan.json").read_text())
    data["modules"]["model.layers.9.mlp.up_proj"] = {"structure": "dense", "encoding": "float"}
    (work / "bad.json").write_text(json.dumps(data))
    assert dobisvd(*PLAN, "--plan", "bad.json") == 1
    assert "model.layers.9.mlp.up_proj" in capfd.readouterr().err
