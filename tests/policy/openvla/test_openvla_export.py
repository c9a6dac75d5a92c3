"""Export: adapted tensors merged, all others copied bit for bit, the folder whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from openvla_files import CONFIG, DEAD, make_tensors, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from roadvla.errors import UserError
from roadvla.policy.openvla import checkpoint as checkpoint_module
from roadvla.policy.openvla import export
from roadvla.policy.openvla.artefacts import Adapter, write_adapter
from roadvla.policy.openvla.checkpoint import fingerprint, open_checkpoint
from roadvla.policy.openvla.export import export_checkpoint, stores_half
from roadvla.policy.openvla.value_head import ValueHead

RANK, ALPHA = 4, 2.0
CONV = "vision_backbone.featurizer.patch_embed.proj"
HEAD = {name: torch.full_like(w, 0.25) for name, w in ValueHead(8).state_dict().items()}
ADAPTED = (
    CONV,
    "projector.fc1",
    "language_model.lm_head",
    "language_model.model.layers.0.self_attn.q_proj",
    *(name.removesuffix(".weight") for name in DEAD if "norm" not in name),
)


def make_modules(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    modules = {}
    for module in ADAPTED:
        out, *rest = tensors[f"{module}.weight"].shape
        a = torch.randn((RANK, *rest), generator=generator)
        modules[module] = (
            a,
            torch.randn((out, RANK, *[1] * (len(rest) - 1)), generator=generator),
        )
    return modules


def write_run(folder: Path, base: Path, **changes: Any) -> Path:
    """An adapter folder; with ``policy.json``, as our own runs save it, unless told otherwise."""
    given: dict[str, Any] = {
        "rank": RANK,
        "alpha": ALPHA,
        "modules": make_modules(make_tensors()),
        "base": str(base),
        "value_head": HEAD,
        "norm_stats": None,
    }
    write_adapter(folder, Adapter(**(given | changes)))
    description = {
        "format": 1,
        "kind": "openvla",
        "checkpoint": str(base),
        "fingerprint": fingerprint(open_checkpoint(base)),
        "settings": {},
        "sha256": {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in ("adapter_model.safetensors", "value_head.safetensors")
            if (folder / name).exists()
        },
    }
    (folder / "policy.json").write_text(json.dumps(description))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "base", shards=2)
    for name in ("tokenizer.json", "special_tokens_map.json", "generation_config.json"):
        (folder / name).write_text(json.dumps({"file": name}, indent=3))
    (folder / "tokenizer.model").write_bytes(b"\x00pieces")
    (folder / "preprocessor_config.json").write_text('{"means": [1]}')
    (folder / "README.md").write_text("about the base")
    (folder / "optimizer.pt").write_text("not wanted")
    return folder


@pytest.fixture
def run(tmp_path: Path, base: Path) -> Path:
    return write_run(tmp_path / "run", base)


def read_all(folder: Path) -> dict[str, Tensor]:
    """All tensors; the files must not overlap and must agree with their index."""
    files = sorted(folder.glob("model*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = load_file(file)
        assert not found.keys() & tensors.keys()
        tensors |= found
    if len(files) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors.keys()
        for name, file in index["weight_map"].items():
            with safe_open(folder / file, framework="pt") as opened:
                assert name in opened.keys()  # noqa: SIM118
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        assert index["metadata"]["total_size"] == size
    return tensors


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def message(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def expected_merge(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """By hand: every output channel's filter is a sum over the rank, in float64."""
    if weight.dim() == 4:
        delta = torch.einsum("or,rikl->oikl", b[:, :, 0, 0].double(), a.double())
    else:
        delta = b.double() @ a.double()
    return weight.double() + ALPHA / RANK * delta


# What is written.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adapted_tensors_are_merged_and_the_rest_copied(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = make_tensors(dtype)
    # Bits that arithmetic would change: a NaN with a payload, and -0.
    tensors["projector.fc1.bias"].view(torch.int16)[:2] = torch.tensor([0x7FA1, -0x8000]).short()
    source = write_checkpoint(tmp_path / "b", tensors, shards=2)
    run = write_run(tmp_path / "run", source)
    out = export_checkpoint(run, tmp_path / "out")
    merged, modules = read_all(out), make_modules(tensors)
    assert merged.keys() == tensors.keys()
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        assert merged[name].dtype == dtype
        if module not in modules:
            assert torch.equal(merged[name].view(torch.uint8), weight.view(torch.uint8)), name
            continue
        wanted = expected_merge(weight, *modules[module])
        assert not torch.equal(merged[name], weight)
        if dtype == torch.float32:
            assert torch.allclose(merged[name].double(), wanted, atol=1e-5)
        else:  # float32 arithmetic, rounded once: half a unit in the last of 8 bits
            assert ((merged[name].double() - wanted).abs() <= wanted.abs() * 2**-8 + 1e-6).all()


def test_merge_scales_by_alpha_over_rank() -> None:
    a, b = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[3.0, -1.0]])
    # B·A = [3, 6 - 1]; α/r = 1/2
    merged = export.merge(torch.tensor([[10.0, 20.0]]), a, b, 0.5)
    assert merged.tolist() == [[11.5, 22.5]]


def test_files_carried_over(base: Path, run: Path, tmp_path: Path) -> None:
    out = export_checkpoint(run, tmp_path / "deep" / "out")
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "model.safetensors", "value_head.safetensors", "tokenizer.json"),
        *("tokenizer.model", "special_tokens_map.json", "preprocessor_config.json"),
        "generation_config.json",
    }
    for name in ("tokenizer.json", "tokenizer.model", "preprocessor_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert json.loads((out / "config.json").read_text()) == CONFIG
    head = load_file(out / "value_head.safetensors")
    assert torch.equal(head["value_head.head_l1.weight"], HEAD["head_l1.weight"])
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"out"}


def test_shards_and_index(run: Path, tmp_path: Path) -> None:
    out = export_checkpoint(run, tmp_path / "out", shard_bytes=600_000)
    files = sorted(path.name for path in out.glob("model*.safetensors"))
    assert files == [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    assert all((out / name).stat().st_size < 600_000 + 4000 for name in files)  # and a header
    assert read_all(out).keys() == make_tensors().keys()
    assert open_checkpoint(out).shapes == {n: tuple(t.shape) for n, t in make_tensors().items()}


def test_a_tensor_larger_than_a_shard_gets_one(run: Path, tmp_path: Path) -> None:
    out = export_checkpoint(run, tmp_path / "out", shard_bytes=1)
    assert len(list(out.glob("model-*"))) == len(make_tensors())
    assert read_all(out).keys() == make_tensors().keys()


def test_export_in_another_precision(run: Path, tmp_path: Path) -> None:
    out = export_checkpoint(run, tmp_path / "out", dtype="float32")
    tensors, modules = make_tensors(), make_modules(make_tensors())
    for name, weight in read_all(out).items():
        assert weight.dtype == torch.float32
        module = name.removesuffix(".weight")
        wanted = tensors[name].double()
        if module in modules:
            wanted = expected_merge(tensors[name], *modules[module])
        assert torch.allclose(weight.double(), wanted, atol=1e-5)
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == config["text_config"]["torch_dtype"] == "float32"
    assert config["text_config"]["hidden_size"] == 8


def test_statistics_of_the_adapter_replace_those_of_the_base(base: Path, tmp_path: Path) -> None:
    (base / "dataset_statistics.json").write_text('{"old": {"action": {}}}')
    kept = export_checkpoint(write_run(tmp_path / "a", base), tmp_path / "kept")
    assert json.loads((kept / "config.json").read_text())["norm_stats"] == CONFIG["norm_stats"]
    assert "old" in json.loads((kept / "dataset_statistics.json").read_text())
    statistics = {"sft": {"action": {"q01": [0.5]}}}
    run = write_run(tmp_path / "b", base, norm_stats=statistics)
    out = export_checkpoint(run, tmp_path / "replaced")
    assert json.loads((out / "config.json").read_text())["norm_stats"] == statistics
    assert json.loads((out / "dataset_statistics.json").read_text()) == statistics


def test_rl4vla_folder_without_our_description(base: Path, run: Path, tmp_path: Path) -> None:
    (run / "policy.json").unlink()
    (run / "value_head.safetensors").unlink()
    (run / "training_state.pt").write_bytes(b"never looked at")
    assert "is pickled" in message(lambda: export_checkpoint(run, tmp_path / "no"))
    save_file(HEAD, run / "value_head.safetensors")
    (run / "training_state.pt").unlink()
    out = export_checkpoint(run, tmp_path / "out")
    head = load_file(out / "value_head.safetensors")
    assert torch.equal(head["value_head.head_l1.weight"], HEAD["head_l1.weight"])
    write_adapter(
        run, Adapter(rank=RANK, alpha=ALPHA, modules=make_modules(make_tensors()), base=None,
                     value_head=None, norm_stats=None)
    )  # fmt: skip
    assert "pass --checkpoint" in message(lambda: export_checkpoint(run, tmp_path / "no"))
    out = export_checkpoint(run, tmp_path / "with", checkpoint=str(base))
    assert read_all(out).keys() == make_tensors().keys()


def test_a_value_head_of_the_base_stays_unless_the_adapter_has_one(tmp_path: Path) -> None:
    inside = {"value_head.head_l1.weight": torch.zeros(512, 8)}
    base = write_checkpoint(tmp_path / "base", make_tensors() | inside)
    run = write_run(tmp_path / "run", base, value_head=None)
    (run / "policy.json").unlink()
    out = export_checkpoint(run, tmp_path / "out")
    assert not (out / "value_head.safetensors").exists()
    assert not read_all(out)["value_head.head_l1.weight"].any()
    out = export_checkpoint(write_run(tmp_path / "other", base), tmp_path / "new")
    assert torch.equal(read_all(out)["value_head.head_l1.weight"], HEAD["head_l1.weight"])


# The original code.


AUTO_MAP = {
    "AutoConfig": "configuration_prismatic.OpenVLAConfig",
    "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
}


def with_code(base: Path) -> None:
    (base / "config.json").write_text(json.dumps(CONFIG | {"auto_map": AUTO_MAP}))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tok.Slow", None], "AutoProcessor": "proc.P"}}
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def test_references_to_code_that_is_not_there_go(base: Path, tmp_path: Path) -> None:
    with_code(base)
    (base / "configuration_prismatic.py").write_text("raise SystemExit('never run')")
    out = export_checkpoint(write_run(tmp_path / "run", base), tmp_path / "out")
    kept = json.loads((out / "config.json").read_text())["auto_map"]
    assert kept == {"AutoConfig": AUTO_MAP["AutoConfig"]}
    assert "never run" in (out / "configuration_prismatic.py").read_text()
    assert json.loads((out / "tokenizer_config.json").read_text()) == {}


def test_references_to_code_on_the_hub_are_named(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_code(base)
    run = write_run(tmp_path / "run", base)
    monkeypatch.setattr(checkpoint_module, "_download", lambda _: base)
    out = export_checkpoint(run, tmp_path / "out", checkpoint="openvla/openvla-7b")
    kept = json.loads((out / "config.json").read_text())["auto_map"]
    assert kept["AutoConfig"] == "openvla/openvla-7b--configuration_prismatic.OpenVLAConfig"
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    assert tokenizer["auto_map"]["AutoTokenizer"] == ["openvla/openvla-7b--tok.Slow", None]


# Whole or not at all.


@pytest.mark.parametrize("place", ["read_tensor", "write_value_head"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("there", [False, True])
def test_a_failure_in_the_middle_leaves_what_was_there(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    error: BaseException,
    there: bool,
) -> None:
    out = tmp_path / "exports" / "out"
    if there:
        out.mkdir(parents=True)
        (out / "earlier").write_text("mine")
    real, calls = getattr(export, place), []

    def fail_late(*arguments: Any) -> Any:
        calls.append(arguments)
        if place == "write_value_head" or len(calls) == 5:
            raise error
        return real(*arguments)

    monkeypatch.setattr(export, place, fail_late)
    with pytest.raises((UserError, KeyboardInterrupt)) as caught:
        export_checkpoint(run, out, force=there)
    if isinstance(error, OSError):
        assert "No space left on device" in str(caught.value)
        assert isinstance(caught.value, UserError)
    assert tree(tmp_path / "exports") == ({"out/earlier": b"mine"} if there else {})
    monkeypatch.setattr(export, place, real)
    export_checkpoint(run, out, force=there)
    assert read_all(out).keys() == make_tensors().keys()


def test_a_failure_to_move_the_new_folder_puts_the_old_one_back(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "earlier").write_text("mine")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == ".out.partial":
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert "Input/output" in message(lambda: export_checkpoint(run, out, force=True))
    assert tree(out) == {"earlier": b"mine"}
    assert {path.name for path in tmp_path.iterdir()} == {"base", "run", "out"}


def test_what_an_export_left_that_was_killed_is_no_hindrance(run: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_text("half")
    export_checkpoint(run, tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()


def test_force_replaces_everything(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_checkpoint(run, out, shard_bytes=600_000)
    assert "is not empty" in message(lambda: export_checkpoint(run, out))
    export_checkpoint(run, out, force=True)
    assert not list(out.glob("model-*"))
    assert read_all(out).keys() == make_tensors().keys()


def test_an_empty_folder_is_filled(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_checkpoint(run, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_source_files_are_not_touched(base: Path, run: Path, tmp_path: Path) -> None:
    before = tree(base), tree(run)
    export_checkpoint(run, tmp_path / "out")
    assert (tree(base), tree(run)) == before


# Refused.


def test_targets_that_are_refused(base: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is a file" in message(lambda: export_checkpoint(run, tmp_path / "file"))
    for target in (base, base / "out", run, run / "out", tmp_path):
        text = message(lambda to=target: export_checkpoint(run, to, force=True))
        assert "lie in one another" in text
    (tmp_path / "link").symlink_to(base)
    text = message(lambda: export_checkpoint(run, tmp_path / "link" / "out"))
    assert "lie in one another" in text
    assert (base / "config.json").exists()


def test_options_that_are_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "dtype is 'int8'" in message(lambda: export_checkpoint(run, out, dtype="int8"))
    assert "shard_bytes is 0" in message(lambda: export_checkpoint(run, out, shard_bytes=0))
    assert "no adapter at" in message(lambda: export_checkpoint(tmp_path / "none", out))
    assert not out.exists()


def test_another_base_is_refused(base: Path, run: Path, tmp_path: Path) -> None:
    tensors = make_tensors()
    tensors["projector.fc1.weight"] += 1
    other = write_checkpoint(tmp_path / "other", tensors)
    text = message(lambda: export_checkpoint(run, tmp_path / "out", checkpoint=str(other)))
    assert "whose weights are not those of" in text
    moved = tmp_path / "moved"
    shutil.move(base, moved)
    assert "which is not here" in message(lambda: export_checkpoint(run, tmp_path / "out"))
    export_checkpoint(run, tmp_path / "out", checkpoint=str(moved))


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        ("projector.fc9", ((RANK, 3), (2, RANK)), "has no such layer"),
        ("projector.fc1", ((RANK, 3), (16, RANK)), "a weight of (16, 3), and"),
        (CONV, ((RANK, 588), (8, RANK)), "has one of (8, 3, 14, 14)"),
    ],
)
def test_adapters_that_do_not_fit(
    base: Path, tmp_path: Path, module: str, shape: tuple[tuple[int, ...], ...], expected: str
) -> None:
    a, b = (torch.ones(size) for size in shape)
    run = write_run(tmp_path / "run", base, modules={module: (a, b)})
    assert expected in message(lambda: export_checkpoint(run, tmp_path / "out"))


def test_adapters_that_diverged(base: Path, tmp_path: Path) -> None:
    modules = make_modules(make_tensors())
    modules["projector.fc1"][1][3, 1] = float("nan")
    run = write_run(tmp_path / "run", base, modules=modules)
    text = message(lambda: export_checkpoint(run, tmp_path / "out"))
    assert "makes projector.fc1.weight infinite or NaN" in text
    assert {path.name for path in tmp_path.iterdir()} == {"base", "run"}


def test_a_full_disk_is_noticed_beforehand(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil._ntuple_diskusage(10**9, 10**9, 1000)  # pyright: ignore
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    assert "0.0 GB are free" in message(lambda: export_checkpoint(run, tmp_path / "out"))


# The real names.


def test_recorded_checkpoint_round_trip(openvla_fixture: Path, tmp_path: Path) -> None:
    base = open_checkpoint(openvla_fixture)
    modules = {"projector.fc3": (torch.ones(RANK, 64), torch.zeros(64, RANK))}
    run = write_run(tmp_path / "run", openvla_fixture, modules=modules, value_head=None)
    (run / "policy.json").unlink()
    out = export_checkpoint(run, tmp_path / "out")
    original, written = load_file(openvla_fixture / "model.safetensors"), read_all(out)
    assert written.keys() == original.keys() == base.shapes.keys()
    assert all(torch.equal(written[name], original[name]) for name in original)
    name = "value_head.safetensors"
    assert (out / name).read_bytes() == (openvla_fixture / name).read_bytes()


def test_a_value_head_that_does_not_fit(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", make_tensors())
    run = write_run(tmp_path / "run", base, value_head=ValueHead(6).state_dict())
    with pytest.raises(UserError, match=r"head_l1.weight is \(512, 6\), expected \(512, 8\)"):
        export_checkpoint(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_whether_an_export_was_rounded(tmp_path: Path, dtype: str) -> None:
    base = write_checkpoint(tmp_path / "base", make_tensors())
    out = export_checkpoint(write_run(tmp_path / "run", base), tmp_path / "out", dtype=dtype)
    assert stores_half(out) == (dtype == "bfloat16")
