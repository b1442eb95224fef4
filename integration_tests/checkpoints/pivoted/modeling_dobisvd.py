"""Loads this low-rank checkpoint where optimum-dobisvd is not installed (trust_remote_code=True).

Written by optimum-dobisvd when it saved the checkpoint. Apache-2.0.
"""

from __future__ import annotations


"""The types every factorizer returns: two factors, and a decomposition of which every prefix is a pair of factors."""


from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

LARGEST_FRACTION = 127 / 128
"""The largest value of an int8 integer `q` that stands for `q / 128`.

Columns are brought to this maximum, so that the scale of a row comes out as the value it was rounded up to before.
"""


class Gauge(Enum):
    """Which of the equal pairs `second Q`, `Q^-1 first` is stored: rounding and training like some better than others.

    `BALANCED`: column `i` of `second` and row `i` of `first` of equal norm. `ROTATED`: balanced, then mixed by a
    rotation. `EQUAL_COLUMNS`: columns of `second`, rows scaled to 1, with equal maxima; `EQUAL_LEADING_COLUMNS`: over
    the first `min(m, n)` rows alone.
    """

    BALANCED = "balanced"
    ROTATED = "rotated"
    EQUAL_COLUMNS = "equal columns"
    EQUAL_LEADING_COLUMNS = "equal leading columns"


@dataclass(frozen=True)
class Factors:
    """`W' = second @ first`.

    `second` is `m x k` (the outer factor, which keeps the bias), `first` is `k x n`.
    """

    second: Tensor
    first: Tensor

    def product(self) -> Tensor:
        """Return the dense `m x n` matrix the factors stand for."""
        return self.second @ self.first

    def in_gauge(self, gauge: Gauge, dtype: torch.dtype) -> Factors:
        """Return factors of the same product in a gauge; `dtype` is what they will be stored beside (see there)."""
        balanced = self.balanced()
        if gauge is Gauge.BALANCED:
            return balanced
        if gauge is Gauge.ROTATED:
            return balanced.rotated()
        leading = gauge is Gauge.EQUAL_LEADING_COLUMNS
        return balanced.with_equal_columns(dtype, min(len(self.second), self.first.shape[1]) if leading else None)

    def balanced(self) -> Factors:
        """Return factors with column `i` of `second` and row `i` of `first` of equal norm, same product.

        Undoing a whitening makes one side huge and the other tiny; fine-tuning and quantizing both want them equal.
        A rank whose product is zero becomes zero on both sides.
        """
        outer = torch.linalg.vector_norm(self.second, dim=0)
        inner = torch.linalg.vector_norm(self.first, dim=1)
        alive = (outer > 0) & (inner > 0)
        scale = torch.where(alive, (inner / outer.where(alive, 1)).sqrt(), 0)
        inverse = torch.where(alive, (outer / inner.where(alive, 1)).sqrt(), 0)
        return Factors(self.second * scale, self.first * inverse[:, None])

    def rotated(self) -> Factors:
        """Return `second Q`, `Q^T first` with a random rotation `Q`, the same for all factors of that rank.

        Ranks differ in size by orders of magnitude, and 4-bit encodings give a scale to a run of neighbors, of which
        the largest then sets the step. After the rotation all are alike, and the outer factor's inputs are correlated,
        so that rounding one rank can be made up for by the next ones (GPTQ); in their own basis they are not.
        """
        generator = torch.Generator().manual_seed(len(self.first))
        noise = torch.randn(len(self.first), len(self.first), generator=generator, dtype=torch.float64)
        rotation = torch.linalg.qr(noise)[0].to(self.first)
        return Factors(self.second @ rotation, rotation.T @ self.first)

    def with_equal_columns(self, dtype: torch.dtype, rows: int | None = None) -> Factors:
        """Return factors whose `second`, each row over its largest value, has columns of equal maxima.

        With one scale per row (integer encodings), all ranks then use the whole range of the integers. One scale per
        rank and one per output is what that amounts to, as in Dobi-SVD's Alg. 3, and the one per output besides.
        Scales of rows are stored in `dtype`, rounded up. Only the first `rows` rows of `second` count; None is all.
        """
        counted = self.second[:rows].double()
        largest = counted.abs().amax(1)
        scale = rounded_up(torch.where(largest > 0, largest, 1), dtype)
        columns = (counted / scale[:, None]).abs().amax(0) / LARGEST_FRACTION
        columns = torch.where(columns > 0, columns, 1)
        return Factors(self.second.double() / columns, self.first.double() * columns[:, None])


def rounded_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the smallest values of `dtype` not below `scale` (float64), as float64.

    Never zero: a scale below the normal range becomes the smallest normal number (its values then use fewer bits).
    ValueError if a scale is not finite in that dtype.
    """
    # What float64 itself rounded must not push a scale that fits to the next value.
    least = scale.double() * (1 - 1e-14)
    nearest = least.clamp_min(torch.finfo(dtype).tiny).to(dtype)
    up = torch.nextafter(nearest, torch.full_like(nearest, float("inf")))
    found = torch.where(nearest.double() < least, up, nearest).double()
    if not bool(torch.isfinite(found).all()):
        raise ValueError(
            f"a factor does not fit into {dtype}: its scale overflows; load the model in bfloat16 or float32"
        )
    return found


@dataclass(frozen=True)
class Decomposition:
    """A matrix written as a sum of rank-one terms, best first, so that every rank is a prefix.

    `left` is `m x p`, `right` is `p x n`; `singular_values` (`p`, descending) are those of the weight in the metric of
    the factorizer: what truncating at rank `k` costs there is the norm of `singular_values[k:]`.
    """

    left: Tensor
    right: Tensor
    singular_values: Tensor

    def truncate(self, rank: int) -> Factors:
        """Return the first `rank` terms. Where there are fewer (a rank-deficient metric) zeros fill the shape."""
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        return self.keep(range(rank))

    def keep(self, directions: Sequence[int]) -> Factors:
        """Return the terms of these numbers, counted from 0, ascending; zeros in place of those that there are not."""
        rank, there = len(directions), self.left.shape[1]
        if directions[-1] == rank - 1:  # the leading ones
            second, first = self.left[:, :rank], self.right[:rank]
        else:
            found = [number for number in directions if number < there]
            chosen = torch.tensor(found, dtype=torch.long, device=self.left.device)
            second, first = self.left[:, chosen], self.right[chosen]
        missing = rank - second.shape[1]
        if missing > 0:
            second = torch.nn.functional.pad(second, (0, missing))
            first = torch.nn.functional.pad(first, (0, 0, 0, missing))
        return Factors(second, first)

    def truncation_loss(self, rank: int) -> float:
        """Return the error at a rank in the factorizer's metric: `sqrt(sum_{i>rank} s_i^2)` (SVD-LLM V2, Thm. 3.1)."""
        return float(torch.linalg.vector_norm(self.singular_values[rank:]))


"""What an encoding is: how one linear's weight is stored, and all that follows from it.

Bundled with every checkpoint (see `checkpoint.bundle`), as are the encodings themselves: they import nothing but
torch, transformers and each other, and other libraries by name where they are needed.
"""


import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


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


class InputGram:
    """`H = X X^T` (`n x n`) of a linear's inputs, and what error feedback leaves of an error under it."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self._conditional: dict[float, Tensor] = {}

    def conditional_variances(self, damping: float) -> Tensor:
        """Return the variance of each input given the inputs after it, `damping` (a share of the mean) added to all.

        Error feedback rounds inputs in order and makes up for each error with the inputs that are left, so that of an
        error only this part remains.
        """
        if damping not in self._conditional:
            damped = self.matrix.double().clone()
            damped.diagonal().add_(damping * damped.diagonal().mean().clamp_min(1e-300))
            factor = torch.linalg.cholesky(damped.flip(0, 1))
            self._conditional[damping] = factor.diagonal().square().flip(0)
        return self._conditional[damping]


@dataclass(frozen=True)
class ErrorMetric:
    """What an error `E` (`m x n`) of a linear's weight costs: `sum_i felt_i E_i H E_i^T`.

    Errors of different outputs are taken as independent, so only the diagonal of what is felt of them counts.

    Attributes:
        gram: `H` of the linear's inputs.
        felt: how much the loss feels each output, `m`.
    """

    gram: InputGram
    felt: Tensor

    def each_value_alone(self, error: Tensor) -> float:
        """Return what an error costs that nothing makes up for."""
        return float((self.felt * ((error @ self.gram.matrix) * error).sum(1)).sum())

    def with_feedback(self, error: Tensor, damping: float) -> float:
        """Return what is left of it when the inputs after each one make up for it."""
        return float((self.felt * (error.square() @ self.gram.conditional_variances(damping))).sum())


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
        loss_is_measured: whether allocators that score ranks weigh its rounding by measured loss.
        own_text, own_tokenizer: calibration text that its settings name, and its tokenizer; None where they do not.
        one_input_at_a_time: whether linears of a block that read different inputs are quantized one after the other,
            each on what the ones before it give, rather than all on what the dense ones give.
        uses_text: whether it rounds better with the Gram of the linear's inputs; such linears are quantized
            sequentially, each on the inputs that the quantized ones before it give.
        needs_text: whether it cannot round without.
        trainable: whether its weights can be trained.
        adapter_refusal: why PEFT can put no adapter on its linears, in words; None if it can.
        merges_adapters: whether PEFT merges adapters into them.
        has_more_tensors: whether checkpoints hold tensors of its linears that `tensors` does not list.
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
    loss_is_measured: ClassVar[bool] = False
    own_text: Any = None
    own_tokenizer: Any = None
    one_input_at_a_time: bool = False
    uses_text: bool = False
    needs_text: ClassVar[bool] = False
    trainable: ClassVar[bool] = False
    adapter_refusal: ClassVar[str | None] = None
    merges_adapters: ClassVar[bool] = True
    has_more_tensors: ClassVar[bool] = False
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
    def loss_name(self) -> str:
        """Its name, and whatever else of its settings decides `quantization_loss`."""
        return self.name

    def quantization_loss(self, weight: Tensor, full_rank: int, metric: ErrorMetric) -> float:
        """Return what rounding a weight (`m x n`) costs, as near as can be told without doing it."""
        return 0.0

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


"""A table of things by name: methods, allocations, factorizers, structures, encodings."""


import difflib
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries by name, in the order in which they were registered.

    Args:
        what: what an entry is, as messages call it.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._entries: dict[str, T] = {}

    def register(self, name: str, entry: T) -> T:
        """Add an entry. ValueError for an empty name, or one that is taken."""
        if not name or name in self._entries:
            raise ValueError(f"{self.what} {name!r} is already registered or has no name; choose another name")
        self._entries[name] = entry
        return entry

    def get(self, name: Any) -> T:
        """Return the entry of that name. ValueError lists the names there are, the nearest first."""
        # A name may come straight from a hand-edited JSON file, so it need not be a string (nor hashable).
        if isinstance(name, str) and name in self._entries:
            return self._entries[name]
        near = difflib.get_close_matches(str(name), self._entries, n=len(self._entries), cutoff=0.5)
        known = dict.fromkeys([*near, *self._entries])
        raise ValueError(f"unknown {self.what} {name!r}; known: {', '.join(known)}")

    def __contains__(self, name: Any) -> bool:
        return isinstance(name, str) and name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


"""Rounding a matrix to a given code so that its outputs, not its values, are close: GPTQ's error feedback."""


import torch
from torch import Tensor

_COLUMNS_AT_ONCE = 128
"""Columns whose errors are passed on to all later ones in one product."""
_FRACTIONS = tuple(0.6 + 0.025 * step for step in range(21))
"""Scales that are tried, over those given. Some are larger, since what is passed on makes later values larger."""


class ErrorFeedback:
    """Chooses values of a code that keep `||(W - W_q) X||_F` small, one input after the other.

    Each input is rounded to the nearest value, and what that changes in the outputs is made up for by the inputs not
    rounded yet, as far as they are correlated with it (GPTQ, arXiv 2210.17323). Inputs with the largest second moment
    go first: scales are fixed beforehand, so the order costs nothing later.

    Args:
        gram: `H = X X^T`, n x n.
        damping: added to the diagonal of `H`, as a share of its mean.
    """

    def __init__(self, gram: Tensor, damping: float = 0.01) -> None:
        self._order = gram.diagonal().argsort(descending=True, stable=True)
        self._upper = _upper_root_of_inverse(gram[self._order][:, self._order].double(), damping)

    def fitted_scales(self, weight: Tensor, code: Tensor, scales: Tensor) -> Tensor:
        """Scales with which rounding to a code loses less than with those of the largest values.

        Of an input's error only that part counts which no input rounded after it makes up for, so that a large value
        of an input that others stand in for need not stretch the code for its neighbors.

        Args:
            weight, code, scales: as for `round`.

        Returns:
            One for each given (float64): the best of 21 fractions of it.
        """
        m, n = weight.shape
        left_over = torch.empty(n, dtype=torch.float64, device=weight.device)
        left_over[self._order] = 1 / self._upper.diagonal().square()
        grouped, left_over = weight.double().view(m, scales.shape[1], -1), left_over.view(1, scales.shape[1], -1)
        code, middles = _with_middles(code)
        best = torch.full(scales.shape, torch.inf, dtype=torch.float64, device=weight.device)
        found = scales.double()
        for fraction in _FRACTIONS:
            tried = fraction * scales.double()
            steps = torch.where(tried > 0, tried, 1)[..., None]
            error = grouped - code[torch.bucketize((grouped / steps).contiguous(), middles)] * steps
            lost = (error.square() * left_over).sum(-1)
            found = torch.where(lost < best, tried, found)
            best = torch.minimum(lost, best)
        return found

    def round(self, weight: Tensor, code: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """The rounding of one matrix.

        Args:
            weight: `W`, m x n.
            code: the values a weight may have in units of its scale, ascending.
            scales: m x (n / g): one for every g neighboring inputs of an output.

        Returns:
            Which value of the code each weight became (int64, m x n), and the matrix they stand for (float64).
        """
        m, n = weight.shape
        order, upper = self._order, self._upper
        left = weight[:, order].double().clone()
        steps = scales.double().repeat_interleave(n // scales.shape[1], dim=1)[:, order]
        steps = torch.where(steps > 0, steps, 1)
        code, middles = _with_middles(code)
        chosen = torch.empty(m, n, dtype=torch.int64, device=weight.device)
        for begin in range(0, n, _COLUMNS_AT_ONCE):
            end = min(begin + _COLUMNS_AT_ONCE, n)
            errors = torch.empty(m, end - begin, dtype=torch.float64, device=weight.device)
            for column in range(begin, end):
                index = torch.bucketize(left[:, column] / steps[:, column], middles)
                chosen[:, column] = index
                error = (left[:, column] - code[index] * steps[:, column]) / upper[column, column]
                left[:, column + 1 : end] -= error[:, None] * upper[column, column + 1 : end]
                errors[:, column - begin] = error
            left[:, end:] -= errors @ upper[begin:end, end:]
        back = order.argsort()
        return chosen[:, back], (code[chosen] * steps)[:, back]


def _with_middles(code: Tensor) -> tuple[Tensor, Tensor]:
    """The code, and where between two of its values rounding changes from one to the other."""
    code = code.double()
    return code, (code[1:] + code[:-1]) / 2


def _upper_root_of_inverse(gram: Tensor, damping: float) -> Tensor:
    """Upper triangular `U` with `U^T U = (H + damping)^-1`; inputs that never vary get a variance of their own."""
    mean = gram.diagonal().mean()
    if not float(mean) > 0:
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    damped = gram.clone()
    damped.diagonal().add_(damping * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


"""Quantizing linears with bitsandbytes, through transformers' own quantizers; both are imported by name."""


import importlib
import importlib.util
from typing import Any, cast

import torch
from torch import Tensor, nn



def require_bitsandbytes() -> None:
    """Raise ImportError, naming the extra, if bitsandbytes is not installed or does not work."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("this needs bitsandbytes: pip install 'optimum-dobisvd[bnb]'")
    try:
        importlib.import_module("bitsandbytes")
    except Exception as error:
        raise ImportError(f"bitsandbytes is installed and cannot be imported: {error}") from error


def hf_quantizer_of(settings: Any, pre_quantized: bool) -> Any:
    """Return transformers' quantizer for a `BitsAndBytesConfig`."""
    # Imported here, because with it come the quantizers of all other libraries, which takes seconds.
    return importlib.import_module("transformers.quantizers.auto").AutoHfQuantizer.from_config(
        settings, pre_quantized=pre_quantized
    )


def quantized_linear(linear: nn.Linear, settings: Any, dtype: torch.dtype) -> Any:
    """Return bitsandbytes' linear of the same function, but for the rounding of each value.

    It remembers `dtype`, the model's, as that of the weight, which may be a wider one here.
    """
    holder: Any = _Holder(linear)
    put_empty_linears(holder, settings, pre_quantized=False)
    new = holder.linear
    operation = hf_quantizer_of(settings, pre_quantized=False).get_quantize_ops()
    found = operation.convert(
        {"linear.weight": [linear.weight.data.to(dtype)]}, model=holder, full_layer_name="linear.weight"
    )
    new.weight = found["linear.weight"]
    if linear.bias is not None:
        new.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    keep_as_saved(new)
    return new.train(linear.training)


def dequantized_weight(linear: Any) -> Tensor:
    """Return the matrix that one of bitsandbytes' linears stands for (`m x n`), before its first forward pass."""
    functional, weight = importlib.import_module("bitsandbytes.functional"), linear.weight
    if hasattr(weight, "quant_state"):
        return cast(Tensor, functional.dequantize_4bit(weight.data, weight.quant_state))
    return cast(Tensor, functional.int8_vectorwise_dequant(weight.data, weight.SCB))


def round_with_feedback(linear: nn.Linear, settings: Any, gram: Tensor, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """Return bitsandbytes' 4-bit linear with values rounded by error feedback, and the matrix it stands for.

    bitsandbytes takes the largest value of a block for its scale and rounds every value on its own. Here scales are
    fitted, and `ErrorFeedback` chooses which value of its code a weight becomes. The tensors are bitsandbytes' own in
    every respect.
    """
    new = quantized_linear(linear, settings, dtype)
    state = new.weight.quant_state
    matrix = linear.weight.detach()
    code, ascending = state.code.double().sort()
    feedback = ErrorFeedback(gram)
    fitted = feedback.fitted_scales(matrix, code, _scales(state).view(len(matrix), -1).to(matrix.device))
    _set_scales(state, fitted.flatten().to(state.code))
    chosen, rounded = feedback.round(matrix, code, _scales(state).view_as(fitted).to(matrix.device))
    values = ascending[chosen].to(torch.uint8).view(-1, 2)
    # Two to a byte, the first one in the upper half.
    new.weight.data = (values[:, 0] << 4 | values[:, 1]).view_as(new.weight.data)
    return new, rounded


def put_empty_linears(module: nn.Module, settings: Any, *, pre_quantized: bool) -> None:
    """Put bitsandbytes' linears on meta in the place of a module's plain ones."""
    replace = importlib.import_module("transformers.integrations").replace_with_bnb_linear
    replace(module, quantization_config=settings, pre_quantized=pre_quantized)


def keep_as_saved(module: nn.Module) -> None:
    """Keep a 4-bit linear from repacking itself in its first forward pass on a CPU with bf16 instructions.

    That takes multiples of 32 outputs only, rounds the scales to bfloat16, and the rounded ones would then be saved.
    """
    if hasattr(module, "support_avx512bf16_for_cpu"):
        setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - a type checker takes it for a tensor


def _scales(state: Any) -> Tensor:
    """One for every block, float32."""
    if not state.nested:
        return cast(Tensor, state.absmax)
    functional = importlib.import_module("bitsandbytes.functional")
    return cast(Tensor, functional.dequantize_blockwise(state.absmax, state.state2) + state.offset)


def _set_scales(state: Any, scales: Tensor) -> None:
    """As bitsandbytes stores them, which for double quantization is as near as 8 bits come."""
    if not state.nested:
        state.absmax = scales
        return
    functional = importlib.import_module("bitsandbytes.functional")
    state.offset = scales.mean()
    state.absmax, state.state2 = functional.quantize_blockwise(scales - state.offset, blocksize=state.state2.blocksize)


class _Holder(nn.Module):
    """A model of one linear, as far as transformers' operations ask."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def get_parameter_or_buffer(self, name: str) -> Tensor:
        return self.get_parameter(name)


"""How this machine's CPU multiplies, and what calibration does about it. Bundled with every checkpoint."""


import functools
from contextvars import ContextVar

import torch

WIDENED_FOR_SPEED: ContextVar[bool] = ContextVar("widened for speed", default=False)
"""Set while bfloat16 modules are computed in float32, since this CPU is faster so: no choice of the user's."""


@functools.cache
def has_bf16_products() -> bool:
    """Whether PyTorch multiplies bfloat16 by instructions of this x86 CPU."""
    # Private, and absent from older versions of PyTorch; without it the choice is only slower.
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return supported() and torch.backends.cpu.get_cpu_capability() == "AVX512"


"""The Triton kernel for products of few rows with int8 matrices: it reads every weight once, as a byte.

Its results are right on an H100. At 4096 x 4096, launched product by product, it is slower there than unpacking (0.27
against 0.20 ms for one row): both are times of launching, not of reading.

Bundled with every checkpoint. Triton is imported when it is first asked for, not before.
"""


import contextlib
import functools
import importlib
import os
from typing import Any

import torch
from torch import Tensor

_MOST_ROWS = 128
_UNIT = 128


def triton_refuses(x: Tensor) -> str | None:
    """Why the kernel cannot compute with these activations, None if it can."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the Triton kernel takes no activations of {x.dtype}"
    return None


def triton_is_outrun(x: Tensor, weight: Tensor) -> bool:
    """Whether unpacking once and a library's product should be faster."""
    return len(x) > _MOST_ROWS or not x.numel()


def triton_int8_matmul(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """`x (weight / 128)^T * scale` for `x` of `M x K`, `weight` of `N x K`.

    Few rows leave the time to reading the weight, so `K` is split among programs until there are enough of them to
    keep every multiprocessor reading; their float32 sums are added up in a fixed order.
    """
    triton, kernel = _compiled()
    rows, inner = x.shape
    outer = len(weight)
    x = x.contiguous()
    # Tiles of a size that fits into the shared memory of small GPUs, too, with the three stages of loads in flight.
    block_rows = min(max(16, triton.next_power_of_2(rows)), 32 if x.dtype is torch.float32 else 64)
    block_outer, block_inner = 32, 64 if x.dtype is torch.float32 else 128
    tiles = triton.cdiv(outer, block_outer) * triton.cdiv(rows, block_rows)
    steps = triton.cdiv(inner, block_inner)
    splits = max(1, min(steps, 2 * _multiprocessors(x.device) // tiles))
    steps_each = triton.cdiv(steps, splits)
    splits = triton.cdiv(steps, steps_each)
    sums = torch.empty((splits, rows, outer), device=x.device, dtype=torch.float32)
    # Triton launches on the current device, which need not be the one the tensors are on.
    with torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext():
        kernel[(triton.cdiv(outer, block_outer), triton.cdiv(rows, block_rows), splits)](
            x,
            weight,
            sums,
            rows,
            outer,
            inner,
            steps_each,
            BLOCK_ROWS=block_rows,
            BLOCK_OUTER=block_outer,
            BLOCK_INNER=block_inner,
            FLOAT32=os.environ.get("TRITON_INTERPRET") == "1",  # which takes the bits of bfloat16 for integers
        )
    found = sums[0] if splits == 1 else sums.sum(0)
    factors = 1 / _UNIT if scale is None else scale.float() / _UNIT
    return (found * factors).to(x.dtype)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def _compiled() -> tuple[Any, Any]:
    """Triton and the kernel."""
    # By name, because transformers refuses a bundled file whose imports are not all installed, wherever they stand.
    triton: Any = importlib.import_module("triton")
    tl: Any = importlib.import_module("triton.language")

    @triton.jit
    def matmul(
        x,
        weight,
        sums,
        rows,
        outer,
        inner,
        steps,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_OUTER: tl.constexpr,
        BLOCK_INNER: tl.constexpr,
        FLOAT32: tl.constexpr,
    ):
        at_outer = tl.program_id(0) * BLOCK_OUTER + tl.arange(0, BLOCK_OUTER)
        at_rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        split = tl.program_id(2)
        found = tl.zeros((BLOCK_ROWS, BLOCK_OUTER), dtype=tl.float32)
        for step in range(steps):
            at_inner = (split * steps + step) * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
            values = tl.load(
                x + at_rows[:, None].to(tl.int64) * inner + at_inner[None, :],
                mask=(at_rows[:, None] < rows) & (at_inner[None, :] < inner),
                other=0.0,
            )
            bytes_ = tl.load(
                weight + at_outer[:, None].to(tl.int64) * inner + at_inner[None, :],
                mask=(at_outer[:, None] < outer) & (at_inner[None, :] < inner),
                other=0,
            )
            factors = tl.trans(bytes_.to(tl.float32))
            if FLOAT32:
                values = values.to(tl.float32)
            # ieee: of the input precisions only this one keeps float32 activations whole.
            found += tl.dot(values, factors.to(values.dtype), input_precision="ieee")
        tl.store(
            sums + (split.to(tl.int64) * rows + at_rows[:, None]) * outer + at_outer[None, :],
            found,
            mask=(at_rows[:, None] < rows) & (at_outer[None, :] < outer),
        )

    return triton, matmul


"""`y = x (Q / 128)^T * scale` for an int8 matrix `Q`: one function, and a table of kernels to compute it with.

The first kernel of the table that takes the operands computes; none quantizes the activations. Bundled with every
checkpoint (see `checkpoint.bundle`): nothing but torch, and Triton where there is one.
"""


import contextlib
import functools
import importlib.util
import logging
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


_kernel_log = logging.getLogger(__name__)

UNIT = 128
"""What an int8 integer is a fraction of."""

KERNEL_CALLS: Counter[str] = Counter()
"""How many products each kernel has computed in this process."""

# `_weight_int8pack_mm` reads beyond its operands where the inner dimension is no multiple of its vectors: with AVX2 of
# 8 (wrong results, then a segmentation fault), with AVX-512 of 16.
_CPU_MULTIPLE = 16
# And with AVX-512 it crashes on operands at other addresses, as those in a mapped file are by the length of its head.
_CPU_ALIGNMENT = 64
_CACHED = 1 << 22
"""Elements that are unpacked at once on a CPU."""
# Above so many rows the bf16 instructions of newer CPUs beat it, unpacking included.
_CPU_FEW_ROWS = 12


@dataclass(frozen=True)
class Kernel:
    """One row of the table.

    Attributes:
        name: as `KERNEL_CALLS` counts it and `using_kernel` takes it.
        device: the type of device it is for, None for any.
        refuses: `(x, weight) -> why it cannot compute these`, None where it can. The user is told once, since products
            are then slower than they need be.
        outrun: `(x, weight) -> whether the kernels after it are faster` on these.
        run: `(x, weight, scale) -> y` for a two-dimensional `x`.
    """

    name: str
    device: str | None
    refuses: Callable[[Tensor, Tensor], str | None]
    outrun: Callable[[Tensor, Tensor], bool]
    run: Callable[[Tensor, Tensor, Tensor | None], Tensor]


def int8_matmul(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """`x (weight / 128)^T * scale`, in the dtype of `x`.

    Differentiable by `x`; the weight and its scale are constants.

    Args:
        x: `... x K`, floating point.
        weight: `N x K`, int8, contiguous.
        scale: `N`, floating point; None is 1.

    Returns:
        `... x N`.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Int8Matmul.apply(x, weight, scale)
    return _dispatch(x, weight, scale)


@contextlib.contextmanager
def using_kernel(name: str) -> Iterator[None]:
    """Compute with this kernel and no other, also where another is faster.

    Raises:
        ValueError: there is no such kernel; inside, it cannot take the operands (says why).
    """
    if name not in (kernel.name for kernel in KERNELS):
        raise ValueError(f"unknown kernel {name!r}; known: {', '.join(kernel.name for kernel in KERNELS)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


_forced: ContextVar[str | None] = ContextVar("forced kernel", default=None)
_told: set[str] = set()
_broken: dict[str, str] = {}
"""Kernels that failed in this process, and how."""


class _Int8Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        return _dispatch(x, weight, scale)

    @staticmethod
    def backward(ctx, gradient):
        weight, scale = ctx.saved_tensors
        if scale is not None:
            gradient = gradient * scale.to(gradient.dtype)
        return gradient @ _unpacked(weight, gradient.dtype), None, None


def _dispatch(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling():  # the compiler fuses the unpacking into the product
        return _dequantizing(rows, weight, scale).view(*x.shape[:-1], len(weight))
    kernel = _choose(rows, weight)
    try:
        product = kernel.run(rows, weight, scale)
    except Exception as error:
        # A kernel compiled on the spot may find no C compiler, or a GPU it was never made for.
        if kernel.name != "triton" or _forced.get() is not None or isinstance(error, torch.OutOfMemoryError):
            raise
        _broken[kernel.name] = f"the Triton kernel failed: {error}"
        return _dispatch(x, weight, scale)
    KERNEL_CALLS[kernel.name] += 1
    return product.view(*x.shape[:-1], len(weight))


def _choose(x: Tensor, weight: Tensor) -> Kernel:
    forced = _forced.get()
    if forced is not None:
        return _checked(next(kernel for kernel in KERNELS if kernel.name == forced), x, weight)
    reasons = []
    for kernel in KERNELS[:-1]:
        if not _is_for(kernel, x):
            continue
        reason = _broken.get(kernel.name) or kernel.refuses(x, weight)
        if reason is None:
            if not kernel.outrun(x, weight):
                return kernel
        else:
            reasons.append(reason)
    if reasons:
        _tell("; ".join(reasons))
    return KERNELS[-1]


def _checked(kernel: Kernel, x: Tensor, weight: Tensor) -> Kernel:
    """The kernel; ValueError if it cannot compute these."""
    why = kernel.refuses(x, weight) if _is_for(kernel, x) else f"it is for {kernel.device}, these are on {x.device}"
    if why is not None:
        raise ValueError(f"the kernel {kernel.name!r} was asked for, and {why}")
    return kernel


def _is_for(kernel: Kernel, x: Tensor) -> bool:
    interpreted = kernel.name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return kernel.device in (None, x.device.type) or interpreted


def _tell(why: str) -> None:
    """Say once why 8-bit weights are unpacked for every product."""
    if why not in _told:
        _told.add(why)
        _kernel_log.warning("8-bit weights are unpacked for every product, which is slow: %s", why)


def _unpacked(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).mul_(1 / UNIT)  # exact: 7 bits and a power of two


def _dequantizing(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        product = torch.nn.functional.linear(x, _unpacked(weight, x.dtype))
        return product if scale is None else product * scale.to(x.dtype)
    # Rows of the weight are unpacked by as many as stay in the cache until they are multiplied.
    product = x.new_empty(len(x), len(weight))
    count = min(max(1, _CACHED // weight.shape[1]), len(weight))
    unpacked = x.new_empty(count, weight.shape[1])
    for begin in range(0, len(weight), count):
        part = weight[begin : begin + count]
        rows = unpacked[: len(part)].copy_(part)
        if x.dtype is torch.float16:  # in which a sum of whole numbers would overflow; elsewhere the sum is divided
            rows.mul_(1 / UNIT)
        product[:, begin : begin + count] = torch.nn.functional.linear(x, rows)
    if x.dtype is not torch.float16:
        return product.mul_(1 / UNIT if scale is None else scale.to(x.dtype) / UNIT)
    return product if scale is None else product.mul_(scale)


def _cpu_refuses(x: Tensor, weight: Tensor) -> str | None:
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the int8 kernel was not tried on {platform.machine()}"
    if x.dtype not in (torch.bfloat16, torch.float16) and not WIDENED_FOR_SPEED.get():
        return f"the CPU kernel is for 16-bit activations, these are {x.dtype} (load with dtype=torch.bfloat16)"
    return None


def _cpu_is_outrun(x: Tensor, weight: Tensor) -> bool:
    if WIDENED_FOR_SPEED.get():
        return True
    return not x.numel() or (len(x) > _CPU_FEW_ROWS and x.dtype is torch.bfloat16 and has_bf16_products())


def _cpu_packed(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    missing = -x.shape[1] % _CPU_MULTIPLE
    if missing:
        x, weight = torch.nn.functional.pad(x, (0, missing)), torch.nn.functional.pad(weight, (0, missing))
    # In float16 a scale over 128 could fall below the normal range; in bfloat16 it is exact.
    fused = scale is not None and x.dtype is torch.bfloat16
    factors = scale.to(x.dtype) / UNIT if fused else x.new_full((len(weight),), 1 / UNIT)  # type: ignore[union-attr]
    product = torch._weight_int8pack_mm(_aligned(x.contiguous()), _aligned(weight), factors)
    return product if fused or scale is None else product * scale.to(x.dtype)


def is_aligned(operand: Tensor) -> bool:
    """Whether a tensor on the CPU is at an address that the CPU kernel can take."""
    return operand.data_ptr() % _CPU_ALIGNMENT == 0


def _aligned(operand: Tensor) -> Tensor:
    """Return a tensor itself, or a copy at such an address."""
    return operand if is_aligned(operand) else operand.clone()


def _triton_refuses(x: Tensor, weight: Tensor) -> str | None:
    return triton_refuses(x) if _has_triton() else "Triton is not installed (pip install triton)"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


KERNELS = (
    Kernel("triton", "cuda", _triton_refuses, triton_is_outrun, triton_int8_matmul),
    Kernel("cpu_int8", "cpu", _cpu_refuses, _cpu_is_outrun, _cpu_packed),
    Kernel("dequantize", None, lambda x, weight: None, lambda x, weight: False, _dequantizing),
)
"""In the order in which they are asked; the last takes everything."""


"""One int8 integer a value, one scale a row.

An integer `q` stands for the fraction `q / 128`, so no element type has to represent 1/127, and the scale of a row is
its largest magnitude, of a size that 16-bit floats hold well: `W = diag(scale) Q / 128`. Scales are rounded up to the
model's dtype first and values against the rounded scale, so the rounding of scales costs nothing.
"""


from typing import Any

import torch
from torch import Tensor, nn


_LARGEST = 127
NO_ADAPTERS = "stored in 8 bits, which take no adapter: name linears that are dense, or call convert(model) first"


class Int8(Encoding):
    """8 bits a value, on disk and in memory."""

    name = "int8"
    gauge = Gauge.EQUAL_COLUMNS
    dense_encodings: tuple[str, ...] = ("int8",)
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

    def part(self, out_features: int, in_features: int, full_rank: int) -> tuple[int, int]:
        """Return how many rows and columns are in 8 bits, from the first on: all."""
        return out_features, in_features

    def bytes(self, shape: LinearShape, element_size: int) -> int:
        rows, columns = self.part(shape.out_features, shape.in_features, shape.full_rank)
        return rows * columns + (shape.numel - rows * columns + rows) * element_size

    def quantization_loss(self, weight: Tensor, full_rank: int, metric: ErrorMetric) -> float:
        rows, columns = self.part(len(weight), weight.shape[1], full_rank)
        rounded = weight.clone()
        rounded[:rows, :columns] = fake_quantize_rows(weight[:rows, :columns])
        return metric.each_value_alone(rounded - weight)

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
        new = self._module(linear, full_rank, "meta")
        for key, value in tensors.items():
            setattr(new, key, nn.Parameter(value.contiguous(), requires_grad=False))
        new.bias = linear.bias
        return new.train(linear.training), new.dense_matrix()

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
        rows, columns = self._part = part or (out_features, in_features)
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
        rows, columns = self._part
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
        rows, columns = self._part
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


"""Checks of transformers' own quantization configurations that several encodings have in common."""


import difflib
import inspect
from typing import Any


def with_method(values: dict[str, Any]) -> str | None:
    """Return the method that a configuration given as a dictionary is of, None if it does not say."""
    method = values.get("quant_method")
    return getattr(method, "value", method)


def check_options(makes: Any, example: Any, values: dict[str, Any]) -> None:
    """Raise ValueError for a key that a configuration does not know: it would be dropped without a word."""
    known = {*inspect.signature(makes).parameters, *example.to_dict()} - {"kwargs"}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "its documentation lists those there are"
            raise ValueError(f"quantization: {makes.__name__} has no option {key!r}; {hint}")


def refuse_layer_names(option: str, value: Any) -> None:
    """Raise ValueError for an option that names layers of the dense model, if it is set."""
    if value:
        raise ValueError(
            f"{option} names layers of the dense model: name what is to stay as it is in "
            "DobiSVDConfig.modules_to_not_convert, or per module in overrides"
        )


"""bitsandbytes' encodings: `nf4`, `fp4`, `nf4_dq`, `fp4_dq` (scales quantized once more) and `llm_int8`."""


import copy
import json
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig


_FOUR_BIT_NAME = re.compile(r"(nf4|fp4)(_dq)?")
_LLM_INT8 = "llm_int8"
_BNB_BLOCK = 64
_BNB_NESTED_BLOCK = 256
_FEEDBACK_DAMPING = 0.01
# QLoRA, appendix E: quantiles of a normal distribution, zero among them. And the values of a 4-bit float.
CODES = {
    "nf4": (
        *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
    ),
    "fp4": tuple(sign * value / 12 for sign in (-1, 1) for value in (0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)),
}


class BitsAndBytes(Encoding):
    """What a `BitsAndBytesConfig` asks for."""

    quant_method = "bitsandbytes"
    gauge = Gauge.ROTATED
    loss_is_measured = True
    has_more_tensors = True
    bits: int

    @classmethod
    def named(cls, name: str, settings: Any = None) -> BitsAndBytes | None:
        if name == _LLM_INT8:
            return LLMInt8(settings)
        found = _FOUR_BIT_NAME.fullmatch(name)
        return None if found is None else FourBit(found[1], found[2] is not None, settings)

    @classmethod
    def from_setting(cls, setting: Any, *, strict: bool) -> BitsAndBytes | None:
        """Take a `BitsAndBytesConfig`, one as a dictionary, or a name."""
        if isinstance(setting, str):
            setting = _bnb_settings_named(setting)
        if isinstance(setting, dict) and _is_bnb(setting):
            known = {key: value for key, value in setting.items() if key != "quant_method"}
            if strict:
                check_options(BitsAndBytesConfig, BitsAndBytesConfig(), setting)
            setting = BitsAndBytesConfig.from_dict({k: value for k, value in known.items() if not k.startswith("_")})
        if not isinstance(setting, BitsAndBytesConfig):
            return None
        _check_bnb(setting)
        if setting.load_in_8bit:
            return LLMInt8(setting)
        return FourBit(setting.bnb_4bit_quant_type, bool(setting.bnb_4bit_use_double_quant), setting)

    def remembered(self) -> Any:
        values = copy.deepcopy(self.settings.to_dict())
        return {key: value for key, value in values.items() if value is not None}

    def as_applied(self) -> Any:
        return BitsAndBytesConfig.from_dict(
            {key: value for key, value in self.remembered().items() if key != "quant_method" and key[0] != "_"}
        )

    def quantize(
        self, linear: nn.Linear, full_rank: int, dtype: torch.dtype, gram: Tensor | None = None
    ) -> tuple[nn.Module, Tensor]:
        """Round every value on its own."""
        new = quantized_linear(linear, self.settings, dtype)
        return new, dequantized_weight(new)

    def require(self) -> None:
        require_bitsandbytes()

    def hf_quantizer(self) -> Any:
        return hf_quantizer_of(self.settings, pre_quantized=True)

    def empty(self, linear: nn.Linear, full_rank: int) -> nn.Module:
        holder = nn.Module()
        holder.linear = linear
        put_empty_linears(holder, self.settings, pre_quantized=True)
        return holder.linear

    def loaded(self, name: str, module: nn.Module) -> nn.Module:
        keep_as_saved(module)
        return module

    def loaded_model(self, model: Any) -> None:
        """Set what peft and transformers' Trainer ask of a model whose linears are bitsandbytes'."""
        setattr(model, f"is_loaded_in_{self.bits}bit", True)
        # Private, and needed to save the model again: transformers would undo the conversions of loading, and those
        # of bitsandbytes have no inverse (their linears write their tensors by themselves).
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [
            each
            for each in conversions
            if not any(hasattr(operation, "hf_quantizer") for operation in getattr(each, "operations", ()))
        ]

    def forget(self, model: Any) -> None:
        model.__dict__.pop(f"is_loaded_in_{self.bits}bit", None)

    def before_saving(self, name: str, module: nn.Module, dtype: torch.dtype) -> None:
        """Bring a bias into the model's dtype again: every pass casts it to what it computes in."""
        bias: Any = module.bias
        if bias is not None:
            bias.data = bias.data.to(dtype)


class FourBit(BitsAndBytes):
    """Two values a byte, a scale for 64 of them."""

    bits = 4
    uses_text = True
    # Blocks that run on into the next row are legal, and bitsandbytes 0.50 unpacks them wrongly on CPUs: errors of
    # half a matrix wherever inputs are a multiple of 16 and not of 64.
    in_multiple = _BNB_BLOCK

    def __init__(self, kind: str, nested: bool, settings: BitsAndBytesConfig | None = None) -> None:
        self.kind, self.nested, self.settings = kind, nested, settings
        self.name = f"{kind}_dq" if nested else kind
        self.relative_error = 0.008 if kind == "nf4" else 0.02
        self.dense_encodings = (self.name, "int8")

    def bytes(self, shape: LinearShape, element_size: int) -> int:
        blocks = -(-shape.numel // _BNB_BLOCK)
        state: dict[str, object] = {
            "quant_type": self.kind,
            "blocksize": _BNB_BLOCK,
            "dtype": "bfloat16" if element_size == 2 else "float32",
            "shape": [shape.out_features, shape.in_features],
        }
        scales = 4 * blocks
        if self.nested:
            state |= {"nested_blocksize": _BNB_NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0.0}
            # Its own scales and map; and the offset is written with up to 24 characters.
            scales = blocks + 4 * -(-blocks // _BNB_NESTED_BLOCK) + 4 * 256 + 24 - len("0.0")
        return -(-shape.numel // 2) + scales + 4 * 16 + len(json.dumps(state))

    def quantization_loss(self, weight: Tensor, full_rank: int, metric: ErrorMetric) -> float:
        return metric.with_feedback(fake_quantize_to_code(weight, CODES[self.kind]) - weight, _FEEDBACK_DAMPING)

    def quantize(
        self, linear: nn.Linear, full_rank: int, dtype: torch.dtype, gram: Tensor | None = None
    ) -> tuple[nn.Module, Tensor]:
        """Round with error feedback where there is a Gram, every value on its own where there is none."""
        if gram is None:
            return super().quantize(linear, full_rank, dtype)
        return round_with_feedback(linear, self.settings, gram, dtype)

    def tensors(self, shape: LinearShape) -> dict[str, tuple[list[int], str | None]]:
        packed, blocks = -(-shape.numel // 2), -(-shape.numel // _BNB_BLOCK)
        return {"weight": ([packed, 1], "U8"), "weight.absmax": ([blocks], "U8" if self.nested else "F32")}


class LLMInt8(BitsAndBytes):
    """LLM.int8(): a scale per row; activations are rounded, too, but for outliers."""

    name = _LLM_INT8
    bits = 8
    relative_error = 1e-4
    dense_encodings = (_LLM_INT8, "int8")

    def __init__(self, settings: BitsAndBytesConfig | None = None) -> None:
        self.settings = settings

    def bytes(self, shape: LinearShape, element_size: int) -> int:
        return shape.numel + 4 * shape.out_features + 1

    def quantization_loss(self, weight: Tensor, full_rank: int, metric: ErrorMetric) -> float:
        return metric.each_value_alone(fake_quantize_rows(weight) - weight)

    def tensors(self, shape: LinearShape) -> dict[str, tuple[list[int], str | None]]:
        return {"weight": ([shape.out_features, shape.in_features], "I8"), "SCB": ([shape.out_features], "F32")}


def fake_quantize_to_code(weight: Tensor, code: tuple[float, ...]) -> Tensor:
    """Return the nearest value of a code to every weight, in units of the largest magnitude of 64 neighbors."""
    values = torch.tensor(sorted(code), dtype=weight.dtype, device=weight.device)
    flat = nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % _BNB_BLOCK)).view(-1, _BNB_BLOCK)
    scale = flat.abs().amax(-1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1)
    middles = (values[1:] + values[:-1]) / 2
    nearest = values[torch.bucketize(flat / scale, middles)] * scale
    return nearest.reshape(-1)[: weight.numel()].view(weight.shape)


def _bnb_settings_named(name: str) -> BitsAndBytesConfig | None:
    if name == _LLM_INT8:
        return BitsAndBytesConfig(load_in_8bit=True)
    found = _FOUR_BIT_NAME.fullmatch(name)
    if found is None:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=found[1], bnb_4bit_use_double_quant=found[2] is not None
    )


def _is_bnb(values: dict[str, Any]) -> bool:
    method = with_method(values)
    return method == "bitsandbytes" or (method is None and ("load_in_4bit" in values or "load_in_8bit" in values))


def _check_bnb(settings: BitsAndBytesConfig) -> None:
    if not settings.is_quantizable():
        raise ValueError("BitsAndBytesConfig() quantizes nothing: pass load_in_4bit=True or load_in_8bit=True")
    refuse_layer_names("llm_int8_skip_modules", settings.llm_int8_skip_modules)
    if settings.load_in_4bit and str(settings.bnb_4bit_quant_storage) != "torch.uint8":
        raise ValueError(
            f"bnb_4bit_quant_storage={settings.bnb_4bit_quant_storage} cannot be stored here: leave it at uint8"
        )
    if settings.llm_int8_has_fp16_weight:
        raise ValueError("llm_int8_has_fp16_weight keeps 16-bit weights, which saves nothing: leave it out")


"""The weight as it is, in the model's own dtype."""


from typing import Any

import torch
from torch import Tensor, nn



class Float(Encoding):
    """Plain `nn.Linear`: what PEFT, GPTQ and bitsandbytes find by its type, and what can be trained."""

    name = "float"
    trainable = True

    @classmethod
    def named(cls, name: str, settings: Any = None) -> Float | None:
        return cls() if name == cls.name else None

    def as_applied(self) -> None:
        """There is nothing to remember: it is what a model without a setting has."""

    def bytes(self, shape: LinearShape, element_size: int) -> int:
        return shape.numel * element_size

    def tensors(self, shape: LinearShape) -> dict[str, tuple[list[int], str | None]]:
        return {"weight": ([shape.out_features, shape.in_features], None)}

    def quantize(
        self, linear: nn.Linear, full_rank: int, dtype: torch.dtype, gram: Tensor | None = None
    ) -> tuple[nn.Module, Tensor]:
        """Cast the weight to the model's dtype. ValueError if a value overflows there."""
        weight = linear.weight.detach().to(dtype).contiguous()
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"a factor does not fit into {dtype}: its values overflow; load the model in bfloat16 or float32"
            )
        linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
        return linear, weight


"""Linears in GPTQ's encoding: their tensors while a checkpoint is loaded, and gptqmodel's kernels afterwards.

gptqmodel is imported by name where it is needed: transformers would not load a bundled file that has an import
statement for a library that is missing, whatever the checkpoint.
"""


import contextlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

GPTQ_IN_MEMORY = "gptq_v2"
"""gptqmodel's format: zero points as they are. That of auto-gptq (`gptq`), which has them less one, is read, too."""


def require_gptqmodel(backend: str | None = None) -> None:
    """Raise ImportError, naming the extra, if gptqmodel is missing or broken; ValueError if it has no such backend."""
    if importlib.util.find_spec("gptqmodel") is None:
        raise ImportError(
            "GPTQ needs gptqmodel, the successor of auto-gptq: pip install 'optimum-dobisvd[gptq]' (together with the "
            "torch you have, e.g. 'torch==2.13.0': its newest release may ask for a newer one)"
        )
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it greets, and standard output may be somebody's data
            importlib.import_module("gptqmodel")
    except Exception as error:
        raise ImportError(f"gptqmodel is installed and cannot be imported: {error}") from error
    known = importlib.import_module("gptqmodel").BACKEND.__members__
    if backend is not None and backend.strip().upper() not in known:
        raise ValueError(
            f"gptqmodel has no backend {backend!r}, which GPTQConfig names: leave it out, or take one of "
            f"{', '.join(name.lower() for name in known)}"
        )


@contextlib.contextmanager
def quiet_gptqmodel() -> Iterator[None]:
    """Keep gptqmodel from printing a line on every linear; warnings are let through."""
    log = importlib.import_module("logbar").LogBar.shared()
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)


class GPTQTensors(nn.Module):
    """The tensors of one linear as they lie in a checkpoint. It computes nothing: `gptq_kernel` takes its place.

    Parameters and not buffers, so that they are placed as weights are.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, bits: int, group_size: int, device: Any
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, group_size
        groups = 1 if group_size == -1 else in_features // group_size
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "qweight": ((in_features // 32 * bits, out_features), torch.int32),
            "qzeros": ((groups, out_features // 32 * bits), torch.int32),
            "scales": ((groups, out_features), torch.float16),
            "g_idx": ((in_features,), torch.int32),
        }
        if bias:
            shapes["bias"] = ((out_features,), torch.float16)
        for key, (shape, dtype) in shapes.items():
            values = torch.empty(shape, dtype=dtype, device=device)
            self.register_parameter(key, nn.Parameter(values, requires_grad=False))

    def held(self) -> dict[str, Tensor]:
        """Return its tensors by name."""
        return {key: parameter.data for key, parameter in self.named_parameters()}


def gptq_kernel(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], bits: int, group_size: int, options: Mapping[str, Any]
) -> nn.Module:
    """Return gptqmodel's linear around these tensors, ready to compute.

    Args:
        tensors: `qweight`, `qzeros`, `scales`, `g_idx`, and `bias` where there is one.
        shape: outputs and inputs of the linear.
        bits, group_size: of its encoding.
        options: of the `GPTQConfig`: `desc_act`, `sym`, `format` of the tensors, and `backend`.

    Raises:
        ValueError: no kernel of that backend takes such a linear.
    """
    device = tensors["qweight"].device
    out_features, in_features = shape
    make = _kernel_class(bits, group_size, options, device)
    linear: Any = make(
        bits=bits,
        group_size=in_features if group_size == -1 else group_size,
        desc_act=bool(options.get("desc_act", False)),
        sym=bool(options.get("sym", True)),
        in_features=in_features,
        out_features=out_features,
        bias="bias" in tensors,
    ).to(device)
    for key, value in tensors.items():
        linear.register_buffer(key, value)
    if options.get("format", GPTQ_IN_MEMORY) == "gptq" and linear.REQUIRES_FORMAT_V2:
        model = importlib.import_module("gptqmodel.utils.model")
        model.convert_gptq_v1_to_v2_format_module(linear, bits=bits, pack_dtype=torch.int32)
    linear.qzero_format(format=2)
    # gptqmodel would compile the unpacking of every linear by itself: minutes for a model of many different ranks.
    linear.optimized = True
    linear.post_init()
    return linear.eval()


def _kernel_class(bits: int, group_size: int, options: Mapping[str, Any], device: torch.device) -> Any:
    """The kernel that was asked for; by default the one that leaves its tensors as they are, so they can be saved."""
    importer = importlib.import_module("gptqmodel.utils.importer")
    backend = options.get("backend")
    try:
        return importer.hf_select_quant_linear_v2(
            bits=bits,
            group_size=group_size,
            desc_act=bool(options.get("desc_act", False)),
            sym=bool(options.get("sym", True)),
            format=GPTQ_IN_MEMORY,
            quant_method="gptq",
            device_map={"": device},
            backend="torch" if backend in (None, "auto", "auto_trainable") else backend,
            pack=False,
        )
    except (ValueError, RuntimeError, ImportError) as error:  # of the second kind are options it has no code for
        raise ValueError(
            f"gptqmodel has no kernel for {bits} bits in groups of {group_size} on {device}: {error}; leave backend "
            "out of the GPTQConfig, or choose another one"
        ) from error


def require_unpacked(name: str, kernel: nn.Module, bits: int, group_size: int) -> None:
    """Raise ValueError if the kernel has put its tensors into another layout than checkpoints', as fast ones do."""
    held = dict(kernel.named_buffers())
    inputs: Any = kernel.in_features
    outputs: Any = kernel.out_features
    expected = GPTQTensors(inputs, outputs, "bias" in held, bits, group_size, "meta").held()
    for key, tensor in expected.items():
        found = held.get(key)
        if found is None or found.shape != tensor.shape or (found.dtype != tensor.dtype and key != "scales"):
            raise ValueError(
                f"{name} cannot be saved: its kernel, {type(kernel).__name__}, has repacked its tensors; load the "
                "model without backend in its GPTQConfig to save it again, or copy the checkpoint"
            )


"""Rounding a linear by GPTQ: gptqmodel does it, our Grams say what with."""


import importlib
from typing import Any

import torch
from torch import Tensor, nn



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
    tensors = _packed(solver.module, (scale, zero, group_of_input), bits, group_size, settings)
    kernel = gptq_kernel(
        {key: tensor.to(linear.weight.device) for key, tensor in tensors.items()},
        (linear.out_features, linear.in_features),
        bits,
        group_size,
        {"desc_act": settings.desc_act, "sym": settings.sym, "backend": None},
    )
    return kernel, solver.module.weight.detach()


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
        ),
    )
    solver.quantizer.configure(bits=bits, sym=settings.sym, perchannel=True)
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
    """Rows `R` with `R^T R = H`: gptqmodel sums inputs up by itself, and these stand for all of them."""
    values, vectors = torch.linalg.eigh(gram.double())
    return (vectors * values.clamp_min(0).sqrt()).T.float().contiguous()


def _in_float32(linear: nn.Linear) -> nn.Linear:
    copy = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    copy.weight = nn.Parameter(linear.weight.detach().float().clone(), requires_grad=False)
    if linear.bias is not None:
        copy.bias = nn.Parameter(linear.bias.detach().float().clone(), requires_grad=False)
    return copy


"""GPTQ's encoding: 2, 3, 4 or 8 bits, a scale and a zero for every group of inputs; gptqmodel makes and runs it."""


import contextlib
import copy
import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPTQConfig


_GPTQ_BITS = (2, 3, 4, 8)
_GPTQ_NAME = re.compile(r"gptq([2348])_(?:g(\d+)|rows)")
_GPTQ_SHORT_NAME = re.compile(r"gptq([2348])(?:_g(\d+)|_rows)?")
_GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)
_WORD = 32
"""Inputs and outputs are packed 32 at a time."""

_gptq_log = logging.getLogger(__name__)


class GPTQ(Encoding):
    """Named `gptq4_g32`: 4 bits, groups of 32 inputs; `gptq4_rows`: one scale for all inputs of an output."""

    quant_method = "gptq"
    gauge = Gauge.ROTATED
    loss_is_measured = True
    uses_text = True
    needs_text = True
    merges_adapters = False

    def __init__(self, bits: int, group_size: int, settings: GPTQConfig | None = None) -> None:
        self.bits, self.group_size, self.settings = bits, group_size, settings
        self.name = f"gptq{bits}_rows" if group_size == -1 else f"gptq{bits}_g{group_size}"
        self.out_multiple = _WORD
        self.in_multiple = _WORD if group_size == -1 else math.lcm(_WORD, group_size)
        # Rounding to a grid whose ends are about 2.4 times the root mean square; GPTQ takes half of that error away.
        self.relative_error = 0.5 * (2.4 * 2 / (2**bits - 1)) ** 2 / 12
        self.dense_encodings = (self.name, "int8")
        if settings is not None:
            self.own_text, self.own_tokenizer = settings.dataset, settings.tokenizer
            self.one_input_at_a_time = bool(settings.true_sequential)

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
        others = (GPTQ(bits, self.group_size) for bits in _GPTQ_BITS if bits != self.bits)
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
        return f"{self.name}-damping{self._damping:g}"

    @property
    def _damping(self) -> float:
        return 0.1 if self.settings is None else float(self.settings.damp_percent)

    def quantization_loss(self, weight: Tensor, full_rank: int, metric: ErrorMetric) -> float:
        return metric.with_feedback(fake_quantize_groups(weight, self.bits, self.group_size) - weight, self._damping)

    def quantize(
        self, linear: nn.Linear, full_rank: int, dtype: torch.dtype, gram: Tensor | None = None
    ) -> tuple[nn.Module, Tensor]:
        """Round with GPTQ on the Gram of the linear's inputs."""
        if gram is None:
            raise ValueError("GPTQ needs the inputs of what it rounds: name calibration text with dataset=")
        return gptq_round(linear, gram, self.bits, self.group_size, self.settings)

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

    def before_saving(self, name: str, module: nn.Module, dtype: torch.dtype) -> None:
        require_unpacked(name, module, self.bits, self.group_size)

    def quiet(self) -> contextlib.AbstractContextManager:
        return quiet_gptqmodel()


def fake_quantize_groups(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Return the weight rounded to GPTQ's symmetric grid: `2^bits` steps between minus and plus a group's maximum."""
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    groups = nn.functional.pad(weight, (0, -columns % size)).view(rows, -1, size)
    step = groups.abs().amax(-1, keepdim=True) * 2 / (2**bits - 1)
    step = torch.where(step > 0, step, 1)
    half = 2 ** (bits - 1)
    return ((groups / step).round().clamp(-half, half - 1) * step).view(rows, -1)[:, :columns]


def _check_gptq(settings: GPTQConfig) -> None:
    if settings.group_size == -1 and settings.act_group_aware:
        raise ValueError(
            "GPTQConfig(group_size=-1) has no groups to order by activation, and gptqmodel refuses it: pass "
            "act_group_aware=False, too, or a group_size such as 32 or 64"
        )
    if settings.group_size != -1 and settings.group_size not in _GROUP_SIZES:
        raise ValueError(
            f"GPTQConfig(group_size={settings.group_size}) is none of gptqmodel's: take -1, "
            f"{', '.join(map(str, _GROUP_SIZES[:-1]))} or {_GROUP_SIZES[-1]}"
        )
    if settings.format not in ("gptq", GPTQ_IN_MEMORY):
        raise ValueError(f"GPTQConfig(format={settings.format!r}) cannot be stored here: take 'gptq'")
    if settings.block_name_to_quantize or settings.module_name_preceding_first_block:
        raise ValueError(
            "block_name_to_quantize and module_name_preceding_first_block say where a model has its blocks, which is "
            "found out here: leave them out"
        )
    refuse_layer_names("modules_in_block_to_quantize", settings.modules_in_block_to_quantize)


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


"""Dobi-SVD's remapped storage (Algorithm 3): a factor's first `min(m, n)` rows and columns in 8 bits, the rest in 16.

A rank-k matrix then takes `k max(m, n)` slots of 16 bits, and scales: one per row of each factor's 8-bit part, which
for `first` is Alg. 3's scale per rank. Which two values share a slot is nobody's business: they are stored as int8.
"""




class Remap(Int8):
    """8 bits where a factor is no longer than the matrix's short side, the model's dtype beyond."""

    name = "remap"
    gauge = Gauge.EQUAL_LEADING_COLUMNS
    needs_gauge = True
    dense_encodings: tuple[str, ...] = ()

    def part(self, out_features: int, in_features: int, full_rank: int) -> tuple[int, int]:
        return min(out_features, full_rank), min(in_features, full_rank)


"""The encodings there are. To add one is a file beside this one, and a line here."""


import functools
import json
from typing import Any


ENCODINGS: Registry[Any] = Registry("kind of encoding")
"""Classes derived from `Encoding`."""
ENCODINGS.register("float", Float)
ENCODINGS.register("int8", Int8)
ENCODINGS.register("remap", Remap)
ENCODINGS.register("gptq", GPTQ)
ENCODINGS.register("bitsandbytes", BitsAndBytes)

_NAMES = "float, int8, remap, gptq4_g32 (2, 3, 4, 8 bits, groups of any size), nf4, fp4, nf4_dq, fp4_dq, llm_int8"


def encoding_named(name: Any, settings: Any = None) -> Encoding:
    """Return the encoding of that name, as plans and config.json have it.

    Args:
        name: such as `int8`, `gptq4_g32`, `nf4`.
        settings: transformers' configuration that it is made with.

    Raises:
        ValueError: there is none; lists the names there are.
    """
    # A name may come straight from a hand-edited JSON file, so it need not be a string (nor hashable).
    if isinstance(name, str):
        found = _named(name) if settings is None else _make(name, settings)
        if found is not None:
            return found
    raise ValueError(f"unknown encoding {name!r}; known: {_NAMES}")


@functools.cache
def _named(name: str) -> Encoding | None:
    return _make(name, None)


def _make(name: str, settings: Any) -> Encoding | None:
    kinds = (ENCODINGS.get(kind) for kind in ENCODINGS)
    return next((found for kind in kinds if (found := kind.named(name, settings)) is not None), None)


def encoding_of(setting: Any, *, strict: bool = True) -> Encoding:
    """Return what a user's `quantization` means: a name, transformers' configuration, or one as a dictionary or JSON.

    Args:
        setting: None is `float`.
        strict: whether an option that a configuration does not know is an error.

    Raises:
        ValueError: it means none, or has options that cannot be stored; names the remedy.
    """
    if setting is None:
        return Float()
    if isinstance(setting, str) and setting.lstrip().startswith("{"):
        setting = _from_json(setting)
    for kind in ENCODINGS:
        found = ENCODINGS.get(kind).from_setting(setting, strict=strict)
        if found is not None:
            return found
    if isinstance(setting, str):
        raise ValueError(
            f"unknown quantization {setting!r}: int8, remap, gptq2, gptq3, gptq4 or gptq8 (gptq4_g32 for groups of "
            "32), nf4, fp4 (nf4_dq for double quantization), llm_int8, or a GPTQConfig or BitsAndBytesConfig as JSON"
        )
    method = with_method(setting) if isinstance(setting, dict) else getattr(setting, "quant_method", None)
    what = getattr(method, "value", method) or type(setting).__name__
    if what == QUANT_METHOD:
        raise ValueError(
            "quantization is a DobiSVDConfig, and low rank is what the outer one does: give a name such as 'int8', "
            "GPTQConfig(...) or BitsAndBytesConfig(...), or drop it"
        )
    raise ValueError(
        f"quantization is {what!r}, which factors cannot be stored in: give a name such as 'int8', a GPTQConfig or a "
        "BitsAndBytesConfig"
    )


def _from_json(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"quantization is no JSON ({error}): {text}") from error
    return dict(values)


"""The dense linears a model may have: `nn.Linear`, and transformers' `Conv1D` (GPT-2), which stores `W^T`.

Bundled with every checkpoint (see `checkpoint.bundle`).
"""


from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def is_dense_linear(module: nn.Module) -> bool:
    """Whether it is exactly `nn.Linear` or `Conv1D`: a subclass may compute something else."""
    return type(module) is nn.Linear or type(module) is Conv1D


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' `Conv1D`."""
    return type(module) is Conv1D


def weight_matrix(module: Any) -> Tensor:
    """Return the weight as `out_features x in_features`, a view."""
    return as_matrix(module, module.weight.detach())


def as_matrix(module: nn.Module, stored: Tensor) -> Tensor:
    """Return a tensor in the layout of a linear's weight (or its gradient) as `out_features x in_features`."""
    return stored.T if type(module) is Conv1D else stored


def dense_linear(weight: Tensor, bias: Tensor | None, conv1d: bool) -> nn.Module:
    """Return a dense linear of this matrix (`m x n`), and a copy of this bias."""
    if conv1d:
        new: Any = Conv1D(*weight.shape)  # always with a bias
        new.weight = nn.Parameter(weight.T.contiguous())
    else:
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        new.weight = nn.Parameter(weight)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone())
    return new


def require_finite(name: str, module: Any) -> None:
    """Raise ValueError, naming it, if a weight in memory has NaN or infinite values."""
    weight = weight_matrix(module)
    if weight.device.type != "meta" and not bool(torch.isfinite(weight).all()):
        raise ValueError(
            f"{name}.weight has NaN or infinite values; the checkpoint is damaged, or its dtype too small"
        )


"""What a structure is: how a matrix is written as linears, and all that follows from it.

A structure is the class of the module that takes a linear's place. Bundled with every checkpoint (see
`checkpoint.bundle`): nothing but torch and what is bundled, too.
"""


import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn



class CompressedLinear(nn.Module, ABC):
    """A linear `W` (`m x n`) stored in another form: a wrapper whose children are the linears it is written as.

    Until an encoding puts something else in their place, the children are exactly `nn.Linear`, because bitsandbytes,
    GPTQ and PEFT find their layers by that type.

    `conv1d` remembers that the dense layer was transformers' `Conv1D` (GPT-2, which stores `W^T`), to put it back so.

    `weight` is empty, and is saved under the dense weight's old name. A reader that does not know the format would
    build the dense model, find no weights, and fill them at random with a warning; with it, it finds a weight of the
    wrong size and stops. Modeling code can still ask it for dtype and device.
    """

    structure: ClassVar[str]
    """Its name in plans and config.json."""
    has_rank: ClassVar[bool] = True
    gauge_is_free: ClassVar[bool] = True
    """Whether equal pairs of factors can be told apart by a gauge."""
    bias_key: ClassVar[str]
    """The name of the bias among the parameters: `bias`, its own, or that of a child."""
    encoding: str
    """Of its children, or what they will be quantized to."""
    weight: Tensor
    rank: int | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | None,
        bias: bool = True,
        conv1d: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.conv1d, self.encoding = conv1d, "float"
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))
        for name, (outputs, inputs) in self.linears(out_features, in_features, rank).items():
            child_bias = bias and f"{name}.bias" == self.bias_key
            self.add_module(name, nn.Linear(inputs, outputs, bias=child_bias, device=device, dtype=dtype))
        for name, (shape, kind) in self.own_tensors(out_features, in_features, rank).items():
            self.register_buffer(name, torch.empty(shape, device=device, dtype=kind))
        if self.bias_key == "bias":
            # Not by register_parameter, which takes the property of that name for something else.
            values = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
            self._parameters[self.bias_key] = values

    # The structure, for shapes and tensors.

    @classmethod
    @abstractmethod
    def linears(cls, out_features: int, in_features: int, rank: int | None) -> dict[str, tuple[int, int]]:
        """Return outputs and inputs of its linears by name, in the order in which they compute."""

    @classmethod
    def own_tensors(
        cls, out_features: int, in_features: int, rank: int | None
    ) -> dict[str, tuple[list[int], torch.dtype]]:
        """Return shape and dtype of the tensors it needs beside its linears, indices for one, by name."""
        return {}

    @classmethod
    def own_bytes(cls, out_features: int, in_features: int, rank: int | None) -> int:
        """Return the bytes of `own_tensors`."""
        own = cls.own_tensors(out_features, in_features, rank).values()
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in own)

    @classmethod
    def problem_with(cls, name: str, tensor: Tensor) -> str | None:
        """Return what is wrong with the values of one of `own_tensors`, None if nothing is."""
        return None

    @classmethod
    @abstractmethod
    def written(cls, source: Factors | Tensor, gauge: Gauge, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the weights of its linears by name, of factors (`m x k`, `k x n`) or, without a rank, of the matrix.

        After them its own tensors. `gauge` says which pair of equal factors to write; scales are stored in `dtype`,
        the model's.
        """

    @classmethod
    def refitted(
        cls, linear: str, weights: Mapping[str, Tensor], before: Mapping[str, Tensor], gram: Tensor | None
    ) -> Tensor:
        """Return the weight of a linear that makes the best of how those before it were rounded.

        `weights` are what `written` gave, `before` what these linears compute with, `gram` `H` of the matrix's inputs.
        """
        return weights[linear]

    @classmethod
    @abstractmethod
    def input_gram(cls, linear: str, gram: Tensor, before: Mapping[str, Tensor]) -> Tensor:
        """Return `H` of the inputs of the linear of that name.

        `gram` is `H` (`n x n`) of the whole matrix's inputs; `before` has what the linears before it compute with.
        """

    @classmethod
    @abstractmethod
    def error_metrics(cls, weights: Mapping[str, Tensor], gram: InputGram, root: Tensor) -> dict[str, ErrorMetric]:
        """Return what errors of its linears' weights cost, by name; `weights` are what `written` gave.

        `gram` is `H` of the whole matrix's inputs; `root` is `R` (`m x m`), and the loss feels `R R^T` of its outputs.
        """

    @classmethod
    @abstractmethod
    def product(cls, matrices: Mapping[str, Tensor]) -> Tensor:
        """Return the `m x n` matrix that these matrices of its linears, and its own tensors, stand for."""

    # The module.

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, wherever it lies."""
        owner, _, key = self.bias_key.rpartition(".")
        found: nn.Parameter | None = getattr(self.get_submodule(owner), key, None) if owner else self._parameters[key]
        return found

    def put_own(self, tensors: Mapping[str, Tensor], bias: nn.Parameter | None) -> None:
        """Put its own tensors in their places, and the bias if that is its own."""
        for name in self.own_tensors(self.out_features, self.in_features, self.rank):
            self.register_buffer(name, tensors[name])
        if self.bias_key == "bias":
            self._parameters[self.bias_key] = bias

    def own(self) -> dict[str, Tensor]:
        """Return its own tensors by name (see `own_tensors`)."""
        names = self.own_tensors(self.out_features, self.in_features, self.rank)
        return {name: self.get_buffer(name) for name in names}

    def matrices(self) -> dict[str, Tensor]:
        """Return what its linears compute with by name, float32, and its own tensors."""
        return {name: matrix_of(child) for name, child in self.named_children()} | self.own()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return `(second, first)` of a matrix with a rank, `m x k` and `k x n`, float64."""
        raise TypeError(f"structure {self.structure!r} has no factors")

    def dense_matrix(self) -> Tensor:
        """Return the `m x n` matrix this stands for, in float32."""
        return self.product(self.matrices())

    def __format__(self, spec: str) -> str:
        # PEFT refuses a module with f"Target module {module} is not supported": the only place in its message where a
        # user can be told what to name instead. print(model), str and repr do not come here.
        refusal = getattr(next(self.children()), "adapter_refusal", None)
        targets = ", ".join(f"'q_proj.{name}'" for name, _ in self.named_children())
        remedy = refusal or f"a wrapper: name what is in it, as in target_modules=[{targets}], or 'all-linear'"
        return format(f"{self!r} ({remedy})", spec)

    def extra_repr(self) -> str:
        rank = "" if self.rank is None else f", rank={self.rank}"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}{rank}"
        return f"{sizes}, structure={self.structure}, encoding={self.encoding}"


def bare_linear(weight: Tensor, bias: Any = None) -> nn.Linear:
    """Return an `nn.Linear` of a weight in any dtype (`m x n`), and perhaps a bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
    return linear


def compressed_linears(model: nn.Module) -> dict[str, CompressedLinear]:
    """Return the compressed linears of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Return outputs and inputs of a compressed or dense linear."""
    if isinstance(module, CompressedLinear):
        return module.out_features, module.in_features
    rows, columns = weight_matrix(module).shape
    return rows, columns


def restore_tensors(compressed: Mapping[str, CompressedLinear], encodings: Mapping[str, Encoding]) -> None:
    """Bring tensors into the state that checkpoints have them in. ValueError names a linear that cannot be."""
    for name, module in compressed.items():
        for child, linear in module.named_children():
            encodings[module.encoding].before_saving(f"{name}.{child}", linear, module.weight.dtype)


def is_compressed(model: nn.Module) -> bool:
    """Whether any linear of the model has been replaced."""
    return any(isinstance(module, CompressedLinear) for module in model.modules())


def to_dense(module: CompressedLinear) -> nn.Module:
    """Return the dense layer of the same function: the matrix is formed in float32 and rounded once."""
    dense = dense_linear(module.dense_matrix().to(module.weight.dtype), module.bias, module.conv1d)
    return dense.train(module.training)


"""The whole matrix, for an encoding to store in fewer bits."""


from collections.abc import Mapping

import torch
from torch import Tensor, nn



class DenseLinear(CompressedLinear):
    """`y = linear(x)`.

    A wrapper of ours around it, because a checkpoint whose matrices were all quantized in place would be taken for a
    dense one by a reader that knows neither format.
    """

    structure = "dense"
    has_rank = False
    bias_key = "linear.bias"
    rank: None
    linear: nn.Module

    @classmethod
    def linears(cls, out_features: int, in_features: int, rank: int | None) -> dict[str, tuple[int, int]]:
        return {"linear": (out_features, in_features)}

    @classmethod
    def written(cls, source: Factors | Tensor, gauge: Gauge, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"linear": source.product() if isinstance(source, Factors) else source}

    @classmethod
    def input_gram(cls, linear: str, gram: Tensor, before: Mapping[str, Tensor]) -> Tensor:
        return gram

    @classmethod
    def error_metrics(cls, weights: Mapping[str, Tensor], gram: InputGram, root: Tensor) -> dict[str, ErrorMetric]:
        return {"linear": ErrorMetric(gram, root.square().sum(1))}

    @classmethod
    def product(cls, matrices: Mapping[str, Tensor]) -> Tensor:
        return matrices["linear"]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


"""Two thin linears: `W' = A B`."""


from collections.abc import Mapping

import torch
from torch import Tensor, nn



class LowRankLinear(CompressedLinear):
    """`y = second(first(x))`: `first` (`k x n`) maps inputs to ranks, `second` (`m x k`, bias) to outputs."""

    structure = "low_rank"
    bias_key = "second.bias"
    rank: int
    first: nn.Module
    second: nn.Module

    @classmethod
    def linears(cls, out_features: int, in_features: int, rank: int | None) -> dict[str, tuple[int, int]]:
        if rank is None:
            raise ValueError("structure 'low_rank' needs a rank")
        return {"first": (rank, in_features), "second": (out_features, rank)}

    @classmethod
    def written(cls, source: Factors | Tensor, gauge: Gauge, dtype: torch.dtype) -> dict[str, Tensor]:
        if isinstance(source, Tensor):
            raise TypeError("structure 'low_rank' is written from factors")
        factors = source.in_gauge(gauge, dtype)
        return {"first": factors.first, "second": factors.second}

    @classmethod
    def input_gram(cls, linear: str, gram: Tensor, before: Mapping[str, Tensor]) -> Tensor:
        if linear == "first":
            return gram
        first = before["first"].to(gram)
        return first @ gram @ first.T

    @classmethod
    def error_metrics(cls, weights: Mapping[str, Tensor], gram: InputGram, root: Tensor) -> dict[str, ErrorMetric]:
        inner = InputGram(cls.input_gram("second", gram.matrix, weights))
        return {
            "first": ErrorMetric(gram, (root.T @ weights["second"]).square().sum(0)),
            "second": ErrorMetric(inner, root.square().sum(1)),
        }

    @classmethod
    def product(cls, matrices: Mapping[str, Tensor]) -> Tensor:
        return matrices["second"] @ matrices["first"]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def factors(self) -> tuple[Tensor, Tensor]:
        matrices = self.matrices()
        return matrices["second"].double(), matrices["first"].double()


"""Rows of a matrix in terms of some of them: the interpolative decomposition, by LU and swaps of rows (maxvol)."""


import torch
from torch import Tensor

_LARGEST_COEFFICIENT = 1.01
"""The magnitude above which a coefficient makes its two rows change places."""
_MOST_SWAPS = 10
"""As multiples of the number of pivots."""


def interpolate(matrix: Tensor, largest: float = _LARGEST_COEFFICIENT) -> tuple[Tensor, Tensor]:
    """Write the rows of `A` (`m x k`, `k <= m`) in terms of `k` of them: `A[rest] = C A[pivots]`, exactly.

    Pivots are those of an LU decomposition; then rows change places while a coefficient exceeds `largest`, each of
    which grows the volume of the pivot rows (maxvol, Goreinov et al. 2010). Without, coefficients reach hundreds, and
    an error in a pivot row is felt in all others as many times over. Works on singular `A`, too.

    Returns:
        The numbers of all rows: the pivots, ascending, and then the others, ascending (int64, `m`); and `C` (`m - k x
        k`, float64), whose rows and columns are in that order.
    """
    rows, count = matrix.shape
    order, coefficients = _by_elimination(matrix.double())
    for _ in range(_MOST_SWAPS * count if rows > count else 0):
        place = int(coefficients.abs().argmax())
        row, column = divmod(place, count)
        value = coefficients[row, column].clone()
        if float(value.abs()) <= largest:
            break
        # The row becomes a pivot, and the pivot a row, in terms of it.
        step = coefficients[row].clone()
        step[column] -= 1
        falls = coefficients[:, column].clone()
        falls[row] += 1
        coefficients.addr_(falls, step / value, alpha=-1)
        order[[column, count + row]] = order[[count + row, column]]
    pivots, rest = order[:count].argsort(), order[count:].argsort()
    return torch.cat([order[:count][pivots], order[count:][rest]]), coefficients[rest][:, pivots].contiguous()


def _by_elimination(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """As `interpolate`, with the pivots of partial pivoting, in their order."""
    rows, count = matrix.shape
    packed, swaps, _ = torch.linalg.lu_factor_ex(matrix)
    order = list(range(rows))
    for place, other in enumerate((swaps - 1).tolist()):
        order[place], order[other] = order[other], order[place]
    lower = packed.tril(-1)
    # L is unit lower triangular even where U is singular.
    coefficients = torch.linalg.solve_triangular(lower[:count].T, lower[count:].T, upper=True, unitriangular=True).T
    return torch.tensor(order, device=matrix.device), coefficients.contiguous()


"""Rows of the matrix itself, and the other rows in terms of them: `W'[rest] = C W'[pivots]`."""


from collections.abc import Mapping

import torch
from torch import Tensor, nn


PERMUTATION = "permutation"
_IN_A_BYTE = 256
_REFIT_DAMPING = 1e-4
"""Added to the diagonal of the Gram of the pivot rows' outputs, as a share of its mean."""


class PivotedLinear(CompressedLinear):
    """`u = first(x)`, `v = second(u)`, and `y` has `u` and `v` at the places that `permutation` names.

    `first` (`k x n`) are `k` rows of the matrix, `second` (`m - k x k`) the other rows in terms of them (PIFA, arXiv
    2501.19090). That spends no numbers on the `k x k` gauge that two factors leave open, so it is smaller than the
    matrix at every rank below `min(m, n)`.

    `permutation[j]` is the output that row `j` of the two stacked linears gives. The bias is its own, of `m` values:
    in `first` it would reach all outputs.
    """

    structure = "pivoted"
    gauge_is_free = False
    bias_key = "bias"
    rank: int
    first: nn.Module
    second: nn.Module
    permutation: Tensor

    @classmethod
    def linears(cls, out_features: int, in_features: int, rank: int | None) -> dict[str, tuple[int, int]]:
        if rank is None:
            raise ValueError("structure 'pivoted' needs a rank")
        return {"first": (rank, in_features), "second": (out_features - rank, rank)}

    @classmethod
    def own_tensors(
        cls, out_features: int, in_features: int, rank: int | None
    ) -> dict[str, tuple[list[int], torch.dtype]]:
        # Not int16: DistributedDataParallel broadcasts buffers, and neither gloo nor NCCL knows that type.
        return {PERMUTATION: ([out_features], torch.uint8 if out_features <= _IN_A_BYTE else torch.int32)}

    @classmethod
    def problem_with(cls, name: str, tensor: Tensor) -> str | None:
        if bool((tensor.long().sort().values == torch.arange(len(tensor))).all()):
            return None
        return f"is no permutation of the numbers from 0 to {len(tensor) - 1}"

    @classmethod
    def written(cls, source: Factors | Tensor, gauge: Gauge, dtype: torch.dtype) -> dict[str, Tensor]:
        if isinstance(source, Tensor):
            raise TypeError("structure 'pivoted' is written from factors")
        factors = source.balanced()
        rank = len(factors.first)
        order, coefficients = interpolate(factors.second)
        pivots = factors.second[order[:rank]].double() @ factors.first.double()
        tensors = cls.own_tensors(len(factors.second), factors.first.shape[1], rank)
        return {"first": pivots, "second": coefficients, PERMUTATION: order.to(tensors[PERMUTATION][1])}

    @classmethod
    def refitted(
        cls, linear: str, weights: Mapping[str, Tensor], before: Mapping[str, Tensor], gram: Tensor | None
    ) -> Tensor:
        """Fit the other rows to the rounded pivot rows `P'`: `C + C (P - P') H P'^T S^-1` with `S = P' H P'^T`."""
        weight = weights[linear]
        if linear == "first" or gram is None or not len(weight):
            return weight
        rounded, exact, felt = before["first"].double(), weights["first"].double(), gram.double()
        inputs = rounded @ felt @ rounded.T
        inputs.diagonal().add_(_REFIT_DAMPING * inputs.diagonal().mean().clamp_min(1e-300))
        moved = torch.linalg.solve(inputs, rounded @ felt @ (exact - rounded).T).T
        return weight + weight.double() @ moved

    @classmethod
    def input_gram(cls, linear: str, gram: Tensor, before: Mapping[str, Tensor]) -> Tensor:
        if linear == "first":
            return gram
        first = before["first"].to(gram)
        return first @ gram @ first.T

    @classmethod
    def error_metrics(cls, weights: Mapping[str, Tensor], gram: InputGram, root: Tensor) -> dict[str, ErrorMetric]:
        inner = InputGram(cls.input_gram("second", gram.matrix, weights))
        outer = cls._outer(weights)
        rest = weights[PERMUTATION].long()[outer.shape[1] :]
        return {
            "first": ErrorMetric(gram, (root.T @ outer).square().sum(0)),
            "second": ErrorMetric(inner, root[rest].square().sum(1)),
        }

    @classmethod
    def product(cls, matrices: Mapping[str, Tensor]) -> Tensor:
        return cls._outer(matrices) @ matrices["first"]

    @classmethod
    def _outer(cls, matrices: Mapping[str, Tensor]) -> Tensor:
        """Return the factor that takes the pivot rows to all rows, `m x k`."""
        second = matrices["second"]
        stacked = torch.cat([torch.eye(second.shape[1]).to(second), second])
        outer = torch.empty_like(stacked)
        outer[matrices[PERMUTATION].long()] = stacked
        return outer

    def forward(self, x: Tensor) -> Tensor:
        pivots = self.first(x)
        rest = self.second(pivots)
        places = self.permutation.long()
        y = pivots.new_empty(*pivots.shape[:-1], self.out_features)
        y.index_copy_(-1, places[: self.rank], pivots)
        y.index_copy_(-1, places[self.rank :], rest.to(y.dtype))
        # As nn.Linear does under autocast: a bias in float32 would make the output float32.
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        matrices = self.matrices()
        return self._outer(matrices).double(), matrices["first"].double()


"""The structures there are. To add one is a file beside this one, and a line here."""


import difflib


STRUCTURES: Registry[type[CompressedLinear]] = Registry("structure")
for _structure in (DenseLinear, LowRankLinear, PivotedLinear):
    STRUCTURES.register(_structure.structure, _structure)

AUTO = "auto"
"""What lets every matrix take whichever structure loses least at its bytes."""


def structures_for(name: str) -> tuple[type[CompressedLinear], ...]:
    """Return the structures that a setting allows; of `auto`, all that have a rank. ValueError lists the names."""
    if name == AUTO:
        return tuple(each for known in STRUCTURES if (each := STRUCTURES.get(known)).has_rank)
    if name not in STRUCTURES:
        near = difflib.get_close_matches(str(name), [AUTO, *STRUCTURES], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown structure {name!r}; {hint}known: {', '.join([AUTO, *STRUCTURES])}")
    return (STRUCTURES.get(name),)


"""A structure with an encoding of its linears: what a matrix weighs and computes, and the module it becomes."""


import bisect
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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
        """Return what rounding its linears costs in the metric of `structure.error_metrics`."""
        weights = self.structure.written(source, self.encoding.gauge, torch.float32)
        metrics = self.structure.error_metrics(weights, gram, root)
        full = min(len(root), len(gram.matrix))
        found = {
            name: self.encoding.quantization_loss(weights[name], full, metrics[name])
            for name in metrics
            if weights[name].numel()
        }
        return sum(found.values())

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
    ) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
        """Quantize the weights of its linears (`structure.written`, any float dtype) in the order they compute in.

        Args:
            weights: of its linears, and its own tensors.
            bias: for the child that has it.
            dtype: the model's.
            full_rank: `min(m, n)`.
            gram: `H` of the matrix's inputs, for a structure that refits what is still to be rounded, and an encoding
                that uses text.

        Returns:
            Its children, and the matrices that they stand for, with its own tensors (see `structure.product`).
        """
        names = list(self.structure.linears(1, 1, 1))
        children: dict[str, nn.Module] = {}
        matrices = {name: tensor for name, tensor in weights.items() if name not in names}
        for name in names:
            weight = self.structure.refitted(name, weights, matrices, gram)
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


"""Checks of a compressed checkpoint's files against the modules they are for, from the headers alone."""


import difflib
import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key



def module_names_in(model: Any, names: list[str]) -> dict[str, str]:
    """Map module names of config.json to names in this model.

    They are the same, unless a headless model (`AutoModel`) reads a checkpoint of one with a head, or the reverse;
    then the base model's prefix comes off or on. ValueError names a module that is nowhere.
    """
    present = dict(model.named_modules())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    mapped = {}
    for name in names:
        candidates = (name, name.removeprefix(prefix), prefix + name)
        found = next((candidate for candidate in candidates if candidate in present), None)
        if found is None:
            near = difflib.get_close_matches(name, present, n=1)
            hint = f" (nearest: {near[0]})" if near else ""
            raise ValueError(
                f"config.json lists a compressed module {name}, which {type(model).__name__} does not have{hint}: the "
                "checkpoint belongs to another architecture, or its config.json was edited"
            )
        mapped[name] = found
    return mapped


def check_tensors(model: Any, files: list[str], encodings: Mapping[str, Encoding]) -> None:
    """Check that every tensor of every compressed linear is in the files, and none is there without a module.

    Shapes and dtypes are read from the headers. Scales of integers are read, and must be above
    zero and finite; indices are read, too.

    Raises:
        ValueError: names the tensor, what is wrong with it, and the remedy. No weight has been allocated by then.
    """
    if any(not str(file).endswith(".safetensors") for file in files):
        raise ValueError(f"a dobi_svd checkpoint is stored in safetensors, found {files[0]}")
    compressed = compressed_linears(model)
    expected: dict[str, tuple[list[int], str | None]] = {}
    read: dict[str, Callable[[Tensor], str | None]] = {}
    for name, module in compressed.items():
        format = Format(type(module), encodings[module.encoding])
        tensors = format.tensors(*matrix_shape(module), module.rank, bias=module.bias is not None)
        expected |= {f"{name}.{key}": header for key, header in tensors.items()}
        read |= {
            f"{name}.{key}": _problem_with_scale for key in tensors if key.rpartition(".")[2] in format.encoding.scales
        }
        own = module.own_tensors(*matrix_shape(module), module.rank)
        read |= {f"{name}.{key}": functools.partial(module.problem_with, key) for key in own}
    found = _headers_by_model_name(model, files, expected, read)
    for tensor, (shape, dtype) in expected.items():
        _check_tensor(tensor, shape, dtype, found.get(tensor))
    for tensor, (shape, _) in found.items():
        owner, _, key = tensor.rpartition(".")
        if owner in compressed and key == "weight" and 0 not in shape:
            raise ValueError(
                f"the checkpoint holds a dense {tensor} beside its factors: files of two models were mixed"
            )
        _check_is_listed(model, tensor, expected, encodings)
    _check_nothing_else_is_missing(model, {tensor: shape for tensor, (shape, _) in found.items()})


def _check_tensor(tensor: str, shape: list[int], dtype: str | None, found: tuple[list[int], str] | None) -> None:
    """It is there, of that shape, and of that dtype if one is given (loading casts floats; integers it must not)."""
    if found is None:
        raise ValueError(f"the checkpoint lacks {tensor}, which config.json promises: it is incomplete, copy it again")
    if found[0] != shape:
        raise ValueError(
            f"{tensor} has shape {found[0]} in the checkpoint and {shape} by config.json: one of the "
            "two belongs to another compression; copy both from the same one"
        )
    if dtype is not None and found[1] != dtype:
        raise ValueError(
            f"{tensor} is stored as {found[1]} and must be {dtype}: another program has rewritten the checkpoint; "
            "copy the original again"
        )


def _check_is_listed(model: Any, tensor: str, expected: Collection[str], encodings: Mapping[str, Encoding]) -> None:
    """Refuse a tensor inside a linear that is not compressed, or not so."""
    if tensor in expected:
        return
    parts = tensor.split(".")
    module = model
    for end in range(1, len(parts)):  # a wrapper before the linears in it: it is what config.json lists
        owner, inside = ".".join(parts[:end]), parts[end:]
        module = getattr(module, parts[end - 1], None)
        if not isinstance(module, torch.nn.Module):
            return
        if isinstance(module, CompressedLinear):
            more = encodings[module.encoding].has_more_tensors and inside[0] in dict(module.named_children())
            strange = inside != ["weight"] and not more
        else:
            strange = is_dense_linear(module) and inside not in (["weight"], ["bias"])
        if strange:
            raise ValueError(
                f"the checkpoint holds {tensor}, but config.json does not list {owner} as compressed that way"
            )


def _check_nothing_else_is_missing(model: Any, shapes: dict[str, list[int]]) -> None:
    """Other weights must be there, too. Only a head may be untrained, where another class was saved than is loaded."""
    other_class = type(model).__name__ not in (model.config.architectures or ())
    head = [] if getattr(model, model.base_model_prefix, model) is model else [model.base_model_prefix + "."]
    optional = [*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())]
    for name in model.state_dict():
        may_be_new = other_class and head and not name.startswith(head[0])
        known = name in shapes or name in model.all_tied_weights_keys or may_be_new
        if not known and not any(re.search(pattern, name) for pattern in optional):
            raise ValueError(f"the checkpoint lacks {name}: it is incomplete, copy it again")


def _problem_with_scale(scale: Tensor) -> str | None:
    if bool((torch.isfinite(scale) & (scale > 0)).all()):
        return None
    return "holds a scale that is zero, negative or not finite"


def _headers_by_model_name(
    model: Any,
    files: list[str],
    expected: Mapping[str, tuple[list[int], str | None]],
    read: Mapping[str, Callable[[Tensor], str | None]],
) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of all tensors in the files, under the names transformers will load them to.

    Those in `read` are read, too, if they are as `expected`: their function says what is wrong with the values.
    ValueError if anything is.
    """
    # Private, all of it, but only transformers knows how this architecture's keys are renamed on load.
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    present = model.state_dict()
    found: dict[str, tuple[list[int], str]] = {}
    for file in files:
        # Older releases of transformers call this under torch.device("meta"); these are read for their values.
        with torch.device("cpu"), safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 - not a dict
                name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, present)
                header = handle.get_slice(key)
                found[name] = (header.get_shape(), header.get_dtype())
                if name not in read:
                    continue
                # First: what is wrong with the values of a tensor of another size says nothing of the size.
                _check_tensor(name, *expected[name], found[name])
                problem = read[name](handle.get_tensor(key))
                if problem is not None:
                    raise ValueError(
                        f"{name} in {file} {problem}: the checkpoint is damaged; copy it again, or compress again"
                    )
    return found


"""The half of the quantizer that loads compressed checkpoints. Bundled with every checkpoint (see `bundle`)."""


import contextlib
from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer


BUNDLED_ENTRY = "DobiSVD"
"""What the classes in the bundled file are called that `auto_map` names, followed by the auto class."""


def forget_bundled_loader(model: Any) -> None:
    """Take the bundled loader out of `auto_map`: a dense model is saved without it."""
    auto_map = getattr(model.config, "auto_map", None) or {}
    kept = {key: value for key, value in auto_map.items() if f".{BUNDLED_ENTRY}Auto" not in str(value)}
    if kept:
        model.config.auto_map = kept
    elif auto_map:
        del model.config.auto_map


def adapted_modules(model: Any) -> list[str]:
    """Return the names of the modules that PEFT has wrapped."""
    return [
        name
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") or hasattr(module, "original_module")
    ]


class CompressedLoader(HfQuantizer):
    """Builds the modules on meta from `modules` of config.json, and checks the files' headers before reading.

    What another library has quantized, that library's own reader loads: where an encoding names a quantizer of
    transformers, this hands on to it.
    """

    converts_at_load = False
    """Whether this loader quantizes what was saved without; the one bundled with checkpoints cannot."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        setting = getattr(quantization_config, "quantization", None)
        self.encoding = encoding_of(setting, strict=False)
        entries = ((getattr(quantization_config, "modules", None) or {}) if self.pre_quantized else {}).values()
        # Only the one whose settings are given can be made with them.
        kinds = self._kinds = {self.encoding.name, *self.encoding.alternatives}
        self.encodings: dict[str, Encoding] = {}
        for entry in entries:
            name = entry["encoding"]
            self.encodings[name] = encoding_named(name, self.encoding.settings if name in kinds else None)
            if name not in kinds and self.encodings[name].quant_method != quantization_config.quant_method:
                raise ValueError(
                    f"config.json lists matrices in encoding {name}, and its 'quantization' does not say how they "
                    "were quantized: copy config.json again"
                )
        readers = (encoding.hf_quantizer() for encoding in self.encodings.values())
        self._reader: Any = next((reader for reader in readers if reader is not None), None)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        for encoding in self.encodings.values():
            encoding.require()
            encoding.check_device_map(kwargs.get("device_map"))
        if self._reader is not None:
            self._reader.validate_environment(*args, **kwargs)

    def update_device_map(self, device_map: Any) -> Any:
        return device_map if self._reader is None else self._reader.update_device_map(device_map)

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, int | str]:
        return max_memory if self._reader is None else self._reader.adjust_max_memory(max_memory)

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        if self._reader is not None:
            return self._reader.param_element_size(model, param_name, param)
        return super().param_element_size(model, param_name, param)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        # Asked while loading, too: packed weights need not have the shape of their parameters on meta.
        return self._reader is not None and bool(self._reader.param_needs_quantization(model, param_name, **kwargs))

    def get_weight_conversions(self) -> list:
        return super().get_weight_conversions() if self._reader is None else self._reader.get_weight_conversions()

    def update_weight_conversions(self, weight_conversions: list, *model: Any) -> list:
        # transformers 5.8 to 5.17 call it without the model, 5.23 with; 5.0 to 5.4 ask get_weight_conversions alone.
        if self._reader is not None:
            return self._reader.update_weight_conversions(weight_conversions, *model)
        return super().update_weight_conversions(weight_conversions, *model)

    @property
    def is_to_be_converted(self) -> bool:
        """Whether the linears are to be quantized once they are loaded."""
        return not self.encoding.trainable and not self._kinds & self.encodings.keys()

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        if self.is_to_be_converted and not self.converts_at_load:
            raise ValueError(
                "the quantization config asks for the quantization of a checkpoint that was saved without, which "
                "needs the package: pip install optimum-dobisvd"
            )
        modules = self.quantization_config.modules  # type: ignore[attr-defined]
        names = module_names_in(model, list(modules))
        for listed, name in names.items():
            dense = model.get_submodule(name)
            if not is_dense_linear(dense):
                raise ValueError(
                    f"config.json lists {listed} as compressed, and in {type(model).__name__} it is a "
                    f"{type(dense).__name__}: the checkpoint belongs to another architecture"
                )
            entry = modules[listed]
            format = Format(STRUCTURES.get(entry["structure"]), self.encodings[entry["encoding"]])
            model.set_submodule(name, empty_compressed(listed, dense, format, entry.get("rank")))
        if checkpoint_files:
            check_tensors(model, checkpoint_files, self.encodings)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for encoding in self.encodings.values():
                stack.enter_context(encoding.quiet())
            for name, module in compressed_linears(model).items():
                for child, linear in list(module.named_children()):
                    loaded = self.encodings[module.encoding].loaded(f"{name}.{child}", linear)
                    if loaded is not linear:
                        module.set_submodule(child, loaded)
        for encoding in self.encodings.values():
            encoding.loaded_model(model)
        if self._kinds & self.encodings.keys():
            self.quantization_config.quantization = self.encoding.as_applied()  # type: ignore[attr-defined]
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        compressed = compressed_linears(model)
        for name, module in compressed.items():
            if adapted_modules(module):
                raise ValueError(
                    f"{name} has adapters (PEFT), which would be lost: merge them (merge_and_unload) or take them off "
                    "(unload), then dequantize"
                )
            if any(parameter.device.type == "meta" for parameter in module.parameters()):
                raise ValueError(f"{name} is offloaded; load the model without cpu or disk offload to dequantize it")
        for name, module in compressed.items():
            model.set_submodule(name, to_dense(module))
        for encoding in self.encodings.values():
            encoding.forget(model)
        model.__dict__.pop("quantization_method", None)
        forget_bundled_loader(model)
        if isinstance(dtype, str):  # config.dtype, which save_pretrained leaves as a name
            dtype = getattr(torch, dtype)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return all(encoding.trainable for encoding in self.encodings.values())

    @property
    def is_compileable(self) -> bool:
        return True


def empty_compressed(name: str, dense: Any, format: Format, rank: int | None) -> CompressedLinear:
    """Return a compressed linear on meta in the place of a dense one. ValueError if it cannot have that rank so."""
    out_features, in_features = weight_matrix(dense).shape
    if rank is not None and rank > min(out_features, in_features):
        raise ValueError(
            f"{name}: rank {rank} in config.json is above its largest possible rank {min(out_features, in_features)}"
        )
    reason = format.unsupported_reason(out_features, in_features, rank)
    if reason is not None:
        raise ValueError(f"{name}: config.json cannot be right, {reason}; copy it again")
    return format.empty(dense, rank)


"""What `auto_map` in config.json names: the loader for machines without this package (`trust_remote_code=True`).

Never imported by the package itself; `bundle.modeling_source` bundles it with every checkpoint.
"""


import dataclasses
from typing import Any

import transformers
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin


SUPPORTED_FORMAT = 2


@dataclasses.dataclass
class CheckpointConfig(QuantizationConfigMixin):
    """The quantization_config of config.json as it stands; only a few of its keys are read."""

    quant_method: Any = "dobi_svd"

    def __init__(self, **values: Any) -> None:
        self.__dict__.update({"quant_method": "dobi_svd", **values})
        version = values.get("format_version", SUPPORTED_FORMAT)
        if version != SUPPORTED_FORMAT:
            newer = isinstance(version, int) and version > SUPPORTED_FORMAT
            remedy = "pip install -U optimum-dobisvd" if newer else "compress the model again"
            raise ValueError(
                f"config.json says dobi_svd format {version!r}, and the loader beside it reads format "
                f"{SUPPORTED_FORMAT} alone: copy all files from one checkpoint, or {remedy}"
            )


class _Entry:
    """Registers the loader, then hands over to the architecture's own class."""

    auto_class: Any = None

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Called by some versions of transformers, with what is known here already."""

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        """`from_pretrained` of that auto class, this time with transformers' own model class."""
        known = AUTO_QUANTIZER_MAPPING.get("dobi_svd")
        # The package's own reads all checkpoints. One of another checkpoint may be older than what this one holds.
        if known is None or known.__name__ == CompressedLoader.__name__:
            AUTO_QUANTIZATION_CONFIG_MAPPING["dobi_svd"] = CheckpointConfig
            AUTO_QUANTIZER_MAPPING["dobi_svd"] = CompressedLoader
        kwargs["trust_remote_code"] = False
        return cls.auto_class.from_pretrained(name, *args, **kwargs)


def __getattr__(name: str) -> Any:
    """`DobiSVDAutoModelForCausalLM` and so on: one entry for every auto class, made when transformers asks for it.

    One for each, because no version of transformers tells an entry reliably which auto class the user called.
    """
    auto_class = getattr(transformers, name.removeprefix("DobiSVD"), None) if name.startswith("DobiSVDAuto") else None
    if auto_class is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return type(name, (_Entry,), {"auto_class": auto_class, "__module__": __name__})
