"""Experts of a mixture as linears, which is what can be calibrated and compressed.

`linearize` puts a module with plain linears per expert in the place of one that keeps them stacked in
three-dimensional parameters; `fuse` puts the stacked one back. Both compute the same. Bundled with every checkpoint.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .expert_layout import (
    ExpertLayout,
    Stack,
    candidate_layouts,
    is_interleaved,
    plain_forward,
    small_copy,
    stacked_parameters,
)


@dataclass(frozen=True)
class RoutedRows:
    """Which tokens of a batch an expert is given: their places in the `batch x seqlen` of `total` tokens, in a row."""

    tokens: Tensor
    total: int


ROUTED_ROWS: ContextVar[RoutedRows | None] = ContextVar("rows an expert is given", default=None)
"""Set while an expert computes, for those who watch its linears."""


class Expert(nn.Module):
    """The linears of one expert, called by `LinearizedExperts`."""


class LinearizedExperts(nn.Module):
    """Experts as linears, `{expert}.{linear}`, called as the module is that keeps them stacked.

    `stacked` is that module. It goes on giving its gate, activation and norm, and takes the weights back by `fuse`.
    """

    def __init__(self, stacked: nn.Module, layout: ExpertLayout) -> None:
        super().__init__()
        self.layout = layout
        self._hidden = (stacked,)  # a tuple, so that it is none of the children
        self._released = False
        self.num_experts = len(next(iter(stacked_parameters(stacked).values())))
        for expert in range(self.num_experts):
            linears = dict(self._cut(expert))
            if layout.call == "sorted":
                self.add_module(str(expert), next(iter(linears.values())))
                continue
            self.add_module(str(expert), Expert())
            for name, linear in linears.items():
                self.get_submodule(str(expert)).add_module(name, linear)
        for name, child in stacked.named_children():
            self.add_module(name, child)
        self.train(stacked.training)

    @property
    def stacked(self) -> Any:
        """The module that keeps the experts stacked."""
        return self._hidden[0]

    @property
    def stacked_names(self) -> list[str]:
        """The names of the stacked parameters."""
        pairs = ((stack.parameter, stack.bias) for stack in self.layout.stacks)
        return [name for pair in pairs for name in pair if name is not None]

    def _cut(self, expert: int) -> Iterator[tuple[str, nn.Linear]]:
        """One expert's linears by name, views of the stacked weights."""
        for stack in self.layout.stacks:
            parameter = self.stacked._parameters[stack.parameter]
            bias = None if stack.bias is None else self.stacked._parameters[stack.bias]
            weights = stack.weights(parameter.detach(), expert)
            biases = [None for _ in weights] if bias is None else stack.biases(bias.detach(), expert)
            for name, weight, values in zip(stack.linears, weights, biases, strict=True):
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=values is not None, device="meta")
                linear.weight = nn.Parameter(weight, requires_grad=parameter.requires_grad)
                if values is not None:
                    linear.bias = nn.Parameter(values, requires_grad=parameter.requires_grad)
                yield name, linear

    def linear(self, expert: int, name: str) -> Any:
        """Return one linear of one expert."""
        found = self._modules[str(expert)]
        return found if self.layout.call == "sorted" else getattr(found, name)

    def names(self) -> Iterator[tuple[int, str]]:
        """Yield the number of an expert and the name of a linear for all there are."""
        yield from ((expert, name) for expert in range(self.num_experts) for name in self.layout.linears)

    def release(self) -> None:
        """Let go of the stacked weights; the linears hold them from now on, and may change."""
        for name in self.stacked_names:
            parameter = self.stacked._parameters[name]
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        self._released = True

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Return the module with stacked weights, those of the linears, which are plain ones."""
        if self._released:
            for stack in self.layout.stacks:
                self._restack(stack.parameter, stack.linears, "weight", stack)
                if stack.bias is not None:
                    self._restack(stack.bias, stack.linears, "bias", stack)
        self._released = False
        return self.stacked.train(self.training)

    def _restack(self, parameter: str, linears: tuple[str, ...], kind: str, stack: Stack) -> None:
        """Write weights or biases of all experts into one new tensor, expert by expert."""
        rows = [[getattr(self.linear(expert, name), kind) for name in linears] for expert in range(self.num_experts)]
        first, outputs = rows[0][0], sum(map(len, rows[0]))
        sizes = (first.shape[1], outputs) if stack.transposed and kind == "weight" else (outputs, *first.shape[1:])
        data = torch.empty((self.num_experts, *sizes), dtype=first.dtype, device=first.device)
        cut = stack.weights if kind == "weight" else stack.biases
        for expert, sources in enumerate(rows):
            for place, source in zip(cut(data, expert), sources, strict=True):
                place.copy_(source)
        old = self.stacked._parameters[parameter]
        if old.is_meta or data.is_meta:
            self.stacked._parameters[parameter] = nn.Parameter(data, requires_grad=first.requires_grad)
        else:
            old.data = data  # the same parameter as before

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(self.layout.arguments, args, strict=False)) | kwargs
        values: list[Any] = [given[name] for name in self.layout.arguments]
        if self.layout.call == "routed":
            return self._routed(*values)
        return self._batched(*values) if self.layout.call == "batched" else self._sorted(*values)

    def _routed(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the experts chosen for each token.

        `hidden` is `... x inputs` of `T` tokens, `index` and `weights` are `T x k`. An index without expert is none.
        """
        rows = hidden.reshape(-1, hidden.shape[-1])
        found = torch.zeros_like(rows)
        for expert, chosen in self._chosen(index):
            tokens, places = chosen // index.shape[-1], chosen % index.shape[-1]
            out = self._through(expert, rows[tokens], RoutedRows(tokens, len(rows)))
            found = found.index_add(0, tokens, (out * weights[tokens, places, None]).to(found.dtype))
        return found.view_as(hidden)

    def _chosen(self, index: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Experts that are chosen, and by which elements of `index`."""
        flat = index.reshape(-1)
        if flat.is_meta:
            yield from ((expert, flat) for expert in range(self.num_experts))
            return
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat.clamp(max=self.num_experts), minlength=self.num_experts + 1).tolist()
        for expert, chosen in enumerate(order.split(counts)[: self.num_experts]):
            if len(chosen):
                yield expert, chosen

    def _batched(self, hidden: Tensor) -> Tensor:
        """Return what each expert makes of its copy of the tokens, `E T x inputs`; of zeros it makes zeros."""
        batches = hidden.view(self.num_experts, -1, hidden.shape[-1])
        found = []
        for expert, batch in enumerate(batches):
            tokens = torch.arange(len(batch), device=batch.device)
            tokens = tokens if batch.is_meta else tokens[(batch != 0).any(-1)]
            out = (
                self._through(expert, batch[tokens], RoutedRows(tokens, len(batch))) if len(tokens) else batch[tokens]
            )
            found.append(torch.zeros_like(batch).index_add(0, tokens, out.to(batch.dtype)))
        return torch.cat(found)

    def _sorted(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """Return what each expert makes of its rows, of which it has `sizes` in turn."""
        return torch.cat([self.linear(expert, "")(part) for expert, part in enumerate(rows.split(sizes))])

    def _through(self, expert: int, x: Tensor, rows: RoutedRows) -> Tensor:
        """Return the output of one expert for rows `x`."""
        stacked, layout = self.stacked, self.layout
        with _routing(rows):
            pieces = [self.linear(expert, name)(x) for stack in layout.stacks[:-1] for name in stack.linears]
            if layout.gating == "own":
                together = (
                    torch.stack(pieces, -1).flatten(-2) if layout.stacks[0].interleaved else torch.cat(pieces, -1)
                )
                inner = stacked._apply_gate(together)
            else:
                inner = getattr(stacked, layout.activation)(pieces[0])
                inner = inner * pieces[1] if layout.gating == "multiplied" else inner
            out: Tensor = self.linear(expert, layout.linears[-1])(inner)
        return out if layout.norm is None else self.get_submodule(layout.norm)(out)


@contextlib.contextmanager
def _routing(rows: RoutedRows) -> Iterator[None]:
    before = ROUTED_ROWS.set(rows)
    try:
        yield
    finally:
        ROUTED_ROWS.reset(before)


def linearize(model: nn.Module) -> dict[str, LinearizedExperts]:
    """Put linears in the place of stacked experts, views of their weights; returns the new modules by name.

    Works on meta tensors. What computes in no way that is known here is left as it is, and so is what another module
    shares or Accelerate keeps out of memory.
    """
    owners = Counter(id(each) for _, each in model.named_parameters(remove_duplicate=False))
    found: dict[str, LinearizedExperts] = {}
    likely: ExpertLayout | None = None
    for name, module in list(model.named_modules()):
        stacked = stacked_parameters(module).values()
        if not name or not stacked or is_offloaded(module) or any(owners[id(each)] > 1 for each in stacked):
            continue
        layout = expert_layout(module, likely)
        if layout is not None:
            likely = layout
            found[name] = LinearizedExperts(module, layout)
            model.set_submodule(name, found[name])
    return found


def is_offloaded(module: nn.Module) -> bool:
    """Whether Accelerate keeps the module's stacked experts out of memory between passes."""
    return hasattr(module, "_hf_hook") and any(each.is_meta for each in stacked_parameters(module).values())


def linearized_experts(model: nn.Module) -> dict[str, LinearizedExperts]:
    """Return the modules that `linearize` has made, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LinearizedExperts)}


def settle(model: nn.Module) -> None:
    """Leave the experts as a checkpoint has them: stacked if all are plain linears, and otherwise linears all of them.

    Plain ones get memory of their own then, so that what was compressed is not kept by the views on its neighbors.
    """
    experts = linearized_experts(model)
    linears = [each.linear(expert, name) for each in experts.values() for expert, name in each.names()]
    if all(type(linear) is nn.Linear for linear in linears):
        fuse(model)
        return
    for linear in linears:
        if type(linear) is nn.Linear:
            for tensor in linear.parameters():
                tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)


def align(model: nn.Module) -> None:
    """Bring weights of linearized experts that were read from a file to where PyTorch puts its own: 64-byte borders.

    A file's memory begins anywhere, and an expert is often given a single token, for which the product on a CPU is
    rounded one way or another by where the matrix begins. So a loaded model would not be equal to the saved one.
    """
    for experts in linearized_experts(model).values():
        for linear in (each for each in experts.modules() if type(each) is nn.Linear):
            for tensor in linear.parameters():
                if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
                    tensor.data = tensor.data.clone()


def fuse(model: nn.Module) -> None:
    """Put the stacked experts back. Their linears are plain ones."""
    for name, module in linearized_experts(model).items():
        model.set_submodule(name, module.fuse())


def expert_layout(module: nn.Module, likely: ExpertLayout | None = None) -> ExpertLayout | None:
    """Return the layout by which linears compute the same as the module with stacked experts, None if none does.

    They are compared on a small copy with random weights, inputs and choices of experts; `likely` is tried first.
    """
    candidates = sorted(candidate_layouts(module), key=lambda layout: layout != likely)
    if not candidates:
        return None
    # Models are also built where meta is the default device.
    with torch.device("cpu"), torch.no_grad():
        copy = small_copy(module)
        return next((layout for layout in candidates if _computes_alike(copy, layout)), None)


def _computes_alike(stacked: nn.Module, layout: ExpertLayout) -> bool:
    try:
        linearized = LinearizedExperts(stacked, layout)
        given = _random_arguments(linearized)
        expected, found = plain_forward(stacked)(stacked, *given), linearized(*given)
        if layout.gating == "own":
            inner = linearized.linear(0, layout.linears[-1]).in_features
            if is_interleaved(stacked, inner) is not layout.stacks[0].interleaved:
                return False
    except Exception:  # whatever modeling code says to weights of another layout
        return False
    return expected.shape == found.shape and bool((found - expected).norm() <= 1e-4 * expected.norm())


def _random_arguments(experts: LinearizedExperts) -> tuple[Any, ...]:
    """Tokens for a call of experts, which not all of them get. In float32: models are built in other dtypes, too."""
    layout, count, tokens = experts.layout, experts.num_experts, 8
    generator = torch.Generator().manual_seed(2)
    width = experts.linear(0, layout.linears[0]).in_features

    def random(rows: int, columns: int) -> Tensor:
        return torch.rand(rows, columns, generator=generator, dtype=torch.float32) - 0.5

    if layout.call == "sorted":
        sizes = [expert % 3 for expert in range(count)]
        return random(sum(sizes), width), sizes
    chosen = random(tokens, count).argsort(-1)[:, : min(2, count)]
    hidden = random(tokens, width)
    if layout.call == "batched":
        kept = torch.zeros(tokens, count, dtype=torch.float32).scatter(1, chosen, 1.0)
        return ((kept.T[..., None] * hidden).reshape(-1, width),)
    return hidden, chosen, random(*chosen.shape) + 1


def router_names(model: nn.Module) -> set[str]:
    """Return the names of what chooses among linearized experts: modules beside them with a weight `E x inputs`."""
    found: set[str] = set()
    for name, experts in linearized_experts(model).items():
        parent = name.rpartition(".")[0]
        wanted = (experts.num_experts, experts.linear(0, experts.layout.linears[0]).in_features)
        for beside, module in model.get_submodule(parent).named_modules(prefix=parent):
            weight = getattr(module, "weight", None)
            inside = f"{beside}.".startswith(f"{name}.")
            if isinstance(weight, Tensor) and weight.shape == wanted and not inside and wanted[0] != wanted[1]:
                found.add(beside)
    return found
