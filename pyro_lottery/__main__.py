"""What can be run: ``python -m pyro_lottery`` lists the commands."""

import importlib

COMMANDS = ("imp", "controls", "transplant", "evaluate", "report", "sites")


def text() -> str:
    """One line a command: its name, and the first sentence of its module's docstring."""
    lines = [f"python -m pyro_lottery.{name:<11} {_first_line(name)}" for name in COMMANDS]
    return "\n".join([*lines, "", "Each takes --help."])


def _first_line(name: str) -> str:
    docstring = str(importlib.import_module(f"pyro_lottery.{name}").__doc__)
    return docstring.split("\n")[0].split(": ``")[0].rstrip(".")


if __name__ == "__main__":
    print(text())
