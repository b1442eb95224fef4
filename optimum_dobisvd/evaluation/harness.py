"""lm-eval on a model, its figures as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .quiet import quiet_lm_eval
from .tasks import LoadedTasks

Figures = dict[str, Any]
"""`{metric: {"value": float, "stderr": float or None}, ..., "samples": int}`"""


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: LoadedTasks,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    lm_class: type | None = None,
) -> dict[str, Figures]:
    """Return lm-eval's figures of a model by task: exactly those of `lm_eval --model hf` with these settings.

    Args:
        model: a causal language model of transformers, on the device and in the dtype to evaluate it in.
        tokenizer: its tokenizer; it is given a padding token where it has none.
        tasks: what to evaluate it on.
        limit: the first so many examples of each task; None takes all.
        num_fewshot: examples with their answers before each question; None takes what each task says.
        batch_size: sequences per forward pass.
        lm_class: a subclass of lm-eval's `HFLM` to evaluate through, figures being its own; None takes `HFLM` itself.

    Returns:
        For each task or aggregated group its metrics as lm-eval calls them (those of a filter other than `none` with
        its name: `exact_match,strict-match`), and `samples`, how many examples were read. A standard error that
        lm-eval does not tell is None.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with quiet_lm_eval():
        found = simple_evaluate(
            model=(lm_class or HFLM)(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks.members.values()),
            task_manager=tasks.manager,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            limit=limit,
            log_samples=False,
        )
    return {name: _figures(found["results"][name]) for name in tasks.members}


def _figures(result: Mapping[str, Any]) -> Figures:
    """`{"acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 20, ...}` as `Figures`."""
    figures: Figures = {}
    for key, value in result.items():
        metric, separator, filter_name = key.partition(",")
        if not separator or metric.endswith("_stderr"):
            continue
        error = result.get(f"{metric}_stderr,{filter_name}")
        name = metric if filter_name == "none" else key
        figures[name] = {"value": float(value), "stderr": float(error) if isinstance(error, float) else None}
    return {**figures, "samples": result["sample_len"]}
