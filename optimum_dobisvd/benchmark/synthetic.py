"""Models of random weights in the shape of known ones, dense or compressed: speed needs no download."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..allocation.budget import BudgetRequest, open_budget
from ..allocation.plan import PlannedModule, planned_bytes
from ..allocation.uniform import uniform
from ..encodings.registry import encoding_of
from ..factorization.factors import Factors
from ..model.layout import find_blocks, find_layout
from ..structures.base import CompressedLinear
from ..structures.format import Format
from ..structures.registry import STRUCTURES

SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "llama-1b": {  # Llama 3.2
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "llama-8x2048": {  # eight blocks, as wide as the one above, in the proportions of the first
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}
"""Fields of transformers' `LlamaConfig`."""


@dataclass(frozen=True)
class SyntheticModel:
    """A Llama of random weights, and how the compressed one stores its matrices.

    Attributes:
        shape: one of `SHAPES`.
        changes: fields of its `LlamaConfig` that are to differ.
        dtype: of its weights.
        structure: what every matrix is written as.
        quantization: how that is stored, in a user's words; None is `dtype`.
        keep: share of the matrices' bytes; None for a structure without rank, whose encoding says it.

    Raises:
        ValueError: an unknown shape or field, or sizes that do not go together; from `check`.
    """

    shape: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    structure: str = "pivoted"
    quantization: str | None = None
    keep: float | None = None

    @property
    def format(self) -> Format:
        """Structure and encoding of its matrices."""
        return Format(STRUCTURES.get(self.structure), encoding_of(self.quantization))

    def meta(self) -> Any:
        """Return the dense model, its parameters on the meta device and its buffers real."""
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM, LlamaConfig

        if self.shape not in SHAPES:
            raise ValueError(f"there is no synthetic model {self.shape!r}; there are: {', '.join(SHAPES)}")
        known = LlamaConfig().to_dict()
        for name in self.changes:
            if name not in known:
                raise ValueError(f"LlamaConfig has no field {name!r}, which the shape of the synthetic model names")
        config = LlamaConfig(**{"bos_token_id": 1, "eos_token_id": 2, **SHAPES[self.shape], **self.changes})
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        model.tie_weights()  # which the empty ones are not
        model.name_or_path = self.shape
        return model.eval()

    def plan(self) -> dict[str, PlannedModule]:
        """Return what every matrix becomes: the same share of each.

        Raises:
            ValueError: the structure and the encoding do not go together, a share that cannot be reached, or one that
                is missing or has no meaning.
        """
        format, targets = self.format, find_layout(self.meta()).targets
        if format.conflict is not None:
            raise ValueError(
                f"structure {self.structure!r} cannot be stored as {self.quantization}: {format.conflict}"
            )
        format.encoding.require()
        if format.structure.has_rank:
            if self.keep is None:
                raise ValueError(
                    f"structure {self.structure!r} has a rank: say with keep what share of bytes it takes"
                )
            return uniform(open_budget(targets, BudgetRequest(format, ratio=self.keep)))
        if self.keep is not None or format.leaves_as_is:
            raise ValueError(
                f"structure {self.structure!r} has no rank: its size is that of its encoding, so name one with "
                "quantization, and leave keep out"
            )
        for target in targets:
            reason = format.unsupported_reason(target.out_features, target.in_features)
            if reason is not None:
                raise ValueError(f"{target.name}: {reason}; take another quantization or shape")
        return {target.name: PlannedModule(*format.key) for target in targets}

    def compressed_bytes(self) -> int:
        """Return the bytes of the compressed model's tensors. Raises as `plan` does."""
        meta = self.meta()
        layout, plan = find_layout(meta), self.plan()
        return layout.other_bytes + sum(planned_bytes(target, plan[target.name]) for target in layout.targets)

    def dense(self, device: str) -> Any:
        """Return the dense model."""
        return _filled(self.meta(), device)

    def compressed(self, device: str) -> Any:
        """Return the compressed model. Matrices of one shape and size have the same values."""
        model, made = self.meta(), {}
        for name, module in self.plan().items():
            if module.leaves_as_is:
                continue
            rows, columns = model.get_submodule(name).weight.shape
            format = Format(module.format.structure, self._encoding(module))
            key = rows, columns, module
            if key not in made:
                made[key] = _compressed(format, (rows, columns), module.rank, self.dtype, device)
            model.set_submodule(name, copy.deepcopy(made[key]))
        return _filled(model, device)

    def _encoding(self, module: PlannedModule) -> Any:
        """The encoding with the user's settings, or another one that the budget had room for."""
        asked = self.format.encoding
        return asked if module.encoding == asked.name else module.format.encoding


@torch.no_grad()
def _filled(model: Any, device: str) -> Any:
    """The model with random values where it has none yet: activations of about the same size all the way."""
    patterns: dict[torch.Size, Tensor] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device.type != "meta":
                continue
            if parameter.shape not in patterns:  # drawing 7 billion numbers takes minutes on a CPU, copying seconds
                patterns[parameter.shape] = _random(parameter.shape, parameter.dtype, device)
            values = patterns[parameter.shape].clone()
            # As loaded models have it: PyTorch copies a weight that takes no gradient for the last row of a prompt.
            setattr(module, name, nn.Parameter(values))
    model.tie_weights()
    return model.to(device).eval()


def _random(shape: torch.Size, dtype: torch.dtype, device: str) -> Tensor:
    if len(shape) < 2:
        return torch.ones(shape, dtype=dtype, device=device)
    return torch.randn(shape, device=device).mul_(shape[1] ** -0.5).to(dtype)


@torch.no_grad()
def _compressed(
    format: Format, shape: tuple[int, int], rank: int | None, dtype: torch.dtype, device: str
) -> CompressedLinear:
    """A compressed linear of random values."""
    m, n = shape
    new = format.structure(n, m, rank, bias=False, device="meta", dtype=dtype)
    new.encoding = format.encoding.name
    new.weight = torch.empty(0, device=device, dtype=dtype)
    source = _random(torch.Size(shape), torch.float32, device) if rank is None else _factors(m, n, rank, device)
    weights = format.structure.written(source, format.encoding.gauge, dtype)
    gram = torch.eye(n, device=device) if format.encoding.uses_text else None
    with format.encoding.quiet():
        children, _ = format.quantize(weights, None, dtype, min(m, n), gram)
    new.put_own(weights, None)
    for name, child in children.items():
        new.set_submodule(name, child.to(device))
    for parameter in new.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter.is_floating_point())
    return new.eval()


def _factors(m: int, n: int, rank: int, device: str) -> Factors:
    """Random factors.

    `rank` rows of the outer one are those of the identity, and the others are small beside them: such rows are found
    at once to be the ones that all others are best written in terms of, which takes minutes of other matrices.
    """
    rest = torch.rand(m - rank, rank, device=device).mul_(2).sub_(1).mul_(rank**-0.5)
    second = torch.cat([torch.eye(rank, device=device), rest])[torch.randperm(m, device=device)]
    return Factors(second, torch.randn(rank, n, device=device).mul_(n**-0.5))


def offloaded(model: Any, device: str, limit: int, folder: str) -> Any:
    """Put a model that is in the CPU's memory on a device, of whose memory its weights take no more than `limit`.

    The rest is offloaded: from a GPU to the CPU's memory, from a CPU to files in `folder`.
    """
    from accelerate import dispatch_model, infer_auto_device_map

    on_cpu = torch.device(device).type == "cpu"
    most: dict[Any, Any] = {"cpu": limit} if on_cpu else {torch.device(device).index or 0: limit, "cpu": 1 << 60}
    whole = list({type(block).__name__ for block in find_blocks(model).values()})
    places = infer_auto_device_map(model, max_memory=most, no_split_module_classes=whole)
    return dispatch_model(model, places, offload_dir=folder, main_device=None if not on_cpu else "cpu")
