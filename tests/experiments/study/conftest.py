import pytest

from experiments.command import jobs_of, study_of
from tests.experiments.study.support import given


@pytest.fixture
def jobs():
    """Two runs and the transplant of one of them."""
    return jobs_of(["fig5"], study_of(given()))
