"""A step of recipes: a sentence from the compressed model in a new process, beside one from the dense model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .options import CommandSpec, Option
from .running import RUNNING

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from .sources import ModelSource

_GROUPS = {
    "input": (
        Option("out", "folder of a compressed checkpoint", positional=True, required=True, metavar="OUT"),
        Option("prompt", "text to continue", required=True, metavar="TEXT"),
        Option("max_new_tokens", "tokens to generate", kind=int, default=40, metavar="N"),
        Option("device", "where both models run", default="cpu"),
    ),
    "running": RUNNING,
}


def execute(options: dict[str, Any], console: Console) -> dict[str, Any]:
    """Generate greedily from the compressed model in a new process, and from the dense model its recipe names.

    Raises:
        RuntimeError: the new process failed; the message has its last line.
    """
    from pathlib import Path

    from .dense_source import dense_source
    from .saved_recipe import compress_options

    folder = Path(options["out"])
    dense, made_with = dense_source(options["out"], None), compress_options(folder) or {}
    result: dict[str, Any] = {"prompt": options["prompt"]}
    trust = bool(made_with.get("trust_remote_code"))
    if dense.note is not None:
        console.print(f"({dense.note})", soft_wrap=True)
    if dense.source is not None:
        result["dense"] = _dense_text(dense.source, {"dtype": dense.dtype or "auto", "trust": trust, **options})
        console.print(f"dense:      {options['prompt']}{result['dense']}", soft_wrap=True)
    result["compressed"] = _text_from_new_process(folder, trust, options)
    console.print(f"compressed: {options['prompt']}{result['compressed']}", soft_wrap=True)
    console.print(
        "(the compressed model: from_pretrained in a new process that imports transformers and nothing else)"
    )
    return result


SPEC = CommandSpec(
    name="generate",
    summary="Continue a text with the compressed model, loaded in a new process, and with the dense one.",
    groups=_GROUPS,
    examples="",
    execute=execute,
)


def _text_from_new_process(folder: Path, trust: bool, options: dict[str, Any]) -> str:
    import json
    import subprocess
    import sys
    from pathlib import Path

    script = Path(__file__).with_name("fresh_process.py").read_text(encoding="utf-8")
    request = {
        "model": str(folder),
        "tokenizer": str(folder),
        "trust_remote_code": trust,
        **{key: options[key] for key in ("prompt", "max_new_tokens", "device")},
    }
    # -c and not the file's path: that would put this folder, with its inspect.py, before the standard library.
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the checkpoint in {folder} did not load in a new process: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])["text"]


def _dense_text(source: ModelSource, options: dict[str, Any]) -> str:
    from .load_dense import load_dense, load_tokenizer

    tokenizer = load_tokenizer(source, trust_remote_code=options["trust"])
    model = load_dense(
        source, dtype=options["dtype"], device_map=options["device"], trust_remote_code=options["trust"]
    )
    return continuation(model, tokenizer, options["prompt"], options["max_new_tokens"])


def continuation(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """Return what a model writes after a prompt, greedily."""
    import torch

    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        tokens = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
