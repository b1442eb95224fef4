"""Adds `optimum-cli dobisvd`.

The wheel installs this file as `optimum/commands/register/register_dobisvd.py`, the folder that optimum-cli reads at
every start. It must import nothing heavy: the commands import torch and transformers inside `run`.
"""

from optimum_dobisvd.commands.root import DobiSVDCommand

REGISTER_COMMANDS = [DobiSVDCommand]
