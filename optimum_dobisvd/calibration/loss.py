"""The loss whose gradients are collected: next-token cross-entropy, summed over tokens."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .model_inputs import inputs_of, next_tokens, predicted_tokens
from .temporarily import differentiable, weights_device

Fisher = Literal["empirical", "sampled"]


def labeled(mask: Tensor) -> Tensor:
    """Return which positions have a label, `batch x (seqlen - 1)`: tokens of text that a token of text follows."""
    return next_tokens(mask, mask)[1]


def require_labels(mask: Tensor, what: str) -> None:
    """Raise ValueError if no token under a mask (`N x seqlen`) has a label."""
    _require_some(int(labeled(mask).sum()), what)


def forward_pass(model: Any, ids: Tensor, mask: Tensor, *, head: bool) -> Any:
    """Run a forward pass of a transformers model, with or without its head; `ids`, `mask`: `batch x seqlen`."""
    device = weights_device(model)
    inputs = {name: tensor.to(device) for name, tensor in inputs_of(model, ids, mask).items()}
    body = model if head else getattr(model, "base_model", model)
    return body(**inputs, use_cache=False)


def logits_of(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Return a model's logits of the tokens it predicts, `batch x positions x vocabulary`; ValueError if none."""
    logits: Tensor | None = getattr(forward_pass(model, ids, mask, head=True), "logits", None)
    places = predicted_tokens(model, ids, mask)[0].shape
    if logits is None or logits.dim() != 3 or not 0 <= logits.shape[1] - places[1] <= 1 or len(logits) != places[0]:
        raise ValueError(
            f"{type(model).__name__} gives no next-token logits, and gradients are those of the next-token loss: load "
            "it as a causal language model, or choose a method that reads no gradients and learns nothing (svd_llm_v2)"
        )
    return logits


def _require_some(labels: int, what: str) -> None:
    if not labels:
        raise ValueError(
            f"{what}: no token has a label: every window is padding, or one token long. The loss needs windows of at "
            "least two tokens of text"
        )


class NotFiniteError(ValueError):
    """An error for a loss or an activation that is NaN or infinite; the message says where."""


class NextTokenLoss:
    """The cross-entropy of the next token, summed over all calls.

    `total` is the sum in nats, `tokens` how many labels it is over. With `fisher="empirical"` these are the text
    itself; with `"sampled"` they are drawn from the model's own distribution (by `seed`), which makes the gradients'
    second moment the Fisher information.
    """

    def __init__(self, fisher: Fisher = "empirical", seed: int = 0) -> None:
        self._fisher = fisher
        self._generator = torch.Generator().manual_seed(seed)
        self.total, self.tokens = 0.0, 0

    def __call__(self, logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the summed loss of one batch, a scalar with gradients, and add it to `total`.

        `logits` is `batch x seqlen x vocabulary`; `ids` and `mask` (bool, False for padding) are `batch x seqlen`, and
        may be on another device. NotFiniteError if the loss is NaN or infinite.
        """
        return self._summed(logits, *next_tokens(ids, mask))

    def of(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        """Run a forward pass over a batch and return its summed loss; ValueError if the model gives no logits."""
        logits = differentiable(model, lambda: logits_of(model, ids, mask))
        return self._summed(logits, *predicted_tokens(model, ids, mask))

    def _summed(self, logits: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
        rows = logits[:, : labels.shape[1]][wanted.to(logits.device)]
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if not bool(torch.isfinite(rows.detach()).all()):
            self._refuse("nan")
        if self._fisher == "sampled":
            labels = torch.multinomial(rows.detach().softmax(-1).cpu(), 1, generator=self._generator).squeeze(-1)
        else:
            labels = labels[wanted]
        loss = cross_entropy(rows, labels.to(rows.device), reduction="sum")
        value = float(loss.detach())
        if not math.isfinite(value):
            self._refuse(str(value))
        self.total += value
        self.tokens += len(rows)
        return loss

    def _refuse(self, what: str) -> None:
        raise NotFiniteError(
            f"the loss is {what} after {self.tokens} tokens of text. Check the checkpoint, or load the model in "
            "float32 or bfloat16 (float16 overflows)"
        )

    def check_seen(self) -> None:
        """Raise ValueError if no token had a label."""
        _require_some(self.tokens, "the calibration text")
