"""``roadvla serve`` and ``remote://``: policies from folders to the network, and back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

from roadvla.errors import UserError
from roadvla.evaluation.machine import usable_device
from roadvla.experiments.stages import trained
from roadvla.files import read_bytes
from roadvla.policy import NormStats, load_policy, policy_kind
from roadvla.policy.settings import OpenVLASettings
from roadvla.serving.settings import Serving
from roadvla.train.checkpoint import policy_folder
from roadvla.train.memory import loading_sizes, within_memory

if TYPE_CHECKING:
    from roadvla.serving.client import RemotePolicy

TOKEN = "ROADVLA_TOKEN"
_MAX_TOKEN = 4096
"""Bytes; a line of a request has at most 8,192."""
_EXTRA = (
    "serving needs packages that are not installed ({error}): pip install 'roadvla[serve]', or "
    "make .venv/installed-test in the repository"
)


def serve(source: Path, settings: Serving, *, token_file: Path | None = None) -> None:
    """Load a policy and serve it until Ctrl-C or SIGTERM.

    Args:
        source: Policy folder, checkpoint or run.
        settings: How.
        token_file: Holds the secret that clients must present.

    Raises:
        UserError: If the policy does not load, the address is taken, others than this machine could
            connect without a token, or the process may not open enough files.
    """
    try:
        from roadvla.serving.server import PolicyServer, run_server
        from roadvla.serving.sockets import allow_files
    except ImportError as error:
        raise UserError(_EXTRA.format(error=error.name)) from error
    token = _token(token_file)
    allow_files(settings.max_clients)  # said before a large policy is loaded
    usable_device(settings.device)
    folder = policy_folder(source)
    kind = policy_kind(folder)
    sizes = loading_sizes(
        settings.device, "tiny" if kind == "tiny" else "openvla", OpenVLASettings()
    )
    with within_memory("loading the policy", *sizes):
        policy = load_policy(folder, settings.device)
    iteration, env_steps = trained(folder)
    about = {
        "policy": kind,
        "checkpoint": str(folder),
        "iteration": iteration,
        "env_steps": env_steps,
        "norm_stats": cast("NormStats", policy.norm_stats).to_dict(),  # type: ignore[attr-defined]
    }
    server = PolicyServer(policy, about, settings, token)
    run_server(
        server,
        announce=lambda port: print(
            f"serving {folder} on ws://{settings.host}:{port} (Ctrl-C ends it)", flush=True
        ),
    )


def connect(address: str) -> RemotePolicy:
    """Connect to a served policy, with the token of the environment variable if there is one.

    Args:
        address: ``remote://HOST:PORT``.

    Raises:
        UserError: If there is no such server, or the variable holds no token.
    """
    try:
        from roadvla.serving.client import RemotePolicy
    except ImportError as error:
        raise UserError(_EXTRA.format(error=error.name)) from error
    return RemotePolicy(address, _token(None))


def _token(file: Path | None) -> str | None:
    """Read the secret from a file, or else from the environment variable, if it is set.

    Raises:
        UserError: If the file cannot be read, or what is read cannot be a token.
    """
    if file is None:
        found = os.environ.get(TOKEN)
        return _checked(found, f"the variable {TOKEN}") if found else None
    try:
        found = read_bytes(file, limit=_MAX_TOKEN).decode()
    except (OSError, ValueError) as error:
        raise UserError(f"token file {file} cannot be read ({error})") from error
    return _checked(found, f"token file {file}")


def _checked(text: str, source: str) -> str:
    """Refuse what no header of a request can hold."""
    token = text.strip()
    if not 0 < len(token) <= _MAX_TOKEN or not all("!" <= letter <= "~" for letter in token):
        raise UserError(f"{source} holds no token: expected one line of ASCII without spaces")
    return token
