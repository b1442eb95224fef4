"""`optimum-cli dobisvd` as it is installed, in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from integration_tests.commands.conftest import COMPRESS
from optimum_dobisvd import DobiSVDConfig
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


def test_a_command_line_is_parsed_without_torch(tmp_path: Path) -> None:
    """`optimum-cli` loads this for commands of others, too; only defaults in a help text are looked up."""
    code = (
        "import argparse, sys; from optimum_dobisvd.commands import root, run, options\n"
        "for spec in (*run.STEPS.values(), run.SPEC): options.add_options(argparse.ArgumentParser(), spec)\n"
        "parser = argparse.ArgumentParser(); options.add_options(parser, run.STEPS['compress'])\n"
        "parser.parse_args(['out', '--model', 'm', '--nsamples', '3'])\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])\n"
        "print('(default: 128)' in parser.format_help())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "True"]


@pytest.mark.parametrize("command", sorted((set(STEPS) - {"generate"}) | {"run"}))
def test_every_command_tells_its_options(command: str, tmp_path: Path) -> None:
    done = run(command, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: optimum-cli dobisvd {command}")
    assert "examples:" in done.stdout
    if command in ("compress", "plan"):
        for default in (DobiSVDConfig.method, DobiSVDConfig.nsamples, DobiSVDConfig.fisher):
            assert f"(default: {default})" in " ".join(done.stdout.split())


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
