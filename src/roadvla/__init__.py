"""ROAD-VLA: online adaptation of vision-language-action policies by self-distillation."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("roadvla")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"
