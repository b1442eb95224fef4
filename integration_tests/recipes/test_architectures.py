"""The tables of architectures and of models that read images are made by commands."""

import json
import subprocess
import sys
from pathlib import Path

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import optimum_dobisvd

BENCHMARKS = Path(optimum_dobisvd.__file__).parent.parent / "recipes" / "benchmarks"


def run(script: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *args], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_table_of_architectures_is_made_once(tmp_path: Path) -> None:
    out, results = tmp_path / "table.md", tmp_path / "rows.jsonl"
    where = ("--out", str(out), "--results", str(results))
    run("architectures.py", *where, "llama", "t5", "llava", "vit")
    table = out.read_text()
    assert "| `llama` | causal | 100.0% | yes | all |  |" in table
    assert "| `t5` | encoder-decoder | 100.0% | yes | all |  |" in table
    assert "parameters in parts that text does not pass through" in table
    vit = next(line for line in table.splitlines() if line.startswith("| `vit`"))
    assert "| yes | svd, svd_llm_v2 |" in vit
    assert "global: ValueError: ViTForImageClassification gives no next-token logits" in vit
    assert run("architectures.py", *where, "llama", "t5", "llava", "vit") == ""  # nothing is made again
    assert out.read_text() == table


CONVERTED = ("gte", "hrm_text", "kimi_k25", "jina_embeddings_v3", "nomic_bert", "qwen3_omni_moe_thinker")
"""Families whose files have q, k and v, or experts, joined, and which transformers takes apart on load."""
PARTLY_CALLED = ("led", "longformer", "trocr", "nllb-moe")
"""Families with linears that a text never calls, or that are experts of modeling code's own."""


def test_families_of_other_kinds_are_compressed_and_reloaded_exactly(tmp_path: Path) -> None:
    names = [name for name in (*CONVERTED, *PARTLY_CALLED) if name in CONFIG_MAPPING_NAMES]
    results = tmp_path / "rows.jsonl"
    run("architectures.py", "--out", str(tmp_path / "table.md"), "--results", str(results), *names)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["model_type"] for row in rows] == names
    for row in rows:
        assert "svd_llm_v2" in row["methods"], row
        assert row["exact"] is True, row


def test_accuracy_and_speed_of_an_action_model_are_measured() -> None:
    rows = run("multimodal.py", "--steps", "150", "--ratios", "0.8").splitlines()
    dense, compressed = (float(row.split("|")[2]) for row in rows[2:])
    assert dense > 0.5  # one of four colors, seven times
    assert compressed > dense - 0.05
