"""Deterministic tickets as Bayesian starting points: ``python -m pyro_lottery.transplant DETERMINISTIC_RUN`` (paper §7).

For each level loc and mask are the ticket's, scale is its usual initial value, and one variational training follows.
Results are in ``DETERMINISTIC_RUN/transplant/``, a run folder like any other. Instead of a run, the ``state_dict`` of a
plain PyTorch network can be given, as .safetensors or .pt; its zeros are the mask, unless ``--mask`` names one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyro_lottery import files, tickets
from pyro_lottery.commands import run_command, signals
from pyro_lottery.config import PRESET_HELP, Config, Parser, preset
from pyro_lottery.console import show_results
from pyro_lottery.errors import UserError
from pyro_lottery.levels import prepare, train_levels
from pyro_lottery.results import RunFolder
from pyro_lottery.runs import Run, check_levels, load_run
from pyro_lottery.types import Mask, Sites, Ticket

PROG = "python -m pyro_lottery.transplant"


def transplant_run(run: Run, levels: Iterable[int] | None = None, **options: Any) -> Run:
    """Transplant the tickets of ``levels`` of a deterministic ``run`` (all finished ones but the dense) and train each;
    ``options`` of :class:`Config` win over those of ``run``. Returns the transplants' run.
    """
    if run.config.guide != "deterministic":
        raise UserError(
            f"{run.folder.path} has the guide {run.config.guide}; a transplant comes from a deterministic run"
        )
    run.vet()
    chosen = check_levels(run, levels, lowest=0 if levels else 1)
    own = {"guide": "mean_field", "device": "auto", "run_dir": str(run.folder.derived("transplant").path)}

    def weights(level: int) -> tuple[Sites, Mask]:
        ticket = run.level(level).ticket
        return {**ticket.start.loc, **ticket.net}, ticket.mask

    return _train(replace(run.config, **own | options), chosen, weights, "the run's tickets")


def transplant_file(path: Path, mask: Path | None, config: Config) -> Run:
    """Transplant a plain network's ``state_dict`` from a file and train it, as level 0 of the run of ``config``.

    Without a ``run_dir`` of its own, the run's name says which weights and mask it was made from, by their checksum.
    """
    weights = tickets.bake_pruned(files.load_state_dict(path))
    given = files.load_state_dict(mask) if mask else None
    checksum = f"{files.checksum({**weights} | {f'mask of {n}': t for n, t in (given or {}).items()}):08x}"
    if config.run_dir == str(Path("runs") / config.name()):
        config = replace(config, run_dir=str(Path("runs") / f"transplant-{path.stem}-{checksum}-{config.name()}"))
    return _train(config, [0], lambda level: (weights, given), checksum)


def _train(
    config: Config, levels: Iterable[int], weights: Callable[[int], tuple[Sites, Mask | None]], source: str
) -> Run:
    if config.guide == "deterministic":
        raise UserError(
            "--guide deterministic has no scale; a transplant becomes Bayesian, with mean_field for instance"
        )
    with signals() as received:
        setup, levels = prepare(config), list(levels)

        def ticket(level: int) -> Ticket:
            return tickets.transplant(*weights(level), setup.dense)

        ticket(levels[0])  # what does not fit shall fail before anything is written
        folder = RunFolder(str(config.run_dir))
        train_levels(folder, setup, levels, ticket, received, transplant=source)
    return load_run(folder.path, trust_code=True)  # its options are the caller's, or of a vetted run


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = Parser(PROG, str(__doc__))
    parser.add_argument("source", type=Path, help="deterministic run folder, or file with a state_dict")
    parser.add_argument("--levels", type=int, nargs="+", help="levels of the run; default: all finished but the dense")
    parser.add_argument("--mask", type=Path, help="file with one mask per pruned weight, by its name in the state_dict")
    parser.add_argument("--preset", default="default", help=f"of a file's training: {PRESET_HELP}")
    parser.add_options(but={"levels"})
    parser.add_trust_option()
    given = vars(parser.parse_args(arguments))
    source, levels, mask, base, trust = (given.pop(n) for n in ("source", "levels", "mask", "preset", "trust_code"))

    def work() -> None:
        show_results(_transplant(source, levels, mask, base, trust, given).folder)

    return run_command(PROG, work, arguments)


def _transplant(
    source: Path, levels: list[int] | None, mask: Path | None, base: str, trust: bool, given: dict[str, Any]
) -> Run:
    if source.is_dir():
        if mask or base != "default":
            raise UserError(f"{'--mask' if mask else '--preset'} is for files; {source} is a run and brings its own")
        return transplant_run(load_run(source, trust), levels, **given)
    if levels:
        raise UserError(f"--levels is for run folders; {source} has one level")
    return transplant_file(source, mask, preset(base, **given))


if __name__ == "__main__":
    sys.exit(main())
