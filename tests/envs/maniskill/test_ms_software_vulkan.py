"""A driver for Vulkan without a GPU, out of a package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from ms_made_assets import files_in

from roadvla.envs.maniskill import software_vulkan
from roadvla.envs.maniskill.software_vulkan import fetch_software_vulkan
from roadvla.errors import UserError
from roadvla.experiments.asset_commands import fetch_vulkan


class _Apt:
    """Stands for apt-get and dpkg-deb."""

    def __init__(self, *having: str) -> None:
        self.having, self.commands = having, list[tuple[str, ...]]()

    def __call__(self, command: Sequence[str], folder: Path) -> str:
        self.commands.append(tuple(command))
        if command[0] == "apt-get":
            if command[2] not in ("chromium-common", "chromium"):
                return "E: Unable to locate package"
            (folder / f"{command[2]}_1_amd64.deb").write_text(command[2])
            return ""
        package = (folder / command[2]).read_text()
        library = folder / "usr" / "lib" / "chromium"
        library.mkdir(parents=True)
        if package in self.having:
            (library / software_vulkan.LIBRARY).write_bytes(b"\x7fELF")
            (library / software_vulkan.MANIFEST).write_text("{}")
        return ""


@pytest.mark.parametrize("package", ["chromium-common", "chromium"])
def test_the_driver_comes_from_either_package(tmp_path: Path, package: str) -> None:
    apt = _Apt(package)
    manifest = fetch_software_vulkan(tmp_path / "vk", run=apt)
    assert manifest == tmp_path / "vk" / "vk_swiftshader_icd.json"
    assert files_in(tmp_path / "vk") == {software_vulkan.LIBRARY, software_vulkan.MANIFEST}
    count = len(apt.commands)
    assert fetch_software_vulkan(tmp_path / "vk", run=apt) == manifest
    assert len(apt.commands) == count  # it is there: nothing to do


def test_no_driver_in_the_packages(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no SwiftShader.*apt-get update") as refusal:
        fetch_software_vulkan(tmp_path / "vk", run=_Apt())
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "vk").exists()


def test_no_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="apt-get is not here"):
        fetch_software_vulkan(tmp_path / "vk")


def test_a_failing_program_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("apt-get", "echo W: no >&2; echo E: gone >&2; exit 100"), ("dpkg-deb", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="chromium-common: E: gone; chromium: E: gone"):
        fetch_software_vulkan(tmp_path / "vk")


def test_the_command_prints_what_to_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(software_vulkan, "_demand", lambda *programs: None)
    monkeypatch.setattr(software_vulkan, "_run", _Apt("chromium-common"))
    fetch_vulkan(tmp_path / "vk")
    said = capsys.readouterr().out
    assert said == f"export VK_ICD_FILENAMES={tmp_path / 'vk' / software_vulkan.MANIFEST}\n"
