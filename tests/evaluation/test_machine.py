from __future__ import annotations

import pytest
import torch

from roadvla.errors import UserError
from roadvla.evaluation.machine import describe_machine, usable_device


def test_the_cpu_is_always_there():
    assert usable_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "count", "said"),
    [
        ("tpuu", 0, "unknown device 'tpuu'"),
        ("cuda", 0, "'cuda' is not available here: use --device cpu"),
        ("cuda:7", 2, "'cuda:7' is not available here: there are 2, counted from cuda:0"),
        ("cuda:2", 2, "there are 2"),
    ],
)
def test_a_device_that_is_not_there_is_refused(monkeypatch, name, count, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        usable_device(name)
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:1"])
def test_devices_that_are_there(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert usable_device(name) == torch.device(name)


def test_the_machine_in_one_line():
    assert f"torch {torch.__version__}" in describe_machine()
    assert "\n" not in describe_machine()
