"""What a structure is: how a matrix is written as linears, and all that follows from it.

A structure is the class of the module that takes a linear's place. Bundled with every checkpoint (see
`checkpoint.bundle`): nothing but torch and what is bundled, too.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..encodings.base import Encoding, matrix_of
from ..encodings.input_gram import InputGram, OutputErrors
from ..factorization.factors import Factors, Gauge
from ..model.linears import dense_linear, weight_matrix

_AIM_DAMPING = 0.01
"""Added to the diagonal of the Gram that is solved with, as a share of its mean."""
RoundingErrors = Callable[[Tensor, InputGram, Tensor | None], OutputErrors]
"""`Encoding.rounding_errors` of weight, Gram of its inputs, and rows or None."""
QuantizationLoss = Callable[[RoundingErrors], float]
"""The loss in nats per token by what an encoding's rounding errors are."""


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
    outputs_in_order: ClassVar[bool] = True
    """Whether rows of its last linear are the outputs as they come, so that some of them alone give some outputs."""
    bias_key: ClassVar[str]
    """The name of the bias among the parameters: `bias`, its own, or that of a child."""
    encoding: str
    """Of its children, or what they will be quantized to."""
    weight: Tensor
    rank: int | None
    sources: Tensor | None
    """For every output the row of `parts` that gives it, int64; None where that is its own number, and in training."""

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
        self.register_buffer("sources", None, persistent=False)
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
    def input_gram(cls, linear: str, gram: Tensor, before: Mapping[str, Tensor]) -> Tensor:
        """Return `H` of the inputs of the linear of that name, where each one reads what the one before it gives.

        `gram` is `H` (`n x n`) of the whole matrix's inputs; `before` has what the linears before it compute with.
        """
        for name in itertools.takewhile(lambda name: name != linear, cls.linears(1, 1, 1)):
            matrix = before[name].to(gram)
            gram = matrix @ gram @ matrix.T
        return gram

    @classmethod
    def aimed(
        cls, linear: str, weights: Mapping[str, Tensor], before: Mapping[str, Tensor], inputs: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return the weight of a linear whose outputs are nearest to what it gives unrounded in the dense model.

        With `X_d` what the linear would read there, behind unrounded linears, and `X` what it reads here, behind
        rounded ones, `W + W (X_d X^T - X X^T) (X X^T + damping)^-1` minimizes `||W X_d - Q X||` over `Q`, but for the
        damping, which keeps it near `W`. So it makes up for what the linears before it lost by rounding, too.

        Args:
            linear, weights, before: as for `refitted`.
            inputs: `H`, and `X_d X^T` of the matrix's inputs.
        """
        gram, crossed = (each.double() for each in inputs)
        for name in itertools.takewhile(lambda name: name != linear, cls.linears(1, 1, 1)):
            exact, rounded = weights[name].to(crossed), before[name].to(crossed)
            gram, crossed = rounded @ gram @ rounded.T, exact @ crossed @ rounded.T
        weight = weights[linear].to(gram)
        if not weight.numel():
            return weights[linear]
        damped = gram.clone()
        damped.diagonal().add_(_AIM_DAMPING * damped.diagonal().mean().clamp_min(1e-300))
        return weight + torch.linalg.solve(damped, (crossed - gram).T @ weight.T).T

    @classmethod
    @abstractmethod
    def quantization_loss(cls, weights: Mapping[str, Tensor], gram: InputGram, root: Tensor) -> QuantizationLoss:
        """Return what tells from an encoding's rounding errors what these cost the loss, without rounding anything.

        Errors of different outputs of a linear are taken as independent.

        Args:
            weights: what `written` gave.
            gram: `H` of the whole matrix's inputs.
            root: `R` (`m x m`): of the matrix's outputs the loss feels `R R^T`.
        """

    @classmethod
    @abstractmethod
    def product(cls, matrices: Mapping[str, Tensor]) -> Tensor:
        """Return the `m x n` matrix that these matrices of its linears, and its own tensors, stand for."""

    # The module.

    def parts(self, x: Tensor) -> list[Tensor]:
        """Return the outputs without the bias, piece by piece as its linears give them.

        One after the other they are the rows that `sources` numbers, or the outputs themselves where that is None.
        """
        return [self(x)]

    def set_inference(self, on: bool) -> None:
        """Keep what makes products faster and is not saved, or drop it again."""

    def output_places(self, linear: str) -> Tensor | None:
        """Return where inputs and outputs of a linear go among the matrix's outputs; None where they do not.

        Those are then what the matrix gives: `placed` of whatever stands in the linear's place may store them so.
        """
        return None

    @property
    def input_linear(self) -> str:
        """The name of the linear that reads the input."""
        return next(iter(self.linears(self.out_features, self.in_features, self.rank)))

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
