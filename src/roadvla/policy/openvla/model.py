"""OpenVLA: an image and an instruction to seven action tokens, natively."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float, Float64, Int
from torch import Tensor

from roadvla.errors import UserError, unknown_name
from roadvla.policy.action_tokens import NUM_TOKENS, NormStats, decode_bins
from roadvla.policy.openvla.architecture import Architecture, read_architecture
from roadvla.policy.openvla.artefacts import read_statistics, read_value_head
from roadvla.policy.openvla.checkpoint import Checkpoint, load_weights, open_checkpoint
from roadvla.policy.openvla.network import Network
from roadvla.policy.openvla.preprocess import (
    Preprocessing,
    preprocess_pil,
    preprocess_tensor,
    read_preprocessing,
)
from roadvla.policy.openvla.prompt import PromptTokenizer
from roadvla.policy.openvla.storage import first_line
from roadvla.policy.openvla.value_head import ValueHead
from roadvla.policy.sampling import draw_uniform
from roadvla.types import PolicyOutput


class OpenVLA(Network):
    """The network with its preprocessing, prompt and action statistics.

    Build it with ``from_pretrained``.

    Attributes:
        architecture: Sizes.
        checkpoint: Where the weights came from.
        recompute: Keep no activations inside blocks; recompute them in the backward pass.
    """

    def __init__(self, architecture: Architecture, checkpoint: Checkpoint | None = None) -> None:
        super().__init__(architecture)
        self.checkpoint = checkpoint
        self._processing: Preprocessing | None = None
        self._tokenize: PromptTokenizer | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> OpenVLA:
        """Load an HF-format checkpoint, and the value head beside it if there is one.

        A ``dataset_statistics.json`` in the folder replaces the configuration's ``norm_stats``.

        Args:
            path: Folder, or the hub's ``owner/name``.
            dtype: Of all weights but the value head's, which are float32.
            device: Where they go; memory for one copy is needed.

        Raises:
            UserError: If the checkpoint is missing, incomplete, damaged or no OpenVLA.
        """
        checkpoint = open_checkpoint(path)
        architecture = read_architecture(
            checkpoint.config, checkpoint.shapes, str(checkpoint.folder / "config.json")
        )
        statistics = read_statistics(checkpoint.folder)
        if statistics is not None:
            architecture = replace(architecture, norm_stats=statistics)
        try:
            with torch.device("meta"):
                model = cls(architecture, checkpoint)
        except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
            raise UserError(
                f"{checkpoint.folder / 'config.json'}: text_config describes no Llama that "
                f"transformers can build ({first_line(error)})"
            ) from error
        head = ValueHead(architecture.hidden)
        model.value_head = head
        head.reset()
        load_weights(checkpoint, model, dtype=dtype, device=device, keep_float32=_is_value_head)
        model.reset_rotation(device)
        head.to(device)
        stored = read_value_head(checkpoint.folder)
        if stored is not None:
            head.load(stored, str(checkpoint.folder))
        return model.eval()

    # What goes in and what comes out.

    def preprocess(
        self, images: Tensor | np.ndarray, *, method: str = "pil"
    ) -> Float[Tensor, "B C S S"]:
        """Resize (bicubic, aspect ignored) and normalize frames for each tower.

        Args:
            images: RGB, uint8 [B, H, W, 3].
            method: ``pil`` is OpenVLA's own, bit-exact, one image after the other on the CPU;
                ``tensor`` is RL4VLA's, batched on the images' device, and overshoots at edges.

        Returns:
            float32 on the model's device; three channels per tower.

        Raises:
            UserError: If the images have another dtype or shape, or the method is unknown.
        """
        ways = {"pil": preprocess_pil, "tensor": preprocess_tensor}
        if method not in ways:
            raise unknown_name("preprocessing method", method, ways)
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(np.ascontiguousarray(images))
        return ways[method](images, self._preprocessing()).to(self.device)

    def prompt_ids(self, instruction: str) -> list[int]:
        """Token ids from BOS to 29871, the token after which actions follow.

        Raises:
            UserError: If the checkpoint has no tokenizer, or the instruction is too long.
        """
        return list(self._tokenizer()(instruction))

    def norm_stats(self, norm_key: str | None = None) -> NormStats:
        """Action statistics of one data set.

        Args:
            norm_key: Entry of ``norm_stats`` in the configuration; may be left out if it is alone.

        Raises:
            UserError: If there is no such entry, or several and none is named.
        """
        known = self.architecture.norm_stats
        names = ", ".join(sorted(known)) or "none"
        if norm_key is None and len(known) != 1:
            raise UserError(
                f"the checkpoint has action statistics for {len(known)} data sets ({names}): "
                + (
                    "choose one with --norm-key (norm_key in Python)"
                    if known
                    else "put its dataset_statistics.json beside it"
                )
            )
        key = next(iter(known)) if norm_key is None else norm_key
        if key not in known:
            raise UserError(f"no action statistics for norm key {key!r}: there are {names}")
        stats = NormStats.from_dict(known[key])
        if len(stats.q01) != NUM_TOKENS:
            raise UserError(
                f"the action statistics of {key!r} have {len(stats.q01)} dimensions, an action has "
                f"{NUM_TOKENS}"
            )
        return stats

    def decode_actions(
        self, action_tokens: Int[Tensor, "B K"], norm_key: str | None = None
    ) -> Float64[Tensor, "B K"]:
        """Bins to un-normalized actions, in float64 as the original computes them.

        Raises:
            UserError: As ``norm_stats``.
        """
        return self.norm_stats(norm_key).unnormalize(decode_bins(action_tokens))

    # The passes.

    @torch.no_grad()
    def act(
        self,
        pixel_values: Float[Tensor, "B C S S"],
        prompt_ids: Sequence[Sequence[int]],
        *,
        temperature: float,
        generator: torch.Generator | None = None,
    ) -> PolicyOutput:
        """Sample one action per row, without gradient; temperature 0 is greedy.

        Tokens follow softmax(logits/temperature) over the 256 action bins, without top-k. Their
        log-probabilities are those of that distribution; a greedy token has probability 1, so
        log-probability 0.

        Args:
            pixel_values: From ``preprocess``.
            prompt_ids: One list per row, from ``prompt_ids``; lengths may differ.
            temperature: At least 0.
            generator: Decides the sampling: one uniform number per token, drawn at once.

        Returns:
            Bins, log-probabilities, values, and the raw logits [B, K, V].

        Raises:
            ValueError: If the temperature is negative.
        """
        ids, lengths = self.pad(prompt_ids)
        uniform = draw_uniform(len(ids), NUM_TOKENS, generator, self.device)
        return self.act_on(pixel_values, ids, lengths, uniform, temperature=temperature)

    def evaluate(
        self,
        pixel_values: Float[Tensor, "B C S S"],
        prompt_ids: Sequence[Sequence[int]],
        action_tokens: Int[Tensor, "B K"],
    ) -> tuple[Float[Tensor, "B K V"], Float[Tensor, " B"]]:
        """Teacher-forced raw logits over the bins at all K positions, and the value; with gradient.

        Args:
            pixel_values: From ``preprocess``.
            prompt_ids: One list per row; lengths may differ.
            action_tokens: Bins.
        """
        return self.evaluate_on(pixel_values, *self.pad(prompt_ids), action_tokens)

    def pad(
        self, prompt_ids: Sequence[Sequence[int]]
    ) -> tuple[Int[Tensor, "B L"], Int[Tensor, " B"]]:
        """Fill prompts up on the right; return ids and lengths.

        Raises:
            UserError: If a prompt is empty or leaves no room for patches and action.
        """
        lengths = [len(row) for row in prompt_ids]
        if not lengths or min(lengths) < 1 or max(lengths) > self.architecture.max_prompt:
            raise UserError(
                f"prompts have {min(lengths, default=0)} to {max(lengths, default=0)} tokens; 1 to "
                f"{self.architecture.max_prompt} are needed"
            )
        pad, longest = self.architecture.pad_token_id, max(lengths)
        rows = [[*row, *[pad] * (longest - len(row))] for row in prompt_ids]
        ids = torch.tensor(rows, device=self.device)
        return ids, torch.tensor(lengths, device=self.device)

    def _preprocessing(self) -> Preprocessing:
        if self._processing is None:
            folder = None if self.checkpoint is None else self.checkpoint.folder
            towers, size = len(self.architecture.towers), self.architecture.image_size
            self._processing = read_preprocessing(folder, towers, size)
        return self._processing

    def _tokenizer(self) -> PromptTokenizer:
        if self._tokenize is None:
            if self.checkpoint is None:
                raise UserError("this OpenVLA was built without a checkpoint: it has no tokenizer")
            self._tokenize = PromptTokenizer(
                self.checkpoint.folder,
                style=self.architecture.prompt_style,
                max_prompt=self.architecture.max_prompt,
            )
        return self._tokenize


def _is_value_head(name: str) -> bool:
    return name.startswith("value_head.")
