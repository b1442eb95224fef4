"""The tables of architectures and of models that read images are made by commands."""

import subprocess
import sys
from pathlib import Path

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


def test_accuracy_and_speed_of_an_action_model_are_measured() -> None:
    rows = run("multimodal.py", "--steps", "150", "--ratios", "0.8").splitlines()
    dense, compressed = (float(row.split("|")[2]) for row in rows[2:])
    assert dense > 0.5  # one of four colors, seven times
    assert compressed > dense - 0.05
