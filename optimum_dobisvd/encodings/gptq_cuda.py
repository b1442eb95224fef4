"""GPTQ's linears on CUDA through the fastest kernel of gptqmodel that takes them: Machete, Marlin, ExLlama V2, Triton.

These repack what they compute from. The tensors as checkpoints have them wait in the CPU's memory meanwhile, so that
weights are on the GPU once, and are saved without unpacking anything.

The choice is tested with stand-ins: on a GPU it has not run yet. Their code is compiled by gptqmodel when it is first
asked for, which takes minutes and a CUDA compiler.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

_WORD = 32
_SCRATCH_BYTES = 1 << 25
_choice_log = logging.getLogger(__name__)

GPTQ_KERNELS: Counter[str] = Counter()
"""How many linears on GPUs each of gptqmodel's kernels was chosen for in this process."""
_left_alone: set[str] = set()


@dataclass(frozen=True)
class GPTQContract:
    """What a kernel must take.

    Attributes:
        bits, group_size: of the encoding; -1 is one group.
        desc_act: whether inputs are out of the order of their groups.
        sym: whether every zero point is the middle of the codes.
        dtype: of the activations.
    """

    bits: int
    group_size: int
    desc_act: bool
    sym: bool
    dtype: torch.dtype


def contract_of(linears: Sequence[Any], bits: int, group_size: int, dtype: torch.dtype) -> GPTQContract:
    """Return what linears in checkpoints' layout ask of a kernel, by their tensors: options may say less."""
    ordered = all(bool((linear.g_idx.diff() >= 0).all()) for linear in linears)
    sym = all(_zeros_are_in_the_middle(linear.qzeros, bits) for linear in linears)
    return GPTQContract(bits, group_size, not ordered, sym, dtype)


def _zeros_are_in_the_middle(qzeros: Tensor, bits: int) -> bool:
    if _WORD % bits:
        return False  # such codes go over the ends of words, and no kernel but the plain one has them
    middle = sum(1 << (bits * place + bits - 1) for place in range(_WORD // bits))
    return bool((qzeros == (middle - (1 << _WORD) if middle >= 1 << (_WORD - 1) else middle)).all())


def gptq_candidates(contract: GPTQContract, device: torch.device) -> list[Any]:
    """Return gptqmodel's kernels for such linears on that device, in its own order, the fastest first."""
    importer = importlib.import_module("gptqmodel.utils.importer")
    try:
        found = importer.select_quant_linear(
            bits=contract.bits,
            group_size=contract.group_size,
            desc_act=contract.desc_act,
            sym=contract.sym,
            device=device,
            format="gptq",  # under which all are listed; what they read is made of gptq_v2
            pack_dtype=torch.int32,
            dtype=contract.dtype,
            multi_select=True,
        )
    except (ValueError, NotImplementedError, ImportError, RuntimeError) as error:
        _tell_left(f"no kernel for {contract}: {error}")
        return []
    return list(found)


def fast_gptq(
    linears: Sequence[Any],
    contract: GPTQContract,
    find: Callable[[GPTQContract, torch.device], Sequence[Any]] = gptq_candidates,
) -> GPTQOnCUDA | None:
    """Return what computes the outputs of linears with the same input; None where only each by itself can.

    A linear that no fast kernel takes stays in the plain one, as one operator for compilers, which its code stops.
    Reasons are told once each, and linears counted in `GPTQ_KERNELS`.
    """
    first = linears[0]
    reasons: list[str] = []
    if any(
        not torch.equal(linear.g_idx, first.g_idx) or (linear.bias is None) != (first.bias is None)
        for linear in linears
    ):
        return None
    if contract.dtype in (torch.float16, torch.bfloat16):
        kernel = _fast_kernel(linears, contract, find, reasons)
        if kernel is not None:
            GPTQ_KERNELS[type(kernel).__name__] += len(linears)
            return GPTQOnCUDA(linears, kernel)
    else:
        reasons.append(f"fast kernels take 16-bit activations, and these are {contract.dtype}")
    if len(linears) > 1:
        return None
    GPTQ_KERNELS[type(first).__name__] += 1
    _tell_left("; ".join(reasons) or f"gptqmodel has none for {contract}")
    return GPTQOnCUDA(linears, first)


def _fast_kernel(
    linears: Sequence[Any], contract: GPTQContract, find: Callable[..., Sequence[Any]], reasons: list[str]
) -> nn.Module | None:
    """The first kernel before the plain one that takes the linears, together; why others do not is added."""
    device, tensors = linears[0].qweight.device, _joined(linears)
    shape = {"in_features": linears[0].in_features, "out_features": sum(each.out_features for each in linears)}
    for kind in find(contract, device):
        if kind is type(linears[0]):
            break
        fits, why = kind.validate(**vars(contract), **shape, pack_dtype=torch.int32, device=device)
        if fits:
            try:
                return _built(kind, tensors, contract, shape)
            except Exception as error:  # compiled on the spot, so anything may be missing; or memory is
                why = error
        reasons.append(f"{kind.__name__}: {why}")
    return None


def _tell_left(why: str) -> None:
    if why not in _left_alone:
        _left_alone.add(why)
        _choice_log.warning("GPTQ linears stay in gptqmodel's plain kernel, which unpacks for every product: %s", why)


def _joined(linears: Sequence[Any]) -> dict[str, Tensor]:
    """The tensors of one linear that gives the outputs of all; copies, since kernels repack in place."""
    found = {
        key: torch.cat([getattr(linear, key) for linear in linears], dim=1) for key in ("qweight", "qzeros", "scales")
    }
    found["g_idx"] = linears[0].g_idx.clone()
    if linears[0].bias is not None:
        found["bias"] = torch.cat([linear.bias for linear in linears])
    return found


def _built(kind: Any, tensors: dict[str, Tensor], contract: GPTQContract, shape: dict[str, int]) -> nn.Module:
    """gptqmodel's linear of that kind around copies of these tensors."""
    size = shape["in_features"] if contract.group_size == -1 else contract.group_size
    options = {**vars(contract), "group_size": size}
    linear: Any = kind(**options, **shape, bias="bias" in tensors).to(tensors["qweight"].device)
    for key, tensor in tensors.items():
        value = tensor.clone()
        value = value.to(contract.dtype) if key in ("scales", "bias") else value
        if key in linear._parameters:
            linear._parameters[key] = nn.Parameter(value, requires_grad=False)
        else:
            linear.register_buffer(key, value)
    linear.qzero_format(format=2)
    linear.optimized = True  # or it would be compiled by itself
    if "scratch_space" in inspect.signature(linear.post_init).parameters:
        linear.post_init(scratch_space=_scratch(linear.temp_dq_size(), tensors["qweight"].device))
    else:
        linear.post_init()
    return linear.eval()


def _scratch(size: int, device: torch.device) -> Any:
    """Memory that ExLlama unpacks to, the same for all linears of about that size."""
    return _scratch_of(max(_SCRATCH_BYTES, 1 << (size - 1).bit_length()), device)


@functools.cache
def _scratch_of(size: int, device: torch.device) -> Any:
    return importlib.import_module("gptqmodel.utils.exllamav2").ScratchSpace(scratch_bytes=size, dev=device)


class GPTQOnCUDA(nn.Module):
    """The outputs of one or several linears in GPTQ's encoding, one after the other, by a kernel that repacked them.

    Of a single linear it has the same buffers by the same names, in the CPU's memory until `release`. The kernel stays
    on its GPU: a model that is to go elsewhere is restored first.
    """

    def __init__(self, linears: Sequence[Any], kernel: nn.Module) -> None:
        super().__init__()
        self._linears, self._kernel = tuple(linears), (kernel,)  # in tuples: not registered
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        self.runs_in = type(kernel).__name__
        self._home = linears[0].qweight.device
        self._handle = _registered(kernel)
        self._move(self._home if kernel is linears[0] else torch.device("cpu"))

    def forward(self, x: Tensor) -> Tensor:
        return gptq_product(x, self._handle, self.out_features)

    def release(self) -> None:
        """Put the linears' tensors back where they were."""
        self._move(self._home)

    def _move(self, device: torch.device) -> None:
        for linear in self._linears:
            for name, buffer in linear.named_buffers(recurse=False):
                linear._buffers[name] = buffer.to(device)
        if len(self._linears) == 1:
            linear = self._linears[0]
            for name, buffer in linear.named_buffers(recurse=False):
                self.register_buffer(name, buffer, name not in linear._non_persistent_buffers_set)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Repacked tensors stay where they are, and in their dtype."""
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._handle = _registered(self._kernel[0])  # of a copy, which has a kernel of its own

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.runs_in}"


_kernels: WeakValueDictionary[int, Any] = WeakValueDictionary()
_handles = itertools.count()


def _registered(kernel: nn.Module) -> int:
    handle = next(_handles)
    _kernels[handle] = kernel
    return handle


@torch.library.custom_op("dobisvd::gptq_product", mutates_args=())
def gptq_product(x: Tensor, handle: int, outputs: int) -> Tensor:
    """The product of a registered kernel, as one operator: gptqmodel's own are not known to compilers."""
    found = _kernels[handle](x)
    return found.clone() if found is x else found


@gptq_product.register_fake
def _(x: Tensor, handle: int, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)
