"""Question: which layers are pruned, and are they others in a Bayesian than in a deterministic network?

The paper's figure 2: sparsity per layer at the last level; the runs are those of figure 1.
"""

import sys

from experiments.command import main
from experiments.study.finished import GUIDES
from experiments.study.jobs import Imp, Study


def jobs(study: Study) -> list[Imp]:
    """The run pruned by snr and the deterministic run, per network and seed."""
    return [study.imp(arch, seed, guide) for seed, arch in study.each() for guide in GUIDES]


if __name__ == "__main__":
    sys.exit(main("fig2"))
