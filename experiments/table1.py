"""Question: what does Bayesian training of a level cost, compared with deterministic training?

The paper's table 1: mean training time per level; the runs are those of figure 2.
"""

import sys

from experiments.command import main
from experiments.fig2 import jobs

__all__ = ["jobs"]

if __name__ == "__main__":
    sys.exit(main("table1"))
