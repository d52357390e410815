"""The first runs of `make soak ONLY=storage`."""

import pytest

from tests.soak import storage as soak


@pytest.mark.slowest
def test_random_faults_kills_and_restarts_leave_nothing_wrong(tmp_path):
    counted = soak.run(range(25), tmp_path)
    assert counted["runs"] == 25
    # the seeds are fixed, and these are what they draw
    assert counted["writer killed"] >= 5
    assert counted["servers killed"] >= 1
    assert sum(count for what, count in counted.items() if what.startswith("faults: ")) >= 50
