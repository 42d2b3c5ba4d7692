"""What the tests of executors share."""

from experiments.command import parser
from tests.support import fingerprint


def given(*arguments):
    return parser("fig5", "").parse_args(["--protocol", "smoke", "--gpus-per-run", "0", *arguments])


def same_as(other, root):
    """Assert that every run in ``root`` is, bit for bit, the same run in the other folder; returns how many there are."""
    found = [path.parent for path in root.rglob("results.csv")]
    for path in found:
        tensors, tables = fingerprint(path)
        whole = fingerprint(other / path.relative_to(root))
        # a run's folder holds those of its controls, which other figures need
        assert tensors.items() <= whole[0].items()
        assert tables.items() <= whole[1].items()
    return len(found)
