"""The package without what only Linux, or only Unix, has: in processes of their own, which lose it before the import."""

import subprocess
import sys

import pytest

LEFT_OUT = """
import os, platform, signal, sys
import lightning_fabric, matplotlib.pyplot, pandas, pyro, rich, safetensors.torch, sklearn.datasets, timm, torchmetrics, torchvision
import filelock, jinja2  # what others do on their system is theirs: the lock opens files as Unix does

platform.uname()  # which is kept
for name in ("sysconf", "fork", "forkpty", "getgid", "getegid", "getppid", "getpgid", "setsid", "uname", "statvfs", "chown",
             "O_DIRECTORY", "O_DIRECT", "sched_getaffinity", "sched_setaffinity", "posix_fallocate", "posix_fadvise", "fdatasync",
             "sync", "nice", "getloadavg", "killpg", "mkfifo", "wait3", "wait4", "pipe2", "sendfile"):
    if hasattr(os, name):
        delattr(os, name)
for name in dir(signal):
    if name.startswith("SIG") and name not in ("SIGINT", "SIGTERM", "SIGABRT", "SIGFPE", "SIGILL", "SIGSEGV", "SIG_DFL", "SIG_IGN"):
        delattr(signal, name)
for name in ("pthread_sigmask", "pthread_kill", "sigwait", "sigtimedwait", "setitimer", "alarm", "pause", "siginterrupt"):
    if hasattr(signal, name):
        delattr(signal, name)
for name in ("fcntl", "resource", "termios", "pwd", "grp", "tty", "pty", "syslog"):
    sys.modules[name] = None
_open = os.open
def no_folders(path, flags, *rest, **more):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return _open(path, flags, *rest, **more)
os.open = no_folders
sys.platform = "win32"
"""
RUN = """
from pyro_lottery import controls, evaluate, imp, machine, sites
import pyro_lottery as pl
import experiments.all, experiments.study.plan, experiments.benchmarks.steps
import plots.command
sys.platform = "linux"  # for what torch and others decide while they run
options = ["--arch", "lenet", "--preset", "smoke", "--levels", "1", "--run-dir", sys.argv[1]]
assert imp.main(options) == 0
assert imp.main(options) == 0  # resumed
assert evaluate.main([sys.argv[1], "--ood", "noise"]) == 0
run = pl.load_run(sys.argv[1])
assert len(run.results) == 2
run.level(1).load_model().predict(run.load_data().test[:5])
assert machine.memory() > 2**30
"""


@pytest.mark.slow
def test_a_run_without_what_only_unix_has(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LEFT_OUT + RUN, str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "results.csv").exists()


LIBRARY = """
import sys, torch
import pyro_lottery as pl
from pyro_lottery import imp, machine
assert not sys.modules.keys() & {"matplotlib", "onnxruntime", "pandas", "sklearn", "timm"}, "imported before a bad option is told"
torch.manual_seed(0)
data = pl.data.load("digits", train_size=60)
model = pl.BayesianClassifier(pl.create_model("lenet", 10, 1, 8), num_data=60)
pl.train(model, pl.guides.mean_field(model), data, epochs=1)
assert not machine.keep_memory.cache_info().misses
assert imp.main(["--arch", "lenet", "--preset", "smoke", "--levels", "1", "--run-dir", sys.argv[1]]) == 0
assert machine.keep_memory.cache_info().misses == 1
assert not sys.modules.keys() & {"lightning_fabric", "torch.distributed.run"}, "imported with one device"
"""


@pytest.mark.slow
def test_what_commands_import_and_that_they_keep_memory(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY, str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
