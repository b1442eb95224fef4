"""Perplexity of a causal language model on a text."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..calibration.objective import AS_CAUSAL_MODEL, require_next_token_model
from ..calibration.token_ids import token_ids
from ..model.input_limits import require_positions, require_tokens

_POSITIONS_AT_ONCE = 256


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    seqlen: int = 1024,
    windows: int | None = None,
    progress: str | None = None,
) -> float:
    """Return exp of the mean negative log-likelihood per predicted token, in float32.

    All of the text is tokenized at once and cut into consecutive windows of `seqlen` tokens without overlap; what is
    left over at the end is not used. The first token of a window is not predicted. Nothing else is left out.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        text: the text.
        seqlen: tokens in a window, at least 2.
        windows: how many windows at most, from the start; None takes all.
        progress: words beside a progress bar; None shows none.

    Raises:
        ValueError: the text is shorter than one window, a number is out of range, the model has too few positions or
            no embedding for a token, it is none of the next token, or a window's loss is not finite (names it).
    """
    ids = window_ids(tokenizer, text, seqlen=seqlen, windows=windows)
    check_readable(model, ids)
    return perplexity_of(model, ids, progress)


@torch.inference_mode()
def perplexity_of(model: nn.Module, ids: Tensor, progress: str | None = None) -> float:
    """`perplexity` on windows of token ids, `N x seqlen`, that `window_ids` gave and `check_readable` passed."""
    seqlen = ids.shape[1]
    why = "perplexity is of predictions of the next token"
    first = torch.ones_like(ids[:1], dtype=torch.bool)
    require_next_token_model(model, ids[:1], first, why=why, remedy=AS_CAUSAL_MODEL)
    was_training = model.training
    model.eval()
    total = 0.0
    try:
        for index, window in enumerate(tqdm(ids, desc=progress, unit="window", disable=progress is None)):
            loss = _summed_loss(model, window)
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss on window {index} of {len(ids)} is {loss}: its logits are NaN or infinite there; "
                    "check its weights, or load it in float32 or bfloat16 (float16 overflows)"
                )
            total += loss
    finally:
        model.train(was_training)
    mean = total / (ids.shape[0] * (seqlen - 1))
    return math.exp(mean) if mean < 700 else math.inf  # exp overflows a float beyond that


def window_ids(tokenizer: Any, text: str, *, seqlen: int, windows: int | None = None) -> Tensor:
    """Return the windows as token ids, `N x seqlen`. ValueError as in `perplexity`."""
    if seqlen < 2:
        raise ValueError(f"seqlen must be at least 2, so that there is a token to predict, got {seqlen}")
    if windows is not None and windows < 1:
        raise ValueError(f"windows must be at least 1, or None for all of the text, got {windows}")
    ids = token_ids(tokenizer, text, at_most=None if windows is None else windows * seqlen)
    available = len(ids) // seqlen
    if available == 0:
        raise ValueError(
            f"the text has {len(ids)} tokens, less than one window of seqlen={seqlen}: use a longer text "
            "or a shorter seqlen"
        )
    return ids[: available * seqlen].view(available, seqlen)[:windows]


def check_readable(model: Any, ids: Tensor, name: str = "the text") -> None:
    """Raise ValueError if the model, which may be on meta, cannot read these windows; `name` is what they are from."""
    require_positions(model, ids.shape[1], f"windows of seqlen={ids.shape[1]} were asked for")
    require_tokens(model, int(ids.max()), name)


def _summed_loss(model: nn.Module, window: Tensor) -> float:
    """Return the summed negative log-likelihood of all predicted tokens of one window, in nats."""
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    logits = model(input_ids=window[None].to(device), use_cache=False).logits[0, :-1]
    target = window[1:].to(logits.device)
    # In slices, because a float32 copy of all logits at once may be larger than the model.
    return sum(
        float(nn.functional.cross_entropy(part.float(), wanted, reduction="sum"))
        for part, wanted in zip(logits.split(_POSITIONS_AT_ONCE), target.split(_POSITIONS_AT_ONCE), strict=True)
    )
