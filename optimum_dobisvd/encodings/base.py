"""What an encoding is: how one linear's weight is stored, and all that follows from it.

Bundled with every checkpoint (see `checkpoint.bundle`), as are the encodings themselves: they import nothing but
torch, transformers and each other, and other libraries by name where they are needed.
"""

from __future__ import annotations

import contextlib
import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..factorization.factors import Gauge
from .input_gram import InputGram, OutputErrors
from .learned_rounding import LearnableLinear, LearnedRoundingSettings
from .rounding import Rounding

QUANT_METHOD = "dobi_svd"
"""What config.json calls this format."""


@dataclass(frozen=True)
class LinearShape:
    """Shape of one linear of a compressed `m x n` matrix.

    Attributes:
        out_features, in_features: of the linear.
        full_rank: `min(m, n)` of the matrix.
    """

    out_features: int
    in_features: int
    full_rank: int

    @property
    def numel(self) -> int:
        """Elements of the weight, hence multiply-adds per token."""
        return self.out_features * self.in_features


class Encoding(ABC):
    """How one linear's weight is stored: one instance for every name that plans and config.json may have.

    Attributes:
        name: in plans and config.json, by all that decides its bytes (`gptq4_g32`).
        settings: transformers' own configuration that it was made from; None for encodings of ours.
        quant_method: what transformers and PEFT call models whose linears are stored so.
        out_multiple, in_multiple: what outputs and inputs must be multiples of.
        rank_multiple: what ranks are multiples of unless the user says otherwise.
        gauge: which pair of equal factors rounds best.
        needs_gauge: whether it is for factors in that gauge alone.
        dense_encodings: what a matrix that is not factorized may be stored as beside it, the smallest first; as it is
            (`float`) is always a choice.
        relative_error: share of a linear's energy that rounding takes, for allocators that know no better.
        learned_loss_share: what learned codes lose, as a share of what `rounding_errors` tells.
        loss_is_measured: whether allocators that score ranks weigh its rounding by measured loss.
        own_text, own_tokenizer: calibration text that its settings name, and its tokenizer; None where they do not.
        one_input_at_a_time: whether linears of a block that read different inputs are quantized one after the other,
            each on what the ones before it give, rather than all on what the dense ones give.
        roundings: algorithms that can choose its codes (see `ROUNDINGS`).
        rounding: the one that does; `rounded_by` gives the same encoding with another.
        quantizes_in_threads: whether several linears can be quantized at once.
        trainable: whether its weights can be trained.
        adapter_refusal: why PEFT can put no adapter on its linears, in words; None if it can.
        merges_adapters: whether PEFT merges adapters into them.
        has_more_tensors: whether checkpoints hold tensors of its linears that `tensors` does not list.
        sliceable: whether rows and columns of a linear are those of its tensors, along their first and second axis, so
            that a process can hold a part of it.
        scales: names of its tensors that must be above zero and finite.
    """

    name: str
    settings: Any = None
    quant_method: str = QUANT_METHOD
    out_multiple: int = 1
    in_multiple: int = 1
    gauge: Gauge = Gauge.BALANCED
    needs_gauge: ClassVar[bool] = False
    dense_encodings: tuple[str, ...] = ()
    relative_error: float = 0.0
    learned_loss_share: float = 1.0
    loss_is_measured: ClassVar[bool] = False
    own_text: Any = None
    own_tokenizer: Any = None
    one_input_at_a_time: bool = False
    roundings: ClassVar[tuple[str, ...]] = ("nearest",)
    rounding: Rounding = Rounding("nearest")
    quantizes_in_threads: ClassVar[bool] = False
    trainable: ClassVar[bool] = False
    adapter_refusal: ClassVar[str | None] = None
    merges_adapters: ClassVar[bool] = True
    has_more_tensors: ClassVar[bool] = False
    sliceable: ClassVar[bool] = False
    scales: ClassVar[tuple[str, ...]] = ()

    # Which encodings there are, and from which setting of the user they come.

    @classmethod
    @abstractmethod
    def named(cls, name: str, settings: Any = None) -> Encoding | None:
        """Return the encoding of that name, None if it is not of this kind."""

    @classmethod
    def from_setting(cls, setting: Any, *, strict: bool) -> Encoding | None:
        """Return what a user's `quantization` means, None if it means no encoding of this kind.

        Args:
            setting: a name, transformers' configuration, or one as a dictionary.
            strict: whether an option it does not know is an error. A checkpoint may come from a newer transformers.

        Raises:
            ValueError: options that cannot be stored so; names the remedy.
        """
        return cls.named(setting) if isinstance(setting, str) else None

    @property
    def alternatives(self) -> tuple[str, ...]:
        """Other encodings of this kind that a mixture may choose."""
        return ()

    def rounded_by(self, rounding: Rounding) -> Encoding:
        """Return the same encoding with codes that are chosen so. ValueError if they cannot be."""
        if rounding.algorithm not in self.roundings:
            known = " or ".join(map(repr, self.roundings)) or "no rounding at all: give a quantization, or drop it"
            raise ValueError(f"rounding={rounding.algorithm!r} does not go with {self.name}, which takes {known}")
        other = copy.copy(self)
        other.rounding = rounding
        return other

    @property
    def uses_text(self) -> bool:
        """Whether it rounds on text. Such linears are quantized once all matrices are factorized.

        By error feedback each is rounded on the inputs that the quantized ones before it give, by learning all of a
        block at once.
        """
        return self.rounding.reads_text

    @property
    def needs_text(self) -> bool:
        """Whether it cannot round without."""
        return self.rounding.needs_text

    @property
    def waits(self) -> bool:
        """Whether its linears stay plain until all matrices are factorized."""
        return self.uses_text

    @property
    def needs_dense(self) -> bool:
        """Whether the dense model is run beside the compressed one while it rounds."""
        return self.rounding.needs_dense

    @property
    def learned(self) -> LearnedRoundingSettings | None:
        """How codes are learned on the outputs of whole blocks; None where each linear is rounded by itself."""
        return self.rounding.learned

    @property
    def text_is_missing(self) -> str:
        """The beginning of an error: it needs text, and there is none."""
        return f"{self.name} needs calibration text for its rounding ({self.rounding.algorithm})"

    def remembered(self) -> Any:
        """Return the setting as config.json keeps it: JSON values, without the inputs of one run."""
        return self.name

    def as_applied(self) -> Any:
        """Return the setting that a model remembers whose linears are stored so; None if it needs none."""
        return self.name

    # Sizes.

    @abstractmethod
    def bytes(self, shape: LinearShape, element_size: int) -> int:
        """Return the bytes of a linear on disk without its bias, scales included; `element_size` is the model's."""

    @property
    def required_rank_multiple(self) -> int:
        """What ranks must be multiples of: a rank is the outputs of one linear and the inputs of another."""
        return math.lcm(self.out_multiple, self.in_multiple)

    @property
    def rank_multiple(self) -> int:
        """What ranks are multiples of unless the user says otherwise."""
        return self.required_rank_multiple

    def unsupported_reason(self, out_features: int, in_features: int) -> str | None:
        """Return why a linear of that shape cannot be stored so, None if it can."""
        if out_features % self.out_multiple:
            return f"{self.name} takes outputs in multiples of {self.out_multiple}, and it has {out_features}"
        if in_features % self.in_multiple:
            return f"{self.name} takes inputs in multiples of {self.in_multiple}, and it has {in_features}"
        return None

    def remedy_for(self, shapes: Mapping[str, tuple[int, int]]) -> str:
        """Return what would make linears of these shapes fit, in words."""
        return "take another encoding: this one is not for matrices of such sizes"

    # Values.

    @property
    def loss_share(self) -> float:
        """What its codes lose, as a share of what `rounding_errors` tells."""
        return 1.0 if self.learned is None else self.learned_loss_share

    @property
    def loss_name(self) -> str:
        """Its name, and whatever else of its settings decides `rounding_errors`."""
        return self.name

    def rounding_errors(
        self, weight: Tensor, full_rank: int, gram: InputGram, rows: Tensor | None = None
    ) -> OutputErrors:
        """Return what rounding a weight (`m x n`) does to each output, as near as can be told without doing it.

        `gram` is of its inputs; `rows` are those of `OutputErrors.within`.
        """
        none = weight.new_zeros(len(weight), dtype=torch.float64)
        return OutputErrors(none, none)

    @abstractmethod
    def quantize(
        self, linear: nn.Linear, full_rank: int, dtype: torch.dtype, gram: Tensor | None = None
    ) -> tuple[nn.Module, Tensor]:
        """Quantize one linear.

        Args:
            linear: its weight in any floating point dtype.
            full_rank: `min(m, n)` of the matrix that it is part of.
            dtype: the model's.
            gram: `H` of its inputs.

        Returns:
            What takes its place, and the matrix that this stands for (`m x n`).

        Raises:
            ValueError: it cannot be done; says why.
        """

    def learnable(self, linear: nn.Linear, dtype: torch.dtype) -> LearnableLinear:
        """Return what stands in a linear's place while its codes are learned; `dtype` is the model's."""
        raise TypeError(f"codes of {self.name} are not learned")

    def from_learned(self, linear: Any) -> nn.Module:
        """Return what takes the place of what `learnable` gave, with the codes and scales that it has by now."""
        raise TypeError(f"codes of {self.name} are not learned")

    # Checkpoints.

    def require(self) -> None:  # noqa: B027 - most encodings have nothing to do
        """Raise ImportError, naming the extra, if a library is missing; ValueError if it cannot do what is asked."""

    def check_device_map(self, device_map: Any) -> None:  # noqa: B027 - most encodings have nothing to do
        """Raise ValueError if its linears cannot be placed so."""

    def hf_quantizer(self) -> Any:
        """Return transformers' quantizer that reads its tensors, None where transformers need not know."""
        return None

    def empty(self, linear: nn.Linear, full_rank: int) -> nn.Module:
        """Return a place for the tensors of a linear, on meta as the linear is."""
        return linear

    def loaded(self, name: str, module: nn.Module) -> nn.Module:
        """Return what computes from a place that has been filled."""
        return module

    def loaded_model(self, model: Any) -> None:  # noqa: B027 - most encodings have nothing to do
        """Make a model whose linears are stored so one that transformers and PEFT treat as such."""

    def forget(self, model: Any) -> None:  # noqa: B027 - most encodings have nothing to do
        """Undo `loaded_model`: a dense model again."""

    def for_inference(self, linears: Sequence[nn.Module], dtype: torch.dtype) -> nn.Module | None:
        """Return what gives the outputs of linears with the same input, one after the other, faster than they do.

        None where there is none. The linears come back when the model is saved, so their tensors stay as they are.
        Parameters of what is returned are those of the linears by the same names, their rows one after the other. Its
        method `release`, if it has one, puts back what it took from the linears.

        Args:
            linears: one or several in this encoding, on their device, with their values.
            dtype: of the activations.
        """
        return None

    def is_row_scaled(self, linear: nn.Module) -> bool:
        """Whether it computes `x weight^T * scale + bias` from parameters of these names.

        The first is `m x n`, of floating-point numbers or int8 fractions of 128; without a scale this is 1.
        """
        return False

    def before_saving(self, name: str, module: nn.Module, dtype: torch.dtype) -> None:  # noqa: B027 - most encodings have nothing to do
        """Make sure that a linear's tensors are as checkpoints have them. ValueError names it."""

    @abstractmethod
    def tensors(self, shape: LinearShape) -> dict[str, tuple[list[int], str | None]]:
        """Return shape and dtype of a linear's tensors as files' headers have them, bias aside; None is any float."""

    def quiet(self) -> contextlib.AbstractContextManager:
        """Return a context in which its library keeps its lines on every linear to itself."""
        return contextlib.nullcontext()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


def stacked(tensors: Sequence[Tensor | None], rows: Sequence[int]) -> nn.Parameter | None:
    """Return the rows of tensors one after the other, zeros for one that is None; None where all are. No gradient."""
    some = next((tensor for tensor in tensors if tensor is not None), None)
    if some is None:
        return None
    parts = [some.new_zeros(count) if each is None else each for each, count in zip(tensors, rows, strict=True)]
    return nn.Parameter(torch.cat([part.detach() for part in parts]), requires_grad=False)


@torch.no_grad()
def matrix_of(linear: nn.Module) -> Tensor:
    """Return the `m x n` weight of a linear in float32; of a quantized one, what it computes with."""
    if type(linear) is nn.Linear:
        return linear.weight.detach().float()
    dequantized = getattr(linear, "dense_matrix", None)
    if dequantized is not None:
        found: Tensor = dequantized()
        return found
    device = next(tensor.device for tensor in (*linear.parameters(), *linear.buffers()))
    columns: Any = linear.in_features
    outputs = linear(torch.eye(columns, device=device)).float()
    bias = getattr(linear, "bias", None)
    return (outputs if bias is None else outputs - bias.float()).T
