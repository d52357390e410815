"""The first runs of `make soak ONLY=launcher`."""

import pytest

from tests.soak import launcher as soak


@pytest.mark.slowest
def test_random_faults_kills_cancels_and_restarts_leave_one_job_or_none(tmp_path):
    counted = soak.run(range(25), tmp_path)
    assert counted["runs"] == 25
    # the seeds are fixed, and this is about what they draw
    assert counted["cancels"] >= 4
    assert counted["kills"] >= 8
    assert counted["faults"] >= 50
    assert counted["lines of logs"] >= 10
