"""Question: can tickets that were found cheaply in a deterministic network be transplanted into a Bayesian one?

The paper's figure 5: accuracy of deterministic, Bayesian and transplanted tickets.
"""

import sys

from experiments import fig2
from experiments.command import main
from experiments.study.jobs import Job, Study, Transplant


def jobs(study: Study) -> list[Job]:
    """Figure 2's runs, and the transplants of the deterministic ones."""
    runs = fig2.jobs(study)
    deterministic = [run for run in runs if run.config.guide == "deterministic"]
    return [*runs, *(Transplant(run, study.derived_levels(run)) for run in deterministic)]


if __name__ == "__main__":
    sys.exit(main("fig5"))
