"""Checkpoints of one model side by side."""

import json
from pathlib import Path

import pytest

from integration_tests.commands.cli_in_process import dobisvd
from integration_tests.commands.conftest import COMPRESS
from optimum_dobisvd.report.comparison import Compared, comparison_picture, recommendation, recommended


def test_sizes_perplexities_and_words_of_two_checkpoints_beside_the_dense_model(work: Path, capfd) -> None:
    assert dobisvd(*COMPRESS, "--ratio", "0.6", "smaller") == 0
    capfd.readouterr()
    asked = ("--dataset", "held-out.txt", "--windows", "2", "--seqlen", "16", "--prompt", "the cat")
    assert dobisvd("compare", "small", "smaller", *asked, "--picture", "sizes.png", "--json", "-") == 0
    found = json.loads(capfd.readouterr().out)
    dense, small, smaller = found["models"]
    assert [dense["name"], small["name"], smaller["name"]] == ["dense", "small", "smaller"]
    assert dense["bytes"] > small["bytes"] > smaller["bytes"]
    assert all(model["perplexity"] > 1 and model["text"].startswith("the cat") for model in found["models"])
    assert dense["seconds"] is None
    assert small["seconds"] > 0
    assert (work / "sizes.png").stat().st_size > 1000
    assert dobisvd("compare", "small", *asked) == 0
    printed = capfd.readouterr().out
    assert "times dense" in printed
    assert "small:\n  the cat" in printed


def test_what_cannot_be_compared_is_said_before_any_model_is_loaded(work: Path, capsys) -> None:
    assert dobisvd("compare", "dense", "--dataset", "held-out.txt") == 1
    assert "dense has no dobisvd_recipe.yaml that names the dense model: pass --dense" in capsys.readouterr().err
    assert dobisvd("compare", "small", "./missing", "--dataset", "held-out.txt") == 1
    said = capsys.readouterr()
    assert "missing" in said.err
    assert "perplexity" not in said.err, "no model was evaluated before"
    assert dobisvd("compare", "small", "--dataset", "held-out.txt", "--windows", "0") == 2
    assert "--windows must be at least 1, got 0" in capsys.readouterr().err


DENSE = Compared("dense", 1000, 20.0)


@pytest.mark.parametrize(
    ("others", "name"),
    [
        ([("half", 500, 20.1), ("third", 330, 20.9), ("quarter", 250, 40.0)], "third"),
        ([("half", 500, 20.1), ("third", 330, 22.0)], "half"),
        ([("half", 500, 30.0)], None),
    ],
)
def test_the_smallest_that_is_close_to_the_dense_one_is_recommended(
    others: list[tuple[str, int, float]], name: str | None, tmp_path: Path
) -> None:
    models = [DENSE, *(Compared(*other) for other in others)]
    found = recommended(models)
    assert (None if found is None else found.name) == name
    assert (name or "keep more bytes") in recommendation(models)
    assert comparison_picture(models, tmp_path / "p.png").exists()
