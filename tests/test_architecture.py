"""The shape of the house: which package may import which, what stays light, how long a file may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("envs", "rollout", "learner", "deploy")
MAX_LINES = 400

# Importer -> what of ours it may import, itself included; the longest matching name counts. rollout.wire is its own.
ARROWS = {
    "envs": {"envs"},
    "rollout.wire": {"rollout.wire"},
    "rollout": {"rollout", "rollout.wire", "envs"},
    "learner": {"learner", "rollout.wire"},
    "deploy": {"deploy", "learner", "rollout", "rollout.wire", "envs"},
}
# Third-party package -> where alone it may be imported, as patterns of paths.
ONLY_IN = {
    "ray": ("deploy/*", "*/actors.py"),
    "vllm": ("rollout/vllm_*.py",),
    "torch": ("rollout/*.py", "learner/*", "deploy/*"),
    "rich": ("deploy/console.py",),
}
TORCH_FREE = ("envs/*", "rollout/wire/*")
WIRE_MAY_USE = {"numpy", "pyarrow", "pydantic", "blake3"} | set(sys.stdlib_module_names)


def imports(source: str, package: str) -> Iterator[str]:
    """Dotted names a module of `package` imports, anywhere in it: in functions, relatively, or by a literal name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            outer = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*outer, *([node.module] if node.module else [])])
            # `from rollout import wire` may name a module: both readings count, a name that is none does no harm.
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "__import__",
        ):
            yield from (
                arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            )


def owner(name: str) -> str:
    """The entry of ARROWS a dotted name of ours belongs to; the name's first part where it is not ours."""
    inside = [entry for entry in ARROWS if f"{name}.".startswith(f"{entry}.")]
    return max(inside, key=len, default=name.partition(".")[0])


def faults(path: str, source: str) -> list[str]:
    """Every import of a file, by its path from the root, that the plan does not allow."""
    package = str(Path(path).parent).replace("/", ".")
    home = owner(package)
    found = []
    for name in imports(source, package):
        target, top = owner(name), name.partition(".")[0]
        ours = target in ARROWS or target == "tests"
        # `from rollout import wire` reads as rollout too: only the deeper reading decides for a bare parent.
        if ours and target not in ARROWS[home] and not _is_bare_parent(name, home):
            found.append(f"{path}: {home} must not import {name}")
        if top in ONLY_IN and not any(fnmatch(path, pattern) for pattern in ONLY_IN[top]):
            found.append(f"{path}: {top} must not be imported here")
        if top == "torch" and any(fnmatch(path, pattern) for pattern in TORCH_FREE):
            found.append(f"{path}: torch must not be imported here")
        if (
            home == "rollout.wire"
            and not ours
            and top not in WIRE_MAY_USE
            and not path.endswith("/actors.py")
        ):
            found.append(f"{path}: rollout.wire must not use {top}")
    return found


def _is_bare_parent(name: str, home: str) -> bool:
    return any(allowed.startswith(f"{name}.") for allowed in ARROWS[home])


def files(*folders: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for folder in folders for p in (ROOT / folder).rglob("*.py"))


@lru_cache
def bound(module: str) -> set[str] | None:
    """The names a module of ours has at its top, modules beside it for a package; None if it is not ours."""
    place = ROOT.joinpath(*module.split("."))
    if place.is_dir():
        beside = {each.stem for each in place.iterdir() if each.suffix == ".py" or each.is_dir()}
        place /= "__init__"
    else:
        beside = set()
    source = place.with_suffix(".py")
    if not source.exists():
        return beside or None
    names = set(beside)
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


@pytest.mark.parametrize("path", files(*PACKAGES))
def test_no_arrow_runs_the_wrong_way(path: str) -> None:
    assert faults(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("envs/base.py", "import rollout.wire.trajectory", "envs must not import rollout.wire"),
        (
            "rollout/wire/schema.py",
            "def f():\n    from ..worker import x",
            "rollout.wire must not import rollout.worker",
        ),
        ("rollout/wire/schema.py", "from .. import worker", "rollout.wire must not import rollout.worker"),
        ("rollout/wire/schema.py", "import pandas", "rollout.wire must not use pandas"),
        ("rollout/wire/schema.py", "def f():\n    import torch.nn", "torch must not be imported here"),
        ("rollout/agent.py", "from learner import losses", "rollout must not import learner"),
        ("learner/batch.py", "from rollout.engine import Sampling", "learner must not import rollout.engine"),
        ("learner/batch.py", "from rollout import engine", "learner must not import rollout.engine"),
        (
            "learner/batch.py",
            "import importlib\nimportlib.import_module('deploy.cli')",
            "learner must not import deploy",
        ),
        ("learner/batch.py", "if True:\n    import ray", "ray must not be imported here"),
        ("rollout/engine.py", "from vllm import LLM", "vllm must not be imported here"),
        ("deploy/cli.py", "from tests.bench import x", "deploy must not import tests"),
    ],
)
def test_a_wrong_arrow_is_seen(path: str, source: str, fault: str) -> None:
    assert any(fault in found for found in faults(path, source)), faults(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("learner/loop.py", "from rollout.wire import schema\nfrom rollout.wire.schema import decode"),
        ("learner/loop.py", "from rollout import wire"),
        ("rollout/wire/actors.py", "import ray\nfrom .store import Store"),
        (
            "rollout/vllm_engine.py",
            "import vllm, torch\nfrom .engine import Engine\nfrom envs import registry",
        ),
        ("deploy/local.py", "import ray, torch\nfrom learner import learner\nfrom rollout.wire import store"),
    ],
)
def test_a_right_arrow_is_let_pass(path: str, source: str) -> None:
    assert faults(path, source) == []


@pytest.mark.parametrize("path", ["deploy/train.py", "deploy/ring.py", "deploy/cluster.py"])
def test_the_driver_cannot_even_name_a_payload(path: str) -> None:
    package = str(Path(path).parent)
    named = {name.partition(":")[0] for name in imports((ROOT / path).read_text(encoding="utf-8"), package)}
    payload = ("pyarrow", "rollout.wire.schema", "rollout.wire.segments", "learner.batch")
    assert not [name for name in named if name.startswith(payload)]


@pytest.mark.parametrize("path", files(*PACKAGES, "tests"))
def test_a_file_is_one_idea(path: str) -> None:
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path} has {lines} lines; split it by idea"


def test_there_is_no_sixth_package() -> None:
    folders = {p.parent.name for p in ROOT.glob("*/*.py") if not p.parent.name.startswith(".")}
    assert folders <= {*PACKAGES, "tests"}


def test_importing_the_wire_stays_light() -> None:
    modules = [
        p.removesuffix(".py").replace("/", ".") for p in files("rollout/wire") if not p.endswith("actors.py")
    ]
    script = (
        f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\nprint(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    )
    assert "rollout.wire.trajectory" in done.stdout.split()
    assert {"torch", "vllm", "ray", "transformers"}.isdisjoint(done.stdout.split())


def test_no_process_is_ended_by_name() -> None:
    # Written in two parts so that this very file does not hold the words.
    by_name = re.compile(rf"\b(p{'kill'}|{'kill'}all)\b")
    folders = [ROOT / ".ci", *(ROOT / name for name in (*PACKAGES, "tests"))]
    sources = [ROOT / "Makefile", *(p for folder in folders for p in folder.rglob("*") if p.is_file())]
    sources = [path for path in sources if "__pycache__" not in path.parts]
    assert [
        str(path) for path in sources if by_name.search(path.read_text(errors="replace", encoding="utf-8"))
    ] == []


def test_every_test_that_the_guide_names_exists() -> None:
    named = re.findall(
        r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    )
    assert named
    for path, function in named:
        assert (ROOT / path).is_file(), f"CONTRIBUTING.md names {path}, which does not exist"
        if function:
            assert f"def {function}(" in (ROOT / path).read_text(encoding="utf-8"), (
                f"CONTRIBUTING.md names {path}::{function}"
            )


@pytest.mark.parametrize("path", files("tests"))
def test_what_a_test_or_a_benchmark_imports_of_ours_is_there(path: str) -> None:
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and owner(node.module) in (*ARROWS, "tests"):
            names = bound(node.module)
            assert names is not None, f"there is no {node.module}"
            missing = {alias.name for alias in node.names} - names
            assert not missing, f"{node.module} has no {', '.join(sorted(missing))}"
