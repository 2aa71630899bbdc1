"""The data types that a recipe leaves open follow the processor of the machine that begins the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.config import derived, processor
from deploy.config.load import load_config
from deploy.run import findings

# One line each of the files that Linux shows for an AMD EPYC 7742, an Intel Xeon 8375C, an AMD EPYC 9554, an Intel Xeon
# 8488C and an Arm Neoverse V2.
PROCESSORS = {
    "flags\t\t: fpu sse4_2 avx avx2 fma": False,
    "flags\t\t: fpu avx2 avx512f avx512bw avx512_vnni": False,
    "flags\t\t: fpu avx2 avx512f avx512_bf16 avx512_vnni": True,
    "flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16 amx_tile": True,
    "Features\t: fp asimd sve svei8mm svebf16 i8mm bf16": True,
}


@pytest.mark.parametrize(("line", "native"), PROCESSORS.items())
def test_a_processor_says_what_it_multiplies(
    line: str, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = tmp_path / "cpuinfo"
    shown.write_text(
        f"processor\t: 0\nmodel name\t: avx512_bf16\n{line}\n\nprocessor\t: 1\n", encoding="utf-8"
    )
    monkeypatch.setattr(processor, "_CPUINFO", shown)
    assert processor.multiplies_bfloat16() is native
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "none")
    assert not processor.multiplies_bfloat16()


@pytest.mark.parametrize(
    ("native", "overrides", "engine", "learner"),
    [
        (True, (), "bfloat16", "bfloat16"),
        (False, (), "float32", "float32"),
        (False, ("engine.dtype=bfloat16",), "bfloat16", "float32"),
        (False, ("rollout.gpus_per_worker=1",), "bfloat16", "float32"),
        (True, ("learner.model.dtype=float32",), "bfloat16", "float32"),
        (False, ("rollout.gpus_per_worker=1", "learner.model.device=cuda"), "bfloat16", "bfloat16"),
    ],
)
def test_a_checkpoints_open_types_are_those_that_are_fast(
    native: bool, overrides: tuple[str, ...], engine: str, learner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derived, "multiplies_bfloat16", lambda: native)
    config = load_config("smollm2_sums", overrides)
    assert (config.engine.dtype, config.learner.model.dtype) == (engine, learner)
    corrected = [part.kind for part in config.learner.algorithm.corrections]
    assert corrected == (["tis"] if engine != learner else [])


@pytest.mark.parametrize(
    ("override", "kinds"),
    [
        ("engine.args={quantization='fp8'}", ["tis"]),
        ("engine.args={kv_cache_dtype='fp8'}", ["tis"]),
        ("engine.args={max_num_batched_tokens=64}", []),
        ("learner.model.float8=true", ["tis"]),
    ],
)
def test_an_engine_or_a_learner_of_fewer_bits_is_corrected_for(
    override: str, kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derived, "multiplies_bfloat16", lambda: True)
    config = load_config("smollm2_sums", (override,))
    assert [part.kind for part in config.learner.algorithm.corrections] == kinds


@pytest.mark.parametrize("native", [True, False])
def test_a_tiny_learner_computes_in_float32(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derived, "multiplies_bfloat16", lambda: native)
    assert load_config("frozen_lake").learner.model.dtype == "float32"


def test_a_type_that_is_emulated_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "multiplies_bfloat16", lambda: False)
    config = load_config("smollm2_sums", ("engine.dtype=bfloat16", "learner.model.dtype=bfloat16"))
    said = [each.text for each in findings.of_recipe(config) if "emulates" in each.text]
    assert said == [
        "engine.dtype and learner.model.dtype='bfloat16': this processor emulates it, several times slower than "
        "float32; leave the data types open or use 'float32'"
    ]
    monkeypatch.setattr(findings, "multiplies_bfloat16", lambda: True)
    assert not [each for each in findings.of_recipe(config) if "emulates" in each.text]
