"""The first day on a GPU: ``python -m experiments.benchmarks.gpu``.

``day`` has the device, the networks, the sizes and what a check is. ``bits`` holds the sections on what must be equal, ``costs`` those on
time, and ``commands`` those that run whole commands. ``__main__`` runs the sections and writes the report.
"""
