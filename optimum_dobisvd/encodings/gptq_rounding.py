"""Rounding a linear by GPTQ: gptqmodel does it, our Grams say what with."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from .gptq_linear import GPTQ_IN_MEMORY, gptq_kernel
from .learned_rounding import RANGE_STEPS, RANGES_TRIED, LearnableLinear, straight_through

_ERROR_NORM = 2.4
"""The power of an error by which the grids of a group are compared: that of GPTQ's authors."""


def gptq_round(linear: Any, gram: Tensor, bits: int, group_size: int, settings: Any) -> tuple[nn.Module, Tensor]:
    """Return gptqmodel's linear in the place of one, and the matrix it stands for (`m x n`, float32).

    Args:
        linear: an `nn.Linear`, `m x n`.
        gram: `H` of its inputs, `n x n`.
        bits, group_size: of the encoding.
        settings: the `GPTQConfig`, for everything else.
    """
    solver = _solver(linear, bits, group_size, settings)
    solver.add_batch(_rows_with_gram(gram).to(linear.weight.device)[None], None)
    scale, zero, group_of_input = solver.fasterquant(
        percdamp=settings.damp_percent, group_size=group_size, actorder=settings.desc_act
    )[:3]
    grid = (scale, zero, group_of_input)
    return packed_kernel(solver.module, grid, bits, group_size, settings), solver.module.weight.detach()


def packed_kernel(
    rounded: nn.Linear, grid: tuple[Tensor, Tensor, Tensor], bits: int, group_size: int, settings: Any
) -> nn.Module:
    """Return gptqmodel's linear of a weight that lies on a grid.

    Args:
        rounded: an `nn.Linear`, `m x n`.
        grid: scales and zero points (`m x groups`), and which group every input is of (`n`).
        bits, group_size: of the encoding.
        settings: the `GPTQConfig`, for everything else.
    """
    tensors = _packed(rounded, grid, bits, group_size, settings)
    return gptq_kernel(
        {key: tensor.to(rounded.weight.device) for key, tensor in tensors.items()},
        (rounded.out_features, rounded.in_features),
        bits,
        group_size,
        {"desc_act": settings.desc_act, "sym": settings.sym, "backend": None},
    )


class LearnableGroups(LearnableLinear):
    """GPTQ's grid, with as many bits of a code and neighboring inputs in a group as are given.

    `symmetric`: it reaches as far below zero as above.
    """

    def __init__(self, linear: nn.Linear, bits: int, group_size: int, symmetric: bool) -> None:
        super().__init__(linear, group_size, linear.weight.dtype)
        self._largest, self._symmetric = 2**bits - 1, symmetric

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return step (in float16, as it is stored) and zero point (a whole number) of every group."""
        if self._symmetric:
            reach = self._groups.abs().amax(-1, keepdim=True) * self.highest
            below, above = -reach, reach
        else:
            below = self._groups.amin(-1, keepdim=True).clamp_max(0) * self.lowest
            above = self._groups.amax(-1, keepdim=True).clamp_min(0) * self.highest
        step = (above - below) / self._largest
        step = straight_through(step, step.half().float())
        step = torch.where(step > 0, step, 1)
        if self._symmetric:
            return step, torch.full_like(step, (self._largest + 1) // 2)
        zero = -below / step
        return step, straight_through(zero, zero.round()).clamp(0, self._largest)

    def codes(self, step: Tensor, zero: Tensor) -> Tensor:
        """Return the code of every value on that grid, `m x groups x group_size`, floats of whole numbers."""
        shifted = self._groups / step + self.offsets
        return (straight_through(shifted, shifted.round()) + zero).clamp(0, self._largest)

    @property
    def weight(self) -> Tensor:
        step, zero = self.grid()
        return ((self.codes(step, zero) - zero) * step).flatten(1)

    @torch.no_grad()
    def stored_grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return steps and zero points (`m x groups`), and which group every input is of (`n`)."""
        step, zero = self.grid()
        group_of_input = torch.arange(self.in_features, dtype=torch.int32) // self._groups.shape[-1]
        return step.squeeze(-1), zero.squeeze(-1), group_of_input


def _solver(linear: nn.Linear, bits: int, group_size: int, settings: Any) -> Any:
    """gptqmodel's solver for a copy of the linear in float32, which it overwrites with the rounded weight."""
    quantization = importlib.import_module("gptqmodel.quantization")
    solver = quantization.GPTQ(
        _in_float32(linear),
        qcfg=quantization.QuantizeConfig(
            bits=bits,
            group_size=group_size,
            damp_percent=settings.damp_percent,
            desc_act=settings.desc_act,
            act_group_aware=settings.act_group_aware,
            sym=settings.sym,
            offload_to_disk=False,
            mse=_ERROR_NORM,
        ),
    )
    tried = {"grid": RANGE_STEPS, "maxshrink": RANGES_TRIED / RANGE_STEPS}
    solver.quantizer.configure(bits=bits, sym=settings.sym, perchannel=True, **tried)
    return solver


def _packed(
    rounded: Any, grid: tuple[Tensor, Tensor, Tensor], bits: int, group_size: int, settings: Any
) -> dict[str, Tensor]:
    """The tensors of a rounded linear as checkpoints have them."""
    importer = importlib.import_module("gptqmodel.utils.importer")
    make = importer.hf_select_quant_linear_v2(
        bits=bits,
        group_size=group_size,
        desc_act=settings.desc_act,
        sym=settings.sym,
        format=GPTQ_IN_MEMORY,
        quant_method=importlib.import_module("gptqmodel.quantization").METHOD.GPTQ,
        device_map={"": torch.device("cpu")},
        backend="torch",
        pack=True,
    )
    n, m, bias = rounded.in_features, rounded.out_features, rounded.bias is not None
    packer = make(
        bits=bits,
        group_size=n if group_size == -1 else group_size,
        desc_act=settings.desc_act,
        sym=settings.sym,
        in_features=n,
        out_features=m,
        bias=bias,
    )
    with torch.inference_mode(False):
        packer.pack(rounded.cpu(), *(each.cpu() for each in grid))
    keys = ("qweight", "qzeros", "scales", "g_idx", *(("bias",) if bias else ()))
    return {key: getattr(packer, key).clone() for key in keys}


def _rows_with_gram(gram: Tensor) -> Tensor:
    """Rows `R` with `R^T R = H`: gptqmodel sums inputs up by itself, and these stand for all of them.

    Inputs that are always zero are so in `R`, too, and not up to rounding: gptqmodel drops what multiplies them.
    """
    values, vectors = torch.linalg.eigh(gram.double())
    rows = (vectors * values.clamp_min(0).sqrt()).T.float()
    return torch.where(gram.diagonal() > 0, rows, 0).contiguous()


def _in_float32(linear: nn.Linear) -> nn.Linear:
    copy = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    copy.weight = nn.Parameter(linear.weight.detach().float().clone(), requires_grad=False)
    if linear.bias is not None:
        copy.bias = nn.Parameter(linear.bias.detach().float().clone(), requires_grad=False)
    return copy
