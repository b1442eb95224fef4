"""OUT never takes the place of what a run reads, and a checkpoint is never compared with itself."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from integration_tests.commands.cli_in_process import dobisvd, names_in
from integration_tests.commands.conftest import COMPRESS


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path, links followed."""
    return {
        str(Path(place, name).relative_to(folder)): Path(place, name).read_bytes()
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
    }


def refuses(capsys: Any, work: Path, *arguments: str) -> str:
    """Run a command that must fail at once and leave every file as it is; returns its message."""
    before = tree(work)
    capsys.readouterr()
    assert dobisvd(*arguments) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1, errors  # no progress, no loading before it
    assert tree(work) == before
    return errors[0]


@pytest.mark.parametrize("out", ["dense", "./dense/", "small/../dense", "link"])
def test_the_model_itself_is_not_replaced(work: Path, capsys: Any, out: str) -> None:
    (work / "link").symlink_to("dense")
    error = refuses(capsys, work, *COMPRESS, out, "--overwrite")
    assert f"{out} is the model (--model dense) itself" in error
    assert "name another folder" in error


def moved(work: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The same command from a sibling folder, everything in a folder `all`."""
    (work / "all").mkdir()
    for name in ("dense", "small", "text.txt", "held-out.txt"):
        shutil.move(work / name, work / "all" / name)
    monkeypatch.chdir(work)
    return ("compress", "--model", "all/dense", "--dataset", "all/text.txt", "--nsamples", "6", "--seqlen", "32")


@pytest.mark.parametrize("kept", ["dense", "text.txt"])
def test_a_folder_that_holds_an_input_is_not_replaced(
    work: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    compress = moved(work, monkeypatch)
    for name in {"dense", "text.txt"} - {kept}:
        shutil.move(work / "all" / name, work / name)
        compress = tuple(name if part == f"all/{name}" else part for part in compress)
    error = refuses(capsys, work, *compress, "all", "--overwrite")
    assert "all holds the " in error
    assert f"all/{kept}" in error


def test_files_behind_links_are_not_deleted(work: Path, capsys: Any) -> None:
    (work / "store").mkdir()
    shutil.move(work / "dense" / "model.safetensors", work / "store" / "blob")
    (work / "dense" / "model.safetensors").symlink_to(work / "store" / "blob")
    assert "store holds the model (--model dense)" in refuses(capsys, work, *COMPRESS, "store", "--overwrite")


def test_statistics_evaluation_text_and_plan_are_not_deleted(work: Path, capsys: Any) -> None:
    # These folders are not there yet: the statistics would be written into OUT, and go when it is put in place.
    assert "out holds the folder --statistics out/stats" in refuses(
        capsys, work, *COMPRESS, "out", "--statistics", "out/stats"
    )
    (work / "mine").mkdir()
    shutil.copy(work / "held-out.txt", work / "mine" / "held-out.txt")
    shutil.copy(work / "small" / "dobisvd_plan.json", work / "mine" / "ranks.json")
    error = refuses(capsys, work, *COMPRESS, "mine", "--overwrite", "--eval-dataset", "mine/held*.txt")
    assert "mine holds the text --eval-dataset mine/held*.txt" in error
    error = refuses(capsys, work, *COMPRESS, "mine", "--overwrite", "--plan", "mine/ranks.json")
    assert "mine holds the file --plan mine/ranks.json" in error
    # A plan is written anew beside what was made by it.
    assert dobisvd(*COMPRESS, "small", "--plan", "small/dobisvd_plan.json") == 0


def test_a_folder_inside_the_model_may_be_new_but_not_the_models_own(work: Path, capsys: Any) -> None:
    (work / "dense" / "original").mkdir()
    (work / "dense" / "original" / "weights.pth").write_text("precious")
    error = refuses(capsys, work, *COMPRESS, "dense/original", "--overwrite")
    assert "dense/original is a part of the model (--model dense)" in error
    before = contents_of_files(work / "dense")
    assert dobisvd(*COMPRESS, "dense/compressed") == 0
    assert dobisvd(*COMPRESS, "dense/compressed") == 0
    assert contents_of_files(work / "dense") == before


def contents_of_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_quantize_does_not_replace_what_it_reads(work: Path, capsys: Any) -> None:
    error = refuses(capsys, work, "quantize", "small", "--quantization", "int8", "--out", "small")
    assert "small is the model (OUT small) itself" in error


def test_every_step_of_a_recipe_is_checked_before_the_first(work: Path, capsys: Any) -> None:
    step = {"model": "dense", "dataset": "text.txt", "nsamples": 6, "seqlen": 32}
    steps = [{"compress": {**step, "out": "one"}}, {"compress": {**step, "out": "dense", "overwrite": True}}]
    (work / "recipe.yaml").write_text(yaml.safe_dump({"steps": steps}))
    assert "dense is the model (--model dense) itself" in refuses(capsys, work, "run", "recipe.yaml")
    (work / "mine").mkdir()
    steps = [{"compress": {**step, "out": "mine", "overwrite": True}}]
    (work / "mine" / "recipe.yaml").write_text(yaml.safe_dump({"steps": steps}))
    assert "mine holds the recipe mine/recipe.yaml" in refuses(capsys, work, "run", "mine/recipe.yaml")
    # The recipe that lies beside a checkpoint makes it again.
    assert dobisvd("run", "small/dobisvd_recipe.yaml") == 0


# --- comparisons ----------------------------------------------------------------------------------------------------

EVAL = ("--dataset", "held-out.txt", "--seqlen", "40", "--windows", "2")


def test_eval_does_not_compare_a_result_with_itself(work: Path, capfd: Any) -> None:
    shutil.rmtree(work / "dense")
    shutil.copytree(work / "small", work / "dense")  # as if the model had been replaced
    (work / "link").symlink_to("dense")
    capfd.readouterr()
    assert dobisvd("eval", "dense", *EVAL, "--json", "-") == 0
    result = json.loads(capfd.readouterr().out)
    assert set(result["perplexity"]["held-out.txt"]) == {"compressed"}
    assert "the dense model dense, which the recipe of dense names, is that checkpoint itself" in result["note"]
    assert dobisvd("eval", "small", *EVAL, "--json", "-") == 0
    result = json.loads(capfd.readouterr().out)
    assert set(result["perplexity"]["held-out.txt"]) == {"compressed"}
    assert "is a compressed model" in result["note"]
    for command in (("eval", "small", "--dense", "link"), ("compare", "small", "--dense", "dense")):
        assert dobisvd(*command, *EVAL) == 1
        assert "is a compressed model; name the model that small was made from" in capfd.readouterr().err
    for command in (("eval", "dense", "--dense", "link"), ("compare", "link", "--dense", "dense")):
        assert dobisvd(*command, *EVAL) == 1
        assert "is that checkpoint itself" in capfd.readouterr().err
    assert dobisvd("compare", "small", *EVAL) == 1
    assert "is a compressed model: pass --dense" in capfd.readouterr().err
    assert names_in(work) == ["dense", "held-out.txt", "link", "small", "text.txt"]
