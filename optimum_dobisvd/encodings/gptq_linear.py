"""Linears in GPTQ's encoding: their tensors while a checkpoint is loaded, and gptqmodel's kernels afterwards.

gptqmodel is imported by name where it is needed: transformers would not load a bundled file that has an import
statement for a library that is missing, whatever the checkpoint.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

GPTQ_IN_MEMORY = "gptq_v2"
"""gptqmodel's format: zero points as they are. That of auto-gptq (`gptq`), which has them less one, is read, too."""


def require_gptqmodel(backend: str | None = None) -> None:
    """Raise ImportError, naming the extra, if gptqmodel is missing or broken; ValueError if it has no such backend."""
    if importlib.util.find_spec("gptqmodel") is None:
        raise ImportError(
            "GPTQ needs gptqmodel, the successor of auto-gptq: pip install 'optimum-dobisvd[gptq]' (together with the "
            "torch you have, e.g. 'torch==2.13.0': its newest release may ask for a newer one)"
        )
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it greets, and standard output may be somebody's data
            importlib.import_module("gptqmodel")
    except Exception as error:
        raise ImportError(f"gptqmodel is installed and cannot be imported: {error}") from error
    known = importlib.import_module("gptqmodel").BACKEND.__members__
    if backend is not None and backend.strip().upper() not in known:
        raise ValueError(
            f"gptqmodel has no backend {backend!r}, which GPTQConfig names: leave it out, or take one of "
            f"{', '.join(name.lower() for name in known)}"
        )


@contextlib.contextmanager
def quiet_gptqmodel() -> Iterator[None]:
    """Keep gptqmodel from printing a line on every linear; warnings are let through."""
    log = importlib.import_module("logbar").LogBar.shared()
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)


class GPTQTensors(nn.Module):
    """The tensors of one linear as they lie in a checkpoint. It computes nothing: `gptq_kernel` takes its place.

    Parameters and not buffers, so that they are placed as weights are.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, bits: int, group_size: int, device: Any
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, group_size
        groups = 1 if group_size == -1 else in_features // group_size
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "qweight": ((in_features // 32 * bits, out_features), torch.int32),
            "qzeros": ((groups, out_features // 32 * bits), torch.int32),
            "scales": ((groups, out_features), torch.float16),
            "g_idx": ((in_features,), torch.int32),
        }
        if bias:
            shapes["bias"] = ((out_features,), torch.float16)
        for key, (shape, dtype) in shapes.items():
            values = torch.empty(shape, dtype=dtype, device=device)
            self.register_parameter(key, nn.Parameter(values, requires_grad=False))

    def held(self) -> dict[str, Tensor]:
        """Return its tensors by name."""
        return {key: parameter.data for key, parameter in self.named_parameters()}


def gptq_kernel(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], bits: int, group_size: int, options: Mapping[str, Any]
) -> nn.Module:
    """Return gptqmodel's linear around these tensors, ready to compute.

    Args:
        tensors: `qweight`, `qzeros`, `scales`, `g_idx`, and `bias` where there is one.
        shape: outputs and inputs of the linear.
        bits, group_size: of its encoding.
        options: of the `GPTQConfig`: `desc_act`, `sym`, `format` of the tensors, and `backend`.

    Raises:
        ValueError: no kernel of that backend takes such a linear.
    """
    device = tensors["qweight"].device
    out_features, in_features = shape
    make = _kernel_class(bits, group_size, options, device)
    linear: Any = make(
        bits=bits,
        group_size=in_features if group_size == -1 else group_size,
        desc_act=bool(options.get("desc_act", False)),
        sym=bool(options.get("sym", True)),
        in_features=in_features,
        out_features=out_features,
        bias="bias" in tensors,
    ).to(device)
    for key, value in tensors.items():
        linear.register_buffer(key, value)
    if options.get("format", GPTQ_IN_MEMORY) == "gptq" and linear.REQUIRES_FORMAT_V2:
        model = importlib.import_module("gptqmodel.utils.model")
        model.convert_gptq_v1_to_v2_format_module(linear, bits=bits, pack_dtype=torch.int32)
    linear.qzero_format(format=2)
    # gptqmodel would compile the unpacking of every linear by itself: minutes for a model of many different ranks.
    linear.optimized = True
    linear.post_init()
    return linear.eval()


def _kernel_class(bits: int, group_size: int, options: Mapping[str, Any], device: torch.device) -> Any:
    """The kernel that was asked for; by default the one that leaves its tensors as they are, so they can be saved."""
    importer = importlib.import_module("gptqmodel.utils.importer")
    backend = options.get("backend")
    try:
        return importer.hf_select_quant_linear_v2(
            bits=bits,
            group_size=group_size,
            desc_act=bool(options.get("desc_act", False)),
            sym=bool(options.get("sym", True)),
            format=GPTQ_IN_MEMORY,
            quant_method="gptq",
            device_map={"": device},
            backend="torch" if backend in (None, "auto", "auto_trainable") else backend,
            pack=False,
        )
    except (ValueError, RuntimeError, ImportError) as error:  # of the second kind are options it has no code for
        raise ValueError(
            f"gptqmodel has no kernel for {bits} bits in groups of {group_size} on {device}: {error}; leave backend "
            "out of the GPTQConfig, or choose another one"
        ) from error


def require_unpacked(name: str, kernel: nn.Module, bits: int, group_size: int) -> None:
    """Raise ValueError if the kernel has put its tensors into another layout than checkpoints', as fast ones do."""
    if not is_unpacked(kernel, bits, group_size):
        raise ValueError(
            f"{name} cannot be saved: its kernel, {type(kernel).__name__}, has repacked its tensors; load the model "
            "without backend in its GPTQConfig to save it again, or copy the checkpoint"
        )


def is_unpacked(kernel: nn.Module, bits: int, group_size: int) -> bool:
    """Whether the kernel's tensors are in the layout that checkpoints have them in."""
    held = dict(kernel.named_buffers())
    inputs: Any = kernel.in_features
    outputs: Any = kernel.out_features
    expected = GPTQTensors(inputs, outputs, "bias" in held, bits, group_size, "meta").held()
    return all(
        key in held and held[key].shape == tensor.shape and (held[key].dtype == tensor.dtype or key == "scales")
        for key, tensor in expected.items()
    )
