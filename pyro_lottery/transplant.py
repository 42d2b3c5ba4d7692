"""Deterministic tickets as Bayesian starting points: ``python -m pyro_lottery.transplant DETERMINISTIC_RUN`` (paper §7).

Each level takes loc and mask from the ticket and the usual initial scale, and is trained once with a Bayesian guide. Results
are in ``DETERMINISTIC_RUN/transplant/``, which is a run folder. The source can also be a file with the ``state_dict`` of a plain
PyTorch network, as .safetensors or .pt, alone or within a checkpoint: its zeros are the mask, unless ``--mask`` gives one. A
ticket or posterior of this library has its own mask.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyro_lottery import masks, tickets, weights
from pyro_lottery.distributed import is_first
from pyro_lottery.errors import UserError
from pyro_lottery.runs.cli import Parser, run_command
from pyro_lottery.runs.config import MASK_STAYS, MOVING, Config, of_transplants
from pyro_lottery.runs.config import preset as config_of
from pyro_lottery.runs.folder import TICKETS_OF_RUN
from pyro_lottery.runs.loaded import Run, check_levels, load_run
from pyro_lottery.runs.own import Own
from pyro_lottery.runs.presets import PRESET_HELP
from pyro_lottery.runs.progress import show_results
from pyro_lottery.runs.session import Session
from pyro_lottery.types import Mask, Ticket
from pyro_lottery.weights import Weights

PROG = "python -m pyro_lottery.transplant"


def transplant_run(run: Run, levels: Iterable[int] | None = None, **options: Any) -> Run:
    """Transplant the tickets of ``levels`` of a deterministic ``run``, train each and return the transplants' run.

    By default, ``levels`` are all finished levels above 0. A level whose mask moved while it trained gives the mask that it ended with; level 0 of
    such a run is the default if there is no other. ``options`` of :class:`Config` override those of ``run``. Raises ``UserError`` if ``run`` is not deterministic or a level is not finished.
    """
    if run.config.guide != "deterministic":
        raise UserError(
            f"{run.folder.path} has the guide {run.config.guide}; transplants need a run with --guide deterministic"
        )
    run.vet()
    if levels is None and run.config.schedule in MOVING and not any(row.level for row in run.folder.results()):
        levels = [0]  # which ends with the ticket that level 1 would train
    chosen = check_levels(run, levels, lowest=0 if levels else 1)
    if moving := sorted(options.keys() & MASK_STAYS.keys()):
        raise UserError(f"{moving[0]} does not go with a transplant, whose mask is the ticket's")

    def ticket(level: int, into: Ticket) -> Ticket:
        source = run.level(level)
        return tickets.transplant({**source.ticket.start.loc, **source.ticket.net}, source.mask, into)

    config = of_transplants(run.config, str(run.folder.derived("transplant").path), **options)
    return _train(config, chosen, ticket, TICKETS_OF_RUN, run.own)


def transplant_file(path: Path, mask: Path | None, config: Config, key: str | None = None) -> Run:
    """Transplant a plain network's ``state_dict`` from a file, train it as level 0 of the run of ``config``, and return the run.

    ``mask`` is a file with the mask, ``key`` the key of the state dict in a file with several. A default ``run_dir`` has the
    checksum of weights and mask in its name. Raises ``UserError`` if the file does not fit the network.
    """
    source, masked = read(path, mask, key)
    checksum = f"{source.checksum(masked):08x}"
    if config.run_dir == str(Path("runs") / config.name()):
        config = replace(config, run_dir=str(Path("runs") / f"transplant-{path.stem}-{checksum}-{config.name()}"))
    return _train(config, [0], lambda level, into: ticket_of(source, masked, into), checksum)


def read(path: Path, mask: Path | None = None, key: str | None = None) -> tuple[Weights, Weights | None]:
    """The weights of a file, and of the mask's file if there is one; weights pruned by ``torch.nn.utils.prune`` become 0, with its masks."""
    source = weights.load(path, key)
    pruned = tickets.pruned_masks(source.values)
    source = replace(source, values=tickets.bake_pruned(source.values), mask=source.mask or pruned or None)
    return source, weights.load(mask) if mask else None


def ticket_of(source: Weights, masked: Weights | None, into: Ticket) -> Ticket:
    """The ticket that a file's weights make, with the mask of another file, of its own, or of its zeros; ``into`` is the
    network's dense ticket. Prints how many zeros count as pruned.
    """
    wanted = {**into.start.loc, **into.net}
    values, half = weights.fit(source.path, source.values, wanted), weights.in_half_precision(source.values)
    if masked is None and source.own and source.mask is not None:
        return tickets.transplant(values, source.mask, into)
    if masked is not None:
        if masked.own and masked.mask is None:
            raise UserError(f"{masked.path} holds no mask/: it is a posterior; name the level's ticket.safetensors")
        found = tickets.transplant(values, weights.fit(masked.path, masked.mask or masked.values, wanted, True), into)
        if not half:  # in half precision, a remaining weight may be 0
            tickets.check_mask(values, found.mask)
        return found
    known = _prunable_part(source.path, weights.fit(source.path, source.mask or {}, wanted, True), into)
    found = tickets.transplant(
        values, {**{n: values[n] != 0 for n in into.mask if n in values}, **known} if known else None, into
    )
    if known and is_first():
        kept, total = masks.remaining(found.mask), masks.total(found.mask)
        print(f"{source.path}: its masks keep {kept:,} of {total:,} prunable weights: density {kept / total:.4%}")
    by_zeros = {name: mask for name, mask in found.mask.items() if name not in known}
    if zeros := masks.total(by_zeros) - masks.remaining(by_zeros):
        _say_zeros(source.path, zeros, found, by_zeros, half)
    return found


def _prunable_part(path: Path, mask: Mask, into: Ticket) -> Mask:
    """The part of a ``mask`` of ``torch.nn.utils.prune`` that is of prunable weights; a warning names the others that it prunes."""
    others = [name for name, each in mask.items() if name not in into.mask and not bool(each.all())]
    if others:
        warnings.warn(
            f"{path}: {', '.join(others)} cannot be pruned here (a bias, the final layer, or deterministic), so its pruned weights begin at 0 and "
            "are trained",
            stacklevel=3,
        )
    return {name: each for name, each in mask.items() if name in into.mask}


def _say_zeros(path: Path, zeros: int, ticket: Ticket, by_zeros: Mask, half: str) -> None:
    if is_first():
        print(
            f"{path}: {zeros:,} of {masks.total(ticket.mask):,} prunable weights are 0 and count as pruned: density "
            f"{masks.density(ticket.mask):.4%}"
        )
    if empty := [name for name, mask in by_zeros.items() if mask.numel() and not bool(mask.any())]:
        warnings.warn(f"{path}: all weights of {', '.join(empty)} are 0 and count as pruned", stacklevel=2)
    if half:
        warnings.warn(
            f"{path} is in {half}, in which small weights become 0 and would count as pruned; give --mask to tell them apart",
            stacklevel=2,
        )


def _train(
    config: Config,
    levels: Iterable[int],
    ticket_of: Callable[[int, Ticket], Ticket],
    source: str,
    own: Own | None = None,
) -> Run:
    if config.guide == "deterministic":
        raise UserError("--guide deterministic has no scale; a transplant needs a Bayesian guide, such as mean_field")
    with Session.open(config, own, transplant=source) as session:
        for level in levels:
            session.train(level, ticket_of(level, session.dense))
    return session.load()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = Parser(PROG, str(__doc__))
    parser.add_argument("source", type=Path, help="run folder with --guide deterministic, or file with a state_dict")
    parser.add_argument(
        "--levels", type=int, nargs="+", help="levels of the run; default: all finished levels except 0"
    )
    parser.add_argument(
        "--mask", type=Path, help="file with a mask for each pruned weight, by its name in the state_dict"
    )
    parser.add_argument(
        "--key", help="key of the state_dict in a file that has several, such as state_dict_ema; default: common names"
    )
    parser.add_argument("--preset", default="default", help=f"options of a file's training: {PRESET_HELP}")
    parser.add_options(but={"levels", "schedule", "mask_every", "pretrained", "pretrained_key", "level0_from"})
    parser.add_trust_option()
    given = vars(parser.parse_args(arguments))
    return run_command(PROG, lambda: show_results(_transplant(**given).folder), arguments)


def _transplant(
    source: Path, levels: list[int] | None, mask: Path | None, key: str | None, preset: str, trust_code: bool,
    **options: Any,
) -> Run:  # fmt: skip
    if os.path.isdir(source):  # Path.is_dir may raise an error for a name that is too long
        weights.check_folder(source)
        for name, given in (("mask", mask), ("key", key), ("preset", preset != "default")):
            if given:
                raise UserError(f"--{name} is for files; {source} is a run folder, which has its own")
        return transplant_run(load_run(source, trust_code), levels, **options)
    if levels:
        raise UserError(f"--levels is for run folders; {source} is a file, which gives one level; leave it out")
    return transplant_file(source, mask, config_of(preset, **options), key)


if __name__ == "__main__":
    sys.exit(main())
