"""OpenVLA, natively: no remote code, no pinned versions. Needs the extra ``openvla``."""

from __future__ import annotations

from roadvla.errors import UserError

try:
    import peft  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise UserError(
        f"OpenVLA needs packages that are not installed ({error.name}): "
        f'pip install "roadvla[openvla]"'
    ) from error

from roadvla.policy.openvla.model import OpenVLA

__all__ = ["OpenVLA"]
