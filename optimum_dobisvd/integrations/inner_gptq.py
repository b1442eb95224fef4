"""Rounding a linear by GPTQ: gptqmodel does it, our statistics say what with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..storage.inner_forms import gptq_bits_of
from .gptq_linear import IN_MEMORY_FORMAT, gptq_kernel, quiet_gptqmodel, require_gptqmodel

__all__ = ["GPTQRounder", "quantized_linear", "quiet_gptqmodel"]


class GPTQRounder:
    """Puts gptqmodel's linears in the place of plain ones.

    Args:
        inner: a `GPTQConfig`.
    """

    def __init__(self, inner: Any) -> None:
        require_gptqmodel()
        self._inner = inner

    def takes(self, storage: str) -> bool:
        """Whether a shell of that storage is to be rounded by GPTQ."""
        return gptq_bits_of(storage) is not None

    def round(self, linear: Any, gram: Tensor, storage: str) -> tuple[nn.Module, Tensor]:
        """The quantized linear, and the matrix it stands for, `m x n`."""
        bits, group_size = gptq_bits_of(storage) or (0, 0)
        return quantized_linear(linear, gram, bits, group_size, self._inner)


def quantized_linear(linear: Any, gram: Tensor, bits: int, group_size: int, inner: Any) -> tuple[Any, Tensor]:
    """One linear rounded by GPTQ: gptqmodel's linear in its place, and the matrix it stands for.

    Args:
        linear: an `nn.Linear`, m x n.
        gram: `H` of its inputs, n x n.
        bits, group_size: of the form.
        inner: the `GPTQConfig`, for everything else.
    """
    from gptqmodel.quantization import GPTQ, METHOD, QuantizeConfig
    from gptqmodel.utils.importer import hf_select_quant_linear_v2

    solver = GPTQ(
        _in_float32(linear),
        qcfg=QuantizeConfig(
            bits=bits,
            group_size=group_size,
            damp_percent=inner.damp_percent,
            desc_act=inner.desc_act,
            act_group_aware=inner.act_group_aware,
            sym=inner.sym,
            offload_to_disk=False,
        ),
    )
    solver.quantizer.configure(bits=bits, sym=inner.sym, perchannel=True)
    solver.add_batch(_rows_with_gram(gram).to(linear.weight.device)[None], None)
    scale, zero, group_of_input = solver.fasterquant(
        percdamp=inner.damp_percent, group_size=group_size, actorder=inner.desc_act
    )[:3]
    rounded = solver.module.weight.detach()
    make = hf_select_quant_linear_v2(
        bits=bits,
        group_size=group_size,
        desc_act=inner.desc_act,
        sym=inner.sym,
        format=IN_MEMORY_FORMAT,
        quant_method=METHOD.GPTQ,
        device_map={"": torch.device("cpu")},
        backend="torch",
        pack=True,
    )
    n, m = linear.in_features, linear.out_features
    packer = make(
        bits=bits,
        group_size=n if group_size == -1 else group_size,
        desc_act=inner.desc_act,
        sym=inner.sym,
        in_features=n,
        out_features=m,
        bias=linear.bias is not None,
    )
    with torch.inference_mode(False):
        packer.pack(solver.module.cpu(), scale.cpu(), zero.cpu(), group_of_input.cpu())
    device = linear.weight.device
    keys = ("qweight", "qzeros", "scales", "g_idx", *(("bias",) if linear.bias is not None else ()))
    tensors = {key: getattr(packer, key).clone().to(device) for key in keys}
    kernel = gptq_kernel(
        tensors,
        in_features=n,
        out_features=m,
        bits=bits,
        group_size=group_size,
        options={"desc_act": inner.desc_act, "sym": inner.sym, "backend": None},
    )
    return kernel, rounded


def _rows_with_gram(gram: Tensor) -> Tensor:
    """Rows `R` with `R^T R = H`: gptqmodel sums inputs up by itself, and these stand for all of them."""
    values, vectors = torch.linalg.eigh(gram.double())
    return (vectors * values.clamp_min(0).sqrt()).T.float().contiguous()


def _in_float32(linear: nn.Linear) -> nn.Linear:
    """A copy, which the solver overwrites with the rounded weight."""
    copy = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    copy.weight = nn.Parameter(linear.weight.detach().float().clone(), requires_grad=False)
    if linear.bias is not None:
        copy.bias = nn.Parameter(linear.bias.detach().float().clone(), requires_grad=False)
    return copy
