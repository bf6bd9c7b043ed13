from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared(shared_data: Path) -> Path:
    """Return the folder of real samples."""
    return shared_data
