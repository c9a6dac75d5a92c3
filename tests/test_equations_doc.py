"""The table of equations tells the truth."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+) \| [^|]+ \| `([\w.]+)` \| .*?`([\w.]+)::(\w+)` \|$", DOCUMENT, re.M)


def named_equations(docstring: str) -> set[int]:
    """Numbers in "Eq. 7-9, 12" and in the "(7)" that stand beside formulas."""
    numbers: set[int] = set()
    for listing in re.findall(r"(?:Eq\. |\()(\d+(?:(?:-|, )\d+)*)\b", docstring):
        for part in listing.split(", "):
            first, _, last = part.partition("-")
            numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def test_every_equation_is_listed() -> None:
    numbers = [int(number) for number, *_ in ROWS]
    assert set(numbers) == set(range(1, 37))
    table = [line for line in DOCUMENT.splitlines() if re.match(r"\| \d", line)]
    assert len(table) == len(ROWS), "a row of the table does not parse"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[1].split('.')[-1]}")
def test_function_and_test_exist(row: tuple[str, str, str, str]) -> None:
    number, path, file, test = row
    module, _, name = path.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    assert int(number) in named_equations(function.__doc__ or "")
    assert getattr(importlib.import_module("roadvla.objective"), name) is function
    source = (ROOT / "tests" / "paper" / file).read_text(encoding="utf-8")
    assert f"def {test}(" in source


def test_other_tests_named_in_the_text_exist() -> None:
    for file, test in re.findall(r"`(test_\w+\.py)::(\w+)`", DOCUMENT):
        assert f"def {test}(" in (ROOT / "tests" / "paper" / file).read_text(encoding="utf-8")
