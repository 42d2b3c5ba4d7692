"""When a study ends: the graph of its levels, trained by some workers or by any number.

A level of a run needs the level before it, a level of a control or transplant that level of its source, and a run that shares
level 0 the run that trains it. The levels of one job
are trained one after the other, since only one process may write to a run folder.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from experiments.study.jobs import Imp, Job


@dataclass(frozen=True)
class Work:
    """What is left of a job."""

    start: float
    """Seconds before the first step, each time that a worker begins with the job."""
    levels: Mapping[int, float]
    """Seconds of each level."""

    @property
    def seconds(self) -> float:
        """Seconds of one worker that begins once."""
        return self.start + sum(self.levels.values())


def makespan(work: Mapping[Job, Work], workers: int) -> float:
    """Seconds until ``workers`` have finished all jobs.

    As in Ray, a free worker takes the next job that has a ticket, and trains its levels until one has no ticket yet.
    """
    jobs, free = _training(work), [0.0] * workers
    while waiting := [job for job in jobs if job.left]:
        now = heapq.heappop(free)
        job = next((job for job in waiting if job.since() <= now), None)
        heapq.heappush(free, min(job.since() for job in waiting) if job is None else job.train(now))
    return max((job.ended for job in jobs), default=0.0)


def critical_path(work: Mapping[Job, Work]) -> float:
    """Seconds until any number of workers have finished all jobs: the longest chain of levels that need each other."""
    jobs = _training(work)
    for job in sorted(jobs, key=_Training.depth):  # the sources first
        while job.left:
            job.train(job.since())
    return max((job.ended for job in jobs), default=0.0)


def trainings(work: Mapping[Job, Work]) -> int:
    """Number of levels in the longest chain, each counted as one."""
    return int(critical_path({job: Work(0.0, dict.fromkeys(w.levels, 1.0)) for job, w in work.items()}))


@dataclass(eq=False)
class _Training:
    """One job, as it is trained."""

    work: Work
    source: _Training | None = None
    copies: bool = False
    """Whether the source gives level 0 alone, and not a ticket for each level."""
    ended: float = 0.0
    """When its last worker stopped."""
    ends: dict[int, float] = field(default_factory=dict)
    """When each level was finished."""
    left: list[int] = field(default_factory=list)

    def depth(self) -> int:
        """Number of jobs that this one waits for, one after the other."""
        return 0 if self.source is None else 1 + self.source.depth()

    def since(self) -> float:
        """When the next level can start; infinite as long as nobody trains its ticket."""
        if self.source is None:
            return self.ended
        # The last of the source's levels, up to this one, that is still to train; without one, the ticket exists.
        last = 0 if self.copies else self.left[0]
        needed = max((level for level in self.source.work.levels if level <= last), default=None)
        return self.ended if needed is None else max(self.ended, self.source.ends.get(needed, math.inf))

    def train(self, now: float) -> float:
        """Train levels from ``now`` on until one has no ticket yet; returns the end."""
        now += self.work.start
        while self.left and self.since() <= now:
            level = self.left.pop(0)
            now += self.work.levels[level]
            self.ends[level] = now
        self.ended = now
        return now


def _training(work: Mapping[Job, Work]) -> list[_Training]:
    found = {job: _Training(w, left=sorted(w.levels)) for job, w in work.items()}
    for job, training in found.items():
        training.copies = isinstance(job, Imp) and job.shares is not None
        needed = job.shares if isinstance(job, Imp) else job.needs()
        training.source = found.get(needed) if needed is not None else None
    return list(found.values())
