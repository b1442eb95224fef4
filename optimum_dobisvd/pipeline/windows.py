"""The calibration windows of a compression: as many tokens as the model can read, and only tokens it knows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..calibration.dataset import CalibrationWindows
from ..calibration.processor_batches import draw_windows
from ..calibration.tokenizer import TokenizerSource
from ..config import DobiSVDConfig
from ..encodings.base import Encoding
from ..model.input_limits import default_seqlen, require_positions, require_tokens

USUAL_SEQLEN = 2048
_HOW_TO_GIVE_TEXT = (
    "pass dataset= of the DobiSVDConfig (or of a GPTQConfig), or take rounding='nearest', which reads none"
)


def with_seqlen(config: DobiSVDConfig, model: Any) -> DobiSVDConfig:
    """Return the config with its `seqlen` filled in: what was asked for, or what the model can read of the usual 2048.

    Raises ValueError if more was asked for than the model has positions. It may be on meta.
    """
    if config.seqlen is None:
        return replace(config, seqlen=default_seqlen(model, USUAL_SEQLEN))
    require_positions(model, config.seqlen, f"seqlen={config.seqlen} was asked for")
    return config


def calibration_windows(model: Any, config: DobiSVDConfig, tokenizer: Any, held_out: int) -> CalibrationWindows | None:
    """Draw the windows that the config asks for, None where it has no text and needs none.

    Raises what `draw_windows` raises, and ValueError where text is needed and there is none, or where the model cannot
    read the windows.
    """
    if config.dataset is not None:
        windows = draw_windows(config.dataset, tokenizer, held_out=held_out, **config.draw)
        check_windows(model, windows)
        return windows
    needs_data = config.resolved_method().needs_data
    if needs_data or (config.encoding.needs_text and config.encoding.own_text is None):
        reader, without = f"method {config.method!r} needs calibration text", "use method='svd', which needs none"
        if not needs_data:
            reader, without = config.encoding.text_is_missing, "take rounding='nearest', which reads none"
        raise ValueError(
            f"{reader}: pass dataset= (a name such as 'wikitext2', a file, a list of strings, or token tensors), or "
            f"{without}"
        )
    return None


def check_windows(model: Any, windows: CalibrationWindows) -> None:
    """Raise ValueError if the model has too few positions for the windows, or no embedding for a token in them."""
    length, name = windows.input_ids.shape[1], windows.description.get("dataset")
    require_positions(model, length, f"the calibration windows have {length} tokens")
    require_tokens(model, int(windows.input_ids.max()), f"the calibration text ({name})")


def quantization_windows(
    encoding: Encoding, windows: CalibrationWindows | None, config: DobiSVDConfig, tokenizer: Any
) -> CalibrationWindows | None:
    """Return what quantization is calibrated on: text of its own if its settings name some, else the compression's.

    Without windows of a compression in this process they are drawn from the config's text. Encodings that can do
    without then do without: nobody expects a calibration of bitsandbytes when a checkpoint is loaded. ValueError where
    there is no text.
    """
    if not encoding.needs_text:
        return windows if encoding.uses_text else None
    own = encoding.own_text
    if own is None and windows is not None:
        return windows_for(encoding, windows)
    text = {"c4-new": "c4"}.get(own, own) if isinstance(own, str) else own if own is not None else config.dataset
    if text is None:
        raise ValueError(f"{encoding.text_is_missing}: {_HOW_TO_GIVE_TEXT}")
    try:
        return windows_for(encoding, draw_windows(text, encoding.own_tokenizer or tokenizer, **config.draw))
    except (ValueError, OSError) as error:
        raise ValueError(f"{encoding.text_is_missing}: {error}; {_HOW_TO_GIVE_TEXT}") from error


def windows_for(encoding: Encoding, windows: CalibrationWindows) -> CalibrationWindows:
    """Return as many of these windows, and as much of each, as the encoding's rounding is to read."""
    learned = encoding.learned
    return windows if learned is None else windows.first(learned.nsamples).shortened(learned.seqlen)


def tokenizer_of(model: Any, config: DobiSVDConfig, tokenizer: Any) -> Any:
    """Return the tokenizer that was passed, the config's, or where the model's own lies; None where nowhere."""
    given = tokenizer if tokenizer is not None else config.tokenizer
    return TokenizerSource.of(model) if given is None else given
