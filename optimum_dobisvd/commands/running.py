"""The frame around every command: where output goes, how errors look, which exit code there is."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

from .options import CommandSpec, Option, Refused, UsageError

STDOUT = "-"
_WIDTH_WITHOUT_TERMINAL = 119

RUNNING = (
    Option("json", "write the result as JSON to this file; - is standard output", metavar="FILE", transient=True),
    Option("debug", "show the traceback of an error", kind=bool, default=False, transient=True),
)


def run_command(spec: CommandSpec, options: dict[str, Any]) -> int:
    """Execute a command and return the process's exit code.

    0: done. 1: an error, told in one line on standard error. 2: a request that makes no sense. 130: Ctrl-C.
    SIGTERM leaves through SystemExit with 143, temporary folders removed as well.
    """
    _wait_without_spinning()
    _print_anything()
    try:
        with _terminated_like_an_error():
            execute(spec, options)
    except KeyboardInterrupt:
        print("interrupted; nothing half-written is left", file=sys.stderr)
        return 130
    except Exception as error:
        if options.get("debug"):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _print_anything() -> None:
    """Have characters that the terminal's encoding lacks written as `?`: a run must not fail at its last line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _wait_without_spinning() -> None:
    """Have PyTorch's threads sleep soon where they wait for each other; it reads this when it is first imported.

    They would spin for milliseconds. Where another process takes a core, that is what most of their time goes into,
    and a minute's work takes ten.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def execute(spec: CommandSpec, options: dict[str, Any], console: Console | None = None) -> dict[str, Any]:
    """Execute a command, write its JSON where the options say, and return it.

    With JSON on standard output, nothing else is printed there.
    """
    spec.check(options)
    target = options.get("json")
    try:
        if target == STDOUT:
            with contextlib.redirect_stdout(sys.stderr):
                result = spec.execute(options, Console(quiet=True))
        else:
            result = spec.execute(options, console or _console())
    except Refused as refusal:
        _write_json(refusal.result, target)
        raise
    _write_json(result, target)
    return result


def _write_json(result: dict[str, Any], target: str | None) -> None:
    text = json.dumps(result, indent=1)
    if target == STDOUT:
        print(text)
    elif target is not None:
        from ..atomic_files import write_text_atomically

        write_text_atomically(target, text + "\n")


def _console() -> Console:
    return Console(
        width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL, highlight=False, markup=False, emoji=False
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "out of memory" in text.lower() or "can't allocate memory" in text or isinstance(error, MemoryError):
        return (
            f"out of memory ({text[:200]}): `optimum-cli dobisvd plan` tells what a run needs; lower batch_size or "
            "seqlen, name a statistics folder, or let device_map place the model"
        )
    if isinstance(error, ValueError | OSError | TypeError | ImportError | UsageError | Refused) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


@contextlib.contextmanager
def _terminated_like_an_error() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that temporary folders are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: Any) -> None:
        print("terminated; nothing half-written is left", file=sys.stderr)
        raise SystemExit(128 + number)

    previous: Callable | int | None = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
