"""vLLM's plugin where there is no vLLM. What it does with one: `integration_tests/vllm`."""

import importlib.util
import logging

import pytest

from integration_tests.fresh_processes import run_python

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")


def test_registering_says_what_is_missing_and_disturbs_nothing(caplog):
    from optimum_dobisvd.integrations.vllm.plugin import register

    with caplog.at_level(logging.WARNING):
        register()
    assert "cannot register with the installed vLLM: No module named 'vllm'" in caplog.text


def test_importing_it_imports_no_compressor():
    done = run_python("import optimum_dobisvd.integrations.vllm.plugin, sys; print('FOUND', *sys.modules)")
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers", "optimum_dobisvd.config"} & set(done.stdout.split("FOUND")[1].split())
