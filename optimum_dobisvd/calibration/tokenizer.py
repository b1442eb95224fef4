"""Tokenizers: where they are loaded from, what else may stand for one, and how they are told apart."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_IDENTITY_PROBE = "The 3 quick foxes' café\n\n\tdef f(x): return x**2  # 模型 🙂"
# How the hub's cache names a file: CACHE/models--ORG--NAME/snapshots/COMMIT/SUBFOLDER/FILE.
_IN_HUB_CACHE = re.compile(r"(?P<cache>.*)/models--[^/]+/snapshots/(?P<commit>[^/]+)/(?P<file>.+)")


@dataclass(frozen=True)
class TokenizerSource:
    """Where a tokenizer is loaded from: the first argument of `AutoTokenizer.from_pretrained`, and the others.

    `refusal` says why it cannot be known which tokenizer is meant, `doubt` what is only assumed; both are told when
    the tokenizer is needed, which it is not for calibration on token ids.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    refusal: str | None = None
    doubt: str | None = None

    @classmethod
    def beside(cls, model: Any, checkpoint_files: Sequence[str] | None) -> TokenizerSource | None:
        """Return where the tokenizer of a model lies whose weights are read from `checkpoint_files`; None if nowhere.

        The arguments that `from_pretrained` of the model was given are not told to a quantizer. Where its files were
        found says the same: the folder, or the cache, commit and subfolder of a repository of the hub.
        """
        name = getattr(model, "name_or_path", None)
        if not name:
            return None
        if not checkpoint_files:
            return cls.of(model)
        first = Path(os.path.abspath(checkpoint_files[0]))
        if os.path.isdir(name):
            return cls(str(first.parent), _trust(model))
        cached = _IN_HUB_CACHE.fullmatch(first.as_posix())
        if cached is None:
            return cls(name, refusal=f"its weights lie in {first.parent}, where no tokenizer can be looked for")
        found = {"revision": cached["commit"], "cache_dir": cached["cache"]}
        return cls(name, {**_trust(model), **found, "subfolder": os.path.dirname(cached["file"])})

    @classmethod
    def of(cls, model: Any) -> TokenizerSource | None:
        """Return where the tokenizer of a model in memory lies, by its name alone; None if it has no name."""
        name = getattr(model, "name_or_path", None)
        if not name:
            return None
        config = getattr(model, "config", None)
        if not os.path.isdir(name):
            commit = getattr(config, "_commit_hash", None)  # kept by transformers before 5.2x
            return cls(
                name,
                {**_trust(model), **({} if commit is None else {"revision": commit})},
                doubt="if the model was loaded with subfolder or revision, pass its tokenizer",
            )
        try:
            stored = json.loads(Path(name, "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return cls(name, refusal="there is no config.json in the folder, so the model is from a subfolder of it")
        for key in ("model_type", "vocab_size"):
            if key in stored and stored[key] != getattr(config, key, stored[key]):
                reason = f"{key} is {stored[key]!r} in its config.json and {getattr(config, key)!r} in the model"
                return cls(name, refusal=reason)
        return cls(name, _trust(model))

    def load(self, remedy: str = "pass a tokenizer, or its folder") -> Any:
        """Return the tokenizer. ValueError, with the remedy, where there is none, or one without a vocabulary."""
        from transformers import AutoTokenizer

        if self.refusal is not None:
            raise ValueError(f"cannot tell which tokenizer belongs to {self}: {self.refusal}; pass the tokenizer")
        if self.doubt is not None:
            logger.warning("calibrating with the tokenizer of %s: %s", self, self.doubt)
        try:
            # False and not None: that would ask on the terminal, in the middle of a run.
            tokenizer = AutoTokenizer.from_pretrained(self.name, **{"trust_remote_code": False, **self.arguments})
        except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"could not load the tokenizer {self}: {remedy}. {reason}") from error
        if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
            # What transformers makes of a config.json alone; it encodes any text as nothing.
            raise ValueError(f"could not load the tokenizer {self}: {remedy}. No file there holds a vocabulary")
        own_code = "AutoTokenizer" in (getattr(tokenizer, "init_kwargs", {}).get("auto_map") or {})
        if own_code and not self.arguments.get("trust_remote_code"):
            logger.warning(
                "the tokenizer %s has code of its own, which is not run here: to calibrate through it, pass "
                "tokenizer=AutoTokenizer.from_pretrained(..., trust_remote_code=True)",
                self,
            )
        return tokenizer

    def __str__(self) -> str:
        told = {key: self.arguments[key] for key in ("revision", "subfolder") if self.arguments.get(key)}
        return repr(self.name) + "".join(f", {key} {value}" for key, value in told.items())


def _trust(model: Any) -> dict[str, Any]:
    """What the user has allowed: a model of remote code is there only because its repository was trusted."""
    return {"trust_remote_code": True} if type(model).__module__.startswith("transformers_modules.") else {}


def text_tokenizer(tokenizer: Any) -> Any:
    """Return what encodes text: a tokenizer as it is, that of a processor, or one loaded from a source or by name.

    Raises:
        TypeError: it is None, or nothing of that.
        ValueError: it could not be loaded.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if tokenizer is None:
        raise TypeError("calibrating on text needs a tokenizer: pass one, its name or its path, or pass token ids")
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = TokenizerSource(os.fspath(tokenizer))
    if isinstance(tokenizer, TokenizerSource):
        return tokenizer.load()
    if isinstance(tokenizer, Tokenizer):  # of the library below transformers' own
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    if not hasattr(tokenizer, "get_vocab") and hasattr(tokenizer, "tokenizer"):  # a processor of text and images
        tokenizer = tokenizer.tokenizer
    _require_tokenizer(tokenizer)
    return tokenizer


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """Return class name, vocabulary size, and a sha256 that changes when the tokenization does, as JSON values.

    For a fast tokenizer the digest is over its serialized pipeline (vocabulary, merges, normalizer, special tokens);
    its padding and truncation are left out, because ordinary calls change them. For a Python tokenizer it is over the
    vocabulary and the ids of a short probe text. TypeError if it is no tokenizer.
    """
    _require_tokenizer(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        pipeline = json.loads(backend.to_str())
        content = {key: value for key, value in pipeline.items() if key not in ("padding", "truncation")}
    else:
        probed = tokenizer(_IDENTITY_PROBE, verbose=False)["input_ids"]
        content = {"vocab": tokenizer.get_vocab(), "probe": probed}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {"class": type(tokenizer).__name__, "vocab_size": len(tokenizer), "sha256": digest}


def _require_tokenizer(tokenizer: Any) -> None:
    if not callable(tokenizer) or not hasattr(tokenizer, "get_vocab"):
        raise TypeError(f"expected a transformers tokenizer, its name or its path, got {type(tokenizer).__name__}")
