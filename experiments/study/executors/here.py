"""Train the runs of a study in this process, one after the other."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from pathlib import Path
from time import sleep

from experiments.study.executors.worker import WAIT_SECONDS, logging
from experiments.study.jobs import Job, ready, released, unfinished
from pyro_lottery import data, machine
from pyro_lottery.errors import Busy, Failed, Stopped, UserError, one_line
from pyro_lottery.runs.config import Config
from pyro_lottery.runs.signals import signals


def carry_out(jobs: Iterable[Job], root: Path) -> dict[Job, Exception]:
    """Run every job that is not finished; returns the failed ones with their errors.

    Several processes may share the work: a run on which another process is working is tried again later. Of a control or
    transplant, those levels are trained whose tickets exist, and the others later. Raises
    ``UserError`` before the first run if the device or the data that all runs share are missing, and that of the first run
    if all runs fail and one of them by bad input.
    """
    waiting, failed = [job for job in jobs if unfinished(job, root)], dict[Job, Exception]()
    if waiting:
        _check_shared(waiting[0].config)
    root.mkdir(parents=True, exist_ok=True)
    refused, count = list[UserError](), len(waiting)
    with signals() as received, received.heeded():
        while waiting:
            later, idle = [], True
            for place, each in enumerate(waiting):
                if received:
                    raise Stopped
                job = released(each, failed)
                if job.needs() in failed:
                    failed[job] = Failed("the run that it is made from failed")
                    continue
                part = ready(job, root)
                if not part or job.folder(root).busy():
                    later += [job] if unfinished(job, root) else []
                    continue
                print(f"{job} ({len(waiting) - place + len(later)} to go)", flush=True)
                try:
                    part.run(root)
                    idle = False
                    later += [job] if unfinished(job, root) and part != job else []
                except Busy:  # another process was quicker
                    later.append(job)
                except Stopped:
                    raise
                except Exception as error:
                    failed[job] = _logged(error, job, root)
                    if isinstance(error, UserError):
                        refused.append(error)
            if idle and len(later) == len(waiting):
                sleep(WAIT_SECONDS)
            waiting = later
    if refused and len(failed) == count:  # none could begin: the mistake is in the options that all share
        raise refused[0]
    return failed


def _check_shared(config: Config) -> None:
    """Raise ``UserError`` if the device or the data of a study cannot be used here."""
    machine.resolve_device(config.device)
    data.load(config.dataset, config.data_dir, image_size=config.image_size)


def _logged(error: Exception, job: Job, root: Path) -> Failed:
    """Write the traceback of ``error`` to the job's log, and return one line that names the log."""
    with logging(job, root) as log:
        traceback.print_exc(file=log)
        return Failed(f"{one_line(error)}; see {log.name}")
