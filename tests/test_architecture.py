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
MAX_FUNCTION_LINES = 60

# Rooms and what of ours each may import besides itself; the longest matching name counts, so that "envs" stands for the
# modules at its top alone. An "all" stands for every room of a package.
ROOMS: dict[str, set[str]] = {
    "envs": set(),
    "envs.sandbox": set(),
    "envs.tools": {"envs", "envs.sandbox"},
    "envs.builtin": {"envs", "envs.sandbox", "envs.tools"},
    "envs.rewards": {"envs", "envs.sandbox"},
    "envs.datasets": {"envs", "envs.rewards"},
    "envs.suites": {"envs", "envs.tools"},
    "envs.hosting": {"envs", "envs.tools"},
    "envs.checks": {"envs", "envs.hosting"},
    "rollout.wire": set(),
    "rollout.buffer": {"rollout.wire"},
    "rollout.chat": {"rollout.wire", "all envs"},
    "rollout.engines": {"rollout.wire", "rollout.chat", "all envs"},
    "rollout.agents": {"rollout.wire", "rollout.chat", "rollout.engines", "all envs"},
    "rollout.external": {"rollout.wire", "rollout.chat", "all envs"},
    "rollout.episodes": {"all rollout", "all envs"},
    "learner.parallel": {"rollout.wire"},
    "learner.algorithm": {"learner.parallel", "rollout.wire"},
    "learner": {"learner.algorithm", "rollout.wire"},
    "learner.data": {"learner.algorithm", "learner.parallel", "rollout.wire"},
    "learner.model": {"learner", "learner.data", "learner.parallel", "rollout.wire"},
    "learner.stages": {
        "learner.algorithm",
        "learner.data",
        "learner.model",
        "learner.parallel",
        "rollout.wire",
    },
    "learner.training": {"all learner", "rollout.wire"},
    "deploy.config": {"all learner", "all rollout", "all envs"},
    "deploy.report": {"deploy.config", "all learner", "all rollout", "all envs"},
    "deploy.assembly": {"deploy.config", "all learner", "all rollout", "all envs"},
    "deploy.labels": {"deploy.config", "all rollout", "all envs"},
    "deploy.serving": {"deploy.config", "deploy.assembly", "all rollout", "all envs"},
    "deploy.cluster": {
        "deploy.assembly",
        "deploy.report",
        "deploy.config",
        "all learner",
        "all rollout",
        "all envs",
    },
    "deploy.run": {
        "deploy.cluster",
        "deploy.assembly",
        "deploy.report",
        "deploy.config",
        "all learner",
        "all rollout",
        "all envs",
    },
    "deploy.commands": {
        "deploy.run",
        "deploy.serving",
        "deploy.labels",
        "deploy.assembly",
        "deploy.report",
        "deploy.config",
        "all learner",
        "all rollout",
        "all envs",
    },
    "deploy": {"all deploy", "all learner", "all rollout", "all envs"},
}


def _rooms(allowed: str) -> set[str]:
    everything, _, package = allowed.rpartition("all ")
    return (
        {allowed}
        if not everything and package == allowed
        else {r for r in ROOMS if f"{r}.".startswith(f"{package}.")}
    )


ARROWS = {room: {room}.union(*map(_rooms, allowed)) for room, allowed in ROOMS.items()}
# Third-party package -> where alone it may be imported, as patterns of paths.
ONLY_IN = {
    "ray": ("deploy/*", "*/actors.py"),
    "vllm": ("rollout/engines/vllm_*.py",),
    "torch": ("rollout/*", "learner/*", "deploy/*"),
    "rich": ("deploy/report/console.py",),
}
TORCH_FREE = ("envs/*", "rollout/wire/*", "rollout/buffer/*")
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
    """The room that a dotted name of ours belongs to; the name's first part where it is in none."""
    inside = [entry for entry in ARROWS if f"{name}.".startswith(f"{entry}.")]
    return max(inside, key=len, default=name.partition(".")[0])


def faults(path: str, source: str) -> list[str]:
    """Every import of a file, by its path from the root, that the plan does not allow."""
    package = str(Path(path).parent).replace("/", ".")
    home = owner(package)
    found = []
    for name in imports(source, package):
        target, top = owner(name), name.partition(".")[0]
        ours = top in (*PACKAGES, "tests")
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
        ("rollout/agents/agent.py", "from learner import losses", "rollout.agents must not import learner"),
        (
            "learner/data/batch.py",
            "from rollout.engines.engine import Sampling",
            "learner.data must not import rollout.engines.engine",
        ),
        (
            "learner/data/batch.py",
            "from rollout import engines",
            "learner.data must not import rollout.engines",
        ),
        (
            "learner/data/batch.py",
            "import importlib\nimportlib.import_module('deploy.cli')",
            "learner.data must not import deploy",
        ),
        ("learner/data/batch.py", "if True:\n    import ray", "ray must not be imported here"),
        ("rollout/engines/engine.py", "from vllm import LLM", "vllm must not be imported here"),
        (
            "rollout/wire/schema.py",
            "from rollout.buffer import ledger",
            "rollout.wire must not import rollout.buffer",
        ),
        (
            "envs/tools/tool.py",
            "from envs.hosting.host import x",
            "envs.tools must not import envs.hosting.host",
        ),
        (
            "deploy/report/report.py",
            "import deploy.run.train",
            "deploy.report must not import deploy.run.train",
        ),
        ("deploy/cli.py", "from tests.bench import x", "deploy must not import tests"),
    ],
)
def test_a_wrong_arrow_is_seen(path: str, source: str, fault: str) -> None:
    assert any(fault in found for found in faults(path, source)), faults(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "learner/training/loop.py",
            "from rollout.wire import schema\nfrom rollout.wire.schema import decode",
        ),
        ("learner/training/loop.py", "from rollout import wire"),
        ("rollout/buffer/actors.py", "import ray\nfrom .replay_store import ReplayStore"),
        (
            "rollout/engines/vllm_engine.py",
            "import vllm, torch\nfrom .engine import Engine\nfrom envs import registry",
        ),
        (
            "deploy/run/local.py",
            "import ray, torch\nfrom learner.training import learner\nfrom rollout.buffer import replay_store",
        ),
    ],
)
def test_a_right_arrow_is_let_pass(path: str, source: str) -> None:
    assert faults(path, source) == []


@pytest.mark.parametrize(
    "path", ["deploy/run/train.py", "deploy/assembly/runtime.py", "deploy/cluster/cluster.py"]
)
def test_the_driver_cannot_even_name_a_payload(path: str) -> None:
    package = str(Path(path).parent)
    named = {name.partition(":")[0] for name in imports((ROOT / path).read_text(encoding="utf-8"), package)}
    payload = ("pyarrow", "rollout.wire.schema", "rollout.buffer.segments", "learner.data.batch")
    assert not [name for name in named if name.startswith(payload)]


@pytest.mark.parametrize("path", files(*PACKAGES, "tests"))
def test_a_file_is_one_idea(path: str) -> None:
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path} has {lines} lines; split it by idea"


@pytest.mark.parametrize("path", files(*PACKAGES))
def test_a_function_is_one_thought(path: str) -> None:
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    }
    assert {name: lines for name, lines in long.items() if lines > MAX_FUNCTION_LINES} == {}, path


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


def test_no_file_imports_itself_through_others() -> None:
    modules = {path.removesuffix(".py").replace("/", "."): path for path in files(*PACKAGES)}
    imported = {
        module: set(imports((ROOT / path).read_text(encoding="utf-8"), module.rpartition(".")[0]))
        & set(modules)
        for module, path in modules.items()
    }
    assert circle(imported) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]


def circle(imported: dict[str, set[str]]) -> list[str]:
    """The modules that reach themselves."""

    def reached(module: str) -> set[str]:
        found: set[str] = set()
        waiting = [*imported[module]]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += imported[name]
        return found

    return sorted(module for module in imported if module in reached(module))


@pytest.mark.parametrize("path", files("tests"))
def test_what_a_test_or_a_benchmark_imports_of_ours_is_there(path: str) -> None:
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.partition(".")[0] in (*PACKAGES, "tests")
        ):
            names = bound(node.module)
            assert names is not None, f"there is no {node.module}"
            missing = {alias.name for alias in node.names} - names
            assert not missing, f"{node.module} has no {', '.join(sorted(missing))}"
