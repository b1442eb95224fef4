"""Options of the commands: one table for the flags of the command line and the keys of recipes."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


class UsageError(Exception):
    """A request that no command understands: an unknown option, a value of the wrong type. Exit code 2."""


class Refused(Exception):
    """A request that this machine cannot fulfill. `result` is what `--json` writes all the same."""

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        key: its name in a recipe; the flag is the same with dashes.
        help: one sentence; the default is added.
        kind: `str`, `int`, `float`, `bool` (a flag without value) or `dict` (JSON on the command line).
        default: the value where nothing is given.
        many: a list of values.
        positional, required: as in argparse.
        choices: the values allowed, if they can be listed.
        metavar: the value's name in the help.
        item_flag: for a `dict`, a second, repeatable flag that adds one entry, written `KEY:JSON`.
        from_config: the default is that of the `DobiSVDConfig` field of this name; None stands for it until the config
            is made.
        transient: says where results go or how a run behaves, not what is computed; left out of saved recipes.
    """

    key: str
    help: str
    kind: type = str
    default: Any = None
    many: bool = False
    positional: bool = False
    required: bool = False
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    item_flag: str | None = None
    transient: bool = False
    from_config: bool = False

    @property
    def flag(self) -> str:
        """The long flag."""
        return "--" + self.key.replace("_", "-")


# What YAML may give for each kind, and its name in messages.
_KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    float: ((float, int), "a number"),
    int: ((int,), "a whole number"),
    str: ((str,), "text"),
    bool: ((bool,), "true or false"),
    dict: ((dict,), "a mapping"),
}

RENAMED = {
    "storage": ("quantization", "mixed"),
    "inner": ("quantization",),
    "dense_storage": ("quantization",),
}
"""Options of earlier versions, and what says the same now."""

OptionGroups = Mapping[str, tuple[Option, ...]]


@dataclass(frozen=True)
class CommandSpec:
    """One subcommand: its options by group, and the function that does it.

    `execute(options, console)` prints for people on `console` and returns what `--json` writes. `check(options)`
    raises UsageError where options make no sense together; a recipe's steps are checked before the first one runs.
    """

    name: str
    summary: str
    groups: OptionGroups
    examples: str
    execute: Callable[[dict[str, Any], Any], dict[str, Any]]
    check: Callable[[dict[str, Any]], None] = lambda options: None

    @property
    def options(self) -> list[Option]:
        """All options, in order."""
        return [option for group in self.groups.values() for option in group]


def add_options(parser: argparse.ArgumentParser, spec: CommandSpec) -> None:
    """Give an argparse parser the command's description, options and examples."""
    parser.description = spec.summary
    parser.formatter_class = _HelpFormatter
    parser.epilog = f"examples:\n{spec.examples}"
    parser.allow_abbrev = False
    for title, options in spec.groups.items():
        group = parser.add_argument_group(title)
        for option in options:
            _add_option(group, option)
    known = {option.key for option in spec.options}
    for old, new in RENAMED.items():
        now = " or ".join(f"--{key}" for key in new if key in known)
        if now:
            flag = f"--{old.replace('_', '-')}"
            parser.add_argument(flag, action=_Refuse, nargs="?", const=now, help=argparse.SUPPRESS)


def from_command_line(spec: CommandSpec, arguments: argparse.Namespace) -> dict[str, Any]:
    """The parsed arguments as `{key: value}`."""
    return {option.key: getattr(arguments, option.key) for option in spec.options}


def from_recipe(spec: CommandSpec, given: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's `{key: value}` with defaults filled in; dashes in keys count as underscores.

    Raises:
        UsageError: an unknown key (names a near one), a missing one, or a value of the wrong type.
    """
    known = {option.key: option for option in spec.options}
    values = {str(key).replace("-", "_"): value for key, value in given.items()}
    for key in values:
        if key not in known:
            raise UsageError(f"{spec.name}: {unknown_option(key, known)}")
    result = {}
    for key, option in known.items():
        value = values.get(key)
        if value is None and option.required:
            raise UsageError(f"{spec.name}: the option {key!r} is missing")
        result[key] = option.default if value is None else _checked(spec.name, option, value)
    return result


def unknown_option(wanted: str, known: Iterable[str]) -> str:
    """The end of an error message: an option that there is not, and what was probably meant."""
    now = [key for key in RENAMED.get(wanted, ()) if key in known]
    if now:
        return f"there is no option {wanted!r} any more; write {' or '.join(map(repr, now))}"
    return f"unknown option {wanted!r}; {near_or_all(wanted, known)}"


def near_or_all(wanted: str, known: Iterable[str]) -> str:
    """The end of an error message: the name that was probably meant, or all there are."""
    names = sorted(known)
    near = difflib.get_close_matches(wanted, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names)}"


def _add_option(group: argparse._ArgumentGroup, option: Option) -> None:
    help_text = _help(option)
    if option.positional:
        nargs = "+" if option.many else None if option.required else "?"
        group.add_argument(option.key, metavar=option.metavar, help=help_text, nargs=nargs)
        return
    if option.kind is bool:
        group.add_argument(option.flag, dest=option.key, action="store_true", help=help_text)
        return
    if option.kind is dict:
        common: dict[str, Any] = {"dest": option.key, "action": _Merge, "default": option.default}
        group.add_argument(option.flag, type=_json_object, metavar="JSON", help=help_text, **common)
        if option.item_flag:
            group.add_argument(
                option.item_flag,
                type=_json_entry,
                metavar=option.metavar,
                help="one entry of it; repeatable",
                **common,
            )
        return
    settings: dict[str, Any] = {"type": option.kind, "default": option.default, "required": option.required}
    if option.many:
        settings |= {"nargs": "+", "action": _Extend}
    group.add_argument(
        option.flag, dest=option.key, choices=option.choices, metavar=option.metavar, help=help_text, **settings
    )


class _HelpOfConfig(str):
    """The help of an option whose default is that of a field of `DobiSVDConfig`."""

    key: str


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """A formatter that adds the defaults of `DobiSVDConfig`: only now, since looking them up imports transformers."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if not isinstance(action.help, _HelpOfConfig):
            return action.help
        from ..config import default_of

        return _with_default(action.help, default_of(action.help.key))


def _help(option: Option) -> str:
    text = option.help.replace("%", "%%")
    if option.from_config:
        found = _HelpOfConfig(text)
        found.key = option.key
        return found
    if option.required and not option.positional:
        return f"{text} (required)"
    return text if option.kind is bool else _with_default(text, option.default)


def _with_default(text: str, default: Any) -> str:
    return text if default in (None, [], {}) else f"{text} (default: {default})"


class _Refuse(argparse.Action):
    """The refusal of a flag of an earlier version."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        parser.error(f"there is no {option_string} any more; write {self.const}")


class _Extend(argparse.Action):
    """The values of all uses of a flag. Where an operand is missing in the end, the error tells what the flag took."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), *values])
        usual = type(parser).error

        def error(message: str) -> None:
            if "are required" in message:
                message += (
                    f" ({option_string} takes all that follows it, and took {' '.join(values)}: put what is no "
                    "value of it before it, or another option between them)"
                )
            usual(parser, message)

        parser.error = error


class _Merge(argparse.Action):
    """The union of all objects given, later entries winning."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), **values})


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text!r}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object such as {{...}}, got {text!r}")
    return value


def _json_entry(text: str) -> dict[str, Any]:
    key, separator, value = text.partition(":{")  # a pattern may have colons itself: "re:.*down_proj"
    if not separator or not key:
        raise argparse.ArgumentTypeError(f"expected PATTERN:JSON such as 'down_proj:{{\"ratio\": 0.9}}', got {text!r}")
    return {key: _json_object("{" + value)}


def _checked(command: str, option: Option, value: Any) -> Any:
    if option.many:
        values = value if isinstance(value, list) else [value]
        return [_scalar(command, option, item) for item in values]
    return _scalar(command, option, value)


def _scalar(command: str, option: Option, value: Any) -> Any:
    allowed, name = _KINDS[option.kind]
    if not isinstance(value, allowed) or (isinstance(value, bool) and option.kind is not bool):
        raise UsageError(f"{command}: {option.key} must be {name}, got {value!r}")
    if option.choices is not None and value not in option.choices:
        raise UsageError(f"{command}: {option.key} must be one of {', '.join(option.choices)}, got {value!r}")
    return option.kind(value)
