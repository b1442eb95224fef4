"""Which auto class loads the architecture that a config names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import AutoModelForCausalLM
from transformers.models.auto import modeling_auto


def auto_classes(config: Any) -> Iterator[tuple[Any, tuple[type, ...]]]:
    """Yield every auto class of models that knows this kind of config, with the model classes it may build."""
    for name, auto_class in vars(modeling_auto).items():
        mapping = getattr(auto_class, "_model_mapping", None)  # no public way to ask
        if name.startswith("AutoModel") and mapping is not None and type(config) in mapping:
            found = mapping[type(config)]
            yield auto_class, found if isinstance(found, tuple) else (found,)


def auto_class_of(config: Any) -> Any:
    """Return the auto class that builds the first of a config's `architectures`; that of causal models by default."""
    wanted = next(iter(getattr(config, "architectures", None) or ()), None)
    known = (auto for auto, models in auto_classes(config) if wanted in {model.__name__ for model in models})
    return next(known, AutoModelForCausalLM)
