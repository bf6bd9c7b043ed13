from collections.abc import Iterator

import pytest

from tests.helpers.cluster import Cluster, why_unavailable


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running two-node SLURM, shared by all tests of the session; skips where none can
    be started."""
    if reason := why_unavailable():
        pytest.skip(reason)
    with Cluster() as running:
        yield running
