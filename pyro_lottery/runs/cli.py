"""What every command does alike: its options, one line for what went wrong, and the exit codes."""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from pyro_lottery import machine
from pyro_lottery.distributed import is_first
from pyro_lottery.errors import Damaged, Diverged, Failed, Stopped, UserError
from pyro_lottery.runs.config import PRESET_HELP, Config, as_text, dashed, preset


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line, and whose options are never guessed from their beginnings."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)

    def add_run_options(self) -> None:
        """Add what commands on a finished run take: where to compute, where the data lie now, whom to trust."""
        self.add_argument("--device", default="auto", help=Config.__dataclass_fields__["device"].metadata["help"])
        self.add_argument("--data-dir", help="where the run's data lie; default: where they lay when it was trained")
        self.add_trust_option()

    def add_trust_option(self) -> None:
        """Add ``--trust-code``."""
        self.add_argument(
            "--trust-code", action="store_true", help="import the code that the run's config.json names, if any"
        )

    def add_options(self, only: Collection[str] | None = None, but: Collection[str] = ()) -> None:
        """Add the options of :class:`Config`; one that is not given leaves no trace in the namespace."""
        for f in fields(Config):
            if f.name in but or (only is not None and f.name not in only):
                continue
            meta = f.metadata
            shown = "" if f.default is None else f" (default: {as_text(f.default)})"
            if meta["kind"] is bool:
                self.add_argument(
                    f"--{dashed(f.name)}",
                    dest=f.name,
                    action="store_true",
                    default=argparse.SUPPRESS,
                    help=meta["help"],
                )
                continue
            choices = f": {', '.join(meta['choices'])}" if meta["choices"] else ""
            self.add_argument(
                f"--{dashed(f.name)}",
                dest=f.name,
                type=meta["kind"],
                nargs="*" if meta["many"] else None,
                default=argparse.SUPPRESS,
                metavar=f.name.upper(),
                help=(meta["help"] + choices + shown).replace("%", "%%"),
            )


def parse(prog: str, description: str, arguments: Sequence[str] | None = None) -> Config:
    """Read the command line; options given beside ``--preset`` win. Bad input raises or exits with 2, in one line."""
    parser = Parser(prog, description)
    parser.add_argument("--preset", default="default", help=PRESET_HELP)
    parser.add_options()
    given = vars(parser.parse_args(arguments))
    return preset(given.pop("preset"), **given)


def run_command(prog: str, work: Callable[[], Any], arguments: Sequence[str] | None = None) -> int:
    """Do ``work``; returns the exit code: 0 finished, 2 bad input, 75 stopped with everything saved, 130 interrupted by a
    second SIGINT, 1 otherwise.

    Warnings and errors become one line each on stderr that begins with ``prog``; that of a stop ends with the command
    that goes on, ``prog`` and its ``arguments`` (those of the process).
    """

    def complain(text: object) -> None:
        if not is_first():
            return
        line = str(text).split("\n")[0]  # Pyro adds its trace's shapes to what goes wrong within
        print(f"{prog}: {line}", file=sys.stderr)

    machine.keep_memory()  # training is quicker by a twentieth, evaluation by a fifth: the process is the command's own
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest, **more: complain(f"warning: {message}")
        try:
            work()
        except UserError as error:
            complain(error)
            return 2 if is_first() else 0  # or whoever started the ranks would end them all
        except Stopped:
            again = shlex.join(sys.argv[1:] if arguments is None else arguments)
            complain(f"stopped, everything is saved; to go on: {prog} {again}")
            return 75 if is_first() else 0
        except KeyboardInterrupt:
            complain("interrupted; what was saved is whole, and the same command goes on from there")
            return 130
        # Anything else is not foreseen, and its traceback is needed.
        except (Diverged, Damaged, Failed, OSError) as error:
            complain(f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error)
            return 1
    return 0
