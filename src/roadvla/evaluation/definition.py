"""Which episodes these are: a hash of the code that decides what an episode contains.

Results are comparable only where it is the same. Comments, docstrings and layout do not count.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from importlib.resources import files
from importlib.resources.abc import Traversable

_SOURCES = {"tabletop": ("suite.py", "tabletop"), "maniskill": ("suite.py", "maniskill")}
# Tools beside the simulation: what they say does not change an episode.
_ASIDE = ("golden", "fetch", "download", "archive", "inspection", "software_vulkan", "expert")


@functools.cache
def definition(sim: str) -> str:
    """Hash the episode-defining code of a simulator: 12 hexadecimal digits.

    Raises:
        KeyError: If there is no such simulator.
    """
    digest = hashlib.sha256()
    for name in _SOURCES[sim]:
        for source in _modules(files("roadvla.envs") / name):
            digest.update(_meaning(source.read_text(encoding="utf-8")).encode())
    return digest.hexdigest()[:12]


@functools.cache
def failure_definition() -> str:
    """Hash the code that says how an episode failed: 12 hexadecimal digits."""
    source = files("roadvla.evaluation") / "failures.py"
    return hashlib.sha256(_meaning(source.read_text(encoding="utf-8")).encode()).hexdigest()[:12]


def _modules(source: Traversable) -> list[Traversable]:
    if source.is_file():
        return [source]
    modules = [found for found in source.iterdir() if found.name.endswith(".py")]
    kept = [found for found in modules if not found.name.startswith(_ASIDE)]
    return sorted(kept, key=lambda found: found.name)


def _meaning(source: str) -> str:
    """Write the code again without docstrings, comments and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:]
    return ast.unparse(tree)
