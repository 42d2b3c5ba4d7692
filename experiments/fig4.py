"""Question: what makes a ticket win: its mask, its values, or the fraction of weights that each layer keeps?

The paper's figure 4: accuracy of the tickets of figure 1 and of their four randomised controls, Bayesian and deterministic.
"""

import sys

from experiments import fig2
from experiments.command import main
from experiments.study.jobs import Control, Job, Study
from pyro_lottery.tickets import CONTROLS


def jobs(study: Study) -> list[Job]:
    """Figure 2's runs, and the controls of each."""
    runs = fig2.jobs(study)
    return [*runs, *(Control(run, control, study.derived_levels(run)) for run in runs for control in CONTROLS)]


if __name__ == "__main__":
    sys.exit(main("fig4"))
