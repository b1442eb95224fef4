"""What values become in every storage when each is rounded on its own: the starting point for prices of rounding.

The quantizers that ship do better (GPTQ passes errors on) or the same; `statistics.roundings` accounts for that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .costs import DENSE_INT8
from .inner_forms import gptq_bits_of
from .packing import pack_dense

# QLoRA, appendix E: quantiles of a normal distribution, zero among them. And the values of a 4-bit float.
_NF4 = (
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
)
_FP4 = tuple(sign * value / 12 for sign in (-1, 1) for value in (0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0))
_BLOCK = 64


def rounded(weight: Tensor, storage: str) -> Tensor:
    """The matrix (`m x n`, floating point) with every value rounded to what the storage can say there.

    ValueError for a storage that rounds nothing, or that has no rounding of single values.
    """
    gptq = gptq_bits_of(storage)
    if gptq is not None:
        return _rounded_in_groups(weight, *gptq)
    if storage.startswith(("nf4", "fp4")):
        return _rounded_to_code(weight, _NF4 if storage.startswith("nf4") else _FP4)
    if storage in (DENSE_INT8, "llm_int8"):
        return pack_dense(DENSE_INT8, weight, torch.float32)[1].to(weight.dtype)
    raise ValueError(f"storage {storage!r} does not round single values")


def _rounded_in_groups(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """GPTQ's symmetric grid: `2^bits` steps between minus and plus the largest magnitude of a group of inputs."""
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    missing = -columns % size
    groups = torch.nn.functional.pad(weight, (0, missing)).view(rows, -1, size)
    step = groups.abs().amax(-1, keepdim=True) * 2 / (2**bits - 1)
    step = torch.where(step > 0, step, 1)
    half = 2 ** (bits - 1)
    return ((groups / step).round().clamp(-half, half - 1) * step).view(rows, -1)[:, :columns]


def _rounded_to_code(weight: Tensor, code: tuple[float, ...]) -> Tensor:
    """The nearest value of a code, in units of the largest magnitude of 64 neighbors."""
    values = torch.tensor(sorted(code), dtype=weight.dtype, device=weight.device)
    flat = torch.nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % _BLOCK)).view(-1, _BLOCK)
    scale = flat.abs().amax(-1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1)
    middles = (values[1:] + values[:-1]) / 2
    nearest = values[torch.bucketize(flat / scale, middles)] * scale
    return nearest.reshape(-1)[: weight.numel()].view(weight.shape)
