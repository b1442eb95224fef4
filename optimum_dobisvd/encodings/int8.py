"""One int8 integer a value, one scale a row.

An integer `q` stands for the fraction `q / 128`, so no element type has to represent 1/127, and the scale of a row is
its largest magnitude, of a size that 16-bit floats hold well: `W = diag(scale) Q / 128`. Scales are rounded up to the
model's dtype first and values against the rounded scale, so the rounding of scales costs nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..factorization.factors import LARGEST_FRACTION, Gauge, rounded_up
from .base import Encoding, ErrorMetric, LinearShape
from .int8_matmul import UNIT, int8_matmul

_LARGEST = 127
NO_ADAPTERS = "stored in 8 bits, which take no adapter: name linears that are dense, or call convert(model) first"


class Int8(Encoding):
    """8 bits a value, on disk and in memory."""

    name = "int8"
    gauge = Gauge.EQUAL_COLUMNS
    dense_encodings = ("int8",)
    # Uniform rounding of rows whose largest value is about four times their root mean square: (4 / 127)^2 / 12.
    relative_error = 8e-5
    adapter_refusal = NO_ADAPTERS
    scales = ("scale",)

    @classmethod
    def named(cls, name: str, settings: Any = None) -> Int8 | None:
        return cls() if name == cls.name else None

    @property
    def rank_multiple(self) -> int:
        """What PyTorch's CPU kernel and the GPU's matrix units take without padding."""
        return 16

    def bytes(self, shape: LinearShape, element_size: int) -> int:
        return shape.numel + shape.out_features * element_size

    def quantization_loss(self, weight: Tensor, full_rank: int, metric: ErrorMetric) -> float:
        return metric.each_value_alone(fake_quantize_rows(weight) - weight)

    def quantize(
        self, linear: nn.Linear, full_rank: int, dtype: torch.dtype, gram: Tensor | None = None
    ) -> tuple[nn.Module, Tensor]:
        """Round every value on its own."""
        integers, scale = quantize_rows(linear.weight.detach(), dtype)
        new = Int8Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        new.set_tensors(linear, weight=integers, scale=scale)
        return new, new.dense_matrix()

    def empty(self, linear: nn.Linear, full_rank: int) -> nn.Module:
        return Int8Linear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )

    def tensors(self, shape: LinearShape) -> dict[str, tuple[list[int], str | None]]:
        return {"weight": ([shape.out_features, shape.in_features], "I8"), "scale": ([shape.out_features], None)}

    def loaded(self, name: str, module: nn.Module) -> nn.Module:
        if isinstance(module, IntegerLinear):
            module.freeze()
            read_offloaded_as_stored(name, module)
        return module


class IntegerLinear(nn.Module):
    """A linear whose parameters are integers and their scales, and perhaps a bias. They are not trained.

    Parameters and not buffers, because Accelerate offloads only these.
    """

    adapter_refusal = NO_ADAPTERS
    weight: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def _add(self, key: str, shape: tuple[int, ...], device: Any, dtype: torch.dtype | None) -> None:
        values = torch.empty(shape, device=device, dtype=dtype)
        self.register_parameter(key, nn.Parameter(values, requires_grad=False))

    def _add_bias(self, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        values = torch.empty(self.out_features, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(values) if bias else None)

    def set_tensors(self, linear: nn.Linear, **tensors: Tensor) -> None:
        """Give it these tensors, and the bias of the linear it stands for."""
        for key, value in tensors.items():
            setattr(self, key, nn.Parameter(value.contiguous(), requires_grad=False))
        if linear.bias is not None:
            self.bias = linear.bias
        self.train(linear.training)

    def freeze(self) -> None:
        """Loading marks every floating-point parameter as one to train; these are not."""
        for key, parameter in self.named_parameters():
            if key != "bias":
                parameter.requires_grad_(False)

    def __format__(self, spec: str) -> str:
        # PEFT refuses a module with f"Target module {module} is not supported": the only place in its message where a
        # user can be told what to name instead. print(model), str and repr do not come here.
        return format(f"{self!r} ({self.adapter_refusal})", spec)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Linear(IntegerLinear):
    """`y = x (Q / 128)^T * scale + bias`: `weight` is `Q` (`m x n`, int8), `scale` has one value a row."""

    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self._add("weight", (out_features, in_features), device, torch.int8)
        self._add("scale", (out_features,), device, dtype)
        self._add_bias(bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = int8_matmul(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias

    def dense_matrix(self) -> Tensor:
        """Return the matrix it stands for, float32."""
        return self.weight.float() * (self.scale.float()[:, None] / UNIT)


def quantize_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return int8 integers of the weight's shape, and a scale per row in `dtype`; a row of zeros has scale 1."""
    rows = weight.double()
    largest = rows.abs().amax(1) / LARGEST_FRACTION
    scale = rounded_up(torch.where(largest > 0, largest, 1), dtype)
    return to_integers(rows / scale[:, None]), scale.to(dtype)


def fake_quantize_rows(weight: Tensor) -> Tensor:
    """Return the weight with every value rounded as `quantize_rows` rounds it, in the weight's dtype."""
    integers, scale = quantize_rows(weight, torch.float32)
    return (integers.double() * scale.double()[:, None] / UNIT).to(weight.dtype)


def to_integers(fractions: Tensor) -> Tensor:
    """Return the nearest int8 integer of each fraction of 128."""
    return (fractions * UNIT).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)


def read_offloaded_as_stored(name: str, module: nn.Module) -> None:
    """Have accelerate read tensors that stay on disk in the dtypes of their parameters.

    transformers before 5.14 has it read all of a model in one float dtype, in which integers lose their low bits.
    """
    weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    index = getattr(getattr(weights, "dataset", None), "index", {})
    for key, tensor in module.named_parameters():
        on_disk = index.get(f"{name}.{key}", {})
        if "safetensors_file" in on_disk:
            on_disk["dtype"] = str(tensor.dtype).removeprefix("torch.")
