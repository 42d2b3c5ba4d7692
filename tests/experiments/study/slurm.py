"""A small SLURM for tests: ``sbatch``, ``srun`` and ``scontrol`` as programs that keep a queue in a folder."""

import os
import re
import shlex
import signal
import subprocess
import sys

from experiments.study.executors import slurm
from tests.support import DEADLOCK, ROOT

PROGRAMS = {
    "sbatch": '[ "$1" = --parsable ] || exit 2\nid=$(($(ls "$QUEUE" | grep -c sh) + 1))\ncat >"$QUEUE/$id.sh"\necho $id',
    "srun": '[ "$1" = --unbuffered ] || exit 2\nshift\nexec "$@"',
    "scontrol": '[ "$1" = requeue ] || exit 2\necho "$2" >>"$QUEUE/requeued"',
}


class Slurm:
    """A queue; its programs are found by commands that the test starts after :meth:`install`."""

    def __init__(self, folder):
        self.queue, self.programs = folder / "queue", folder / "bin"
        self.queue.mkdir(parents=True)
        self.programs.mkdir()
        for name, text in PROGRAMS.items():
            (self.programs / name).write_text(f"#!/bin/bash\n{text}\n")
            (self.programs / name).chmod(0o755)

    def install(self, monkeypatch):
        monkeypatch.setenv("PATH", f"{self.programs}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
        monkeypatch.setenv("QUEUE", str(self.queue))
        return self

    def script(self, job):
        return (self.queue / f"{job}.sh").read_text()

    def start(self, job, number):
        """Start one job of an array; its process is the one that SLURM signals."""
        variables = {"SLURM_ARRAY_JOB_ID": str(job), "SLURM_ARRAY_TASK_ID": str(number)}
        return subprocess.Popen(["bash", self.queue / f"{job}.sh"], env=os.environ | variables, cwd=ROOT)

    def call(self, job, number):
        """What one job of an array does, in this process, with the arguments of the script; returns the exit code."""
        *_, arguments = self.script(job).partition(" experiments.study.executors.slurm ")
        jobs, _ = shlex.split(arguments)
        return slurm.main([jobs, str(number)])

    def run(self, job, interrupt=None):
        """Run an array, each job again as often as it is requeued; returns the exit codes by job.

        The first start of job 0 gets SIGUSR1, as before a time limit, when ``interrupt`` has waited for the right moment.
        """
        codes = {}
        for number in range(int(re.search(r"--array=0-(\d+)%", self.script(job)).group(1)) + 1):
            wanted, codes[number] = 0, []
            while len(codes[number]) <= wanted:
                process = self.start(job, number)
                if interrupt and not number and not codes[number]:
                    interrupt(process)
                    process.send_signal(signal.SIGUSR1)
                codes[number].append(process.wait(DEADLOCK))
                wanted = self.requeued().count(f"{job}_{number}")
        return codes

    def requeued(self):
        path = self.queue / "requeued"
        return path.read_text().split() if path.exists() else []
