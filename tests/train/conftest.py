from __future__ import annotations

from pathlib import Path

import pytest
from probe_runs import run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    return run(tmp_path_factory.mktemp("finished") / "run")
