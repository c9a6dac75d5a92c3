"""Everything recorded from the original OpenVLA and RL4VLA code, computed again natively."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from roadvla.objective import entropy, token_log_probs
from roadvla.policy.action_tokens import bins_of_token_ids, decode_bins, encode_bins, token_ids
from roadvla.policy.openvla import OpenVLA
from roadvla.policy.openvla.architecture import is_dead
from roadvla.policy.openvla.decoder import run_layer

ATOL = 3e-5
FIRST = 31744


@pytest.fixture(scope="module")
def model(openvla_fixture: Path) -> OpenVLA:
    return OpenVLA.from_pretrained(openvla_fixture, dtype=torch.float32)


@pytest.fixture(scope="module")
def given(openvla_fixture: Path) -> dict[str, Tensor]:
    return _arrays(openvla_fixture / "inputs.npz")


@pytest.fixture(scope="module")
def expected(openvla_fixture: Path) -> dict[str, Tensor]:
    return _arrays(openvla_fixture / "expected.npz")


@pytest.fixture(scope="module")
def expected_rl(openvla_fixture: Path) -> dict[str, Tensor]:
    return _arrays(openvla_fixture / "expected_rl.npz")


@pytest.fixture(scope="module")
def prompts(given: dict[str, Tensor]) -> list[list[int]]:
    return [
        row[:length].tolist()
        for row, length in zip(given["tf_input_ids"], given["prompt_len"], strict=True)
    ]


def test_pixel_values_are_bit_exact(model: OpenVLA, given: dict[str, Tensor]) -> None:
    assert torch.equal(model.preprocess(given["images"], method="pil"), given["pixel_values"])
    assert torch.equal(
        model.preprocess(given["images"].numpy(), method="pil"), given["pixel_values"]
    )


def test_tensor_pixel_values(model: OpenVLA, given: dict[str, Tensor]) -> None:
    close(model.preprocess(given["images"][:1], method="tensor"), given["pixel_values_rl0"])


def test_patch_features(
    model: OpenVLA, given: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    features = model.vision_backbone(given["pixel_values"])
    close(features, expected["patch_features"])
    close(model.projector(features), expected["projector_features"])


def test_hidden_states(
    model: OpenVLA, given: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    x = model._sequence(given["pixel_values"], given["tf_input_ids"])
    columns = torch.arange(x.shape[1]).unsqueeze(0)
    decoder = model.language_model.model
    rotation = decoder.rotary_emb(x, columns)
    first, _, _ = run_layer(decoder.layers[0], x, rotation, model._heads)
    close(first, expected["tf_layer1_hidden"])
    last, _ = model._run(x, columns.expand(len(x), -1))
    close(last, expected["tf_last_hidden"])
    predicting = last[:, 256 + 28 : 256 + 28 + 7]
    close(model.language_model.lm_head(predicting), expected["tf_logits"])
    loss = torch.nn.functional.cross_entropy(
        model.language_model.lm_head(last[:, 256 + 28 : 256 + 28 + 8]).flatten(0, 1),
        given["tf_labels"][:, 29:].flatten(),
    )
    close(loss, expected["tf_loss"])


def test_teacher_forced_logits(
    model: OpenVLA, given: dict[str, Tensor], expected: dict[str, Tensor], prompts: list[list[int]]
) -> None:
    logits, _ = model.evaluate(given["pixel_values"], prompts, bins(given["action_tokens"]))
    close(logits, expected["tf_logits"][..., FIRST:32000].flip(-1))


def test_greedy_tokens_and_their_logits(
    model: OpenVLA, given: dict[str, Tensor], expected: dict[str, Tensor], prompts: list[list[int]]
) -> None:
    output = model.act(given["pixel_values"], prompts, temperature=0.0)
    assert torch.equal(token_ids(output.action_tokens), expected["greedy_tokens"])
    assert output.logits is not None
    close(output.logits, expected["greedy_logits_window"].flip(-1))
    actions = model.decode_actions(output.action_tokens)
    close(actions, expected["greedy_actions"])
    assert torch.equal(actions, model.decode_actions(output.action_tokens, "toy_bridge"))


def test_action_tables(model: OpenVLA, expected: dict[str, Tensor]) -> None:
    close(decode_bins(torch.arange(255)), expected["bin_centers"])
    decoded = model.decode_actions(bins(expected["decode_ids"]), "toy_bridge")
    close(decoded, expected["decode_actions_toy_bridge"])
    encoded = token_ids(encode_bins(expected["encode_values"]))
    assert torch.equal(encoded, expected["encode_tokens"])


def test_value_log_probs_and_entropy(
    model: OpenVLA,
    given: dict[str, Tensor],
    expected_rl: dict[str, Tensor],
    prompts: list[list[int]],
) -> None:
    tokens = bins(given["action_tokens"])
    logits, value = model.evaluate(given["pixel_values"], prompts, tokens)
    close(value.unsqueeze(1), expected_rl["eval_value"])
    close(value.unsqueeze(1), expected_rl["value"])
    close(token_log_probs(logits, tokens).sum(-1, keepdim=True), expected_rl["eval_logprob"])
    close(entropy(logits).mean(-1, keepdim=True), expected_rl["eval_entropy"])


def test_generation_of_the_reinforcement_learner(
    model: OpenVLA,
    given: dict[str, Tensor],
    expected_rl: dict[str, Tensor],
    prompts: list[list[int]],
) -> None:
    output = model.act(given["pixel_values"], prompts, temperature=0.0)
    assert torch.equal(token_ids(output.action_tokens), expected_rl["gen_tokens"])
    close(output.value.unsqueeze(1), expected_rl["gen_value"])
    assert output.logits is not None
    raw = token_log_probs(output.logits, output.action_tokens)
    close(raw.sum(-1, keepdim=True), expected_rl["gen_logprob"])


def test_value_on_the_tensor_path(
    model: OpenVLA,
    given: dict[str, Tensor],
    expected_rl: dict[str, Tensor],
    prompts: list[list[int]],
) -> None:
    pixels = model.preprocess(given["images"], method="tensor")
    value = model.value_on(pixels, *model.pad(prompts))
    close(value.unsqueeze(1), expected_rl["value_rlpixels"])


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients(
    openvla_fixture: Path,
    given: dict[str, Tensor],
    expected_rl: dict[str, Tensor],
    prompts: list[list[int]],
    recompute: bool,
) -> None:
    model = OpenVLA.from_pretrained(openvla_fixture, dtype=torch.float32)
    model.recompute = recompute
    tokens = bins(given["action_tokens"])
    logits, value = model.evaluate(given["pixel_values"], prompts, tokens)
    log_prob = token_log_probs(logits, tokens).sum(-1)
    loss = -log_prob.mean() + value.square().mean() - 0.01 * entropy(logits).mean()
    close(loss, expected_rl["grad_loss"])
    loss.backward()
    recorded: dict[str, Any] = json.loads(
        (openvla_fixture / "expected_rl_grad_norms.json").read_text()
    )
    parameters = dict(model.named_parameters())
    for name, norm in recorded.items():
        if norm is None:
            assert is_dead(name, model.architecture)
            assert name not in parameters
        else:
            grad = parameters[name].grad
            assert grad is not None
            assert grad.norm().item() == pytest.approx(norm, rel=1e-4), name
    live = {name for name, norm in recorded.items() if norm is not None}
    assert live == {name for name in parameters if parameters[name].grad is not None}
    for name, key in (
        ("projector.fc3.weight", "grad_projector_fc3_weight"),
        ("vision_backbone.featurizer.patch_embed.proj.bias", "grad_patch_embed_bias"),
    ):
        grad, wanted = parameters[name].grad, expected_rl[key]
        assert grad is not None
        assert (grad - wanted).norm() < 1e-4 * wanted.norm()


def bins(ids: Tensor) -> Tensor:
    return bins_of_token_ids(ids)


def close(actual: Tensor | None, wanted: Tensor) -> None:
    assert actual is not None
    assert actual.shape == wanted.shape
    torch.testing.assert_close(
        actual.detach().double(), wanted.double(), atol=ATOL, rtol=0.0, check_dtype=False
    )


def _arrays(path: Path) -> dict[str, Tensor]:
    with np.load(path) as file:
        return {name: torch.from_numpy(file[name]) for name in file}
