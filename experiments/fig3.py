"""Question: what do the randomised controls change of a ticket, and what do they keep?

The paper's figure 3: one layer of a ticket and of its four controls, as a picture; one run of figure 1 is enough.
"""

import sys

from experiments.command import main
from experiments.study.jobs import Job, Study


def jobs(study: Study) -> list[Job]:
    """The run pruned by snr of the first network and seed."""
    return [study.imp(study.archs[0], study.seeds[0])]


if __name__ == "__main__":
    sys.exit(main("fig3"))
