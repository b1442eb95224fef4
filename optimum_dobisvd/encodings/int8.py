"""One int8 integer a value, one scale a row.

An integer `q` stands for the fraction `q / 128`, so no element type has to represent 1/127, and the scale of a row is
its largest magnitude, of a size that 16-bit floats hold well: `W = diag(scale) Q / 128`. Scales are rounded up to the
model's dtype first and values against the rounded scale, so the rounding of scales costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..factorization.factors import LARGEST_FRACTION, Gauge, rounded_up
from .base import Encoding, LinearShape, stacked
from .input_gram import InputGram, OutputErrors
from .int8_matmul import CPU_MULTIPLE, UNIT, int8_matmul, is_aligned
from .learned_rounding import LearnableLinear, straight_through

_LARGEST = 127
NO_ADAPTERS = "stored in 8 bits, which take no adapter: name linears that are dense, or call convert(model) first"


class Int8(Encoding):
    """8 bits a value, on disk and in memory."""

    name = "int8"
    gauge = Gauge.EQUAL_COLUMNS
    dense_encodings: tuple[str, ...] = ("int8",)
    # Uniform rounding of rows whose largest value is about four times their root mean square: (4 / 127)^2 / 12.
    relative_error = 8e-5
    roundings: ClassVar[tuple[str, ...]] = ("nearest", "learned")
    adapter_refusal = NO_ADAPTERS
    sliceable: ClassVar[bool] = True
    scales = ("scale",)

    @classmethod
    def named(cls, name: str, settings: Any = None) -> Int8 | None:
        return cls() if name == cls.name else None

    @property
    def rank_multiple(self) -> int:
        """What PyTorch's CPU kernel and the GPU's matrix units take without padding."""
        return 16

    def part(self, out_features: int, in_features: int, full_rank: int) -> tuple[int, int]:
        """Return how many rows and columns are in 8 bits, from the first on: all."""
        return out_features, in_features

    def bytes(self, shape: LinearShape, element_size: int) -> int:
        rows, columns = self.part(shape.out_features, shape.in_features, shape.full_rank)
        return rows * columns + (shape.numel - rows * columns + rows) * element_size

    def rounding_errors(
        self, weight: Tensor, full_rank: int, gram: InputGram, rows: Tensor | None = None
    ) -> OutputErrors:
        m, n = self.part(len(weight), weight.shape[1], full_rank)
        rounded = weight.clone()
        rounded[:m, :n] = fake_quantize_rows(weight[:m, :n])
        return gram.errors(rounded - weight, rows)

    def quantize(
        self, linear: nn.Linear, full_rank: int, dtype: torch.dtype, gram: Tensor | None = None
    ) -> tuple[nn.Module, Tensor]:
        """Round every value of the 8-bit part on its own; columns right of it are in units of their row's scale."""
        weight = linear.weight.detach()
        rows, columns = self.part(len(weight), weight.shape[1], full_rank)
        integers, scale = quantize_rows(weight[:rows, :columns], dtype)
        tensors = {"weight": integers, "scale": scale}
        if rows < len(weight):
            tensors["rest"] = weight[rows:].to(dtype)
        elif columns < weight.shape[1]:
            tensors["rest"] = (weight[:, columns:].double() / scale.double()[:, None]).to(dtype)
        if "rest" in tensors and not bool(torch.isfinite(tensors["rest"]).all()):
            raise ValueError(
                f"a factor does not fit into {dtype}: its values overflow; load the model in bfloat16 or float32"
            )
        new = _filled(self._module(linear, full_rank, "meta"), tensors, linear)
        return new, new.dense_matrix()

    def learnable(self, linear: nn.Linear, dtype: torch.dtype) -> LearnableRows:
        return LearnableRows(linear, linear.in_features, dtype)

    def from_learned(self, linear: LearnableRows) -> nn.Module:
        integers, scale = linear.rounded()
        shape = (linear.in_features, linear.out_features)
        new = Int8Linear(*shape, bias=linear.bias is not None, device="meta", dtype=linear.dtype)
        return _filled(new, {"weight": integers, "scale": scale}, linear)

    def empty(self, linear: nn.Linear, full_rank: int) -> nn.Module:
        return self._module(linear, full_rank, linear.weight.device)

    def _module(self, linear: nn.Linear, full_rank: int, device: Any) -> Int8Linear:
        shape = (linear.out_features, linear.in_features)
        return Int8Linear(
            *shape[::-1],
            part=self.part(*shape, full_rank),
            bias=linear.bias is not None,
            device=device,
            dtype=linear.weight.dtype,
        )

    def tensors(self, shape: LinearShape) -> dict[str, tuple[list[int], str | None]]:
        rows, columns = self.part(shape.out_features, shape.in_features, shape.full_rank)
        found: dict[str, tuple[list[int], str | None]] = {"weight": ([rows, columns], "I8"), "scale": ([rows], None)}
        rest = rest_shape((shape.out_features, shape.in_features), (rows, columns))
        return found if rest is None else {**found, "rest": (list(rest), None)}

    def loaded(self, name: str, module: nn.Module) -> nn.Module:
        for key, parameter in module.named_parameters():
            # Loading marks every floating-point parameter as one to train; these are not.
            parameter.requires_grad_(key == "bias")
        read_offloaded_as_stored(name, module)
        return module

    def is_row_scaled(self, linear: nn.Module) -> bool:
        return isinstance(linear, Int8Linear) and linear.part == (linear.out_features, linear.in_features)

    def for_inference(self, linears: Sequence[nn.Module], dtype: torch.dtype) -> nn.Module | None:
        """Join linears whose rows are all in 8 bits, as far to the right as each other's."""
        eight = [linear for linear in linears if isinstance(linear, Int8Linear)]
        parts = [linear.part for linear in eight]
        whole = all(rows == linear.out_features for linear, (rows, _) in zip(eight, parts, strict=True))
        if len(eight) < 2 or len(eight) < len(linears) or not whole or len({columns for _, columns in parts}) > 1:
            return None
        rows = [linear.out_features for linear in eight]
        if any(count % CPU_MULTIPLE for count in rows):
            return None  # what the next linear reads is a slice of what this one gives, and must be where it can
        part = (sum(rows), parts[0][1])
        new = Int8Linear(eight[0].in_features, sum(rows), part, bias=False, device="meta")
        for key in dict(eight[0].named_parameters(), bias=None):
            new.register_parameter(key, stacked([getattr(linear, key) for linear in eight], rows))
        return new.eval()

    def loaded_model(self, model: Any) -> None:
        """Give the model memory of its own, if its file is mapped to where the CPU kernel cannot take the weights.

        Once, and not the weights for every product; and all of it, since a tensor that stayed would keep the whole
        file mapped beside the copies.
        """
        weights = [module.weight for module in model.modules() if isinstance(module, Int8Linear)]
        if all(weight.device.type != "cpu" or is_aligned(weight) for weight in weights):
            return
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu" and tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensor.data = tensor.data.clone()


class Int8Linear(nn.Module):
    """`y = x (Q / 128)^T * scale + bias`: `weight` is `Q` (`m x n`, int8), `scale` has one value a row.

    Its `part` may be smaller than the matrix. `rest` then has the rows below it, or the columns right of it, in the
    model's dtype; such columns are in units of their row's scale.

    Parameters and not buffers, because Accelerate offloads only these. But for the bias they are not trained.
    """

    adapter_refusal = NO_ADAPTERS
    weight: Tensor
    scale: Tensor
    rest: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        part: tuple[int, int] | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        rows, columns = self.part = part or (out_features, in_features)
        self._add("weight", (rows, columns), device, torch.int8)
        self._add("scale", (rows,), device, dtype)
        rest = rest_shape((out_features, in_features), (rows, columns))
        if rest is not None:
            self._add("rest", rest, device, dtype)
        values = torch.empty(out_features, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(values) if bias else None)

    def _add(self, key: str, shape: tuple[int, ...], device: Any, dtype: torch.dtype | None) -> None:
        values = torch.empty(shape, device=device, dtype=dtype)
        self.register_parameter(key, nn.Parameter(values, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.part
        if columns < self.in_features:
            eight, sixteen = x[..., :columns], x[..., columns:]
            y = (int8_matmul(eight, self.weight) + nn.functional.linear(sixteen, self.rest)) * self.scale
        else:
            y = int8_matmul(x, self.weight, self.scale)
            if rows < self.out_features:
                y = torch.cat([y, nn.functional.linear(x, self.rest)], dim=-1)
        return y if self.bias is None else y + self.bias

    def dense_matrix(self) -> Tensor:
        """Return the matrix it stands for, float32."""
        rows, columns = self.part
        scale = self.scale.float()[:, None]
        part = self.weight.float() * (scale / UNIT)
        if rows < self.out_features:
            return torch.cat([part, self.rest.float()])
        return torch.cat([part, self.rest.float() * scale], dim=1) if columns < self.in_features else part

    def __format__(self, spec: str) -> str:
        # PEFT refuses a module with f"Target module {module} is not supported": the only place in its message where a
        # user can be told what to name instead. print(model), str and repr do not come here.
        return format(f"{self!r} ({self.adapter_refusal})", spec)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class LearnableRows(LearnableLinear):
    """The grid of a row is from minus to plus 127 of its scale, which is rounded up to the model's dtype."""

    def _scale(self) -> Tensor:
        largest = self._groups.abs().amax(-1, keepdim=True) * self.highest
        stored = torch.where(largest > 0, largest, LARGEST_FRACTION).detach().double() / LARGEST_FRACTION
        return straight_through(largest / LARGEST_FRACTION, rounded_up(stored, self.dtype).float())

    def _integers(self, scale: Tensor) -> Tensor:
        shifted = (self._groups / scale * UNIT + self.offsets).clamp(-_LARGEST, _LARGEST)
        return straight_through(shifted, shifted.round())

    @property
    def weight(self) -> Tensor:
        scale = self._scale()
        return (self._integers(scale) * (scale / UNIT)).flatten(1)

    @torch.no_grad()
    def rounded(self) -> tuple[Tensor, Tensor]:
        """Return integers (`m x n`) and scales (`m`) as they are stored."""
        scale = self._scale()
        return self._integers(scale).flatten(1).to(torch.int8), scale.flatten().to(self.dtype)

    def learned(self) -> tuple[nn.Parameter, ...]:
        return self.offsets, self.highest


def _filled(new: Int8Linear, tensors: Mapping[str, Tensor], like: Any) -> Int8Linear:
    """Give a linear that is on meta its tensors, and the bias and the mode of another."""
    for key, value in tensors.items():
        setattr(new, key, nn.Parameter(value.contiguous(), requires_grad=False))
    new.bias = like.bias
    return new.train(like.training)


def rest_shape(whole: tuple[int, int], part: tuple[int, int]) -> tuple[int, int] | None:
    """Return the shape of what is below a part of a matrix, or right of it; None if it is all."""
    if part[0] < whole[0]:
        return whole[0] - part[0], whole[1]
    return (whole[0], whole[1] - part[1]) if part[1] < whole[1] else None


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
