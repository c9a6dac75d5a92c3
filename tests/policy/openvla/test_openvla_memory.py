"""Memory: the formulas against the bytes that real networks hold, on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from openvla_networks import SIGLIP, make_architecture, make_network, random_inputs
from torch import Tensor

from roadvla.policy.openvla.architecture import Architecture
from roadvla.policy.openvla.cost import (
    OPENVLA_7B,
    adapter_parameters,
    decoder_parameters,
    prefill_tokens,
    training_tokens,
)
from roadvla.policy.openvla.memory import (
    cache_bytes,
    decode_bytes,
    resident,
    saved_bytes,
    trained_parameters,
    working_bytes,
)
from roadvla.policy.openvla.network import Network

RANK, PROMPT = 8, 30
HALF = pytest.mark.parametrize("half", [True, False], ids=["bfloat16", "float32"])
TOLERANCE = 0.01
"""Of the saved bytes; the issue asks for 10 %."""


def build(half: bool, **sizes: int) -> tuple[Architecture, Network]:
    architecture = make_architecture(**sizes)
    dtype = torch.bfloat16 if half else torch.float32
    return architecture, make_network(architecture, rank=RANK, dtype=dtype)


@HALF
@pytest.mark.parametrize("lm_head", [True, False])
def test_resident_bytes_are_exact(half: bool, lm_head: bool) -> None:
    architecture = make_architecture()
    dtype = torch.bfloat16 if half else torch.float32
    network = make_network(architecture, rank=RANK, lm_head=lm_head, dtype=dtype)
    parameters = list(network.parameters())
    trained = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]

    expected = resident(architecture, RANK, lm_head=lm_head, half=half)
    assert expected.base == sum(p.nbytes for p in parameters if not p.requires_grad)
    assert expected.adapters == sum(p.nbytes for p in trained)
    assert expected.gradients == expected.adapters
    assert expected.moments == sum(t.nbytes for t in moments)


@HALF
@pytest.mark.parametrize("shared", [4, 2])
def test_cache_bytes_are_exact(half: bool, shared: int) -> None:
    architecture, network = build(half, shared=shared)
    pixels, ids, lengths, _, _ = random_inputs(2, PROMPT)
    with torch.no_grad():
        x = network._sequence(pixels, ids)
        _, cache = network._run(x, network._state_positions(lengths).unsqueeze(1), room=6)
    assert cache.nbytes == 2 * cache_bytes(architecture, PROMPT, half=half)


@HALF
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"shared": 2}, {"layers": 5}], ids=str)
def test_saved_bytes_are_what_autograd_keeps(
    half: bool, checkpointing: bool, sizes: dict[str, int]
) -> None:
    architecture, network = build(half, **sizes)
    network.recompute = checkpointing
    # Per sample: what does not grow with the batch, such as casts of the adapters, cancels.
    measured = (saved_by_autograd(network, 3) - saved_by_autograd(network, 1)) / 2
    expected = saved_bytes(architecture, PROMPT, RANK, checkpointing=checkpointing, half=half)
    assert measured == pytest.approx(expected.kept, rel=TOLERANCE)


@HALF
def test_saved_bytes_of_one_tower(half: bool) -> None:
    architecture = make_architecture((SIGLIP,))
    dtype = torch.bfloat16 if half else torch.float32
    network = make_network(architecture, rank=RANK, dtype=dtype)
    measured = (saved_by_autograd(network, 3) - saved_by_autograd(network, 1)) / 2
    expected = saved_bytes(architecture, PROMPT, RANK, half=half)
    assert measured == pytest.approx(expected.kept, rel=TOLERANCE)


@HALF
def test_a_recomputed_block_is_the_largest(half: bool) -> None:
    deep, shallow = (make_architecture(layers=layers) for layers in (4, 3))
    plain = [saved_bytes(a, PROMPT, RANK, half=half) for a in (deep, shallow)]
    again = saved_bytes(deep, PROMPT, RANK, checkpointing=True, half=half)
    # In these sizes a decoder layer keeps more than a vision block.
    assert again.recomputed == plain[0].kept - plain[1].kept
    assert plain[0].recomputed == 0
    assert again.peak == again.kept + again.recomputed < plain[0].peak


def test_casts_are_what_autograd_keeps_once() -> None:
    architecture, network = build(True)
    measured = saved_by_autograd(network, 1)
    per_sample = (saved_by_autograd(network, 3) - measured) / 2
    # Beside the casts, the action rows of the output layer in float32.
    rows = 256 * architecture.hidden * 4
    expected = resident(architecture, RANK).casts
    assert measured - per_sample - rows == pytest.approx(expected, rel=0.05)


@HALF
def test_working_bytes_are_the_peak_of_a_pass_without_gradient(half: bool) -> None:
    # So wide a decoder that the peak is not in a tower.
    architecture, network = build(half, hidden=512, inner=1376)

    def evaluate(count: int) -> Callable[[], object]:
        pixels, ids, lengths, tokens, _ = random_inputs(count, PROMPT)
        return lambda: network.evaluate_on(pixels, ids, lengths, tokens)

    def act(count: int) -> Callable[[], object]:
        pixels, ids, lengths, _, uniform = random_inputs(count, PROMPT)
        return lambda: network.act_on(pixels, ids, lengths, uniform, temperature=1.0)

    with torch.no_grad():
        passing = (peak(evaluate(6)) - peak(evaluate(2))) / 4
        acting = (peak(act(6)) - peak(act(2))) / 4
    # The tests' shape checks hold on to the decoder's input, which is free otherwise.
    held = architecture.hidden * (2 if half else 4)
    whole = training_tokens(architecture, PROMPT)
    expected = working_bytes(architecture, whole, half=half) + whole * held
    assert passing == pytest.approx(expected, rel=0.01)
    image_and_prompt = prefill_tokens(architecture, PROMPT)
    expected = working_bytes(architecture, image_and_prompt, half=half) + image_and_prompt * held
    expected += cache_bytes(architecture, PROMPT, half=half)
    assert acting == pytest.approx(expected, rel=0.02)


@HALF
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_stays_within_the_plan(half: bool, checkpointing: bool) -> None:
    architecture, network = build(half, hidden=256, inner=688)
    network.recompute = checkpointing
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)

    def update(count: int) -> Callable[[], object]:
        pixels, ids, lengths, tokens, _ = random_inputs(count, PROMPT)

        def run() -> None:
            logits, value = network.evaluate_on(pixels, ids, lengths, tokens)
            (logits.log_softmax(-1).mean() + value.mean()).backward()

        return run

    measured = (peak(update(6)) - peak(update(2))) / 4
    saved = saved_bytes(architecture, PROMPT, RANK, checkpointing=checkpointing, half=half)
    planned = saved.peak + working_bytes(
        architecture, training_tokens(architecture, PROMPT), half=half
    )
    assert 0.6 * planned < measured <= planned


def test_openvla_7b_in_gigabytes() -> None:
    stays = resident(OPENVLA_7B, 32)
    assert stays.base == 2 * 7_498_156_704
    assert stays.adapters == 4 * (109_126_400 + 2_163_456)
    assert trained_parameters(OPENVLA_7B, 32) == 109_126_400 + 2_163_456
    # 32 layers of keys and values, 32 heads of 128 channels, 292 positions, bfloat16.
    assert cache_bytes(OPENVLA_7B, 30) == 32 * 2 * 32 * 128 * 292 * 2
    # The survey of peers: about 2 GB of activations per sample, fused.
    plain = saved_bytes(OPENVLA_7B, 30, 32)
    again = saved_bytes(OPENVLA_7B, 30, 32, checkpointing=True)
    assert plain.peak == pytest.approx(2.0e9, rel=0.1)
    assert again.peak < plain.peak / 8


def test_decoding_reads_the_decoder_and_the_caches_once_per_token() -> None:
    base, adapters = decoder_parameters(OPENVLA_7B, 32)
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    assert base == 32 * layer + 256 * 4096
    assert adapters == 32 * (32 * (4 * 8192 + 3 * 15104) + 4096 + 256)
    alone = decode_bytes(OPENVLA_7B, 30, 32, 1)
    assert alone == 6 * (2 * base + 4 * adapters + cache_bytes(OPENVLA_7B, 30))
    assert decode_bytes(OPENVLA_7B, 30, 32, 5) - alone == 4 * 6 * cache_bytes(OPENVLA_7B, 30)
    # The survey of peers: 13.2 GB of weights and 150 MB per observation, 31.8 ms at 4.3 TB/s.
    assert decode_bytes(OPENVLA_7B, 30, 32, 64) / 4.3e12 == pytest.approx(31.8e-3, rel=0.03)


def test_the_output_layers_adapter_is_not_cast() -> None:
    assert resident(OPENVLA_7B, 32).casts == 2 * adapter_parameters(OPENVLA_7B, 32, lm_head=False)
    assert resident(OPENVLA_7B, 32, half=False).casts == 0


def saved_by_autograd(network: Network, count: int) -> int:
    """Bytes of the distinct storages that a pass saves for its backward pass, but parameters."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        where = tensor.untyped_storage().data_ptr()
        if where not in own:
            kept[where] = tensor  # alive, so that no other storage takes its place
        return tensor

    towers = len(network.architecture.towers)
    pixels, ids, lengths, tokens, _ = random_inputs(count, PROMPT, towers=towers)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network.evaluate_on(pixels, ids, lengths, tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def peak(run: Callable[[], object]) -> int:
    """Most bytes that a call has allocated at any time, beyond what there was.

    Without oneDNN: on processors with AMX it takes buffers for bfloat16 products as large as the
    product itself, which says nothing about a GPU.
    """
    with torch.backends.mkldnn.flags(enabled=False):
        run()  # what is made once is made now
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            run()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
