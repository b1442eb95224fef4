"""Fresh Python processes for tests: with the plugin installed, or on a copy of the environment that lacks it."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def run_python(code: str, *args: str, without_package_in: Path | None = None, **environment: str):
    """Run `code` in a new process; returns the completed process, output captured as text.

    Args:
        without_package_in: a folder in which to build an environment without optimum-dobisvd (links to every installed
            package but this one); None runs in the current environment.
        environment: added to the environment variables.
    """
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-c", code, *args]
    if without_package_in is not None:
        env["PYTHONPATH"] = str(site_without_package(without_package_in))
        command.insert(1, "-S")  # or the editable install's .pth file would bring the package back
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, cwd="/")


def site_without_package(folder: Path) -> Path:
    """A folder that links every installed distribution except optimum-dobisvd."""
    site = folder / "site-without-dobisvd"
    if not site.exists():
        site.mkdir()
        for entry in Path(torch.__file__).parent.parent.iterdir():
            if "dobisvd" not in entry.name and entry.suffix != ".pth":
                (site / entry.name).symlink_to(entry)
    return site
