"""Where the runs of a study are trained: in this process, by workers of Ray, or as array jobs of SLURM.

A run may be killed at any time. It finds out by itself what is left to do, so that a run whose worker died is simply started
again. A run that fails does not stop the others. A control or transplant of a level starts when its run has finished this level;
with SLURM, whose dependencies are between whole jobs, when the run has ended.
"""
