"""Memory does not grow with levels; measured in a process of its own."""

import subprocess
import sys

import pytest

LEVELS = """
import sys
import pyro_lottery as pl
from pyro_lottery import imp, levels

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])

seen, train_level = [], levels.train_level

def train_and_look(*arguments, **options):
    row = train_level(*arguments, **options)
    seen.append(resident())
    return row

levels.train_level = train_and_look
imp.run_imp(pl.preset("smoke", arch="lenet", levels=10, prune_fraction=0.2, train_size=400, run_dir=sys.argv[1]))
print(seen[1], seen[10])
"""


def measured(script, *arguments):
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    return map(int, done.stdout.split()[-2:])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_levels_end_with_the_memory_of_the_first(tmp_path):
    first, tenth = measured(LEVELS, str(tmp_path / "run"))
    assert tenth < 1.05 * first
