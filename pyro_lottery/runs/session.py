"""A session trains tickets as the levels of a run folder; after any interruption, the same calls go on where it stopped."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from pyro_lottery import levels, seeds, tickets, training
from pyro_lottery.errors import Damaged, Diverged, Stopped
from pyro_lottery.levels import TrainedLevel
from pyro_lottery.runs.build import Setup, prepare
from pyro_lottery.runs.checkpoint import LevelHooks
from pyro_lottery.runs.config import Config
from pyro_lottery.runs.folder import RunFolder
from pyro_lottery.runs.level_folder import MANIFEST
from pyro_lottery.runs.loaded import Run, load_run
from pyro_lottery.runs.own import Own
from pyro_lottery.runs.resume import adopt, check_begun, open_folder
from pyro_lottery.runs.sharing import check_level_0, copy_level_0
from pyro_lottery.runs.signals import Received, signals
from pyro_lottery.schedules import Schedule
from pyro_lottery.types import Mask, Posterior, Sites, Ticket, posterior_checksum, ticket_checksum

PLOT_SECONDS = 10.0
"""Shortest time between two plots of a run's figures: plotting takes longer than training a small network."""


class Session:
    """A run folder and what is needed to train its levels; handles the lock, ranks, signals, checkpoints and figures.

    ::

        with Session.open(config) as session:
            for level in range(config.levels + 1):
                session.train(level, next_ticket(session, level))
    """

    def __init__(self, setup: Setup, received: Received, facts: dict[str, str]):
        self.setup, self.config, self.folder = setup, setup.config, RunFolder(str(setup.config.run_dir))
        self._received, self._ranks, self._facts = received, setup.ranks, setup.facts | facts
        self._inside = ExitStack()
        self._is_open = self._trained = False
        self._plotted = time.monotonic()

    @classmethod
    @contextmanager
    def open(cls, config: Config, own: Own | None = None, **facts: str) -> Iterator[Session]:
        """Load the data and build the model and guide of ``config``, or of ``own`` objects; plot the run's figures at the end.

        The first call of :meth:`train` creates or resumes the folder and locks it, so a run that cannot be trained leaves no
        folder behind. ``facts`` are added to config.json. Raises ``UserError`` if the run cannot be trained on this machine,
        ``Busy`` if another process uses the folder, and ``Stopped``, after saving everything, when a signal asks to stop.
        """
        check_begun(RunFolder(str(config.run_dir)), config.options())
        with signals() as received:
            session = cls(prepare(config, own), received, facts)
            with session._inside:
                yield session
                if session._is_open:
                    session._ranks.first(session._plot)

    def train(self, level: int, ticket: Ticket, schedule: Schedule | None = None) -> None:
        """Train ``ticket`` as ``level``, measure the trained network and save everything.

        A ``schedule`` moves the mask meanwhile, every ``--mask-every`` steps. Returns at once if the level is finished and was trained from the same ticket.
        """
        self._enter()
        ticket = self._ranks.first(self._as_begun, level, ticket)
        if self._ranks.first(self._is_finished, level, ticket):
            return
        if level == 0 and self.config.level0_from is not None:
            self._ranks.first(self._copy_level_0, ticket)
            self._trained = True
            return
        if self._ranks.any(bool(self._received)):
            raise Stopped
        self._ranks.agree(f"the ticket of level {level}", ticket_checksum, ticket)
        self._ranks.first(self.folder.level(level).save_ticket, ticket)
        trained = self._train(level, ticket, schedule)
        self._ranks.agree(f"the posterior of level {level}", posterior_checksum, trained.posterior, trained.net)
        self._ranks.first(self._finish, level, ticket, trained, schedule is not None)
        self._trained = True

    @property
    def dense(self) -> Ticket:
        """All weights at the initial values that the seed draws."""
        return self.setup.dense

    def ticket(self, level: int) -> Ticket:
        """The ticket of a level, read from its file, so that a resumed run has the same bits."""
        return self._ranks.first(self.folder.level(level).load_ticket)

    def mask(self, level: int) -> Mask:
        """The mask of the trained network of a finished level, read from its files."""
        return self._ranks.first(self.folder.mask, level)

    def posterior(self, level: int) -> tuple[Posterior, Sites]:
        """The posterior of a finished level, and the network's values that are not random, read from their file."""
        return self._ranks.first(self.folder.level(level).load_posterior)

    def rewind_point(self) -> tuple[Posterior, Sites]:
        """The values that tickets are rewound to: all weights at the start of level 0, or after K of its epochs."""
        return self._ranks.first(self.folder.load_rewind_point)

    def load(self, trust_code: bool = True) -> Run:
        """The run as it is now, for reading. Code that config.json names is trusted: it comes from the session's own config."""
        return load_run(self.folder.path, trust_code, self.setup.own)

    def _enter(self) -> None:
        """Lock the folder and create or resume it, once; from then on, signals are checked between steps."""
        if not self._is_open:
            self._ranks.first(self._check_level_0_from)
            self._inside.enter_context(self._received.heeded())
            self._ranks.first(self._open)
            self._is_open = True

    def _check_level_0_from(self) -> None:
        """Check the run of ``--level0-from`` before anything is written, unless level 0 is finished."""
        if self.config.level0_from is not None and not (self.folder.level(0).path / MANIFEST).exists():
            check_level_0(RunFolder(self.config.level0_from), self.config, self._facts, self.dense)

    def _copy_level_0(self, ticket: Ticket) -> None:
        """Copy level 0 from the run of ``--level0-from``, which has trained the same one."""
        source, level = RunFolder(str(self.config.level0_from)), self.folder.level(0)
        copy_level_0(source, check_level_0(source, self.config, self._facts, ticket), level)
        self.folder.write_results()
        level.drop_checkpoints()

    def _open(self) -> None:
        self._inside.enter_context(self.folder.lock())
        open_folder(self.folder, self.config.options(), self._facts)
        self.folder.check_places()
        self.folder.drop_leftovers()
        adopt(self.folder, self.config)
        for number in self.folder.levels():
            try:
                self.folder.level(number).manifest()
            except Damaged as error:
                self._set_aside(number, error)
        self.folder.write_results()

    def _set_aside(self, level: int, error: Exception | str) -> None:
        warnings.warn(f"{error}; level {level} is trained again", stacklevel=2)
        self.folder.level(level).set_aside()

    def _as_begun(self, level: int, ticket: Ticket) -> Ticket:
        """The ticket in the level's folder if it equals ``ticket`` up to the rounding of another processor, else ``ticket``."""
        if self._trained:  # the ticket in the folder comes from an earlier level that has been trained again since
            return ticket
        folder = self.folder.level(level)
        try:
            if (manifest := folder.manifest()) is not None and manifest.ticket == ticket_checksum(ticket):
                return ticket  # no need to read the large file
            begun = folder.load_ticket()
        except (FileNotFoundError, Damaged):
            return ticket
        return begun if tickets.close(begun, ticket) else ticket

    def _is_finished(self, level: int, ticket: Ticket) -> bool:
        folder = self.folder.level(level)
        try:
            manifest = folder.check(self.config.epochs_of(level))
        except Damaged as error:
            self._set_aside(level, error)
            self.folder.write_results()
            return False
        if manifest is None:
            if folder.has_files() and not folder.checkpoint.exists():  # a kill before the manifest leaves a checkpoint
                self._set_aside(level, f"{folder.path} has the files of a finished level and no {MANIFEST}")
            return False
        if manifest.ticket != ticket_checksum(ticket):
            self._set_aside(level, f"level {level} was trained from another ticket than the run makes now")
            self.folder.write_results()
            return False
        folder.drop_checkpoints()  # the process may have been killed after writing the manifest
        return True

    def _train(self, level: int, ticket: Ticket, schedule: Schedule | None) -> TrainedLevel:
        """Train the level; if it diverges, ``--on-divergence retry`` trains it once more with half the learning rate."""
        setup, config, folder = self.setup, self.config, self.folder.level(level)
        halved = self._ranks.first(self._halved, level)
        lr = config.lr / 2 if halved else config.lr
        hooks = LevelHooks(self.folder, level, setup, ticket, self._received)
        options = _train_options(config) | {"lr": lr, "epochs": config.epochs_of(level)}
        try:
            with seeds.algorithms(config.deterministic), hooks:
                return levels.train_level(
                    setup.model, setup.guide, setup.data, ticket, level, first_epoch=config.first_epoch(level),
                    eval_samples=config.eval_samples, sparse=config.sparse, hooks=hooks, ranks=setup.ranks,
                    schedule=schedule, mask_every=config.mask_every, dense=setup.dense, **options,
                )  # fmt: skip
        except Diverged as error:
            if config.on_divergence != "retry" or halved:
                raise
            self._ranks.first(folder.drop_checkpoints)
            what = {"epoch": error.epoch, "step": error.step, "sites": error.sites, "lr": config.lr / 2}
            self._ranks.first(folder.save_divergence, what)
            warnings.warn(f"{error}; level {level} starts again with --lr {config.lr / 2:g}", stacklevel=2)
        return self._train(level, ticket, schedule)

    def _halved(self, level: int) -> bool:
        """Whether the level trains with half the learning rate because its first training diverged."""
        folder, lr = self.folder.level(level), self.config.lr / 2
        diverged = folder.load_divergence()
        if diverged is not None and diverged.get("lr") != lr:
            raise Damaged(
                f"{folder.path / 'diverged.json'} has lr {diverged.get('lr')}, expected half of --lr {self.config.lr:g}; remove the file"
            )
        return diverged is not None

    def _finish(self, level: int, ticket: Ticket, trained: TrainedLevel, has_moved: bool) -> None:
        """Save the trained level; its manifest is written last, since it is the commit point."""
        folder = self.folder.level(level)
        folder.save_posterior(trained.posterior, trained.net, trained.mask if has_moved else None)
        folder.save_history(trained.history)
        rewind = level == 0 and self.folder.rewinds_late
        folder.finish(levels.result(level, trained), ticket_checksum(ticket), rewind, trained.layers)
        self.folder.write_results()
        folder.drop_checkpoints()
        if time.monotonic() - self._plotted > PLOT_SECONDS:
            self._plot()

    def _plot(self) -> None:
        from pyro_lottery.runs import figures  # matplotlib takes half a second

        figures.plot_run(self.folder)
        self._plotted = time.monotonic()


def _train_options(config: Config) -> dict[str, Any]:
    """The options of a run that ``training.train`` takes."""
    taken = inspect.signature(training.train).parameters.values()
    return {p.name: getattr(config, p.name) for p in taken if p.kind is p.KEYWORD_ONLY and hasattr(config, p.name)}
