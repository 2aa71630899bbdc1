"""What the processor of this machine multiplies, which decides the data type that a recipe leaves open."""

from __future__ import annotations

from pathlib import Path

# x86: AVX512-BF16 and AMX; Arm: the BF16 extension, for NEON and SVE.
_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})
_CPUINFO = Path("/proc/cpuinfo")


def multiplies_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself. Elsewhere it is emulated and several times slower than float32.

    False where the processor does not say, as outside of Linux.
    """
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    said = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return not _BFLOAT16.isdisjoint(next(said, []))
