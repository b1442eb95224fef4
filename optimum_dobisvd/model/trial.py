"""One pass of a tiny window through a model without its weights: what it calls, and which weights its code reads.

Parameters and buffers are zeros of their shapes that take no memory, and linears give zeros without a product. So the
pass costs next to nothing at any size, runs before a weight is loaded, and comes out the same before and after.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .linears import is_conv1d, is_linear
from .states import evaluating, replaced_forward

logger = logging.getLogger(__name__)

_TOKENS = 4
_NO_TEXT = ("pixel", "image", "video", "audio", "speech", "input_features", "input_values")
_ABOUT = ("_mask", "_ids", "_sizes", "_size", "_thw", "_lengths", "_embeds")
# Functions that take of a tensor its shape, dtype or device, and none of its values.
_OF_FORM = ("type_as", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")


@dataclass(frozen=True)
class Trial:
    """What one pass did.

    `calls`: every module that was called, in the order of first calls. `read`: linears by full name whose weight went
    into a function outside their own forward.
    """

    calls: dict[nn.Module, int]
    read: frozenset[str]

    def reaches(self, module: nn.Module) -> bool:
        """Return whether the module, or one in it, was called."""
        return any(each in self.calls for each in module.modules())

    def first_call(self, module: nn.Module) -> int:
        """Return when a module that it reaches, or one in it, was first called."""
        return min(self.calls[each] for each in module.modules() if each in self.calls)


def model_inputs(model: nn.Module) -> str:
    """Return the name of what a model cannot do without."""
    return str(getattr(model, "main_input_name", "input_ids"))


def takes_text(model: nn.Module) -> bool:
    """Return whether token ids alone are what the model takes."""
    return model_inputs(model) == "input_ids"


def other_inputs(model: nn.Module) -> list[str]:
    """Return the arguments of a model's forward that are pictures or sound."""
    arguments = inspect.signature(model.forward).parameters
    return [name for name in arguments if name.startswith(_NO_TEXT) and not name.endswith(_ABOUT)]


def token_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the embeddings of a model's token ids; None where it names none."""
    named: Callable[[], nn.Module | None] = getattr(model, "get_input_embeddings", lambda: None)
    try:
        return named()
    except (AttributeError, NotImplementedError):  # transformers' own, where no attribute has a name that it knows
        return None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether one part of the model reads, and another one writes."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def text_window(model: nn.Module) -> dict[str, Tensor]:
    """Return the inputs of a tiny window of text."""
    ids = torch.zeros(1, _TOKENS, dtype=torch.int64)
    inputs = {"input_ids": ids}
    if is_encoder_decoder(model):
        inputs["decoder_input_ids"] = ids
    return inputs


def try_out(model: nn.Module, inputs: Mapping[str, Any]) -> Trial | None:
    """Pass inputs through a model, on meta or not, without its head. None, with a warning, where it cannot be done."""
    body: nn.Module = getattr(model, "base_model", model)
    prefix = next((f"{name}." for name, module in model.named_modules() if module is body and name), "")
    named = (*body.named_parameters(remove_duplicate=False), *body.named_buffers(remove_duplicate=False))
    zeros = {name: torch.zeros((), dtype=tensor.dtype, device="cpu").expand(tensor.shape) for name, tensor in named}

    def without_weights() -> Any:
        return torch.func.functional_call(body, zeros, kwargs={**inputs, "use_cache": False}, tie_weights=False)

    def as_it_is() -> Any:
        home = next(parameter.device for parameter in body.parameters() if not parameter.is_meta)
        placed = {key: value.to(home) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        return body(**placed, use_cache=False)

    on_meta = all(parameter.is_meta for parameter in body.parameters())
    reason: Exception | None = None
    for run, tensors in ((without_weights, zeros), *(() if on_meta else ((as_it_is, None),))):
        try:
            return _traced(body, prefix, run, tensors)
        except Exception as error:  # whatever the code of an unknown architecture says
            reason = reason or error
    logger.warning(
        "%s could not be tried on a tiny window (%s: %s): which of its blocks the text passes through is told from "
        "where its embeddings are, and weights that its code reads instead of calling are not found",
        type(model).__name__,
        type(reason).__name__,
        reason,
    )
    return None


def _traced(body: nn.Module, prefix: str, run: Callable[[], Any], tensors: Mapping[str, Tensor] | None) -> Trial:
    linears = {name: module for name, module in body.named_modules() if is_linear(module)}
    weights = {
        id(module.weight if tensors is None else tensors[f"{name}.weight"]): name
        for name, module in linears.items()
        if isinstance(module.weight, Tensor)
    }
    reads = _Reads(weights)
    calls: dict[nn.Module, int] = {}
    forwards: dict[nn.Module, Any] = {}
    for name, module in body.named_modules():
        outputs = _outputs_of(module)
        if outputs is not None:
            forwards[module] = _giving_zeros(outputs)
        elif name in linears:
            forwards[module] = reads.allowing(name, module)
        elif tensors is not None and hasattr(module, "_hf_hook"):  # Accelerate would bring the weights back
            forwards[module] = type(module).forward.__get__(module)

    def note(module: nn.Module, _args: Any) -> None:
        calls.setdefault(module, len(calls))

    hook = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        with torch.no_grad(), evaluating(body), replaced_forward(forwards), reads:
            run()
    finally:
        hook.remove()
    return Trial(calls, frozenset(prefix + name for name in reads.found))


class _Reads(TorchFunctionMode):
    """Notes which of these weights (by `id`, with their linears' names) go into functions that compute tensors."""

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._weights, self._allowed = weights, ""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if _has_tensor(result) and name not in _OF_FORM and not name.startswith("new_"):
            given = args[:1] if name == "to" else (*args, *(kwargs or {}).values())
            read = {self._weights[id(each)] for each in _flat(given) if id(each) in self._weights}
            self.found |= read - {self._allowed}
        return result

    def allowing(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """Return the forward of a linear, in which its own weight may be read."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._allowed = name
            try:
                return type(module).forward(module, *args, **kwargs)
            finally:
                self._allowed = ""

        return forward


def _outputs_of(module: nn.Module) -> int | None:
    """Return how many features a linear gives, compressed or quantized or not; None for all that may be no linear."""
    if type(module) is not nn.Linear and isinstance(module, nn.Linear):
        return None
    outputs = getattr(module, "nf", None) if is_conv1d(module) else getattr(module, "out_features", None)
    return outputs if isinstance(outputs, int) and not isinstance(module, nn.Bilinear) else None


def _giving_zeros(outputs: int) -> Callable[..., Tensor]:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        return x.new_zeros(*x.shape[:-1], outputs)

    return forward


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _has_tensor(result: Any) -> bool:
    return any(isinstance(each, Tensor) for each in _flat((result,)))
