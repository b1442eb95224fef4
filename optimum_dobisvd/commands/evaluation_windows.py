"""The windows that perplexity is measured on, checked against the model before one of its weights is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .load_dense import load_meta_model
from .sources import ModelSource

if TYPE_CHECKING:
    from torch import Tensor

USUAL_SEQLEN = 1024


def evaluation_seqlen(source: ModelSource, asked: int | None, *, trust_remote_code: bool) -> int:
    """Return the tokens in a window: what was asked for, or 1024, or as many positions as the model has.

    Raises ValueError if more was asked for than it has.
    """
    from ..model.input_limits import default_seqlen, require_positions

    model = load_meta_model(source, trust_remote_code=trust_remote_code)
    if asked is None:
        return default_seqlen(model, USUAL_SEQLEN)
    require_positions(model, asked, f"windows of {asked} tokens were asked for")
    return asked


def evaluation_windows(
    source: ModelSource, tokenizer: Any, texts: Mapping[str, str], settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the token ids of every text's windows by its name; `settings` has seqlen, windows, trust_remote_code.

    Raises ValueError for a text that is too short, or that has tokens which the model has no embedding for.
    """
    from ..evaluation.perplexity import check_readable, window_ids

    if not texts:
        return {}
    model = load_meta_model(source, trust_remote_code=settings["trust_remote_code"])
    found = {}
    for name, text in texts.items():
        found[name] = window_ids(tokenizer, text, seqlen=settings["seqlen"], windows=settings["windows"])
        check_readable(model, found[name], f"the text {name}")
    return found
