"""lm-eval as its users run it: the command, in a new process, on the YAMLs of this repository."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[2] / "recipes" / "tasks"


def lm_eval(model: Path, data: Path, tasks: Iterable[str], results: Path, *options: str) -> dict[str, Any]:
    """`lm_eval --model hf --model_args pretrained=MODEL --tasks local_...` in the folder `data`; figures by task.

    Nothing of this package is imported there, other than by `from_pretrained`.
    """
    names = ",".join(f"local_{task}" for task in tasks)
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32"]
    command += ["--device", "cpu", "--include_path", str(RECIPES), "--tasks", names, *options]
    command += ["--output_path", str(results / "direct.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=data, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = results.glob("direct*.json")
    return json.loads(written.read_text(encoding="utf-8"))["results"]


def same_figures(found: dict[str, Any], direct: dict[str, Any]) -> int:
    """Compare our `{task: figures}` with lm-eval's results, to the last bit; returns how many figures there are."""
    number = 0
    for task, figures in found.items():
        expected = direct[f"local_{task}"]
        metrics = {key.partition(",")[0] for key in expected if "," in key and "_stderr" not in key}
        assert set(figures) == metrics | {"samples"}
        assert figures["samples"] == expected["sample_len"]
        for metric in metrics:
            assert figures[metric]["value"] == expected[f"{metric},none"], (task, metric)
            assert figures[metric]["stderr"] == expected[f"{metric}_stderr,none"], (task, metric)
            number += 2
    return number
