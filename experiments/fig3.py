"""Question: what do the randomised controls change in a ticket, and what do they keep?

The paper's figure 3: one layer of a ticket and of its four controls, as images; one run of figure 1 is enough.
"""

import sys

from experiments.command import main
from experiments.study.jobs import Job, Study


def jobs(study: Study) -> list[Job]:
    """The run of the first network and seed, pruned by snr."""
    return [study.imp(study.archs[0], study.seeds[0])]


if __name__ == "__main__":
    sys.exit(main("fig3"))
