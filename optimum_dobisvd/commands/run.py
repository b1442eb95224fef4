"""`optimum-cli dobisvd run`: the steps of a recipe, one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import bench, compare, compress, eval, generate, inspect, plan, quantize
from .options import CommandSpec, Option, UsageError, from_recipe, near_or_all, unknown_option
from .running import RUNNING

if TYPE_CHECKING:
    from rich.console import Console

STEPS = {
    module.SPEC.name: module.SPEC for module in (compress, plan, quantize, eval, compare, bench, inspect, generate)
}
_NOTES = ("versions", "files")  # what a saved recipe records beside its step; read by people

_GROUPS = {
    "recipe": (
        Option("recipe", "a YAML file", positional=True, required=True, metavar="RECIPE.yaml"),
        Option(
            "set",
            "change an option: STEP.OPTION=VALUE for the steps of that name, OPTION=VALUE for every step that has it; "
            "VALUE is YAML",
            many=True,
            default=[],
            metavar="KEY=VALUE",
        ),
    ),
    "running": RUNNING,
}

_EXAMPLES = """\
  optimum-cli dobisvd run recipes/demo.yaml
  optimum-cli dobisvd run recipes/demo.yaml --set compress.model=Qwen/Qwen3-0.6B compress.gguf_file=null
  optimum-cli dobisvd run llama-0.8/dobisvd_recipe.yaml --set compress.ratio=0.6 out=llama-0.6

A recipe is a list of steps with the options of these commands:
  steps:
    - compress: {model: meta-llama/Llama-3.2-1B, ratio: 0.8, dataset: wikitext2, out: llama-0.8}
    - eval: {out: llama-0.8, dataset: [c4], windows: 20}
Relative paths start from the working directory."""


def execute(options: dict[str, Any], console: Console) -> dict[str, Any]:
    """Run the steps; returns `{"steps": [{name: result}, ...]}`. All steps are checked before the first one runs.

    Raises:
        UsageError: the recipe is not one (names the key and a near one).
        ValueError: a step would delete what it reads, or the recipe.
        FileNotFoundError: there is no such file.
    """
    from .running import execute as execute_step

    steps = read_steps(options["recipe"], options["set"])
    results = []
    for number, (spec, given) in enumerate(steps, start=1):
        if len(steps) > 1:
            console.rule(f"step {number} of {len(steps)}: {spec.name}", align="left")
        results.append({spec.name: execute_step(spec, given, console)})
    return {"steps": results}


def read_steps(path: str, changes: list[str]) -> list[tuple[CommandSpec, dict[str, Any]]]:
    """Return the steps of a recipe with `--set` applied, each with all its options. Raises as `execute` does."""
    from .output_folder import refuse_losing
    from .saved_recipe import RECIPE_NAME

    steps = [_step(number, entry) for number, entry in enumerate(_read(path), start=1)]
    for change in changes:
        _apply(change, steps)
    resolved = [(spec, from_recipe(spec, given)) for spec, given in steps]
    for spec, options in resolved:
        spec.check(options)
        if "overwrite" in options and options["out"] is not None and Path(path).name != RECIPE_NAME:
            refuse_losing(options["out"], [(f"the recipe {path}", Path(path))])
    return resolved


SPEC = CommandSpec(
    name="run",
    summary="Run the steps of a recipe, a YAML file with the options of these commands.",
    groups=_GROUPS,
    examples=_EXAMPLES,
    execute=execute,
)


def _read(path: str) -> list[Any]:
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"there is no recipe {path}; relative paths start from the working directory"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected a mapping with 'steps', got {type(content).__name__}")
    for key in content:
        if key != "steps" and key not in _NOTES:
            raise UsageError(f"{path}: unknown key {key!r}; {near_or_all(str(key), ['steps', *_NOTES])}")
    steps = content.get("steps")
    if not isinstance(steps, list) or not steps:
        raise UsageError(f"{path}: 'steps' must be a list of steps such as '- compress: {{...}}'")
    return steps


def _step(number: int, entry: Any) -> tuple[CommandSpec, dict[str, Any]]:
    if not isinstance(entry, dict) or len(entry) != 1:
        raise UsageError(
            f"step {number} must be one command with its options, such as 'compress: {{...}}', got {entry!r}"
        )
    name, given = next(iter(entry.items()))
    if name not in STEPS:
        raise UsageError(f"step {number}: unknown command {name!r}; {near_or_all(str(name), STEPS)}")
    if not isinstance(given, dict):
        raise UsageError(f"step {number}: the options of {name} must be a mapping, got {given!r}")
    return STEPS[name], {str(key).replace("-", "_"): value for key, value in given.items()}


def _apply(change: str, steps: list[tuple[CommandSpec, dict[str, Any]]]) -> None:
    """Put one `KEY=VALUE` into the steps it is for."""
    import yaml

    key, separator, text = change.partition("=")
    if not separator or not key:
        raise UsageError(f"--set takes KEY=VALUE, got {change!r}")
    step, _, option = key.replace("-", "_").rpartition(".")
    meant = [(spec, given) for spec, given in steps if not step or spec.name == step]
    if not meant:
        raise UsageError(f"--set {change}: no step {step!r}; {near_or_all(step, [spec.name for spec, _ in steps])}")
    takers = [given for spec, given in meant if option in {known.key for known in spec.options}]
    if not takers:
        known = {known.key for spec, _ in meant for known in spec.options}
        raise UsageError(f"--set {change}: {unknown_option(option, known)}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {change}: the value is not YAML: {error}") from error
    for given in takers:
        given[option] = value
