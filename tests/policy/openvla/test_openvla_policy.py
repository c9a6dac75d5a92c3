"""OpenVLA as a policy: adapters, critics on the same base, folders, the 7B's counts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from roadvla.errors import UserError
from roadvla.policy.base import Policy
from roadvla.policy.openvla import OpenVLA
from roadvla.policy.openvla.adapters import adapted_modules, attach
from roadvla.policy.openvla.architecture import Architecture, Tower
from roadvla.policy.openvla.artefacts import write_adapter
from roadvla.policy.openvla.export import export_checkpoint
from roadvla.policy.openvla.network import Network
from roadvla.policy.openvla.policy import (
    OpenVLAPolicy,
    load_critic,
    load_openvla,
    make_openvla,
    save_openvla,
)
from roadvla.policy.openvla.tiny_checkpoint import write_tiny_checkpoint
from roadvla.policy.settings import OpenVLASettings
from roadvla.types import Observation

SETTINGS = OpenVLASettings(dtype="float32", lora_rank=4, lora_alpha=8, inference_batch=2)
# Llama-2-7B as OpenVLA's export leaves it to the defaults.
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 32000,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("base") / "tiny", seed=1))


@pytest.fixture
def policy(checkpoint: str) -> OpenVLAPolicy:
    return make_openvla(checkpoint, SETTINGS)


@pytest.fixture
def observation(policy: OpenVLAPolicy) -> Observation:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (5, 64, 64, 3), dtype=torch.uint8, generator=generator)
    texts = ["put carrot on plate", "put red ball on blue plate"] * 2 + ["put cube on plate"]
    return Observation(image=image, prompt=policy.tokenize(texts))


def test_it_is_a_policy(policy: OpenVLAPolicy) -> None:
    assert isinstance(policy, Policy)
    named = dict(policy.named_parameters())
    trained = {id(p) for p in policy.policy_parameters()}
    heads = {id(p) for p in policy.value_parameters()}
    assert trained
    assert len(heads) == 5
    for name, parameter in named.items():
        assert parameter.requires_grad == (id(parameter) in trained | heads), name
        assert (id(parameter) in trained) == (".lora_" in name)
        assert (id(parameter) in heads) == ("value_head" in name)
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32


def test_fresh_adapters_change_nothing(
    policy: OpenVLAPolicy, checkpoint: str, observation: Observation
) -> None:
    tokens = torch.randint(0, 256, (5, 7))
    logits, value = policy.evaluate(observation, tokens)
    model = policy.model
    bare = type(model).from_pretrained(checkpoint, dtype=torch.float32)
    inputs = policy._inputs(observation)
    wanted, wanted_value = bare.evaluate_on(*inputs, tokens)
    torch.testing.assert_close(logits, wanted)
    torch.testing.assert_close(value, wanted_value)


def test_every_adapter_learns(policy: OpenVLAPolicy, observation: Observation) -> None:
    """A takes gradient only once B is not zero."""
    disturb(policy)
    logits, value = policy.evaluate(observation, torch.randint(0, 256, (5, 7)))
    (logits.log_softmax(-1)[..., 3].mean() + value.mean()).backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            assert parameter.grad.abs().sum() > 0, name


def test_acting_does_not_depend_on_the_split(
    policy: OpenVLAPolicy, observation: Observation
) -> None:
    disturb(policy)
    outputs = []
    for size in (2, 5):
        policy.settings = replace(SETTINGS, inference_batch=size)
        generator = torch.Generator().manual_seed(3)
        outputs.append(policy.act(observation, temperature=1.0, generator=generator))
    assert torch.equal(outputs[0].action_tokens, outputs[1].action_tokens)
    torch.testing.assert_close(outputs[0].value, outputs[1].value)
    torch.testing.assert_close(policy.value(observation), outputs[0].value)
    assert outputs[0].logits is None
    assert policy.act(observation, temperature=0.0, keep_logits=True).logits is not None


def test_padding_is_inert(policy: OpenVLAPolicy) -> None:
    texts = ["put carrot on plate", "put red ball on blue plate"]
    image = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    tokens = torch.randint(0, 256, (2, 7))
    logits, value = policy.evaluate(Observation(image, policy.tokenize(texts)), tokens)
    for row, text in enumerate(texts):
        one = slice(row, row + 1)
        alone = Observation(image[one], policy.tokenize([text]))
        wanted, wanted_value = policy.evaluate(alone, tokens[one])
        torch.testing.assert_close(logits[one], wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(value[one], wanted_value, atol=1e-5, rtol=1e-5)


def test_a_fresh_value_head(policy: OpenVLAPolicy, checkpoint: str) -> None:
    head = dict(policy.model.value_head.named_parameters())
    for name, weight in head.items():
        if name.endswith("bias"):
            assert not weight.any()
        else:
            assert weight.std().item() == pytest.approx(0.02, rel=0.2)
    again = make_openvla(checkpoint, SETTINGS).model.value_head
    assert all(torch.equal(head[name], weight) for name, weight in again.named_parameters())


def test_saved_and_loaded(policy: OpenVLAPolicy, observation: Observation, tmp_path: Path) -> None:
    disturb(policy)
    save_openvla(policy, tmp_path / "saved")
    loaded = load_openvla(tmp_path / "saved")
    assert loaded.settings == SETTINGS
    for (name, one), (other_name, other) in zip(
        policy.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert name == other_name
        assert torch.equal(one, other), name
        assert one.requires_grad == other.requires_grad
    generator = torch.Generator()
    one = policy.act(observation, temperature=1.0, generator=generator.manual_seed(1))
    other = loaded.act(observation, temperature=1.0, generator=generator.manual_seed(1))
    assert torch.equal(one.log_probs, other.log_probs)
    again = make_openvla(str(tmp_path / "saved"), SETTINGS)
    assert torch.equal(again.value(observation), policy.value(observation))


def test_critic_shares_the_base_and_leaves_the_policy_alone(
    policy: OpenVLAPolicy, observation: Observation, tmp_path: Path
) -> None:
    other = make_openvla(str(policy.model.checkpoint.source), SETTINGS)  # type: ignore[union-attr]
    disturb(other, seed=9)
    save_openvla(other, tmp_path / "ppo")
    disturb(policy, seed=4)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    flags = {name: p.requires_grad for name, p in policy.named_parameters()}
    own = policy.value(observation)
    critic = load_critic(tmp_path / "ppo", policy)
    assert torch.equal(critic.value(observation), other.value(observation))
    assert not torch.allclose(own, other.value(observation))
    assert torch.equal(policy.value(observation), own)
    after = dict(policy.named_parameters())
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name
        assert after[name].requires_grad == flags[name], name
    extra = after.keys() - before.keys()
    assert extra
    assert all(".reference." in name and not after[name].requires_grad for name in extra)
    assert {id(p) for p in policy.policy_parameters()} == {
        id(p) for name, p in after.items() if name in before and ".lora_" in name
    }
    assert policy.give().modules.keys() == other.give().modules.keys()
    base = {name for name in after if "base_layer" in name}
    assert base == {name for name in before if "base_layer" in name}


def test_exported_is_the_same_policy(
    policy: OpenVLAPolicy, observation: Observation, tmp_path: Path
) -> None:
    """Merged into the base in float32: the oracle of every adapter's place, scale and transpose."""
    disturb(policy)
    save_openvla(policy, tmp_path / "saved")
    merged = export_checkpoint(tmp_path / "saved", tmp_path / "merged", dtype="float32")
    exported = OpenVLA.from_pretrained(merged, dtype=torch.float32)
    tokens = torch.randint(0, 256, (5, 7))
    logits, value = policy.evaluate(observation, tokens)
    wanted, wanted_value = exported.evaluate_on(*policy._inputs(observation), tokens)
    torch.testing.assert_close(logits, wanted, atol=3e-5, rtol=1e-5)
    torch.testing.assert_close(value, wanted_value, atol=3e-5, rtol=1e-5)
    bare, _ = make_openvla(policy.model.checkpoint.source, SETTINGS).evaluate(observation, tokens)  # type: ignore[union-attr]
    assert (bare - logits).abs().max() > 1.0
    again = export_checkpoint(tmp_path / "saved", tmp_path / "again", dtype="float32")
    for name in ("model.safetensors", "config.json", "value_head.safetensors"):
        assert (again / name).read_bytes() == (merged / name).read_bytes()


def test_an_adapter_of_rl4vla(
    policy: OpenVLAPolicy, observation: Observation, tmp_path: Path
) -> None:
    """bfloat16, with adapters on dead modules, its value head converted once."""
    disturb(policy)
    own = policy.give()
    dead = "vision_backbone.fused_featurizer.attn_pool.q"
    pair = (torch.randn(4, 40), torch.zeros(40, 4))
    adapter = replace(own, modules={**own.modules, dead: pair}, value_head=None)
    write_adapter(tmp_path, adapter)
    assert own.value_head is not None
    torch.save({"vh": own.value_head, "vh_optimizer": {}}, tmp_path / "training_state.pt")
    with pytest.raises(UserError, match=r"training_state\.pt is pickled"):
        make_openvla(str(tmp_path), SETTINGS)
    save_file(own.value_head, tmp_path / "value_head.safetensors")
    loaded = make_openvla(str(tmp_path), SETTINGS)
    tokens = torch.randint(0, 256, (5, 7))
    for wanted, found in zip(
        policy.evaluate(observation, tokens), loaded.evaluate(observation, tokens), strict=True
    ):
        assert torch.equal(wanted, found)
    assert dead not in loaded.give().modules
    lacking = replace(own, modules={n: p for n, p in own.modules.items() if "fc3" not in n})
    write_adapter(tmp_path, lacking)
    with pytest.raises(UserError, match=r"1 missing \(projector.fc3, …\)"):
        make_openvla(str(tmp_path), SETTINGS)
    write_adapter(tmp_path, replace(own, modules={**own.modules, "projector.fc9": pair}))
    with pytest.raises(UserError, match=r"1 unknown \(projector.fc9, …\)"):
        make_openvla(str(tmp_path), SETTINGS)
    write_adapter(tmp_path, replace(own, modules={**own.modules, "projector.fc3": pair}))
    with pytest.raises(UserError, match=r"does not fit at projector.fc3: \(4, 40\)"):
        make_openvla(str(tmp_path), SETTINGS)


def test_the_base_is_found_from_elsewhere(
    policy: OpenVLAPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Path(policy.model.checkpoint.source)  # type: ignore[union-attr]
    monkeypatch.chdir(checkpoint.parent)
    save_openvla(make_openvla(checkpoint.name, SETTINGS), tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    assert load_openvla(tmp_path / "saved").model.checkpoint is not None
    shutil.copytree(checkpoint, tmp_path / "copy")
    moved = load_openvla(tmp_path / "saved", checkpoint="copy")
    assert moved.model.checkpoint is not None
    assert moved.model.checkpoint.source == "copy"


def test_rank_and_layers_must_agree(policy: OpenVLAPolicy, tmp_path: Path) -> None:
    save_openvla(policy, tmp_path / "saved")
    with pytest.raises(UserError, match=r"rank 4 and alpha 8, not 8 and 8: pass --lora-rank 4"):
        load_openvla(tmp_path / "saved", settings=replace(SETTINGS, lora_rank=8))
    with pytest.raises(UserError, match=r"an adapter on language_model.lm_head: pass --lora-lm"):
        load_openvla(tmp_path / "saved", settings=replace(SETTINGS, lora_lm_head=False))


def test_another_base_is_refused(policy: OpenVLAPolicy, tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", seed=2)
    save_openvla(policy, tmp_path / "saved")
    with pytest.raises(UserError, match=r"whose weights are not those of .*other"):
        load_openvla(tmp_path / "saved", checkpoint=str(other))
    foreign = make_openvla(str(other), SETTINGS)
    with pytest.raises(UserError, match="whose weights are not those of"):
        load_critic(tmp_path / "saved", foreign)


def test_damaged_folders(policy: OpenVLAPolicy, tmp_path: Path) -> None:
    save_openvla(policy, tmp_path / "saved")
    for name in ("value_head.safetensors", "adapter_model.safetensors"):
        broken = tmp_path / name
        shutil.copytree(tmp_path / "saved", broken)
        data = bytearray((broken / name).read_bytes())
        data[-1] ^= 1
        (broken / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"{name} is missing, or not the file"):
            load_openvla(broken)
    described = tmp_path / "saved" / "policy.json"
    described.write_text(json.dumps({"format": 1, "kind": "tiny", "sha256": "0"}))
    with pytest.raises(UserError, match="kind 'tiny'"):
        load_openvla(tmp_path / "saved")
    described.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_openvla(tmp_path / "saved")


@pytest.mark.parametrize(("lm_head", "count"), [(True, 109_126_400), (False, 107_969_280)])
def test_adapters_of_the_7b(lm_head: bool, count: int) -> None:
    """RL4VLA's 110,828,288 less its adapters on dead modules, rank 32.

    Per adapted layer 32·(in + out). Dead: DINOv2's last block 32·(4096 + 2048 + 5120 + 5120),
    SigLIP's 32·(4608 + 2304 + 5456 + 5456), its pooling 32·(2304 + 3456 + 2304 + 5456 + 5456),
    1,701,888 in all. ``lm_head``: 32·(4096 + 32064) = 1,157,120.
    """
    tower = Tower(
        width=1024,
        depth=23,
        heads=16,
        mlp=4096,
        patch=14,
        patches=256,
        registers=4,
        class_token=True,
        layer_scale=True,
        packed=True,
    )
    siglip = replace(
        tower, width=1152, depth=26, mlp=4304, registers=0, class_token=False, layer_scale=False
    )
    architecture = Architecture(
        towers=(tower, siglip),
        image_size=224,
        text=LLAMA_7B,
        prompt_style="openvla",
        norm_stats={},
    )
    with torch.device("meta"):
        network = Network(architecture)
    total = sum(p.numel() for name, p in network.named_parameters() if "value_head" not in name)
    dead_blocks = 12_600_320 + 30_480_160
    assert total == 7_541_237_184 - dead_blocks
    assert sum(p.numel() for p in network.value_head.parameters()) == 2_163_456
    modules = adapted_modules(network, lm_head=lm_head)
    attach(network, "policy", modules, rank=32, alpha=16)
    assert sum(p.numel() for n, p in network.named_parameters() if ".lora_" in n) == count
    dead = 32 * (4096 + 2048 + 5120 + 5120 + 4608 + 2304 + 5456 + 5456)
    dead += 32 * (2304 + 3456 + 2304 + 5456 + 5456)
    assert count + dead == 110_828_288 - (0 if lm_head else 32 * (4096 + 32064))


def disturb(policy: OpenVLAPolicy, seed: int = 0) -> None:
    """Make every adapter and the value head count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in [*policy.policy_parameters(), *policy.value_parameters()]:
            noise: Tensor = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * noise)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("norm_key", value) for value in ([], {}, 3, True)),
        *(("lora_rank", value) for value in (True, 1.5, "4", None, [], 0)),
        *(("shard", value) for value in (1, "true", None, [])),
        *(("dtype", value) for value in ([], None, "int8")),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_settings_of_another_type_are_refused(name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{name} is .*(expected|use|needed)"):
        OpenVLASettings(**{name: value})  # type: ignore[arg-type]
