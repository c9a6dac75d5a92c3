"""How a hint enters a prompt: the same text for every policy."""

from __future__ import annotations

import re

_PUT = re.compile(r"put (?:the )?(?P<object>.+?) on(?:to)? (?:the )?(?P<receptacle>.+)")


def join(instruction: str, hint: str) -> str:
    """Append a hint to what is asked for; every policy tokenizes the whole as an instruction."""
    return f"{instruction.rstrip(' .?!')}. {hint}"


def names(instruction: str) -> tuple[str, str]:
    """Find what an instruction calls object and receptacle.

    Returns:
        Their names; ``object`` and ``target`` where it is not of the form "put … on …".
    """
    found = _PUT.search(instruction.rstrip(" .?!").lower())
    return (found["object"], found["receptacle"]) if found else ("object", "target")
