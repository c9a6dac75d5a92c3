"""Adapter folders: ours written and read back, RL4VLA's read, everything else refused by name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from roadvla.errors import UserError
from roadvla.policy.openvla.artefacts import (
    Adapter,
    read_adapter,
    read_value_head,
    write_adapter,
)

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "bias": "none"}
HEAD = {"head_l1.weight": torch.ones(3, 2), "head_l3.weight": torch.ones(1, 3)}
STATISTICS = {"sft": {"action": {"q01": [0.0], "q99": [1.0]}}}


def make_modules(rank: int = 4) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        "tower.patch_embed.proj": (torch.randn(rank, 3, 2, 2), torch.randn(6, rank, 1, 1)),
        "layers.0.q_proj": (torch.randn(rank, 6), torch.randn(8, rank)),
    }


def make_adapter(**changes: Any) -> Adapter:
    given: dict[str, Any] = {
        "rank": 4,
        "alpha": 2.0,
        "modules": make_modules(),
        "base": "owner/base",
        "value_head": dict(HEAD),
        "norm_stats": STATISTICS,
    }
    return Adapter(**(given | changes))


def write_peft(folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """An adapter folder as peft writes it."""
    if tensors is None:
        tensors = {
            f"base_model.model.{module}.lora_{part}.weight": weight
            for module, pair in make_modules().items()
            for part, weight in zip("AB", pair, strict=True)
        }
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def message(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


# Ours.


def test_written_adapter_reads_back(tmp_path: Path) -> None:
    adapter = make_adapter()
    write_adapter(tmp_path / "new" / "folder", adapter)
    back = read_adapter(tmp_path / "new" / "folder")
    assert (back.rank, back.alpha, back.base) == (4, 2.0, "owner/base")
    assert back.norm_stats == STATISTICS
    assert back.modules.keys() == adapter.modules.keys()
    for module, pair in adapter.modules.items():
        for stored, weight in zip(back.modules[module], pair, strict=True):
            assert stored.dtype == torch.float32
            assert torch.equal(stored, weight)
    assert back.value_head is not None
    assert all(torch.equal(back.value_head[name], HEAD[name]) for name in HEAD)
    assert back.value_head.keys() == HEAD.keys()


def test_write_leaves_nothing_of_an_earlier_adapter(tmp_path: Path) -> None:
    write_adapter(tmp_path, make_adapter())
    write_adapter(tmp_path, make_adapter(value_head=None, norm_stats=None, base=None, alpha=0.5))
    back = read_adapter(tmp_path)
    assert (back.value_head, back.norm_stats, back.base, back.alpha) == (None, None, None, 0.5)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}


def test_write_keeps_the_file_there_is_if_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path, make_adapter())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_adapter(tmp_path, make_adapter(modules=make_modules()))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_written_value_head_has_the_checkpoint_names(tmp_path: Path) -> None:
    write_adapter(tmp_path, make_adapter())
    stored = load_file(tmp_path / "value_head.safetensors")
    assert stored.keys() == {f"value_head.{name}" for name in HEAD}


def test_peft_reads_what_is_written(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(6, 8, bias=False)
            self.proj = nn.Conv2d(3, 6, 2, bias=False)

        def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
            return self.q_proj(x), self.proj(image)

    modules = make_modules()
    linear, conv = modules["layers.0.q_proj"], modules["tower.patch_embed.proj"]
    write_adapter(tmp_path, make_adapter(modules={"q_proj": linear, "proj": conv}))
    model, x, image = Model(), torch.randn(5, 6), torch.randn(5, 3, 2, 2)
    plain = model(x, image)
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path))(x, image)  # pyright: ignore
    (a, b), scale = linear, 2 / 4
    assert torch.allclose(adapted[0], plain[0] + scale * x @ a.T @ b.T, atol=1e-5)
    filters = torch.einsum("or,rikl->oikl", conv[1].flatten(1), conv[0])
    change = torch.einsum("oikl,bikl->bo", filters, image)
    assert torch.allclose(adapted[1].flatten(1), plain[1].flatten(1) + scale * change, atol=1e-4)


# RL4VLA's and other folders of peft.


def test_rl4vla_folder(tmp_path: Path) -> None:
    tensors = {
        f"base_model.model.{module}.lora_{part}.weight": weight.bfloat16()
        for module, pair in make_modules().items()
        for part, weight in zip("AB", pair, strict=True)
    }
    write_peft(tmp_path, tensors, base_model_name_or_path="/data/openvla-7b", lora_alpha=16)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    state = {
        "vh": {name: weight.bfloat16() for name, weight in HEAD.items()},
        "vh_optimizer": optimizer.state_dict(),
        "vla_optimizer": optimizer.state_dict(),
    }
    torch.save(state, tmp_path / "training_state.pt")
    assert "is never read" in message(lambda: read_adapter(tmp_path))
    _convert(tmp_path)
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(STATISTICS))
    adapter = read_adapter(tmp_path)
    assert (adapter.alpha, adapter.base) == (16.0, "/data/openvla-7b")
    assert adapter.norm_stats == STATISTICS
    assert adapter.value_head is not None
    assert adapter.value_head.keys() == HEAD.keys()
    assert {weight.dtype for weight in adapter.value_head.values()} == {torch.float32}
    assert adapter.modules.keys() == make_modules().keys()
    assert {w.dtype for pair in adapter.modules.values() for w in pair} == {torch.float32}


@pytest.mark.parametrize("infix", ["", ".default", ".policy"])
def test_keys_with_an_adapter_name(tmp_path: Path, infix: str) -> None:
    tensors = {
        f"base_model.model.layers.0.mlp.lora_{part}{infix}.weight": weight
        for part, weight in zip("AB", (torch.ones(4, 3), torch.ones(2, 4)), strict=True)
    }
    assert list(read_adapter(write_peft(tmp_path, tensors)).modules) == ["layers.0.mlp"]


def _convert(folder: Path) -> None:
    """Run what docs/openvla.md tells whoever trusts a ``training_state.pt``."""
    text = (Path(__file__).parents[3] / "docs/openvla.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (snippet,) = (block for block in blocks if "training_state.pt" in block)
    subprocess.run([sys.executable, "-c", snippet], cwd=folder, check=True)


def test_our_value_head_goes_before_the_training_state(tmp_path: Path) -> None:
    (tmp_path / "training_state.pt").write_bytes(b"never looked at")
    save_file({"value_head.head_l1.weight": torch.ones(1)}, tmp_path / "value_head.safetensors")
    head = read_value_head(tmp_path)
    assert head is not None
    assert head["head_l1.weight"].item() == 1.0


def test_no_value_head(tmp_path: Path) -> None:
    assert read_value_head(tmp_path) is None


def test_recorded_value_head(openvla_fixture: Path) -> None:
    head = read_value_head(openvla_fixture)
    assert head is not None
    assert head["head_l1.weight"].shape == (512, 64)


# Refused.


def test_no_adapter(tmp_path: Path) -> None:
    assert "no adapter at" in message(lambda: read_adapter(tmp_path))
    assert "no adapter at" in message(lambda: read_adapter(tmp_path / "none"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    assert "has no adapter_model.safetensors" in message(lambda: read_adapter(tmp_path))
    (tmp_path / "adapter_model.bin").touch()
    text = message(lambda: read_adapter(tmp_path))
    assert "pickled" in text
    assert "save_file" in text


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"use_rslora": True}, "use_rslora True"),
        ({"lora_bias": True}, "lora_bias True"),
        ({"bias": "all"}, "bias 'all'"),
        ({"rank_pattern": {"fc1": 8}}, "rank_pattern {'fc1': 8}"),
        ({"alpha_pattern": {"fc1": 8}}, "alpha_pattern {'fc1': 8}"),
        ({"modules_to_save": ["head"]}, "modules_to_save ['head']"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"r": 0}, "r 0"),
        ({"r": "4"}, "r '4'"),
        ({"lora_alpha": None}, "lora_alpha None"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan"),
    ],
)
def test_config_that_is_no_plain_lora(
    tmp_path: Path, config: dict[str, Any], expected: str
) -> None:
    write_peft(tmp_path, **config)
    assert expected in message(lambda: read_adapter(tmp_path))


def test_config_with_everything_off_is_plain(tmp_path: Path) -> None:
    off = {"use_dora": False, "rank_pattern": {}, "modules_to_save": None, "loftq_config": {}}
    write_peft(tmp_path, **off, init_lora_weights="gaussian", use_rslora=False)
    assert read_adapter(tmp_path).rank == 4


A_KEY, B_KEY = (f"base_model.model.fc.lora_{part}.weight" for part in "AB")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({B_KEY: None}, "has only one of A and B for fc"),
        ({A_KEY: None, B_KEY: None}, "is empty"),
        ({A_KEY: torch.ones(8, 3)}, "A and B of fc are (8, 3) and (2, 4), which is not rank 4"),
        ({B_KEY: torch.ones(2, 8)}, "(4, 3) and (2, 8), which is not rank 4"),
        ({A_KEY: torch.ones(4, 3, 2, 2)}, "which is not rank 4"),
        ({A_KEY: torch.ones(4)}, "which is not rank 4"),
        ({B_KEY: torch.tensor(1.0)}, "which is not rank 4"),
        ({"base_model.model.fc.lora_magnitude_vector": torch.ones(2)}, "lora_magnitude_vector"),
        ({"base_model.model.fc.lora_B.bias": torch.ones(2)}, "lora_B.bias"),
        ({"base_model.model.fc.weight": torch.ones(2)}, "fc.weight, which is no weight of plain"),
        ({"base_model.model.fc.lora_A.x.weight": torch.ones(4, 3)}, "several adapters on fc"),
    ],
)
def test_weights_that_are_no_plain_lora(
    tmp_path: Path, change: dict[str, Tensor | None], expected: str
) -> None:
    tensors = {A_KEY: torch.ones(4, 3), B_KEY: torch.ones(2, 4), **change}
    write_peft(tmp_path, {name: t for name, t in tensors.items() if t is not None})
    assert expected in message(lambda: read_adapter(tmp_path))


def test_damaged_weights(tmp_path: Path) -> None:
    path = write_peft(tmp_path) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is damaged or cut short" in message(lambda: read_adapter(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", '{"sft": {}}'])
def test_damaged_statistics(tmp_path: Path, content: str) -> None:
    write_peft(tmp_path)
    (tmp_path / "dataset_statistics.json").write_text(content)
    assert "dataset_statistics.json" in message(lambda: read_adapter(tmp_path))


class Harmful:
    """Leaves a mark if it is ever unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return eval, (f"open({str(self.mark)!r}, 'w')",)


def test_a_training_state_is_refused_and_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    torch.save({"vh": HEAD, "more": Harmful(mark)}, tmp_path / "training_state.pt")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was opened"))
    text = message(lambda: read_value_head(tmp_path))
    assert "training_state.pt is pickled, which can run code, and is never read" in text
    assert "value_head.safetensors as docs/openvla.md shows" in text
    assert not mark.exists()
    for content in (b"", b"nonsense", b"PK\x03\x04"):
        (tmp_path / "training_state.pt").write_bytes(content)
        assert message(lambda: read_value_head(tmp_path)) == text


def test_value_head_of_something_else(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1, dtype=torch.int64)}, tmp_path / "value_head.safetensors")
    assert "holds no value head" in message(lambda: read_value_head(tmp_path))


def test_damaged_value_head(tmp_path: Path) -> None:
    (tmp_path / "value_head.safetensors").write_bytes(b"")
    assert "value_head.safetensors is damaged" in message(lambda: read_value_head(tmp_path))
