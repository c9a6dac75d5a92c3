"""OpenVLA, natively: no remote code, no pinned versions. Needs the extra ``openvla``."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from roadvla.errors import UserError

if TYPE_CHECKING:
    from roadvla.policy.openvla.model import OpenVLA

__all__ = ["OpenVLA"]

if missing := [name for name in ("transformers", "peft") if find_spec(name) is None]:
    raise UserError(
        f"OpenVLA needs packages that are not installed ({', '.join(missing)}): "
        f'pip install "roadvla[openvla]"'
    )


def __getattr__(name: str) -> Any:
    """Import the model when it is asked for: transformers takes seconds."""
    if name == "OpenVLA":
        from roadvla.policy.openvla.model import OpenVLA

        return OpenVLA
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
