"""The same mixtures of experts with every expert written as `nn.Linear`s, by hand."""

from typing import Any

import torch
from torch import Tensor, nn

from integration_tests.tiny_models import tiny


class _Expert(nn.Module):
    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, act_fn: Any) -> None:
        super().__init__()
        for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight.detach().clone())
            self.add_module(name, linear)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        parts: Any = self
        return parts.down_proj(self.act_fn(parts.gate_proj(x)) * parts.up_proj(x))


class _SeparateExperts(nn.ModuleList):
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        found = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            tokens, places = (top_k_index == number).nonzero(as_tuple=True)
            if len(tokens):
                found = found.index_add(0, tokens, expert(hidden_states[tokens]) * top_k_weights[tokens, places, None])
        return found


def with_separate_experts(model_type: str, **settings: Any) -> nn.Module:
    """That tiny model, with the same weights: gate and up must lie one after the other in it."""
    model = tiny(model_type, **settings)
    for name, module in list(model.named_modules()):
        if hasattr(module, "gate_up_proj") and module.gate_up_proj.dim() == 3:
            cut = [(*both.chunk(2), down) for both, down in zip(module.gate_up_proj, module.down_proj, strict=True)]
            model.set_submodule(name, _SeparateExperts([_Expert(*each, module.act_fn) for each in cut]))
    return model
