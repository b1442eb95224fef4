"""The root of `optimum-cli dobisvd`, and its subcommands as optimum-cli wants them."""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from . import bench, compare, compress, eval, inspect, plan, quantize, run
from .options import CommandSpec, add_options, from_command_line
from .running import run_command


def _subcommand(spec: CommandSpec) -> CommandInfo:
    """A subcommand class for optimum-cli, made from the table."""

    class Subcommand(BaseOptimumCLICommand):
        @staticmethod
        def parse_args(parser: ArgumentParser) -> None:
            add_options(parser, spec)

        def run(self) -> None:
            # optimum-cli ignores what `run` returns.
            sys.exit(run_command(spec, from_command_line(spec, self.args)))

    return CommandInfo(name=spec.name, help=spec.summary, subcommand_class=Subcommand)


class DobiSVDCommand(BaseOptimumCLICommand):
    """`optimum-cli dobisvd`."""

    COMMAND = CommandInfo(
        name="dobisvd", help="Compress language models by low-rank factorization (SVD-LLM, Dobi-SVD)."
    )
    SUBCOMMANDS = tuple(
        _subcommand(module.SPEC) for module in (compress, quantize, plan, eval, compare, bench, inspect, run)
    )

    def run(self) -> None:
        self.parser.print_help(sys.stderr)
        sys.exit(2)
