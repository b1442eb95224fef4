"""Models in wrappers, and weights that are no plain tensors: each told in one sentence, with the way out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


def refuse_wrapped(model: Any) -> None:
    """Raise ValueError for a model that is compiled, wrapped for parallel training, sharded, or quantized in place."""
    for name, module in model.named_modules():
        which = f"its module {name}" if name else f"the {type(model).__name__}"
        if hasattr(module, "_orig_mod"):  # an OptimizedModule, which torch.compile returns
            inner = "model._orig_mod" if not name else "a model whose modules are not compiled"
            raise ValueError(f"{which} is compiled (torch.compile): pass {inner}, and compile the compressed model")
        if getattr(module, "_compiled_call_impl", None) is not None:  # module.compile()
            raise ValueError(
                f"{which} is compiled in place (module.compile()): load it without, and compile the compressed one"
            )
        if isinstance(module, nn.DataParallel | DistributedDataParallel):
            raise ValueError(
                f"{which} is wrapped in {type(module).__name__}: pass its .module, and wrap the compressed one"
            )
        if isinstance(module, FullyShardedDataParallel):
            raise ValueError(f"{which} is sharded (FSDP): compress the model before it is wrapped")
    for name, parameter in model.named_parameters():
        # Not by the parameter's own type: transformers and others have subclasses of nn.Parameter.
        kind = type(parameter.data)
        if isinstance(parameter, DTensor) or isinstance(parameter.data, DTensor):
            raise ValueError(f"{name} is sharded over processes (a DTensor): compress the model before it is sharded")
        if kind is not Tensor and not issubclass(kind, nn.Parameter):
            raise ValueError(
                f"{name} is a {kind.__name__}, not a plain tensor: {kind.__module__.partition('.')[0]} has quantized "
                "it; load the dense model, and quantize what is compressed (quantization=)"
            )
