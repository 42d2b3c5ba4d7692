"""Randomised controls of a finished run's tickets: ``python -m pyro_lottery.controls RUN --control reinit`` (paper §6).

A control trains each level's ticket again with its mask or its values randomised, with the same code, on the same batches in
the same order. Results are in ``RUN/controls/CONTROL/``, which is a run folder.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from pyro_lottery import masks, seeds, tickets
from pyro_lottery.errors import UserError, unknown
from pyro_lottery.runs.cli import Parser, run_command
from pyro_lottery.runs.config import MASK_STAYS
from pyro_lottery.runs.loaded import Run, check_levels, load_run
from pyro_lottery.runs.progress import show_results
from pyro_lottery.runs.session import Session
from pyro_lottery.types import Ticket

PROG = "python -m pyro_lottery.controls"


def run_control(
    run: Run,
    control: str,
    levels: Iterable[int] | None = None,
    device: str = "auto",
    data_dir: str | None = None,
) -> Run:
    """Train the tickets of ``levels`` of ``run``, randomised by ``control`` (one of ``tickets.CONTROLS``), and return that run.

    By default, ``levels`` are all finished levels except the dense one. ``data_dir`` is the folder with the run's data, if they
    have moved. Raises ``UserError`` for an unknown control, a level that is not finished, or a run that is itself a control or
    transplant.
    """
    if control not in tickets.CONTROLS:
        raise unknown("--control", control, tickets.CONTROLS)
    if control != "reinit" and run.config.rewind == "lr":
        raise UserError(
            f"--control {control} needs the values of pruned weights, which --rewind lr does not keep; use --control reinit"
        )
    if control != "reinit" and run.config.schedule == "gradual" and run.config.rewind_epoch:
        raise UserError(
            f"--control {control} needs the values of pruned weights, which --rewind {run.config.rewind} does not keep with --schedule gradual; use "
            "--control reinit"
        )
    if run.folder.origin:
        raise UserError(f"{run.folder.path} is itself a {run.folder.origin}; give the run that it was made from")
    run.vet()
    chosen = check_levels(run, levels, lowest=1)
    if control != "reinit":
        run.row(0)  # a shuffle takes values of the rewind point, which is one of the files of level 0
    folder = run.folder.derived("controls", control)
    config = replace(run.config, device=device, run_dir=str(folder.path), data_dir=data_dir or run.config.data_dir)
    config = replace(
        config, pretrained=None, pretrained_key=None, level0_from=None, **MASK_STAYS
    )  # the tickets hold all values
    with Session.open(config, run.own, control=control) as session:
        run.check_data(session.setup.data)
        for level in chosen:
            session.train(level, randomised(run, level, control))
    return session.load(run.trust_code)


def randomised(run: Run, level: int, control: str) -> Ticket:
    """The ticket of ``level`` of ``run``, randomised by ``control`` with a random stream of that level."""
    ticket, seed = run.level(level).ticket, seeds.derive(run.config.seed, "control", level)
    if control == "reinit":
        found = tickets.reinit(ticket, seed, run.initial)
        _check_is_new(run, found)
        return found
    dense = tickets.rewind(masks.full(ticket.start), *run.folder.load_rewind_point())
    return tickets.shuffle(ticket, seed, dense, control)


def _check_is_new(run: Run, ticket: Ticket) -> None:
    """Raise ``UserError`` if a reinitialised ``ticket`` has the weights of the run's own seed, and warn if it has them in part."""
    old, new = masks.apply(ticket.mask, run.initial(run.config.seed).start).loc, ticket.start.loc
    left = [name for name, mask in ticket.mask.items() if bool(mask.any())]
    same = [name for name in left if torch.equal(old[name], new[name])]
    if same and len(same) == len(left):
        raise UserError(
            "--control reinit: the network's function gives the same weights for every seed, so the control would have no new ones; let them "
            "follow torch's global generator, without a seed and without pretrained weights of the function's own"
        )
    kept = {name: new[name][ticket.mask[name]] for name in same}
    if fixed := [name for name, values in kept.items() if bool((values != values[0]).any())]:  # constants are no draws
        warnings.warn(
            f"--control reinit: {', '.join(fixed[:3])} begin with the same values for every seed, so they are not new",
            stacklevel=3,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = Parser(PROG, str(__doc__))
    parser.add_argument("run", help="run folder of python -m pyro_lottery.imp, with any guide")
    parser.add_argument("--control", required=True, help=f"how tickets are randomised: {', '.join(tickets.CONTROLS)}")
    parser.add_argument("--levels", type=int, nargs="+", help="levels to train; default: all finished levels except 0")
    parser.add_run_options()
    given = parser.parse_args(arguments)

    def work() -> None:
        run = load_run(given.run, given.trust_code)
        show_results(run_control(run, given.control, given.levels, given.device, given.data_dir).folder)

    return run_command(PROG, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
