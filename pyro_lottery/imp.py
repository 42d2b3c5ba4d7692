"""Iterative magnitude pruning, Bayesian or deterministic: ``python -m pyro_lottery.imp --arch resnet18`` (paper §5).

This is the one file that knows the order: start from a ticket, sparsify, train, predict, measure, save; then score the
posterior, shrink the mask, rewind, and so on.
"""

from __future__ import annotations

import signal
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from rich.console import Console
from torch.optim import Adam

from pyro_lottery import figures, guides, masks, metrics, scores, seeds, tickets, training
from pyro_lottery.config import Config, parse
from pyro_lottery.console import LevelDisplay, results_table
from pyro_lottery.data import Data
from pyro_lottery.errors import Damaged, Diverged, Stopped, UserError
from pyro_lottery.handlers import sparsify
from pyro_lottery.model import BayesianClassifier
from pyro_lottery.prediction import predict
from pyro_lottery.results import LevelFolder, RunFolder
from pyro_lottery.runs import Run, build, check_names, facts, load_data, load_run, resolve_device, shape_of
from pyro_lottery.types import LevelResult, Ticket

CHECKPOINT_SECONDS = 5.0
"""Least time between two checkpoints of quick epochs; slower epochs are saved each. Where saving itself is slow, it is
made so rare that it takes at most a twentieth of the time."""


def run_imp(config: Config) -> Run:
    """Run iterative magnitude pruning to the end, or go on with it, in ``config.run_dir``; returns the run."""
    check_names(config)
    device = resolve_device(config.device)
    _warn_of_slow_bf16(config, device)
    with _signals() as received:
        data = load_data(config, device)
        shape = shape_of(data)
        model, guide = build(config, shape, device)
        training.check_batches(model, data, config.batch_size)
        if config.levels:  # a score that does not suit the guide shall fail now, not after the first level's hours
            initial = guides.posterior(guide)
            masks.shrink(masks.full(initial), scores.by_name(config.score)(initial), config.prune_fraction)
        run = RunFolder(str(config.run_dir))
        with run.lock():
            run.open(config.options(), facts(config, shape, device))
            finished = run.results()
            for level in range(finished[-1].level + 1 if finished else 0, config.levels + 1):
                if received:
                    raise Stopped
                ticket = next_ticket(run, level, config, model, guide)
                hooks = _LevelHooks(run, level, config, model, guide, masks.density(ticket.mask), received)
                run.add_result(train_level(run.level(level), level, ticket, config, data, model, guide, hooks))
                run.level(level).drop_checkpoints()
                figures.draw_run(run)
            if finished:  # a kill may have come before the last level's pictures
                figures.draw_run(run)
    return load_run(run.path)


def next_ticket(run: RunFolder, level: int, config: Config, model: BayesianClassifier, guide: AutoGuide) -> Ticket:
    """The ticket of ``level``: dense at the initial values for level 0; later the mask of the level before, shrunk by
    its posterior's score, times the rewind point (paper §5). Read from files, so that a resumed run sees the same bits.
    """
    if level == 0:
        start = guides.posterior(guide)
        return tickets.rewind(masks.full(start), start, model.net_state())
    before = run.level(level - 1)
    trained = before.load_posterior()
    score = scores.by_name(config.score, config.seed, level)(trained[0])
    mask = masks.shrink(before.load_ticket().mask, score, config.prune_fraction)
    if config.rewind == "lr":
        start, net = trained
    elif config.rewind_epoch:
        start, net = run.rewind_point.load_posterior()
    else:
        first = run.level(0).load_ticket()
        start, net = first.start, first.net
    return tickets.rewind(mask, start, net)


def train_level(
    folder: LevelFolder,
    level: int,
    ticket: Ticket,
    config: Config,
    data: Data,
    model: BayesianClassifier,
    guide: AutoGuide,
    hooks: _LevelHooks,
) -> LevelResult:
    """Train one ticket, measure it, and save all of it in ``folder``; returns its row of ``results.csv``."""
    device = data.train.pixels.device
    folder.save_ticket(ticket)
    guides.set_posterior_(guide, ticket.start)
    guides.zero_pruned_(guide, ticket.mask)
    model.load_net_state(ticket.net)
    with sparsify(ticket.mask):
        with hooks:
            history = training.train(
                model,
                guide,
                data,
                epochs=config.epochs,
                batch_size=config.batch_size,
                lr=config.lr,
                milestones=config.milestones,
                warmup_epochs=config.warmup_epochs,
                weight_decay=config.weight_decay,
                train_samples=config.train_samples,
                history_samples=config.history_samples,
                kl=config.kl,
                precision=config.precision,
                seed=config.seed,
                level=level,
                hooks=hooks,
            )
        with seeds.stream(device, config.seed, "predict", level):
            probs = predict(model, guide, data.test, config.eval_samples, precision=config.precision)
    measured = metrics.all_metrics(probs, data.test.labels)
    folder.save_posterior(masks.apply(ticket.mask, guides.posterior(guide)), model.net_state())
    folder.save_history(history)
    chosen = max(history, key=lambda row: row["val_accuracy"]) if data.val is not None else None
    seconds = [row["seconds"] for row in history]
    steps = -(-len(data.train) // config.batch_size)
    return LevelResult(
        level=level,
        density=masks.density(ticket.mask),
        remaining=masks.remaining(ticket.mask),
        total=masks.total(ticket.mask),
        test_accuracy=measured["accuracy"],
        max_test_accuracy=max(measured["accuracy"], *(row["test_accuracy"] for row in history)),
        val_accuracy=chosen["val_accuracy"] if chosen else None,
        nll=measured["nll"],
        mace=measured["mace"],
        ece=measured["ece"],
        brier=measured["brier"],
        train_seconds=sum(seconds),
        step_ms=1000 * statistics.median(seconds) / steps,
        selected_test_accuracy=chosen["test_accuracy"] if chosen else None,
    )


class _LevelHooks(training.Hooks):
    """Checkpoints, the display and the signals of one level's training."""

    def __init__(
        self,
        run: RunFolder,
        level: int,
        config: Config,
        model: BayesianClassifier,
        guide: AutoGuide,
        density: float,
        received: list[int],
    ):
        self.folder, self.model, self.guide, self.received = run.level(level), model, guide, received
        self.epochs = config.epochs
        self.rewind_point, self.rewind_epoch = run.rewind_point, config.rewind_epoch if level == 0 else 0
        self.display = LevelDisplay(level, config.levels, density, config.epochs)
        self.next_save = time.monotonic() + CHECKPOINT_SECONDS

    def __enter__(self) -> None:
        self.display.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.display.__exit__(*exception)

    def start(self, optimizer: Adam) -> training.Progress | None:
        loaded = self.folder.load_checkpoint()
        if loaded is None:
            return None
        tensors, info = loaded
        device, generators = next(self.guide.parameters()).device, _group(tensors, "generator")
        if generators and info["device"] != device.type:
            warnings.warn(
                f"this epoch began on {info['device']}; its random numbers begin anew on {device}", stacklevel=2
            )
            generators = {}
        self.guide.load_state_dict(_group(tensors, "guide"))
        self.model.load_net_state(_group(tensors, "net"))
        _load_optimizer(optimizer, _group(tensors, "optimizer"))
        return training.Progress(
            info["epoch"], info["step"], info["seconds"], info["history"], tensors["sums"], generators
        )

    def stopping(self) -> bool:
        return bool(self.received)

    def stop(self, progress: training.Progress, optimizer: Adam) -> None:
        self._save(progress, optimizer)
        raise Stopped

    def check(self, progress: training.Progress, steps: int, nll: float, accuracy: float) -> None:
        state = f"nll {nll:.4f}, train accuracy {100 * accuracy:.2f} %"
        if progress.step < steps:  # an epoch's end has its own line
            self.display.update(progress.epoch + progress.step / steps, state)

    def epoch(self, progress: training.Progress, optimizer: Adam) -> None:
        row = progress.history[-1]
        test, last = f"test accuracy {100 * row['test_accuracy']:.2f} %", progress.epoch == self.epochs
        self.display.update(progress.epoch, f"loss {row['loss']:.4f}, nll {row['nll']:.4f}, {test}", last)
        if progress.epoch == self.rewind_epoch:
            self.rewind_point.save_posterior(guides.posterior(self.guide), self.model.net_state())
        if self.received:
            self.stop(progress, optimizer)
        if time.monotonic() >= self.next_save:
            self._save(progress, optimizer)

    def _save(self, progress: training.Progress, optimizer: Adam) -> None:
        began = time.monotonic()
        tensors = {f"guide/{n}": t for n, t in self.guide.state_dict().items()}
        tensors |= {f"net/{n}": t for n, t in self.model.net_state().items()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{n}": t for n, t in state.items()}
        tensors |= {f"generator/{n}": t for n, t in progress.generators.items()} | {"sums": progress.sums}
        info: dict[str, Any] = {"epoch": progress.epoch, "step": progress.step, "seconds": progress.seconds}
        info["device"] = next(self.guide.parameters()).device.type
        self.folder.save_checkpoint(tensors, info | {"history": progress.history})
        self.next_save = time.monotonic() + max(CHECKPOINT_SECONDS, 20 * (time.monotonic() - began))


def _group(tensors: dict[str, torch.Tensor], group: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{group}/"): t for name, t in tensors.items() if name.startswith(f"{group}/")}


def _load_optimizer(optimizer: Adam, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that fills when SIGTERM or SIGINT asks to stop; a second SIGINT interrupts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python lets the main thread alone handle signals
        return

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _warn_of_slow_bf16(config: Config, device: torch.device) -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    if config.precision == "bf16" and device.type == "cpu" and not capability.startswith("AVX512"):
        warnings.warn(
            f"this processor ({capability}) has no bf16 instructions: --precision bf16 is emulated, about ten times "
            "slower than 32",
            stacklevel=2,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 finished, 2 bad input, 75 stopped with everything saved, 1 otherwise."""
    prog = "python -m pyro_lottery.imp"

    def complain(text: object) -> None:
        print(f"{prog}: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest, **more: complain(f"warning: {message}")
        try:
            run = run_imp(parse(prog, "Find lottery tickets by iterative magnitude pruning.", arguments))
        except UserError as error:
            complain(error)
            return 2
        except Stopped:
            complain("stopped, everything is saved; repeat the command to go on")
            return 75
        except (Diverged, Damaged, OSError) as error:  # anything else is not foreseen, and its traceback is needed
            complain(error)
            return 1
    Console().print(results_table(run.folder.results()))
    print(f"results, tickets, posteriors and figures: {run.folder.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
