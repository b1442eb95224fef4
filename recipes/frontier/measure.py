"""Measure a checkpoint, through `from_pretrained` alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from optimum_dobisvd.calibration.dataset import read_text
from optimum_dobisvd.evaluation.harness import evaluate
from optimum_dobisvd.evaluation.mean_accuracy import compare_means
from optimum_dobisvd.evaluation.perplexity import perplexity
from optimum_dobisvd.evaluation.tasks import load_tasks
from optimum_dobisvd.model.footprint import resident_bytes

from .make import ADAPTER, load_in
from .settings import TASKS, Settings

_BATCH = 64  # linears of GPTQ and bitsandbytes unpack their weights in every pass
_BATCH_INT8 = 8  # questions; lm-eval holds the logits of all their tokens, several GB at 64
_PROMPT, _NEW = 512, 24
_ROUNDS = 5


def load(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """Load a checkpoint, or an adapter with the checkpoint below it, either in `dtype`."""
    if not (folder / ADAPTER).exists():
        return load_in(folder, dtype, device)
    from peft import PeftConfig, PeftModel

    below = str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)
    model = PeftModel.from_pretrained(load_in(below, dtype, device), str(folder))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)  # stored in 16 bits; PEFT holds it in 32
    return model.eval()


def sizes(folder: Path, settings: Settings) -> dict[str, Any]:
    """Return the bytes of the weights on disk, the model below an adapter included, and in memory."""
    files = list(folder.glob("*.safetensors"))
    if (folder / ADAPTER).exists():
        files += (folder.parent / "checkpoint").glob("*.safetensors")
    return {
        "disk": sum(file.stat().st_size for file in files),
        "memory": resident_bytes(load(folder, torch.bfloat16, settings.device)),
    }


def perplexities(folder: Path, settings: Settings) -> dict[str, Any]:
    """Return the perplexity by text, computed in float32."""
    model, tokenizer = load(folder, torch.float32, settings.device), AutoTokenizer.from_pretrained(folder)
    return {
        Path(name).name: perplexity(
            model, tokenizer, read_text(name, "test"), seqlen=settings.seqlen, windows=settings.eval_windows
        )
        for name in settings.eval_dataset
    }


def accuracies(folder: Path, settings: Settings) -> dict[str, Any]:
    """Return lm-eval's figures by task and their mean, computed in float32.

    LLM.int8() rounds activations as the batch's largest ones will have it, and what else is read changes an answer:
    it is evaluated in lm-eval's own batches.
    """
    from .shared_contexts import SharedContextLM

    model, tokenizer = load(folder, torch.float32, settings.device), AutoTokenizer.from_pretrained(folder)
    in_int8 = getattr(model, "is_loaded_in_8bit", False)
    found = evaluate(
        model,
        tokenizer,
        load_tasks(TASKS, settings.data_dir),
        limit=settings.limit,
        batch_size=_BATCH_INT8 if in_int8 else _BATCH,
        lm_class=None if in_int8 else SharedContextLM,
    )
    means = compare_means({task: {"compressed": figures} for task, figures in found.items()})
    return {"tasks": found, "mean": means["compressed"] if means else None}


@torch.inference_mode()
def speeds(folder: Path, dense: Path, settings: Settings) -> dict[str, Any]:
    """Return milliseconds per token of a prompt of 512 tokens and of decoding with the cache, and over dense.

    Both models take turns round by round in this process; medians. In bfloat16, but on CPUs in float32: many multiply
    nothing shorter fast, and an encoding that unpacks to it would be compared with a dense model that nobody runs
    there.
    """
    dtype = torch.float32 if settings.device == "cpu" else torch.bfloat16
    models = {name: load(each, dtype, settings.device) for name, each in (("compressed", folder), ("dense", dense))}
    generator = torch.Generator().manual_seed(settings.seed)
    prompt = torch.randint(0, models["dense"].config.vocab_size, (1, _PROMPT), generator=generator)
    prompt = prompt.to(settings.device)
    taken: dict[tuple[str, str], list[float]] = {}
    for turn in range(_ROUNDS + 1):
        for name, model in models.items():
            prefill, decode = _one_round(model, prompt)
            if turn:  # the first one warms up
                taken.setdefault((name, "prefill"), []).append(prefill)
                taken.setdefault((name, "decode"), []).append(decode)
    found = {key: statistics.median(values) for key, values in taken.items()}
    return {
        phase: {
            "ms_per_token": found["compressed", phase],
            "dense_ms_per_token": found["dense", phase],
            "speedup": found["dense", phase] / found["compressed", phase],
        }
        for phase in ("prefill", "decode")
    }


def _one_round(model: Any, prompt: torch.Tensor) -> tuple[float, float]:
    """Return milliseconds per token of the prompt, and of the tokens after it."""
    started = _now()
    out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    middle = _now()
    for _ in range(_NEW):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    ended = _now()
    return 1000 * (middle - started) / _PROMPT, 1000 * (ended - middle) / _NEW


def _now() -> float:
    """Return the time in seconds, everything that was begun on a GPU being done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


MEASURES: dict[str, Callable[[Path, Settings], dict[str, Any]]] = {
    "sizes": sizes,
    "perplexity": perplexities,
    "accuracy": accuracies,
}
