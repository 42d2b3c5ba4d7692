"""What all commands share: options, errors in one line, and exit codes."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from typing import Any

import torch

from pyro_lottery import machine
from pyro_lottery.distributed import is_first
from pyro_lottery.errors import Damaged, Diverged, Failed, OneLineParser, Stopped, UserError
from pyro_lottery.runs.config import Config, preset
from pyro_lottery.runs.options import as_text, dashed
from pyro_lottery.runs.presets import PRESET_HELP
from pyro_lottery.runs.signals import signals


class Parser(OneLineParser):
    """A parser that reports an error in one line and accepts no abbreviated options."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def add_run_options(self) -> None:
        """Add the options of commands on a finished run: ``--device``, ``--data-dir`` and ``--trust-code``."""
        self.add_argument("--device", default="auto", help=Config.__dataclass_fields__["device"].metadata["help"])
        self.add_argument("--data-dir", help="folder with the run's data; default: the run's own --data-dir")
        self.add_trust_option()

    def add_trust_option(self) -> None:
        """Add ``--trust-code``."""
        self.add_argument(
            "--trust-code", action="store_true", help="import code that the run's config.json names by import path"
        )

    def add_options(self, only: Collection[str] | None = None, but: Collection[str] = ()) -> None:
        """Add the options of :class:`Config`; the namespace then holds only those that are given."""
        for f in fields(Config):
            if f.name in but or (only is not None and f.name not in only):
                continue
            meta = f.metadata
            shown = "" if f.default is None else f" (default: {as_text(f.default)})"
            shared: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS}
            if meta["kind"] is bool:
                self.add_argument(f"--{dashed(f.name)}", action="store_true", help=meta["help"], **shared)
                continue
            choices = f": {', '.join(meta['choices'])}" if meta["choices"] else ""
            text = (meta["help"] + choices + shown).replace("%", "%%")
            shared |= {"metavar": f.name.upper(), "nargs": "*" if meta["many"] else None}
            names = [f"--{dashed(name)}" for name in (f.name, *meta["also"])]
            self.add_argument(*names, type=_reader(meta["kind"], meta["words"]), help=text, **shared)


def _reader(kind: Any, words: Sequence[str]) -> Any:
    """What reads an argument of ``kind``, or one of ``words``."""
    if not words:
        return kind

    def read(text: str) -> Any:
        return text if text in words else kind(text)

    read.__name__ = kind.__name__  # argparse says it: invalid float value
    return read


def parse(prog: str, description: str, arguments: Sequence[str] | None = None) -> Config:
    """Read the command line into a config; single options override those of ``--preset``.

    Raises ``UserError`` for a bad value; exits with 2, after one line on stderr, for an unknown option.
    """
    parser = Parser(prog, description)
    parser.add_argument("--preset", default="default", help=PRESET_HELP)
    parser.add_options()
    given = vars(parser.parse_args(arguments))
    return preset(given.pop("preset"), **given)


def run_command(
    prog: str, work: Callable[[], Any], arguments: Sequence[str] | None = None, resumes: bool = True
) -> int:
    """Do ``work`` and return the exit code: 0 finished, 2 bad input, 75 stopped with everything saved, 130 interrupted by a
    second SIGINT, or by the first if the work is not one that ``resumes``, 1 any other error.

    Prints each warning and error as one line on stderr that starts with ``prog``. The line about a stop ends with the command
    that resumes the work: ``prog`` and ``arguments``, by default those of the process.
    """

    def complain(text: object) -> None:
        if not is_first():
            return
        line = str(text).split("\n")[0]  # Pyro appends the shapes of its trace to errors within a model
        print(f"{prog}: {line}", file=sys.stderr)

    machine.keep_memory()  # makes training 5 % and evaluation 20 % faster; allowed because a command owns its process
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest, **more: complain(f"warning: {message}")
        try:
            with signals():  # also after the last level, while results are shown
                work()
        except UserError as error:
            complain(error)
            return 2 if is_first() else 0  # another code would make the launcher end all ranks
        except Stopped:
            if not resumes:
                complain("interrupted")
                return 130
            again = shlex.join(sys.argv[1:] if arguments is None else arguments)
            complain(f"stopped, everything is saved; to resume: {prog} {again}")
            return 75 if is_first() else 0
        except KeyboardInterrupt:
            complain("interrupted; what was saved is undamaged, and the same command resumes from it")
            return 130
        except torch.OutOfMemoryError as error:
            tried = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
            complain(
                f"the GPU's memory is full ({f'no {tried[1]} are left' if tried else 'a tensor does not fit'}); a smaller --batch-size or "
                "--precision bf16 needs less. If another process fills the memory, the same command resumes when that has ended"
            )
            return 1
        # Any other exception is a bug, so its traceback is shown.
        except (Diverged, Damaged, Failed, OSError) as error:
            complain(f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error)
            return 1
    return 0
