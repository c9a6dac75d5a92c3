from __future__ import annotations

import pytest

from roadvla.errors import UserError


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("plain é 2⁶³", "plain é 2⁶³"),
        ("two\nlines\r", "two\\nlines\\r"),
        ("\x1b[2Jgone\x00", "\\x1b[2Jgone\\x00"),
        ("\udcff\u202e", "\\udcff\\u202e"),
    ],
)
def test_what_a_file_says_cannot_command_the_terminal(message, shown):
    assert str(UserError(message)) == shown
    assert shown.isprintable()
