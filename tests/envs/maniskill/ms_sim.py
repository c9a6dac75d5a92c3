"""What tests on ManiSkill need: the package, the assets, and a device to draw with."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import pytest
import torch
from ms_recorded import SHARED

from roadvla.envs.maniskill.assets import asset_folders

# ManiSkill reads this when it is imported.
if (SHARED / "assets").is_dir():
    os.environ.setdefault("MS_ASSET_DIR", str(SHARED / "assets"))


@cache
def missing() -> str:
    """Say what is missing, or nothing."""
    if find_spec("mani_skill") is None:
        return "mani_skill is not installed: pip install 'roadvla[maniskill]'"
    folders = asset_folders()
    if not (folders.objects / "model_db.json").exists():
        return f"no assets in {folders.rl4vla}"
    from roadvla.envs.maniskill.rendering import render_device
    from roadvla.errors import UserError

    try:
        render_device(torch.device("cpu"))
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(autouse=True, scope="module")
def simulator():
    """Skip the module's tests where ManiSkill cannot run."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    torch.set_num_threads(1)
