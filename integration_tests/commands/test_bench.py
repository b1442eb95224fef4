"""`optimum-cli dobisvd bench`: a checkpoint, a dense model and random weights, timed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import optimum_dobisvd
from integration_tests.commands.cli_in_process import dobisvd
from integration_tests.tiny_architectures import tiny_architecture
from integration_tests.tiny_models import tiny
from optimum_dobisvd.benchmark import worker
from optimum_dobisvd.benchmark.bounds import MachineSpeed, bytes_needed
from optimum_dobisvd.benchmark.generation import Cell
from optimum_dobisvd.commands import bench_models
from optimum_dobisvd.inference import optimize as optimize_module
from optimum_dobisvd.structures.base import compressed_linears

QUICK = ("--batch", "1", "2", "--prompt", "6", "--new-tokens", "3", "--rounds", "3")
ROWS = [1, 2, 6, 12]
"""Rows of the products of these cells, in steps and in prompts."""
EAGER = ("--rows", "dense", "checkpoint", "fused")
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
RANDOM = ("--synthetic", "llama-7b", "--shape", json.dumps(TINY), "--dtype", "float32", "--structure", "low_rank")


class WorkerHere:
    """A worker in this process, which is there at once."""

    def __init__(self, name: str, request: Any) -> None:
        self.name, self._worker = name, worker.Worker(request)

    def begin(self, method: str, *arguments: Any) -> None:
        pass

    def result(self) -> None:
        pass

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._worker, method)(*arguments)

    def close(self) -> None:
        pass


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No new processes, and an own measurement of the machine, which takes seconds."""
    monkeypatch.setattr(bench_models, "RemoteWorker", WorkerHere)
    monkeypatch.setattr(worker, "measure_machine", lambda device, dtype: MachineSpeed(1e10, 1e11))


def measured(capfd: Any, *arguments: object) -> dict[str, Any]:
    capfd.readouterr()
    assert dobisvd("bench", *arguments, "--json", "-") == 0
    found: dict[str, Any] = json.loads(capfd.readouterr().out)
    return found


def test_a_checkpoint_beside_its_dense_model_in_processes_of_their_own(work: Path, capfd: Any) -> None:
    found = measured(capfd, "small", *QUICK, "--rows", "dense", "checkpoint", "--picture", "speed.png")
    assert [(each["row"], each["batch"]) for each in found["cells"]] == [
        ("dense", 1),
        ("checkpoint", 1),
        ("dense", 2),
        ("checkpoint", 2),
    ]
    dense, checkpoint = found["models"]
    assert (dense["name"], checkpoint["name"]) == ("dense", "checkpoint")
    assert checkpoint["macs"] < dense["macs"]
    assert checkpoint["read_bytes"] < dense["read_bytes"]
    assert all(each["load_cold"] > 0 and each["load_warm"] > 0 for each in found["models"])
    assert found["machine"]["bandwidth"] > 1e8
    assert found["machine"]["flops"] > 1e8
    for each in found["cells"]:
        assert 0 < each["gap_reached"] < 1
        assert 0 < each["first_reached"] < 1
        assert each["gap_p95"] >= each["gap"]
        assert (each["gap_times"] is None) == (each["row"] == "dense")
    assert {"batch", "prompt", "noise"} == set(found["noise"][0])
    assert (work / "speed.png").stat().st_size > 1000


@pytest.mark.usefixtures("here")
def test_the_table_for_people(work: Path, capfd: Any) -> None:
    assert dobisvd("bench", "small", *QUICK, *EAGER) == 0
    said = capfd.readouterr().out
    for words in (
        "in memory",
        "loaded cold",
        "3 new tokens, greedy",
        "tokens/s",
        "the bound:",
        "measured in this run",
    ):
        assert words in said


@pytest.mark.usefixtures("here")
def test_the_fused_row_is_the_checkpoint_after_optimize_for_inference(
    work: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimized = []

    def optimize(model: Any, *, rows: list[int], compiled: bool) -> Any:
        assert not compiled
        optimized.append((len(compressed_linears(model)), rows))
        return model

    monkeypatch.setattr(optimize_module, "optimize_for_inference", optimize)
    found = measured(capfd, "small", *QUICK, *EAGER)
    assert [each["name"] for each in found["models"]] == ["dense", "checkpoint", "fused"]
    assert optimized == [(len(compressed_linears(optimum_dobisvd.load_quantized_model("small"))), ROWS)]
    assert {each["row"] for each in found["cells"]} == {"dense", "checkpoint", "fused"}


@pytest.mark.usefixtures("here")
def test_without_a_dense_model_the_checkpoint_is_measured_alone_and_it_says_so(work: Path, capfd: Any) -> None:
    shutil.move("dense", "away")
    found = measured(capfd, "small", *QUICK, *EAGER)
    assert {each["row"] for each in found["cells"]} >= {"checkpoint"}
    assert not any(each["row"] == "dense" or each["gap_times"] is not None for each in found["cells"])
    (note,) = [note for note in found["notes"] if "alone" in note]
    assert "dense cannot be loaded" in note
    assert "pass --dense" in note
    shutil.copytree("small", "unnamed")
    (Path("unnamed") / "dobisvd_recipe.yaml").unlink()
    found = measured(capfd, "unnamed", *QUICK, *EAGER)
    assert any("unnamed has no dobisvd_recipe.yaml" in note and "alone" in note for note in found["notes"])
    assert "dense" in {each["row"] for each in measured(capfd, "unnamed", *QUICK, *EAGER, "--dense", "away")["cells"]}


@pytest.mark.usefixtures("here")
def test_random_weights_of_a_shape(work: Path, capfd: Any) -> None:
    found = measured(capfd, *RANDOM, "--keep", "0.4", *QUICK, *EAGER)
    assert found["title"] == "llama-7b of random weights, low_rank float, keep 0.4"
    dense, checkpoint = found["models"][:2]
    assert dense["load_cold"] is None
    other = dense["weight_bytes"] - 4 * 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    assert checkpoint["weight_bytes"] - other == pytest.approx(0.4 * (dense["weight_bytes"] - other), rel=0.05)
    half = measured(capfd, *RANDOM, *QUICK, *EAGER)
    assert half["title"].endswith("keep 0.5")


@pytest.mark.usefixtures("here")
def test_above_a_limit_of_memory_dense_is_offloaded_and_the_compressed_model_is_not(work: Path, capfd: Any) -> None:
    models = measured(capfd, *RANDOM, *QUICK, "--rows", "dense", "checkpoint")["models"]
    between = (models[0]["weight_bytes"] + models[1]["weight_bytes"]) // 2 + 100_000  # some of it for the generation
    found = measured(capfd, *RANDOM, *QUICK, "--rows", "dense", "dense-compiled", "checkpoint", "--memory", between)
    assert [(each["name"], each["offloaded"]) for each in found["models"]] == [("dense", True), ("checkpoint", False)]
    assert "dense-compiled: left out, since weights of dense are offloaded" in found["notes"]
    assert {each["row"] for each in found["cells"]} == {"dense", "checkpoint"}
    tensors = sum(each.stat().st_size for each in Path("dense").glob("*.safetensors"))
    limit = int(0.9 * tensors) + bytes_needed(tiny("llama"), Cell(2, 6), 3)
    found = measured(capfd, "small", *QUICK, "--rows", "dense", "checkpoint", "--memory", limit)
    assert [(each["name"], each["offloaded"]) for each in found["models"]] == [("dense", True), ("checkpoint", False)]


def test_what_cannot_be_measured_is_said_before_any_model_is_loaded(
    work: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_worker(*arguments: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(bench_models, "RemoteWorker", no_worker)

    def refused(*arguments: object) -> str:
        assert dobisvd("bench", *arguments) == 1
        said: str = capsys.readouterr().err
        return said

    assert "dense was not compressed by optimum-dobisvd" in refused("dense")
    assert "missing" in refused("./missing")
    assert "--dense small is that checkpoint itself" in refused("small", "--dense", "small")
    assert "cannot load ./missing" in refused("small", "--dense", "./missing")
    assert "this machine has: cpu" in refused("small", "--device", "cuda:7")
    assert "batch 2, prompt 6 takes about" in refused("small", *QUICK, "--memory", "1kB")
    assert "--memory '1Gb' ends in a small b" in refused("small", *QUICK, "--memory", "1Gb")
    assert "LlamaConfig has no field 'width'" in refused(*RANDOM, "--shape", '{"width": 3}')
    monkeypatch.setattr(bench_models, "available_memory", lambda: 1000)
    assert "all are in memory at once: dense" in refused("small", *QUICK)


@pytest.mark.usefixtures("here")
def test_a_batch_that_does_not_fit_is_left_out_and_named(
    work: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needed(model: Any, cell: Any, new_tokens: int) -> int:
        return 1 << 60 if cell.batch == 2 else bytes_needed(model, cell, new_tokens)

    monkeypatch.setattr(bench_models, "bytes_needed", needed)
    found = measured(capfd, "small", *QUICK, *EAGER)
    assert {each["batch"] for each in found["cells"]} == {1}
    (note,) = [note for note in found["notes"] if "batch 2" in note]
    assert note.startswith("batch 2, prompt 6: left out: it takes about 1152922 TB beside the weights")
    assert note.endswith("lower --batch or --prompt")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name a checkpoint OUT, or --synthetic SHAPE; one of both"),
        (("small", "--synthetic", "llama-7b"), "one of both"),
        (("small", "--keep", "0.5"), "--keep is for --synthetic"),
        (("--synthetic", "llama-7b", "--dense", "x"), "--dense is for a checkpoint"),
        (("small", "--batch", "0"), "--batch must be at least 1, got 0"),
        (("small", "--new-tokens", "1"), "--new-tokens must be at least 2, got 1"),
        (("small", "--rounds", "2"), "--rounds must be at least 3, got 2"),
        (("small", "--rows", "fuzed"), "there is no row 'fuzed'; there are: dense, dense-compiled"),
        (("small", "--seconds", "0"), "--seconds must be above 0"),
    ],
)
def test_requests_that_make_no_sense(arguments: tuple[str, ...], said: str, capsys: Any) -> None:
    assert dobisvd("bench", *arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_the_recipe_of_a_memory_limit_measures_both_models(work: Path, capfd: Any) -> None:
    recipe = Path(optimum_dobisvd.__file__).parent.parent / "recipes" / "memory_limit.yaml"
    shape = {**TINY, "hidden_size": 128, "intermediate_size": 256}
    changes = (f"shape={json.dumps(shape)}", "device=cpu", "dtype=float32", "memory=2MB", "prompt=[6]", "new_tokens=3")
    capfd.readouterr()
    assert dobisvd("run", recipe, "--set", *changes, "keep=0.5", "rows=[dense, checkpoint]", "--json", "-") == 0
    steps = json.loads(capfd.readouterr().out)["steps"]
    assert len(steps) == 3
    for step in steps:
        found = step["bench"]
        assert [(each["name"], each["offloaded"]) for each in found["models"]] == [
            ("dense", True),
            ("checkpoint", False),
        ]
        assert all(each["tokens_per_second"] > 0 for each in found["cells"])


def test_a_model_that_continues_no_text_is_refused(work: Path, capsys: Any) -> None:
    model = tiny_architecture("t5")
    optimum_dobisvd.DobiSVDQuantizer(method="svd", ratio=0.8, structure="pivoted").quantize_model(model)
    model.save_pretrained("t5")
    assert dobisvd("bench", "t5") == 1
    assert "t5 is a T5ForConditionalGeneration; bench is for models that continue a text" in capsys.readouterr().err
