"""Lists the commands: ``python -m pyro_lottery``."""

import importlib

COMMANDS = ("imp", "controls", "transplant", "evaluate", "diagnose", "report", "sites", "export", "predict")


def text() -> str:
    """One line per command: how to run it, and the first line of its module's docstring."""
    lines = [f"python -m pyro_lottery.{name:<11} {_first_line(name)}" for name in COMMANDS]
    return "\n".join([*lines, "", "Each command has --help."])


def _first_line(name: str) -> str:
    docstring = str(importlib.import_module(f"pyro_lottery.{name}").__doc__)
    return docstring.split("\n")[0].split(": ``")[0].rstrip(".")


if __name__ == "__main__":
    print(text())
