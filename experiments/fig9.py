"""Question: are transplanted tickets as well calibrated as tickets found by Bayesian training?

The paper's figure 9: MACE of transplanted and of fully Bayesian tickets; the runs are those of figure 5.
"""

import sys

from experiments.command import main
from experiments.fig5 import jobs

__all__ = ["jobs"]

if __name__ == "__main__":
    sys.exit(main("fig9"))
