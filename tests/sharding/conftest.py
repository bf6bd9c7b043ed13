from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared(shared_data: Path) -> Path:
    """The real samples, by the name that these tests use."""
    return shared_data
