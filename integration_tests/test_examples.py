"""The examples run as a user would run them, on a tiny model and a text file."""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPTQConfig

from integration_tests.tiny_models import tiny
from optimum_dobisvd import DobiSVDQuantizer, convert
from optimum_dobisvd.calibration.dataset import load_windows
from optimum_dobisvd.structures.base import compressed_linears

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ["--nsamples", "4", "--seqlen", "32"]


@pytest.fixture
def inputs(tmp_path: Path, tiny_tokenizer: Any) -> list[str]:
    tiny("llama").save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "mat",
        "while",
        "dog",
        "ran",
        "over",
        "hill",
        "state",
        "of",
        "union",
        "president",
        "spoke",
    ]
    (tmp_path / "text.txt").write_text(" ".join(random.Random(0).choices(words, k=600)), encoding="utf-8")
    return ["--model", "dense", "--dataset", "text.txt", *SMALL]


def run(name: str, *arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def factorized_linears(folder: Path) -> int:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return sum(module.rank is not None for module in compressed_linears(model).values())


def is_compressed(folder: Path) -> bool:
    return factorized_linears(folder) == 21


def test_quickstart(tmp_path: Path, inputs: list[str]) -> None:
    said = run("quickstart.py", *inputs, "--out", "out", cwd=tmp_path)
    assert "kept 80.0% of the bytes" in said or "kept 79." in said
    assert "The state of the Union is" in said
    assert is_compressed(tmp_path / "out")


def test_compress_on_load(tmp_path: Path, inputs: list[str]) -> None:
    run("compress_on_load.py", *inputs, "--out", "out", cwd=tmp_path)
    assert is_compressed(tmp_path / "out-0.8")
    assert is_compressed(tmp_path / "out-0.6")
    assert (tmp_path / "out-statistics" / "statistics.json").exists()


def test_device_map_offload(tmp_path: Path, inputs: list[str]) -> None:
    said = run("device_map_offload.py", *inputs, "--out", "out", "--max-memory", "120KB", cwd=tmp_path)
    assert "['cpu', 'disk']" in said
    assert is_compressed(tmp_path / "out")


def perplexities(said: str) -> list[float]:
    """Before and after."""
    return [float(line.rpartition(" ")[2]) for line in said.splitlines() if line.startswith("perplexity of")]


def test_heal_with_lora(tmp_path: Path, inputs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    monkeypatch.chdir(tmp_path)  # the adapter names its model as the example was given it, by a relative path
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    texts = ["--text", "text.txt", "--eval-text", "text.txt", "--seqlen", "16", "--nsamples", "8", "--steps", "20"]
    from_dense = ["--model", "dense", *texts, "--ratio", "0.7", "--lr", "1e-2", "--out", "out", "--merge"]
    before, after = perplexities(run("heal_with_lora.py", *from_dense, cwd=tmp_path))
    assert after < 0.7 * before
    assert factorized_linears(tmp_path / "out-merged") == factorized_linears(tmp_path / "out-base") > 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out-merged", dtype=torch.float32)
    healed = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, healed(input_ids=ids).logits, atol=0.2)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "out-merged" / name).read_text() == (tmp_path / "out-base" / name).read_text()

    bare = ["--model", "out-base", *texts, "--bare", "--lr", "1e-2", "--out", "bare"]
    first, after = perplexities(run("heal_with_lora.py", *bare, cwd=tmp_path))
    assert first == before
    assert after < 0.7 * before
    assert factorized_linears(tmp_path / "bare") == factorized_linears(tmp_path / "out-base")


def test_heal_with_lora_on_quantized_linears(tmp_path: Path, inputs: list[str]) -> None:
    for library in ("peft", "bitsandbytes", "gptqmodel"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    tiny("llama", hidden_size=128, intermediate_size=256, num_key_value_heads=2).save_pretrained(tmp_path / "wide")
    texts = ["--text", "text.txt", "--eval-text", "text.txt", "--seqlen", "16", "--steps", "20", "--lr", "1e-2"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    DobiSVDQuantizer(method="svd", ratio=0.6).quantize_model(model).save_pretrained(tmp_path / "low")
    for name, quantization in (
        ("nf4", BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
        ("gptq", GPTQConfig(bits=4, group_size=32)),
    ):
        low = AutoModelForCausalLM.from_pretrained(tmp_path / "low")
        windows = load_windows(str(tmp_path / "text.txt"), tokenizer, nsamples=4, seqlen=32, seed=0)
        convert(low, quantization, windows=windows).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        asked = ["--model", name, *texts, "--out", f"{name}-lora", *(["--merge"] if name == "nf4" else [])]
        before, after = perplexities(run("heal_with_lora.py", *asked, cwd=tmp_path))
        assert after < 0.7 * before
    assert factorized_linears(tmp_path / "nf4-lora-merged") == factorized_linears(tmp_path / "nf4") > 0
    with pytest.raises(AssertionError, match="PEFT merges nothing into GPTQ's linears"):
        run("heal_with_lora.py", "--model", "gptq", *texts, "--merge", cwd=tmp_path)
    with pytest.raises(AssertionError, match="--bare trains factors in 16 bits, and these are stored as nf4"):
        run("heal_with_lora.py", "--model", "nf4", *texts, "--bare", cwd=tmp_path)


def test_every_example_has_a_test() -> None:
    tested = {name.removeprefix("test_") + ".py" for name in globals() if name.startswith("test_")}
    assert {path.name for path in EXAMPLES.glob("*.py")} <= tested
