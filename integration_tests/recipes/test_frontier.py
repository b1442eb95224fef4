"""The frontier on a tiny model: resumed, told when a row fails, shown when unfinished."""

import importlib.util
import json
import random
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from integration_tests.commands.conftest import WORDS
from integration_tests.evaluation.task_rows import write_rows
from integration_tests.tiny_models import tiny
from recipes.frontier import __main__ as command
from recipes.frontier import rows as rows_module
from recipes.frontier.make import MAKERS
from recipes.frontier.measure import load
from recipes.frontier.results import Results
from recipes.frontier.rows import ROWS, row_named
from recipes.frontier.settings import TASKS, Settings
from recipes.frontier.show import write_table

FRONTIER = Path(__file__).parents[2] / "recipes" / "frontier"
needs_bnb = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
needs_gptq = pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="gptqmodel is not installed")

NUMBERS = {"nsamples": 4, "seqlen": 32, "eval-windows": 2, "rounding-windows": 2, "heal-steps": 3, "train-seqlen": 32}


@pytest.fixture
def place(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    tiny("llama", dtype=torch.bfloat16, hidden_size=128, intermediate_size=256).save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    draw = random.Random(0)
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_text(" ".join(draw.choices(WORDS.split(), k=1500)), encoding="utf-8")
    return tmp_path


@pytest.fixture
def frontier(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command, its processes being calls of this one."""

    def call(argv: list[str]) -> int:
        try:
            return command.main(argv)
        except Exception:
            traceback.print_exc()
            return 1

    monkeypatch.setattr(command, "in_new_process", call)
    files = {"model": "dense", "dataset": "train.txt", "eval-dataset": "test.txt", "data-dir": ".", "work": "work"}
    options = [f"--{key}={place / value}" for key, value in {**files, "results": "results.jsonl"}.items()]
    numbers = [f"--{key}={value}" for key, value in NUMBERS.items()]
    return lambda *argv: command.main([*options, *numbers, *argv])


def figures(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "results.jsonl").read_text().splitlines()]


def table_lines(place: Path) -> list[str]:
    return (place / "frontier.md").read_text().splitlines()


def test_rows_have_names_and_folders_of_their_own() -> None:
    assert len({row.name for row in ROWS}) == len({row.slug for row in ROWS}) == len(ROWS) > 12
    for row in ROWS:
        assert row.make in MAKERS
        if "on" in row.options:
            assert row_named(row.options["on"]).make == "compress"


def test_a_run_goes_on_where_it_was_and_heals_what_is_in_8_bits(place: Path, frontier: Callable[..., int]) -> None:
    rows = ("--rows", "dense bf16", "SVD 0.6 remap", "--steps", "sizes", "perplexity")
    assert frontier(*rows, "--states", "plain") == 0
    lines = (place / "results.jsonl").read_text().splitlines()
    assert frontier(*rows) == 0
    after = (place / "results.jsonl").read_text().splitlines()
    assert after[: len(lines)] == lines
    found = {(line["row"], line["healed"], line["step"]): line["found"] for line in figures(place)}
    assert len(found) == len(after), "nothing is measured twice"
    for name in ("dense bf16", "SVD 0.6 remap"):
        assert found[name, True, "sizes"]["disk"] == found[name, False, "sizes"]["disk"], "merged: not a byte more"
        assert found[name, True, "perplexity"] != found[name, False, "perplexity"]
    assert found["SVD 0.6 remap", False, "sizes"]["disk"] < found["dense bf16", False, "sizes"]["disk"]
    table = (place / "frontier.md").read_text()
    assert table.count("healed") == 2
    assert "–" in table, "what was not measured is a dash"
    assert (place / "frontier.png").stat().st_size > 10_000


@needs_gptq
def test_gptq_on_dense_matrices_on_low_rank_and_in_mixtures(place: Path, frontier: Callable[..., int]) -> None:
    rows = ("GPTQ-4", "SVD 0.8 + GPTQ-4", "mixture, bytes of GPTQ-4")
    assert frontier("--rows", *rows, "--states", "plain", "--steps", "sizes") == 0
    found = {line["row"]: line["found"]["disk"] for line in figures(place) if line["step"] == "sizes"}
    assert found["SVD 0.8 + GPTQ-4"] < found["GPTQ-4"]
    assert found["mixture, bytes of GPTQ-4"] < 1.02 * found["GPTQ-4"]
    modules = {name: entries_of(place / "work" / row_named(name).slug / "checkpoint") for name in rows}
    assert {entry["structure"] for entry in modules["GPTQ-4"]} == {"dense"}
    assert {"low_rank", "pivoted"} & {entry["structure"] for entry in modules["SVD 0.8 + GPTQ-4"]}
    for name in rows[:2]:
        assert {entry["encoding"] for entry in modules[name]} == {"gptq4_g32"}, "every matrix"
    assert any(entry["encoding"].startswith("gptq") for entry in modules["mixture, bytes of GPTQ-4"])


def entries_of(checkpoint: Path) -> list[dict[str, Any]]:
    """What config.json says of every compressed matrix."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return list(config["quantization_config"]["modules"].values())


@needs_bnb
def test_an_adapter_that_cannot_be_merged_stays_and_its_bytes_count(place: Path, frontier: Callable[..., int]) -> None:
    assert frontier("--rows", "BnB nf4", "--steps", "sizes", "perplexity", "speed") == 0
    found = {(line["healed"], line["step"]): line["found"] for line in figures(place)}
    adapter = load_file(place / "work" / "bnb-nf4" / "healed" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.bfloat16}
    added = sum(tensor.nbytes for tensor in adapter.values())
    assert found[True, "sizes"]["memory"] == found[False, "sizes"]["memory"] + added
    assert added < found[True, "sizes"]["disk"] - found[False, "sizes"]["disk"] < 1.2 * added
    assert found[True, "perplexity"] != found[False, "perplexity"]
    assert all(found[True, "speed"][phase]["speedup"] > 0 for phase in ("prefill", "decode"))


@needs_bnb
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_computes_in_what_is_asked_for(
    place: Path, frontier: Callable[..., int], dtype: torch.dtype
) -> None:
    """Products of 16 bits are slow on many CPUs, and would be taken for the adapter's price."""
    assert frontier("--rows", "BnB nf4", "--states", "healed", "--steps", "sizes") == 0
    folder = place / "work" / "bnb-nf4" / "healed"
    model = load(folder, dtype, "cpu")
    found = {name: value for name, value in model.named_parameters() if ".lora_" in name}
    stored = load_file(folder / "adapter_model.safetensors")
    assert len(found) == len(stored)
    assert {value.dtype for value in found.values()} == {dtype}
    for name, value in stored.items():
        place_in_model = name.removesuffix(".weight") + ".default.weight"
        assert torch.equal(found[place_in_model], value.to(dtype))


@needs_bnb
def test_accuracies_are_those_of_one_answer_at_a_time(
    place: Path, frontier: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model with an adapter beside its 4-bit linears, too."""
    models = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
    from recipes.frontier import shared_contexts

    write_rows(place)
    rows = ("--rows", "BnB nf4", "--steps", "accuracy")
    assert frontier(*rows) == 0
    together = [line["found"] for line in figures(place) if line["step"] == "accuracy"]
    (place / "results.jsonl").unlink()
    monkeypatch.setattr(shared_contexts, "SharedContextLM", models.HFLM)
    assert frontier(*rows) == 0
    assert together == [line["found"] for line in figures(place) if line["step"] == "accuracy"]
    assert len(together) == 2
    assert all(set(found["tasks"]) == set(TASKS) and found["mean"]["stderr"] > 0 for found in together)


@needs_bnb
def test_answers_that_depend_on_the_batch_are_read_in_lm_evals_batches(
    place: Path, frontier: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLM.int8(): read side by side under a mask they would be others."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from recipes.frontier import shared_contexts

    write_rows(place)

    def refused(**_: Any) -> None:
        raise AssertionError("answers were read side by side")

    monkeypatch.setattr(shared_contexts, "SharedContextLM", refused)
    assert frontier("--rows", "BnB int8", "--states", "plain", "--steps", "accuracy") == 0
    (found,) = [line["found"] for line in figures(place) if line["step"] == "accuracy"]
    assert found["mean"]["value"] > 0


def test_speeds_of_another_device_are_not_this_ones(place: Path, frontier: Callable[..., int]) -> None:
    """Other figures are."""
    row = ("--rows", "dense bf16", "--states", "plain", "--steps", "sizes", "speed")
    assert frontier(*row) == 0
    lines = figures(place)
    for line in lines:
        line["device"] = "cuda"
        if line["step"] == "speed":
            line["found"]["decode"] = {"ms_per_token": 123.0, "dense_ms_per_token": 246.0, "speedup": 2.0}
    (place / "results.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert frontier(*row) == 0
    assert [(line["step"], line["device"]) for line in figures(place)[len(lines) :]] == [("speed", "cpu")]
    heads, _, row_cells = ([cell.strip() for cell in line.split("|")] for line in table_lines(place))
    assert row_cells[heads.index("decode, ms/token, cuda")] == "123 (2.00 × as fast as dense)"
    assert "123" not in row_cells[heads.index("decode, ms/token, cpu")].split(" ")


def test_longer_healing_is_not_another_speed(place: Path, frontier: Callable[..., int]) -> None:
    """Other values in the same encoding; an adapter of another rank is another one."""
    healed = ("--rows", "dense bf16", "--states", "healed", "--steps", "perplexity", "speed")

    def taken() -> list[str]:
        return [line["step"] for line in figures(place) if line["step"] != "make"]

    assert frontier(*healed, "--heal-steps=1") == 0
    assert frontier(*healed) == 0
    assert taken() == ["perplexity", "speed", "perplexity"]
    assert "as fast as dense" in (place / "frontier.md").read_text()
    assert frontier(*healed, "--lora-rank=2") == 0
    assert taken()[3:] == ["perplexity", "speed"]


def test_speeds_alone_take_one_step_of_healing(place: Path, frontier: Callable[..., int]) -> None:
    """And what needs the full training is not measured on it."""
    healed = ("--rows", "SVD 0.6", "--states", "healed", "--steps")

    def steps_trained() -> int:
        record = json.loads((place / "work" / "svd-0.6" / "healed" / "frontier.json").read_text())
        return int(record["settings"]["heal_steps"])

    assert frontier(*healed, "speed") == 0
    assert steps_trained() == 1
    assert [(line["healed"], line["step"]) for line in figures(place)] == [(False, "make"), (True, "speed")]
    assert frontier(*healed, "speed", "perplexity") == 0
    assert steps_trained() == NUMBERS["heal-steps"]
    assert [line["step"] for line in figures(place)[2:]] == ["make", "perplexity"]
    assert "as fast as dense" in (place / "frontier.md").read_text()


def test_a_row_that_fails_is_told_and_the_others_go_on(frontier: Callable[..., int], capfd: Any) -> None:
    options = ("--states", "plain", "--steps", "accuracy", "sizes")
    assert frontier("--rows", "dense bf16", "SVD 0.3 int8", *options) == 1
    told = capfd.readouterr()
    assert "FAILED dense bf16" in told.out
    assert "piqa_valid.jsonl, which is not there" in told.err
    assert "FAILED SVD 0.3 int8" in told.out, "and the next one was tried"


def test_other_numbers_are_other_figures(place: Path, frontier: Callable[..., int]) -> None:
    rows = ("--rows", "dense bf16", "--states", "plain", "--steps", "perplexity")
    assert frontier(*rows) == frontier(*rows, "--eval-windows=1") == 0
    assert sum("test.txt" in line["found"] for line in figures(place)) == 2


def test_a_checkpoint_made_otherwise_is_not_taken_for_this_one(
    place: Path, frontier: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither with other numbers, nor when the row itself has changed since."""
    rows = ("--rows", "SVD 0.6", "--steps", "sizes", "perplexity")
    assert frontier(*rows) == frontier(*rows, "--heal-steps=1") == 0
    made = [(line["row"], line["healed"]) for line in figures(place) if line["step"] == "make"]
    assert made == [("SVD 0.6", False), ("SVD 0.6", True), ("SVD 0.6", True)], "healing alone is done again"
    healed = [line["found"] for line in figures(place) if line["healed"] and line["step"] == "perplexity"]
    assert healed[0] != healed[1]
    changed = replace(row_named("SVD 0.6"), options={"ratio": 0.5})
    for module in (rows_module, command):
        monkeypatch.setattr(module, "row_named", lambda name: changed)
    assert frontier(*rows, "--states", "plain") == 0
    sizes = [line["found"]["disk"] for line in figures(place) if not line["healed"] and line["step"] == "sizes"]
    assert sizes[-1] < sizes[0]


def test_a_figure_broken_off_by_a_kill_is_taken_again(place: Path, frontier: Callable[..., int]) -> None:
    rows = ("--rows", "dense bf16", "--states", "plain", "--steps", "sizes", "perplexity")
    assert frontier(*rows) == 0
    path = place / "results.jsonl"
    complete = path.read_text()
    path.write_text(complete[:-40])
    assert frontier(*rows) == 0
    assert path.read_text() == complete


def committed() -> tuple[Results, Settings]:
    """The figures that are published, by the settings that they were taken with."""
    texts = ("wikitext2_raw_test.txt", "c4_val_1k.jsonl.gz")
    settings = Settings(model="smollm2", dataset="wt2_train.txt", eval_dataset=texts, data_dir="", work="")
    return Results(FRONTIER / "results.jsonl", settings), settings


def test_the_published_table_is_that_of_the_published_figures(tmp_path: Path) -> None:
    """All of them: a run with other settings would write a table with nothing but dashes over it."""
    results, settings = committed()
    write_table(results, settings, tmp_path / "frontier.md")
    published = (FRONTIER / "frontier.md").read_text(encoding="utf-8")
    assert (tmp_path / "frontier.md").read_text(encoding="utf-8") == published
    lines = published.splitlines()
    partly = [line for line in lines if "–" in line]  # not healed, timed or asked tasks yet
    assert len(partly) == 7
    assert all(line.startswith(("| auto", "| mixture of structures")) for line in partly)
    assert len(lines) - len(partly) == 2 + 2 * (len(ROWS) - len(partly)) == 2 + 52


def shown(value: float) -> str:
    return f"{value:.0f}" if value > 1000 else f"{value:.1f}"


def test_the_results_page_has_the_published_figures() -> None:
    results, settings = committed()
    page = (FRONTIER.parent / "RESULTS.md").read_text(encoding="utf-8")
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("|")}
    for row in ROWS:
        cells = []
        for healed in (False, True):
            size, found, accuracy = (results.found(row, healed, step) for step in ("sizes", "perplexity", "accuracy"))
            assert healed or (size and found)
            perplexities = " / ".join(shown(found[name]) for name in settings.eval_dataset) if found else "–"
            cells += [f"{size['disk'] / 1e6:.0f}" if size else "–", perplexities]
            cells.append(f"{100 * accuracy['mean']['value']:.1f}" if accuracy else "–")
        name = f"{row.name} ({row.mark})" if row.mark == "every matrix dense" else row.name
        assert lines[name] == "| " + " | ".join([name, *cells]) + " |"


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("| dense, bfloat16 | 1 |", "dense bf16"),
        ("| `global`, int8 (no matrix is factorized yet) | 0.505 |", "SVD 0.505 int8"),
        ("| `global` (182 of 210 matrices pivoted, 27 as they are) | 0.8 |", "auto 0.8"),
        ("| `global` | 0.6 |", "auto 0.6"),
        ("| `global`, int8 | 0.4 |", "auto 0.4 int8"),
        ("| GPTQ, 4 bits, groups of 32, no low rank | 0.29 |", "GPTQ-4"),
        (
            "| `global`, mixture of structures and bits (at 3-bit GPTQ's bytes) | 0.227 |",
            "mixture of structures, bytes of GPTQ-3",
        ),
    ],
)
def test_the_readme_has_the_published_figures(line: str, name: str) -> None:
    results, settings = committed()
    size, found = (results.found(row_named(name), False, step) for step in ("sizes", "perplexity"))
    assert size
    assert found
    cells = [f"{size['disk'] / 1e6:.0f}", *(shown(found[text]) for text in settings.eval_dataset)]
    readme = (FRONTIER.parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"{line} {' | '.join(cells)} |" in readme.splitlines()


def test_an_unknown_row_is_named(frontier: Callable[..., int]) -> None:
    with pytest.raises(ValueError, match="there is no row 'SVD 0.85'; there are: dense bf16; BnB int8"):
        frontier("--rows", "SVD 0.85")
