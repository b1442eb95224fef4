"""How a module holds the experts of a mixture in three-dimensional parameters: found by trying.

transformers keeps the experts of a layer stacked, `E x outputs x inputs` or transposed, gate and up in one parameter,
one after the other or interleaved. Names and flags tell little of that for modeling code one has never seen, so every
layout that the shapes allow is tried on a small copy with random weights, and the one that computes the same is taken.
Bundled with every checkpoint.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Call = Literal["routed", "batched", "sorted"]
Gating = Literal["own", "multiplied", "plain", "none"]

_CALLS: dict[int, Call] = {3: "routed", 1: "batched", 2: "sorted"}
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")
_FEWEST_FEATURES = 4  # of a small copy's sizes: with two, one after the other and interleaved are hard to tell apart


@dataclass(frozen=True)
class Stack:
    """A parameter `E x outputs x inputs` (or `E x inputs x outputs` if `transposed`), and the linears it is cut into.

    Two linears share the outputs, the first half and the second one, or by turns if `interleaved`. `bias` names the
    parameter `E x outputs` beside it.
    """

    parameter: str
    bias: str | None
    linears: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False

    def weights(self, stacked: Tensor, expert: int) -> list[Tensor]:
        """Return the weights (`outputs x inputs`) of one expert's linears, views of the stacked ones."""
        matrix = stacked[expert]
        return self._cut(matrix.T if self.transposed else matrix)

    def biases(self, stacked: Tensor, expert: int) -> list[Tensor]:
        """Return the biases of one expert's linears, views of the stacked ones."""
        return self._cut(stacked[expert])

    def _cut(self, outputs: Tensor) -> list[Tensor]:
        count = len(self.linears)
        if self.interleaved:
            return [outputs[start::count] for start in range(count)]
        return list(outputs.chunk(count))


@dataclass(frozen=True)
class ExpertLayout:
    """How experts are stacked, and how their module is called.

    Attributes:
        stacks: in the order in which they compute; the last one is the expert's output.
        call: with all tokens, the experts chosen for each and their weights (`routed`); with the tokens once for every
            expert, zero where it is not chosen (`batched`); with rows sorted by expert, and how many each gets.
        arguments: the names of these.
        gating: what comes before the last linear: the module's own `_apply_gate`, `act(gate) * up`, or `act(up)`.
        activation: the attribute that holds `act`.
        norm: the child that the output of an expert goes through, None without.
    """

    stacks: tuple[Stack, ...]
    call: Call
    arguments: tuple[str, ...]
    gating: Gating
    activation: str = ""
    norm: str | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """The names of an expert's linears."""
        return tuple(name for stack in self.stacks for name in stack.linears)


def stacked_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the module's own three-dimensional parameters, if there are some and all have one first dimension."""
    found = {name: each for name, each in module._parameters.items() if each is not None and each.dim() == 3}
    return found if len({len(each) for each in found.values()}) == 1 else {}


def candidate_layouts(module: nn.Module) -> Iterator[ExpertLayout]:
    """Every layout that the parameters' shapes and the arguments of `forward` allow."""
    stacked = stacked_parameters(module)
    arguments = tuple(inspect.signature(plain_forward(module)).parameters)[1:]
    call = _CALLS.get(len(arguments))
    biases = {name: f"{name}_bias" for name in stacked if getattr(module, f"{name}_bias", None) is not None}
    own = set(stacked) | set(biases.values())
    if call is None or not stacked or any(each is not None and name not in own for name, each in _own_tensors(module)):
        return  # tensors of unknown meaning
    if call == "sorted":
        if len(stacked) == 1 and not biases:
            for name, transposed in itertools.product(stacked, (False, True)):
                yield ExpertLayout((Stack(name, None, (name,), transposed),), call, arguments, "none")
        return
    norms = [None, *(name for name, child in module.named_children() if any(True for _ in child.parameters()))]
    for stacks in _candidate_stacks(stacked, biases):
        width = sum(len(stack.linears) for stack in stacks[:-1])
        for gating, activation in _gatings(module, width):
            for norm in norms:
                yield ExpertLayout(stacks, call, arguments, gating, activation, norm)


def plain_forward(module: nn.Module) -> Any:
    """Return the forward function of the module's class without what decorators put around it.

    transformers' picks another implementation of the same function by the model's configuration.
    """
    return inspect.unwrap(type(module).forward)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    yield from module._parameters.items()
    yield from module._buffers.items()


def _candidate_stacks(stacked: dict[str, nn.Parameter], biases: dict[str, str]) -> Iterator[tuple[Stack, ...]]:
    """Ways to cut two parameters (gate and up in one, or no gate) or three into the linears of an expert."""
    for names in itertools.permutations(stacked):
        for flags in sorted(itertools.product((False, True), repeat=len(names)), key=lambda flags: len(set(flags))):
            shapes = [
                stacked[name].shape[:0:-1] if flag else stacked[name].shape[1:]
                for name, flag in zip(names, flags, strict=True)
            ]
            (*_, (outputs, inner)), (_, inputs) = shapes, shapes[0]
            if outputs != inputs or any(shape[1] != inputs for shape in shapes[:-1]) or len(names) not in (2, 3):
                continue
            last = Stack(names[-1], biases.get(names[-1]), (names[-1],), flags[-1])
            if all(shape[0] == inner for shape in shapes[:-1]):
                firsts = [
                    Stack(name, biases.get(name), (name,), flag)
                    for name, flag in zip(names[:-1], flags[:-1], strict=True)
                ]
                yield (*firsts, last)
            elif len(names) == 2 and shapes[0][0] == 2 * inner:
                for interleaved in (False, True):
                    cut = ("gate_proj", "up_proj")
                    yield Stack(names[0], biases.get(names[0]), cut, flags[0], interleaved), last


def _gatings(module: nn.Module, width: int) -> Iterator[tuple[Gating, str]]:
    """Ways to get from the outputs of an expert's first linears, of which there are `width`, to its last input."""
    if width == 2 and hasattr(module, "_apply_gate"):
        yield "own", ""
    for name in _ACTIVATIONS:
        if callable(getattr(module, name, None)):
            yield ("multiplied" if width == 2 else "plain"), name


def small_copy(module: nn.Module) -> nn.Module:
    """Return the same module with all experts, but of few features, with random weights in float32 on the CPU.

    All its sizes are divided by one number, and so are its integer attributes that have one of these values.
    """
    stacked = stacked_parameters(module)
    count = len(next(iter(stacked.values())))
    sizes = {size for each in stacked.values() for size in each.shape[1:]}
    common = math.gcd(*sizes)
    # An attribute that is the number of experts must not be taken for a size.
    usable = [] if count in sizes else [each for each in range(1, common + 1) if common % each == 0]
    divisor = max((each for each in usable if common // each >= _FEWEST_FEATURES), default=1)
    generator = torch.Generator().manual_seed(0)

    def small(tensor: Tensor) -> Tensor:
        shape = [size // divisor if size in sizes else size for size in tensor.shape]
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)

    known: dict[int, Any] = {id(each): nn.Parameter(small(each), False) for each in module.parameters()}
    known |= {id(each): small(each) for each in module.buffers()}
    made = copy.copy(module)  # its own tensors are not copied, nor what Accelerate hangs on it
    for key, value in vars(module).items():
        if type(value) is int and value in sizes:
            made.__dict__[key] = value // divisor
    made._parameters = {name: known.get(id(each)) for name, each in module._parameters.items()}
    made._modules = {name: copy.deepcopy(child, dict(known)) for name, child in module._modules.items()}
    return made


def is_interleaved(module: nn.Module, inner: int) -> bool | None:
    """Return whether the module's own gate takes its two inputs by turns, None if it cannot be told.

    Whichever way its `inner` pairs are cut, putting them together again gives the same; only which linear is the gate
    depends on it. So one input is changed, and the output that changes with it tells to whom it belongs.
    """
    values = torch.randn(1, 2 * inner, generator=torch.Generator().manual_seed(1), device="cpu", dtype=torch.float32)
    changed = values.clone()
    changed[0, 1] += 0.1
    gate: Any = module
    differs = (gate._apply_gate(changed) != gate._apply_gate(values))[0].nonzero().flatten().tolist()
    return {(0,): True, (1,): False}.get(tuple(differs))
