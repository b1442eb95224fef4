"""GPTQ's encoding: 2, 3, 4 or 8 bits, a scale and a zero for every group of inputs; gptqmodel makes and runs it."""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GPTQConfig

from ..factorization.factors import Gauge
from .base import Encoding, LinearShape
from .gptq_cpu import GPTQOnCPU, can_run_on_cpu
from .gptq_linear import (
    GPTQ_IN_MEMORY,
    GPTQTensors,
    gptq_kernel,
    is_unpacked,
    quiet_gptqmodel,
    require_gptqmodel,
    require_unpacked,
)
from .gptq_rounding import LearnableGroups, gptq_round, packed_kernel
from .input_gram import Feedback, InputGram, OutputErrors
from .rounding import Rounding
from .settings import check_options, refuse_layer_names, with_method

GPTQ_BITS = (2, 3, 4, 8)
_GPTQ_NAME = re.compile(r"gptq([2348])_(?:g(\d+)|rows)")
_GPTQ_SHORT_NAME = re.compile(r"gptq([2348])(?:_g(\d+)|_rows)?")
_GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)
_WORD = 32
"""Inputs and outputs are packed 32 at a time."""

_gptq_log = logging.getLogger(__name__)

_LEARNED_LOSS_SHARES = {2: 0.40, 3: 0.52, 4: 0.39}
"""By bits: increase of the loss with codes learned from fitted ranges over what is told for error feedback. SmolLM2,
every third block, dense matrices, groups of 32, 50 steps, on training text that was not calibrated on."""


class GPTQ(Encoding):
    """Named `gptq4_g32`: 4 bits, groups of 32 inputs; `gptq4_rows`: one scale for all inputs of an output."""

    quant_method = "gptq"
    gauge = Gauge.ROTATED
    loss_is_measured = True
    merges_adapters = False
    roundings: ClassVar[tuple[str, ...]] = ("feedback", "nearest", "learned")
    rounding = Rounding("feedback")

    def __init__(self, bits: int, group_size: int, settings: GPTQConfig | None = None) -> None:
        self.bits, self.group_size, self.settings = bits, group_size, settings
        self.name = f"gptq{bits}_rows" if group_size == -1 else f"gptq{bits}_g{group_size}"
        self.out_multiple = _WORD
        self.in_multiple = _WORD if group_size == -1 else math.lcm(_WORD, group_size)
        # Rounding to a grid whose ends are about 2.4 times the root mean square; GPTQ takes half of that error away.
        self.relative_error = 0.5 * (2.4 * 2 / (2**bits - 1)) ** 2 / 12
        self.dense_encodings = (self.name, "int8")
        self.learned_loss_share = _LEARNED_LOSS_SHARES.get(bits, 1.0)
        if settings is not None:
            self.own_text, self.own_tokenizer = settings.dataset, settings.tokenizer
            self.one_input_at_a_time = bool(settings.true_sequential)

    @property
    def waits(self) -> bool:
        """Even where it reads no text: factors are made in threads, and gptqmodel packs one linear at a time."""
        return True

    @classmethod
    def named(cls, name: str, settings: Any = None) -> GPTQ | None:
        found = _GPTQ_NAME.fullmatch(name)
        group_size = -1 if found is None or found[2] is None else int(found[2])
        return cls(int(found[1]), group_size, settings) if found is not None and group_size else None

    @classmethod
    def from_setting(cls, setting: Any, *, strict: bool) -> GPTQ | None:
        """Take a `GPTQConfig`, one as a dictionary, or a name: `gptq4` (groups of 128), `gptq4_g32`, `gptq4_rows`."""
        if isinstance(setting, str):
            found = _GPTQ_SHORT_NAME.fullmatch(setting)
            if found is None:
                return None
            rows = setting.endswith("_rows")
            setting = GPTQConfig(
                bits=int(found[1]),
                group_size=-1 if rows else int(found[2] or 128),
                act_group_aware=False if rows else GPTQConfig(bits=4).act_group_aware,
            )
        if isinstance(setting, dict) and with_method(setting) == "gptq":
            if strict:
                check_options(GPTQConfig, GPTQConfig(bits=4), setting)
            setting = GPTQConfig.from_dict({key: value for key, value in setting.items() if key != "quant_method"})
        if type(setting).__name__ != "GPTQConfig":
            return None
        _check_gptq(setting)
        if strict:
            _warn_of_unused(setting)
        return cls(setting.bits, setting.group_size, setting)

    @property
    def alternatives(self) -> tuple[str, ...]:
        """The other bits at the same group size."""
        others = (GPTQ(bits, self.group_size) for bits in GPTQ_BITS if bits != self.bits)
        return tuple(other.name for other in others)

    def remembered(self) -> Any:
        values = copy.deepcopy(self.settings.to_dict())
        return {
            key: value for key, value in values.items() if key not in ("dataset", "tokenizer") and value is not None
        }

    def as_applied(self) -> Any:
        values = {**self.remembered(), "format": GPTQ_IN_MEMORY, "checkpoint_format": GPTQ_IN_MEMORY}
        return GPTQConfig.from_dict({key: value for key, value in values.items() if key != "quant_method"})

    def bytes(self, shape: LinearShape, element_size: int) -> int:
        groups = 1 if self.group_size == -1 else shape.in_features // self.group_size
        packed = shape.numel * self.bits // 8
        zeros, scales = shape.out_features * groups * self.bits // 8, 2 * shape.out_features * groups
        return packed + zeros + scales + 4 * shape.in_features  # the last: the group of every input

    def tensors(self, shape: LinearShape) -> dict[str, tuple[list[int], str | None]]:
        m, n = shape.out_features, shape.in_features
        groups = 1 if self.group_size == -1 else n // self.group_size
        return {
            "qweight": ([n // _WORD * self.bits, m], "I32"),
            "qzeros": ([groups, m // _WORD * self.bits], "I32"),
            "scales": ([groups, m], None),
            "g_idx": ([n], "I32"),
        }

    def remedy_for(self, shapes: Mapping[str, tuple[int, int]]) -> str:
        for size in (128, 64, 32):
            other = GPTQ(self.bits, size)
            if all(other.unsupported_reason(*shape) is None for shape in shapes.values()):
                return f"take group_size={size} (on the command line gptq{self.bits}_g{size})"
        return "take another group_size"

    @property
    def loss_name(self) -> str:
        if self.rounding.algorithm == "nearest":
            return f"{self.name}-{'symmetric' if self._settings.sym else 'asymmetric'}-nearest"
        grid, order = "symmetric" if self._settings.sym else "asymmetric", self._feedback.largest_first
        return f"{self.name}-{grid}-damping{self._feedback.damping:g}{'-ordered' if order else ''}"

    @property
    def _settings(self) -> GPTQConfig:
        return GPTQConfig(bits=self.bits) if self.settings is None else self.settings

    @property
    def _feedback(self) -> Feedback:
        if self.learned is not None:
            # Losses are told as if error feedback chose the codes, important inputs first. Learned ones lose less.
            return Feedback(0.01)
        # gptqmodel's other order keeps groups together and puts important inputs first as far as that goes.
        ordered = bool(self._settings.desc_act or self._settings.act_group_aware)
        return Feedback(float(self._settings.damp_percent), ordered)

    def rounding_errors(
        self, weight: Tensor, full_rank: int, gram: InputGram, rows: Tensor | None = None
    ) -> OutputErrors:
        rounded = fake_quantize_groups(weight, self.bits, self.group_size, symmetric=bool(self._settings.sym))
        if self.rounding.algorithm == "nearest":
            return gram.errors(rounded - weight, rows)
        return gram.errors_with_feedback(rounded - weight, self._feedback, rows)

    def quantize(
        self, linear: nn.Linear, full_rank: int, dtype: torch.dtype, gram: Tensor | None = None
    ) -> tuple[nn.Module, Tensor]:
        """Round with GPTQ on the Gram of the linear's inputs, or every value on its own."""
        if self.rounding.algorithm == "nearest":
            nearest = self.learnable(linear, dtype)
            return self.from_learned(nearest), nearest.plain().weight.detach()
        if gram is None:
            raise ValueError(f"{self.text_is_missing}: name some with dataset=")
        return gptq_round(linear, gram, self.bits, self.group_size, self._settings)

    def learnable(self, linear: nn.Linear, dtype: torch.dtype) -> LearnableGroups:
        size = linear.in_features if self.group_size == -1 else self.group_size
        return LearnableGroups(linear, self.bits, size, bool(self._settings.sym))

    def from_learned(self, linear: LearnableGroups) -> nn.Module:
        return packed_kernel(linear.plain(), linear.stored_grid(), self.bits, self.group_size, self._settings)

    def require(self) -> None:
        require_gptqmodel(None if self.settings is None else self.settings.backend)

    def check_device_map(self, device_map: Any) -> None:
        if isinstance(device_map, dict):
            kinds = {str(place).split(":")[0] for place in device_map.values()}
            if "disk" in kinds or ("cpu" in kinds and len(kinds) > 1):
                raise ValueError(
                    "linears quantized by GPTQ cannot be offloaded to disk, or to the CPU beside a GPU: gptqmodel "
                    "computes where its tensors are; give a device_map of GPUs, or device_map='cpu'"
                )

    def empty(self, linear: nn.Linear, full_rank: int) -> nn.Module:
        bias = linear.bias is not None
        return GPTQTensors(linear.in_features, linear.out_features, bias, self.bits, self.group_size, "meta")

    def loaded(self, name: str, module: nn.Module) -> nn.Module:
        if not isinstance(module, GPTQTensors):
            return module
        shape = (module.out_features, module.in_features)
        return gptq_kernel(module.held(), shape, self.bits, self.group_size, self.settings.to_dict())

    def for_inference(self, linears: Sequence[nn.Module], dtype: torch.dtype) -> nn.Module | None:
        if not all(is_unpacked(linear, self.bits, self.group_size) for linear in linears):
            return None
        if can_run_on_cpu(linears, self.bits):
            return GPTQOnCPU(linears, self.bits, dtype)
        if not all(linear.qweight.device.type == "cuda" for linear in linears):
            return None
        # By name, which is not bundled with checkpoints: a process can register the operator in it only once.
        cuda = importlib.import_module(".gptq_cuda", __package__)
        found: nn.Module | None = cuda.fast_gptq(linears, cuda.contract_of(linears, self.bits, self.group_size, dtype))
        return found

    def before_saving(self, name: str, module: nn.Module, dtype: torch.dtype) -> None:
        require_unpacked(name, module, self.bits, self.group_size)

    def quiet(self) -> contextlib.AbstractContextManager:
        return quiet_gptqmodel()


def fake_quantize_groups(weight: Tensor, bits: int, group_size: int, *, symmetric: bool = True) -> Tensor:
    """Return the weight rounded to GPTQ's grid: `2^bits` values, zero among them.

    Symmetric: between minus and plus a group's largest magnitude. Otherwise between its smallest and largest value.
    """
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    groups = nn.functional.pad(weight, (0, -columns % size)).view(rows, -1, size)
    if symmetric:
        highest = groups.abs().amax(-1, keepdim=True)
        lowest = -highest
    else:
        lowest, highest = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True).clamp_min(0)
    step = (highest - lowest) / (2**bits - 1)
    step = torch.where(step > 0, step, 1)
    zero = torch.full_like(step, 2 ** (bits - 1)) if symmetric else (-lowest / step).round()
    integers = ((groups / step).round() + zero).clamp(0, 2**bits - 1)
    return ((integers - zero) * step).view(rows, -1)[:, :columns]


def _check_gptq(settings: GPTQConfig) -> None:
    if settings.group_size == -1 and settings.act_group_aware:
        raise ValueError(
            "GPTQConfig(group_size=-1) has no groups to order by activation, and gptqmodel refuses it: pass "
            "act_group_aware=False, too, or a group_size such as 32 or 64"
        )
    check_group_size("GPTQConfig", settings.group_size)
    if settings.format not in ("gptq", GPTQ_IN_MEMORY):
        raise ValueError(f"GPTQConfig(format={settings.format!r}) cannot be stored here: take 'gptq'")
    if settings.block_name_to_quantize or settings.module_name_preceding_first_block:
        raise ValueError(
            "block_name_to_quantize and module_name_preceding_first_block say where a model has its blocks, which is "
            "found out here: leave them out"
        )
    refuse_layer_names("modules_in_block_to_quantize", settings.modules_in_block_to_quantize)


def check_group_size(name: str, group_size: int) -> None:
    """Raise ValueError, with the name of the configuration it is of, for a size that gptqmodel has no kernel for."""
    if group_size != -1 and group_size not in _GROUP_SIZES:
        raise ValueError(
            f"{name}(group_size={group_size}) is none of gptqmodel's: take -1, "
            f"{', '.join(map(str, _GROUP_SIZES[:-1]))} or {_GROUP_SIZES[-1]}"
        )


_UNUSED_BY_US = ("model_seqlen", "max_input_length", "batch_size", "pad_token_id", "cache_block_outputs")


def _warn_of_unused(settings: GPTQConfig) -> None:
    usual = GPTQConfig(bits=4)
    given = [name for name in _UNUSED_BY_US if getattr(settings, name) != getattr(usual, name)]
    if given:
        _gptq_log.warning(
            "GPTQConfig's %s is not used: nsamples, seqlen and batch_size of the DobiSVDConfig say what its rounding "
            "is calibrated on",
            ", ".join(given),
        )
