"""`optimum-cli dobisvd` as it is installed, in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from integration_tests.commands.conftest import COMPRESS
from optimum_dobisvd.commands.run import STEPS

CLI = [sys.executable, "-m", "optimum.commands.optimum_cli", "dobisvd"]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*CLI, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)


def test_the_command_is_found_and_tells_what_it_can(tmp_path: Path) -> None:
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    for name in (set(STEPS) - {"generate"}) | {"run"}:
        assert name in done.stdout
    assert run(cwd=tmp_path).returncode == 2
    assert run("compres", cwd=tmp_path).returncode == 2


def test_help_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from optimum_dobisvd.commands import root;"
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_compress_and_inspect_end_to_end(work: Path) -> None:
    done = run(*COMPRESS, "out", "--json", "-", cwd=work)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ratios"]["target_bytes"] <= 0.8
    shown = run("inspect", "out", cwd=work)
    assert shown.returncode == 0, shown.stderr
    assert "model.layers.2.mlp.down_proj" in shown.stdout
    refused = run(*COMPRESS, "out", "--ratio", "20", cwd=work)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("error: ratio is the fraction of bytes KEPT")
    assert "Traceback" not in refused.stderr
