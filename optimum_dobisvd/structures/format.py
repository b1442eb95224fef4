"""A structure with an encoding of its linears: what a matrix weighs and computes, and the module it becomes."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..encodings.base import Encoding, LinearShape
from ..encodings.input_gram import InputGram, OutputErrors
from ..encodings.registry import encoding_named
from ..factorization.factors import Factors
from ..model.linears import is_conv1d
from .base import CompressedLinear, RoundingErrors, bare_linear, matrix_shape
from .registry import STRUCTURES

_HEADER_NAMES = {torch.uint8: "U8", torch.int32: "I32"}
"""What safetensors calls the dtypes of `CompressedLinear.own_tensors`."""


@dataclass(frozen=True)
class Format:
    """How an `m x n` matrix is stored, but for its rank: `out_features` is `m`, `in_features` is `n`.

    `rank` is None for structures that have none.
    """

    structure: type[CompressedLinear]
    encoding: Encoding

    @property
    def key(self) -> tuple[str, str]:
        """The names of structure and encoding."""
        return self.structure.structure, self.encoding.name

    @property
    def loss_name(self) -> str:
        """A name for what rounding costs in this format, by all that decides it."""
        return f"{self.key[0]}-{self.encoding.loss_name}"

    @property
    def conflict(self) -> str | None:
        """Why the two do not go together, None if they do."""
        if self.structure.gauge_is_free or not self.encoding.needs_gauge:
            return None
        return f"{self.encoding.name} is for factors that can be scaled, and structure {self.key[0]!r} fixes them"

    @property
    def loss_is_measured(self) -> bool:
        """Whether allocators that score ranks weigh its rounding by measured loss."""
        # Where no gauge evens rows out, and an error of one row is felt in others, 8 bits are too few to be ignored.
        fixed = self.structure.has_rank and not self.structure.gauge_is_free
        return self.encoding.loss_is_measured or (fixed and not self.encoding.trainable)

    @property
    def leaves_as_is(self) -> bool:
        """Whether a matrix in this format is the model's own linear, untouched."""
        return self.key == ("dense", "float")

    def linears(self, out_features: int, in_features: int, rank: int | None) -> dict[str, LinearShape]:
        """Return the shapes of its linears by name."""
        full = min(out_features, in_features)
        shapes = self.structure.linears(out_features, in_features, rank)
        return {name: LinearShape(*shape, full_rank=full) for name, shape in shapes.items()}

    def bytes(self, out_features: int, in_features: int, rank: int | None, element_size: int) -> int:
        """Return the bytes on disk, scales and indices included; `element_size` is the dense weight's."""
        return _bytes(self, out_features, in_features, rank, element_size)

    def macs(self, out_features: int, in_features: int, rank: int | None) -> int:
        """Return multiply-adds per token."""
        return sum(shape.numel for shape in self.linears(out_features, in_features, rank).values())

    def unsupported_reason(self, out_features: int, in_features: int, rank: int | None = None) -> str | None:
        """Return why such a matrix (of that rank) cannot be stored so, None if it can."""
        reason = self.conflict or self.encoding.unsupported_reason(out_features, in_features)
        if reason is not None or rank is None:
            return reason
        multiple = self.encoding.required_rank_multiple
        if rank % multiple:
            return f"{self.encoding.name} takes ranks in multiples of {multiple}, and it is to have {rank}"
        shapes = self.structure.linears(out_features, in_features, rank).values()
        if any(outputs < 1 for outputs, _ in shapes):
            return f"structure {self.key[0]!r} at rank {rank} has all rows of the matrix in its first linear"
        return next((why for shape in shapes if (why := self.encoding.unsupported_reason(*shape)) is not None), None)

    def largest_rank_below(self, size: int, out_features: int, in_features: int, element_size: int) -> int:
        """Return the largest rank that takes less than `size` bytes, or 0; for the dense matrix's, break-even."""
        ranks = range(1, min(out_features, in_features) + 1)
        return bisect.bisect_left(
            ranks, size, key=lambda rank: self.bytes(out_features, in_features, rank, element_size)
        )

    @property
    def relative_error(self) -> float:
        """The share of a matrix's energy that rounding its linears takes, for allocators that know no better."""
        # Of factors in few enough bits to matter it is measured; in others it is small beside what is truncated.
        if self.structure.has_rank and not self.loss_is_measured:
            return 0.0
        return len(self.structure.linears(1, 1, 1)) * self.encoding.relative_error

    def quantization_loss(self, source: Factors | Tensor, gram: InputGram, root: Tensor) -> float:
        """Return what rounding its linears costs the loss; see `structure.quantization_loss`."""
        weights = self.structure.written(source, self.encoding.gauge, torch.float32)
        full_rank = min(len(root), len(gram.matrix))
        return self.structure.quantization_loss(weights, gram, root)(self.rounding_errors(full_rank))

    def rounding_errors(self, full_rank: int) -> RoundingErrors:
        """Return what its encoding does to linears of a matrix with that full rank."""

        def errors(weight: Tensor, gram: InputGram, rows: Tensor | None) -> OutputErrors:
            if not weight.numel():
                none = weight.new_zeros(len(weight), dtype=torch.float64)
                return OutputErrors(none, none)
            return self.encoding.rounding_errors(weight, full_rank, gram, rows)

        return errors

    def tensors(
        self, out_features: int, in_features: int, rank: int | None, bias: bool
    ) -> dict[str, tuple[list[int], str | None]]:
        """Return shape and dtype of all its tensors as files' headers have them; None is any float."""
        linears = self.linears(out_features, in_features, rank)
        found = {name: self.encoding.tensors(shape).items() for name, shape in linears.items()}
        tensors = {f"{name}.{key}": header for name, headers in found.items() for key, header in headers}
        own = self.structure.own_tensors(out_features, in_features, rank).items()
        tensors |= {name: (shape, _HEADER_NAMES[dtype]) for name, (shape, dtype) in own}
        return {**tensors, self.structure.bias_key: ([out_features], None)} if bias else tensors

    def empty(self, dense: Any, rank: int | None) -> CompressedLinear:
        """Return the module of a dense linear's shape, bias and dtype, on meta, to load tensors into."""
        (outputs, inputs), conv1d = matrix_shape(dense), is_conv1d(dense)
        bias, dtype = dense.bias is not None, dense.weight.dtype
        new = self.structure(inputs, outputs, rank, bias=bias, conv1d=conv1d, device="meta", dtype=dtype)
        new.encoding = self.encoding.name
        for name, child in list(new.named_children()):
            new.set_submodule(name, self.encoding.empty(child, min(outputs, inputs)))  # type: ignore[arg-type]
        return new

    def quantize(
        self,
        weights: Mapping[str, Tensor],
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        full_rank: int,
        gram: Tensor | None = None,
        crossed: Tensor | None = None,
    ) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
        """Quantize the weights of its linears (`structure.written`, any float dtype) in the order they compute in.

        Args:
            weights: of its linears, and its own tensors.
            bias: for the child that has it.
            dtype: the model's.
            full_rank: `min(m, n)`.
            gram: `H` of the matrix's inputs, for a structure that refits what is still to be rounded, and an encoding
                that uses text.
            crossed: `X_d X^T` of its inputs in the dense model and here, to round towards the outputs on the former.

        Returns:
            Its children, and the matrices that they stand for, with its own tensors (see `structure.product`).
        """
        names = list(self.structure.linears(1, 1, 1))
        children: dict[str, nn.Module] = {}
        matrices = {name: tensor for name, tensor in weights.items() if name not in names}
        for name in names:
            if gram is None or crossed is None:
                weight = self.structure.refitted(name, weights, matrices, gram)
            else:
                weight = self.structure.aimed(name, weights, matrices, (gram, crossed))
            linear = bare_linear(weight, bias if f"{name}.bias" == self.structure.bias_key else None)
            inputs = None
            if gram is not None and self.encoding.uses_text:
                inputs = self.structure.input_gram(name, gram, matrices)
            children[name], matrix = self.encoding.quantize(linear, full_rank, dtype, inputs)
            matrices[name] = matrix if gram is None else matrix.to(gram)
        return children, matrices


@functools.lru_cache(1 << 16)  # most matrices of a model have one of a few shapes, and allocators ask for every rank
def _bytes(format: Format, out_features: int, in_features: int, rank: int | None, element_size: int) -> int:
    linears = format.linears(out_features, in_features, rank).values()
    own = format.structure.own_bytes(out_features, in_features, rank)
    return own + sum(format.encoding.bytes(shape, element_size) for shape in linears)


AS_IS = Format(STRUCTURES.get("dense"), encoding_named("float"))
"""The model's own linear, untouched."""


def format_named(structure: Any, encoding: Any, settings: Any = None) -> Format:
    """Return the format of that structure and encoding. ValueError lists the names there are."""
    return Format(STRUCTURES.get(structure), encoding_named(encoding, settings))
