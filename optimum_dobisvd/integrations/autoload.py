"""Registers the quantizer with transformers as soon as transformers can take it, without importing anything early.

`install` is the entry point `torch.backends`, which `import torch` calls: from then on, checkpoints of this format
load through plain `from_pretrained` in processes that never import this package. An exception here would break
`import torch`, so nothing below may raise.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import sys
from typing import Any

logger = logging.getLogger(__name__)

# The quantizers' table is complete once `quantizers.auto` has run. That module itself imports torch, so it may be half
# way through when `install` is called; then the next import of modeling_utils (all of from_pretrained) is the moment.
_TABLE = "transformers.quantizers.auto"
_MOMENTS = (_TABLE, "transformers.modeling_utils")


def install() -> None:
    """Register now if transformers' table is there, and otherwise as soon as it has been imported. Never raises."""
    try:
        if _register():
            return
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    except Exception as error:
        logger.warning("optimum-dobisvd could not register with transformers: %s", error)


def _register() -> bool:
    """Whether the quantizer is registered, after trying."""
    table: Any = sys.modules.get(_TABLE)
    if table is None or not hasattr(table, "register_quantizer") or not hasattr(table, "get_hf_quantizer"):
        return False
    try:
        from ..config import QUANT_METHOD, DobiSVDConfig
        from .compress_on_load import CompressOnLoadQuantizer
    except Exception as error:
        if isinstance(error, ImportError) and "partially initialized module" in str(error):
            return False  # one of our own modules is being imported, and has set off this; the next moment will do
        logger.warning("optimum-dobisvd does not work with the installed transformers: %s", error)
        return True
    if QUANT_METHOD not in table.AUTO_QUANTIZATION_CONFIG_MAPPING:
        table.register_quantization_config(QUANT_METHOD)(DobiSVDConfig)
    if QUANT_METHOD not in table.AUTO_QUANTIZER_MAPPING:
        table.register_quantizer(QUANT_METHOD)(CompressOnLoadQuantizer)
    return True


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the other finders find the two modules, and has `_register` called when they have been executed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _MOMENTS:
            return None
        try:
            for finder in sys.meta_path:
                find = getattr(finder, "find_spec", None)
                if isinstance(finder, _Finder) or find is None:
                    continue
                spec = find(fullname, path, target)
                if spec is not None and spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                    return spec
        except Exception as error:
            logger.warning("optimum-dobisvd could not watch the import of %s: %s", fullname, error)
        return None


class _Loader(importlib.abc.Loader):
    """The real loader, and `_register` after it."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def create_module(self, spec: Any) -> Any:
        return self._real.create_module(spec)

    def exec_module(self, module: Any) -> None:
        # Give the module its real loader back first: resource readers and inspect look at it.
        module.__loader__ = module.__spec__.loader = self._real
        self._real.exec_module(module)
        try:
            if _register():
                sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
        except Exception as error:
            logger.warning("optimum-dobisvd could not register with transformers: %s", error)
