"""`quantize`, and `compress` with `--quantization`, `--mixed` and `--budget`."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from integration_tests.commands.cli_in_process import dobisvd
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd.model.footprint import checkpoint_bytes

TO_LOW_RANK = ("--method", "output_pca", "--ratio", "0.8")
COMPRESS = ("compress", "--model", "wide", "--dataset", "text.txt", "--nsamples", "4", "--seqlen", "32")
DRAW = ("--nsamples", "4", "--seqlen", "32")
needs_gptq = pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="gptqmodel is not installed")
needs_bnb = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


@pytest.fixture
def wide(work: Path, tiny_tokenizer: Any) -> Path:
    model = tiny("llama", dtype=torch.bfloat16, hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    model.save_pretrained("wide")
    tiny_tokenizer.save_pretrained("wide")
    return work


def encodings_of(model: Any) -> set[str]:
    return {entry["encoding"] for entry in model.config.quantization_config.modules.values()}


@needs_gptq
@needs_bnb
def test_a_saved_checkpoint_is_quantized_offline(wide: Path, capfd: Any) -> None:
    assert dobisvd(*COMPRESS, *TO_LOW_RANK, "low") == 0
    for encoding, options in (("gptq4_g32", DRAW), ("nf4", ()), ("llm_int8", ())):
        capfd.readouterr()
        assert dobisvd("quantize", "low", "--quantization", encoding, *options, "--json", "-") == 0
        result = json.loads(capfd.readouterr().out)
        assert result["quantization"] == encoding
        out = Path(f"low-{encoding}")
        model = AutoModelForCausalLM.from_pretrained(out)
        assert result["bytes_after"] == checkpoint_bytes(model) < 0.8 * result["bytes_before"]
        assert encodings_of(model) == {encoding}
        steps = yaml.safe_load((out / "dobisvd_recipe.yaml").read_text())["steps"]
        assert [next(iter(step)) for step in steps] == ["compress", "quantize"]
        assert dobisvd("inspect", str(out), "--json", "-") == 0
        assert {module["encoding"] for module in json.loads(capfd.readouterr().out)["modules"]} == {encoding}
        assert dobisvd("eval", str(out), "--dataset", "held-out.txt", "--seqlen", "32", "--windows", "2") == 0
    first = load_file("low-nf4/model.safetensors")
    assert dobisvd("run", "low-nf4/dobisvd_recipe.yaml", "--set", "compress.overwrite=true") == 0
    again = load_file("low-nf4/model.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first), "the recipe repeats the run"
    capfd.readouterr()
    assert dobisvd("quantize", "low-nf4", "--quantization", "nf4") == 1
    assert "is quantized already (nf4)" in capfd.readouterr().err


@needs_gptq
@needs_bnb
def test_a_checkpoint_that_names_no_text_is_told_what_is_missing(wide: Path, capfd: Any, caplog: Any) -> None:
    assert dobisvd(*COMPRESS, *TO_LOW_RANK, "low") == 0
    (wide / "low" / "dobisvd_recipe.yaml").unlink()
    capfd.readouterr()
    assert dobisvd("quantize", "low", "--quantization", "gptq4_g32") == 1
    assert "low does not say what it was calibrated on: name some with --dataset" in capfd.readouterr().err
    assert not Path("low-gptq4_g32").exists()
    assert dobisvd("quantize", "low", "--quantization", "nf4") == 0
    assert "each value is rounded to 4 bits on its own" in caplog.text
    caplog.clear()
    assert dobisvd("quantize", "low", "--quantization", "nf4", "--overwrite", "--dataset", "text.txt", *DRAW) == 0
    assert "on its own" not in caplog.text


def test_our_own_8_bits_need_no_text_and_no_library(wide: Path) -> None:
    assert dobisvd(*COMPRESS, *TO_LOW_RANK, "low") == 0
    for encoding, structures in (("int8", {"low_rank", "dense"}), ("remap", {"low_rank"})):
        assert dobisvd("quantize", "low", "--quantization", encoding) == 0
        model = AutoModelForCausalLM.from_pretrained(f"low-{encoding}")
        assert encodings_of(model) == {encoding}
        entries = model.config.quantization_config.modules.values()
        assert {"low_rank"} <= {entry["structure"] for entry in entries} <= structures
        assert checkpoint_bytes(model) < checkpoint_bytes(AutoModelForCausalLM.from_pretrained("low"))
        assert dobisvd("inspect", f"low-{encoding}") == 0


@needs_gptq
def test_compress_counts_the_bits_of_a_quantization_against_a_size(wide: Path) -> None:
    asked = int(0.65 * checkpoint_bytes(AutoModelForCausalLM.from_pretrained("wide")))
    assert dobisvd(*COMPRESS, "--budget", str(asked), "--mixed", "--quantization", "gptq4_g32", "out") == 0
    model = AutoModelForCausalLM.from_pretrained("out")
    assert 0.97 * asked < checkpoint_bytes(model) <= asked
    assert torch.isfinite(model(input_ids=tokens(1, 9)).logits).all()
    assert dobisvd("run", "out/dobisvd_recipe.yaml", "--set", "out=again") == 0
    again = AutoModelForCausalLM.from_pretrained("again").config.quantization_config
    assert again.modules == model.config.quantization_config.modules


@needs_gptq
def test_plan_tells_what_a_size_will_give(wide: Path, capfd: Any) -> None:
    asked = int(0.65 * checkpoint_bytes(AutoModelForCausalLM.from_pretrained("wide")))
    options = ("--budget", str(asked), "--mixed", "--quantization", "gptq4_g32")
    capfd.readouterr()
    assert dobisvd("plan", *COMPRESS[1:], *options, "--json", "-") == 0
    planned = json.loads(capfd.readouterr().out)
    assert 0.9 * asked < planned["compressed_model_bytes"] <= asked


@needs_gptq
def test_whose_text_is_read(wide: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """--dataset before that of the GPTQConfig before that of the recipe; LLM.int8() and our own 8 bits read none."""
    from optimum_dobisvd.calibration import dataset, processor_batches

    assert dobisvd(*COMPRESS, *TO_LOW_RANK, "low") == 0
    text = Path("text.txt").read_text()
    Path("named.txt").write_text(text[100:])
    quantization = json.dumps(
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "dataset": [text[:5000], text[5000:]]}
    )
    read: list[Any] = []
    real = dataset.load_windows

    def seen(source: Any, *arguments: Any, **draw: Any) -> Any:
        read.append(source)
        return real(source, *arguments, **draw)

    monkeypatch.setattr(dataset, "load_windows", seen)
    monkeypatch.setattr(processor_batches, "load_windows", seen)
    for options, expected in (((), [text[:5000], text[5000:]]), (("--dataset", "named.txt"), "named.txt")):
        read.clear()
        settings = ("--quantization", quantization, "--out", "out", "--overwrite", *options, *DRAW)
        assert dobisvd("quantize", "low", *settings) == 0
        assert read == [expected]
    capfd.readouterr()
    assert dobisvd("quantize", "low", "--quantization", "int8", "--dataset", "named.txt") == 2
    assert "int8 reads no text: leave --dataset out" in capfd.readouterr().err
    assert dobisvd("quantize", "low", "--quantization", "llm_int8", "--seqlen", "9") == 2
    assert "llm_int8 reads no text: leave --seqlen out" in capfd.readouterr().err


@needs_gptq
def test_an_encoding_that_fits_too_little_writes_nothing(wide: Path, capfd: Any) -> None:
    assert dobisvd(*COMPRESS, *TO_LOW_RANK, "low") == 0
    capfd.readouterr()
    assert dobisvd("quantize", "low", "--quantization", "gptq4_g256", *DRAW) == 1
    assert "take group_size=128 (on the command line gptq4_g128)" in capfd.readouterr().err
    assert not Path("low-gptq4_g256").exists()
    assert dobisvd("quantize", "low", "--quantization", "gptq4_g256", "--min-coverage", "0.1", *DRAW) == 0
    assert encodings_of(AutoModelForCausalLM.from_pretrained("low-gptq4_g256")) == {"gptq4_g256", "float"}
    assert dobisvd("plan", *COMPRESS[1:], "--quantization", "gptq4_g256", "--ratio", "0.25") == 1
    assert "take group_size=128" in capfd.readouterr().err


def test_bad_quantizations_are_named(wide: Path, capfd: Any) -> None:
    assert dobisvd(*COMPRESS, "--quantization", "gptq5", "out") == 1
    assert "unknown quantization 'gptq5': int8, remap, gptq2, gptq3, gptq4 or gptq8" in capfd.readouterr().err
    assert dobisvd("quantize", "low", "--quantization", "gptq5") == 1
    assert "unknown quantization 'gptq5'" in capfd.readouterr().err
    assert dobisvd(*COMPRESS, "--quantization", '{"quant_method": "gptq", "bits": 4', "out") == 1
    assert "is no JSON" in capfd.readouterr().err
    assert dobisvd(*COMPRESS, "--quantization", '{"quant_method": "gptq", "bits": 4, "group_sise": 32}', "out") == 1
    assert "GPTQConfig has no option 'group_sise'; did you mean 'group_size'?" in capfd.readouterr().err
    assert dobisvd(*COMPRESS, "--budget", "1KB", "out") == 1
    assert "what is not compressed" in capfd.readouterr().err
    assert not Path("out").exists()


LEARNED = ("--rounding", "learned", "--rounding-settings", '{"steps": 2, "nsamples": 3}')


def test_codes_are_chosen_as_asked_on_the_command_line(wide: Path, capfd: Any) -> None:
    assert dobisvd(*COMPRESS, *TO_LOW_RANK, "low") == 0
    small = (*COMPRESS, "--method", "output_pca", "--ratio", "0.4", "--quantization", "int8")
    for options, command, out in (
        (LEARNED, small, "one"),
        ((), small, "two"),
        (LEARNED, ("quantize", "low", "--quantization", "int8", *DRAW, "--out"), "three"),
        ((), ("quantize", "low", "--quantization", "int8", "--out"), "four"),
    ):
        command = (*command, out, *options)
        assert dobisvd(*command) == 0, capfd.readouterr().err
        assert encodings_of(AutoModelForCausalLM.from_pretrained(out)) == {"int8"}
    for learned, nearest in (("one", "two"), ("three", "four")):
        files = [load_file(f"{name}/model.safetensors") for name in (learned, nearest)]
        assert any(not torch.equal(files[0][name], value) for name, value in files[1].items())
        steps = yaml.safe_load(Path(learned, "dobisvd_recipe.yaml").read_text())["steps"]
        saved = next(iter(steps[-1].values()))
        assert saved["rounding"] == "learned"
        assert saved["rounding_settings"] == {"steps": 2, "nsamples": 3}
    first = load_file("one/model.safetensors")
    assert dobisvd("run", "one/dobisvd_recipe.yaml", "--set", "compress.overwrite=true") == 0
    again = load_file("one/model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first), "the recipe repeats the run"


def test_roundings_that_cannot_be_are_named(wide: Path, capfd: Any) -> None:
    def refused(words: str, code: int, *command: str) -> None:
        assert dobisvd(*command) == code
        assert words in capfd.readouterr().err
        assert not Path("out").exists()

    int8 = (*COMPRESS, "--ratio", "0.4", "--quantization", "int8")
    refused("invalid choice: 'learnt'", 2, *int8, "--rounding", "learnt", "out")
    refused("rounding='feedback' does not go with int8", 1, *int8, "--rounding", "feedback", "out")
    refused(
        "has not; did you mean 'steps'",
        1,
        *int8,
        *LEARNED[:3],
        '{"step": 2}',
        "out",
    )
    refused("does not go with float", 1, *COMPRESS, "--method", "svd", "--rounding", "learned", "out")
    assert dobisvd("compress", "--model", "wide", "--method", "svd", "--ratio", "0.8", "low") == 0
    command = ("quantize", "low", "--quantization", "int8", "--out", "out")
    refused("int8 needs calibration text for its rounding (learned), and low does not say", 1, *command, *LEARNED)
