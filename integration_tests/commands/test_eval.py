"""`eval`: its perplexities against ones computed here."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from integration_tests.commands.cli_in_process import dobisvd

EVAL = ("eval", "small", "--dataset", "held-out.txt", "--seqlen", "40", "--windows", "5")


def perplexity_by_hand(model: str, text: str, seqlen: int, windows: int) -> float:
    """From the log-probabilities of one whole batch, summed token by token."""
    ids = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    batch = torch.tensor([ids[start * seqlen : (start + 1) * seqlen] for start in range(windows)])
    with torch.no_grad():
        logs = AutoModelForCausalLM.from_pretrained(model)(batch).logits.double().log_softmax(-1)
    terms = [-logs[row, i, batch[row, i + 1]].item() for row in range(windows) for i in range(seqlen - 1)]
    return math.exp(math.fsum(terms) / len(terms))


def measured(capfd: Any, *arguments: str) -> dict[str, Any]:
    capfd.readouterr()
    assert dobisvd(*arguments, "--json", "-") == 0
    return json.loads(capfd.readouterr().out)


def test_both_models_are_evaluated(work: Path, capfd: Any) -> None:
    text = (work / "held-out.txt").read_text()
    found = measured(capfd, *EVAL)["perplexity"]["held-out.txt"]
    assert found["dense"] == pytest.approx(perplexity_by_hand("dense", text, 40, 5), rel=1e-5)
    assert found["compressed"] == pytest.approx(perplexity_by_hand("small", text, 40, 5), rel=1e-5)
    assert dobisvd(*EVAL, "text.txt") == 2  # a second OUT
    assert dobisvd("eval", "small", "--dataset", "held-out.txt", "text.txt", "--seqlen", "40", "--windows", "5") == 0
    out = capfd.readouterr().out
    assert f"{found['dense']:.3f}" in out
    assert f"{found['compressed']:.3f}" in out
    assert "text.txt" in out


def test_without_a_recipe_only_the_compressed_is_evaluated(work: Path, capfd: Any) -> None:
    (work / "small" / "dobisvd_recipe.yaml").unlink()
    result = measured(capfd, *EVAL)
    assert set(result["perplexity"]["held-out.txt"]) == {"compressed"}
    assert "--dense" in result["note"]
    assert dobisvd(*EVAL) == 0
    assert "--dense" in capfd.readouterr().out
    assert set(measured(capfd, *EVAL, "--dense", "dense")["perplexity"]["held-out.txt"]) == {"dense", "compressed"}


def test_a_dense_model_that_is_gone_is_told(work: Path, capfd: Any) -> None:
    shutil.rmtree(work / "dense")
    result = measured(capfd, *EVAL)
    assert set(result["perplexity"]["held-out.txt"]) == {"compressed"}
    assert "the dense model dense could not be evaluated" in result["note"]
    assert dobisvd(*EVAL, "--dense", "dense") == 1
    assert "cannot load dense" in capfd.readouterr().err.splitlines()[-1]


def test_too_little_text_is_an_error(work: Path, capfd: Any) -> None:
    assert dobisvd("eval", "small", "--dataset", "held-out.txt", "--seqlen", "100000") == 1
    assert "less than one window of seqlen=100000" in capfd.readouterr().err
    assert dobisvd("eval", "small") == 2
