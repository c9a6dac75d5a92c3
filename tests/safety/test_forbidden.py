"""Nothing in the package can run what it reads: no unpickling, no evaluation, no shell."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "src").rglob("*.py"))
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
LOADERS = {
    *("torch.load", "torch.serialization.load", "torch.jit.load", "torch.hub.load"),
    *("torch.export.load", "torch.package.PackageImporter"),
}
CALLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
FORBIDDEN = {
    "a module": "from pickle import loads",
    "a module under another name": "import dill as d",
    "a module's function": "import pickle\npickle.loads(b'')",
    "eval": "eval('1')",
    "exec": "exec('1')",
    "a shell": "import os\nos.system('ls')",
    "a subprocess's shell": "import subprocess\nsubprocess.run('ls', shell=True)",
    "a shell that may be": "import subprocess\nsubprocess.run('ls', shell=flag)",
    "remote code": "AutoModel.from_pretrained('x', trust_remote_code=True)",
    "yaml": "import yaml\nyaml.load(text)",
    "an array of objects": "import numpy as np\nnp.load('x')",
    "an array that may hold objects": "import numpy as np\nnp.load('x', allow_pickle=flag)",
    "torch.load": "import torch\ntorch.load('x')",
    "torch.load that may unpickle": "import torch\ntorch.load('x', weights_only=False)",
    "torch.load of weights alone": "import torch\ntorch.load('x', weights_only=True)",
    "torch.load handed on": "import torch\nread = torch.load",
    "torch.load from where it lives": "from torch.serialization import load\nload('x')",
    "torch under another name": "import torch as t\nt.load('x')",
    "a program of torch's": "import torch\ntorch.jit.load('x')",
    "the error's name": "import pickle\ntry:\n    pass\nexcept pickle.UnpicklingError:\n    pass",
    "torch.load under its own name": "from torch import load\nload('x')",
}
ALLOWED = {
    "torch by its parts": "import torch\nfrom torch.nn import functional as F\ntorch.save",
    "plain arrays": "import numpy as np\nnp.load('x', allow_pickle=False)",
    "a method of that name": "model.eval()",
    "safetensors": "from safetensors.torch import load\nload(data)",
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_source_can_run_what_it_reads(path):
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("source", FORBIDDEN.values(), ids=FORBIDDEN)
def test_it_is_noticed(source):
    assert faults(source)


@pytest.mark.parametrize("source", ALLOWED.values(), ids=ALLOWED)
def test_what_is_harmless_is_allowed(source):
    assert faults(source) == []


def faults(source: str) -> list[str]:
    """List line and kind of everything that is forbidden."""
    found = []
    for node in ast.walk(ast.parse(source)):
        what = ""
        if isinstance(node, ast.Import):
            plain = {alias.name.partition(".")[0] for alias in node.names}
            hidden = {alias.name for alias in node.names if alias.asname} & {"torch"}
            what = " ".join((plain & MODULES) | hidden)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            taken = {f"{module}.{alias.name}" for alias in node.names}
            known = module.partition(".")[0] in MODULES
            what = module if known else " ".join(taken & (CALLS | LOADERS))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in LOADERS:
            what = ast.unparse(node)
        elif isinstance(node, ast.Call):
            what = _call_fault(node)
        if what:
            found.append(f"line {node.lineno}: {what}")
    return found


def _call_fault(call: ast.Call) -> str:
    name = ast.unparse(call.func)
    given = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
    if name in BUILTINS | CALLS:
        return name
    for flag in ("shell", "trust_remote_code"):
        if given.get(flag, False) is not False:
            return flag
    if name in {"np.load", "numpy.load"} and given.get("allow_pickle") is not False:
        return name
    if name.startswith("yaml.") and "safe" not in name:
        return name
    return ""
