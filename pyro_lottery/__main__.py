"""Lists the commands: ``python -m pyro_lottery``."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = ("imp", "controls", "transplant", "evaluate", "diagnose", "report", "sites", "export", "predict")


def text() -> str:
    """One line per command: how to run it, and the first line of its module's docstring."""
    lines = [f"python -m pyro_lottery.{name:<11} {_first_line(name)}" for name in COMMANDS]
    return "\n".join([*lines, "", "Each command has --help."])


def _first_line(name: str) -> str:
    docstring = str(importlib.import_module(f"pyro_lottery.{name}").__doc__)
    return docstring.split("\n")[0].split(": ``")[0].rstrip(".")


def main(arguments: Sequence[str]) -> int:
    """Print the list; returns the exit code, which is 2 for arguments: commands are modules of their own."""
    if not arguments:
        print(text())
        return 0
    name = next((name for name in COMMANDS if name == arguments[0]), "COMMAND")
    print(f"python -m pyro_lottery takes no arguments; did you mean python -m pyro_lottery.{name}?", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
