"""Tensors out of safetensors data that came from somewhere else."""

from __future__ import annotations

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor


def parse_tensors(data: bytes) -> dict[str, Tensor]:
    """Take the tensors out of a safetensors file's content.

    Raises:
        ValueError: If it is none, or holds numbers of a kind that PyTorch does not have.
    """
    try:
        return load(data)
    except SafetensorError as error:
        raise ValueError(str(error).partition("\n")[0]) from error
    except KeyError as error:  # the format knows more kinds of numbers than the reader
        raise ValueError(f"it holds numbers of the kind {error.args[0]!r}") from error
    except (AssertionError, RuntimeError, TypeError, OverflowError) as error:
        raise ValueError("a tensor's shape and data disagree") from error
