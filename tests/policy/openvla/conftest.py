"""The checkpoint and the outputs recorded from the original OpenVLA code."""

from __future__ import annotations

from pathlib import Path

import pytest

_FOLDER = Path(__file__).parents[3].parent / "shared" / "fixtures" / "openvla-tiny"


@pytest.fixture(scope="session")
def openvla_fixture() -> Path:
    """Folder of the recorded fixture; skips where it is absent."""
    if not _FOLDER.is_dir():
        pytest.skip(f"the recorded OpenVLA fixture is not here ({_FOLDER})")
    return _FOLDER
