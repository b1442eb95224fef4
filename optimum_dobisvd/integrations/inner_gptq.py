"""GPTQ on a compressed model, block by block: gptqmodel rounds, our statistics say what with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.runner import BlockRunner
from ..nn.compressed_linear import CompressedLinear
from ..nn.low_rank_linear import LowRankLinear
from ..statistics.collect import InputCollector
from ..statistics.store import full_gram
from ..storage.inner_forms import gptq_bits_of
from .gptq_linear import IN_MEMORY_FORMAT, gptq_kernel, quiet_gptqmodel, require_gptqmodel

logger = logging.getLogger(__name__)


def quantize_gptq(model: nn.Module, runner: BlockRunner, inner: Any) -> None:
    """Quantise the linears inside every shell whose storage is a GPTQ form, in place.

    Blocks are taken in order, and each is calibrated on what the quantised blocks before it give. Within a block the
    linears that share an input are rounded together, and with `true_sequential` the next ones see what these give; the
    outer factor's inputs follow from the inner factor's (`B H B^T`), exactly.

    Args:
        model: the compressed model; its shells still hold plain linears.
        runner: takes the calibration windows through its blocks.
        inner: a `GPTQConfig`.

    Raises:
        ValueError: naming the linear that saw no token, or that gptqmodel cannot round.
    """
    require_gptqmodel()
    shells = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CompressedLinear) and gptq_bits_of(module.storage) is not None
    }

    def change(block: str, _module: nn.Module, replay: Callable[[InputCollector], None]) -> None:
        mine = {name: shell for name, shell in shells.items() if f"{name}.".startswith(f"{block}.")}
        if mine:
            _Block(mine, replay, inner).quantize()

    with quiet_gptqmodel():
        runner.run_in_turn(change, "GPTQ")


class _Block:
    """One block's shells on their way to GPTQ."""

    def __init__(
        self, shells: Mapping[str, CompressedLinear], replay: Callable[[InputCollector], None], inner: Any
    ) -> None:
        self._shells, self._replay, self._inner = shells, replay, inner

    def quantize(self) -> None:
        waiting = dict(self._shells)
        while waiting:
            grams, leader = self._input_grams(waiting)
            # In the order in which the block calls them: the first group's inputs are those of the quantised model.
            groups = list(dict.fromkeys(leader.values()))
            ready = groups[:1] if self._inner.true_sequential else groups
            for name in [name for name in waiting if leader[name] in ready]:
                self._quantize_shell(name, waiting.pop(name), grams[leader[name]])

    def _input_grams(self, shells: Mapping[str, CompressedLinear]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """`H` by the first linear that reads an input, and which that is for every shell."""
        found: dict[str, Any] = {}
        carriers = {name: _entry(shell) for name, shell in shells.items()}
        self._replay(InputCollector(lambda _: carriers, lambda _, statistics: found.update(it=statistics), _always))
        statistics = found["it"]
        return {name: full_gram(each) for name, each in statistics.inputs.items()}, statistics.leader

    def _quantize_shell(self, name: str, shell: CompressedLinear, gram: Tensor) -> None:
        bits, group_size = gptq_bits_of(shell.storage) or (0, 0)
        try:
            if isinstance(shell, LowRankLinear):
                shell.first, first = quantized_linear(shell.first, gram, bits, group_size, self._inner)
                first = first.to(gram)
                shell.second, _ = quantized_linear(shell.second, first @ gram @ first.T, bits, group_size, self._inner)
            else:
                shell.whole, _ = quantized_linear(_entry(shell), gram, bits, group_size, self._inner)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{name}: GPTQ with {bits} bits in groups of {group_size} failed: {error}") from error


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


def _entry(shell: CompressedLinear) -> Any:
    """The linear in a shell that is given the shell's own input."""
    return shell.get_submodule("first" if isinstance(shell, LowRankLinear) else "whole")


def _always(_: str) -> bool:
    return True
