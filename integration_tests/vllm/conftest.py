"""Tests with the real vLLM, in an environment of its own (`make test-vllm`): elsewhere they are not collected."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["*"]
