"""The arguments of vLLM that a recipe may set are vLLM's own, and what is wrong about one is said in one line."""

from __future__ import annotations

import dataclasses
import re
import types
from enum import Enum, IntEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError, option_names
from deploy.config.load import load_config
from learner.model.tiny import build_tiny
from learner.model.tokenizer import build_tokenizer
from rollout.engines.vllm_arguments import VllmArguments
from rollout.engines.vllm_options import DECIDED, QUANTIZATIONS, check_arguments
from rollout.engines.vllm_start import VllmSettings, start_llm
from rollout.engines.vllm_tables import TABLES


def _as_toml(annotation: Any) -> Any:
    """What of a type a TOML value can have; None where there is nothing. Choices beside any text are text."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _as_toml(inner[0])
    if origin in (Union, types.UnionType):
        kept = [each for each in map(_as_toml, inner) if each is not None]
        texts = str in kept
        kept = [each for each in kept if not (texts and get_origin(each) is Literal)]
        return Union[tuple(kept)]  # noqa: UP007 - of a list
    if origin in (list, set):
        return list[_as_toml(inner[0])]  # type: ignore[misc]
    if origin is dict:
        return dict[str, _as_toml(inner[1])]  # type: ignore[misc]
    if origin is Literal or annotation in (str, int, float, bool, Any, type(None)):
        return annotation
    if annotation is dict or dataclasses.is_dataclass(annotation):
        return dict[str, Any]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return int if issubclass(annotation, IntEnum) else str
    return None  # a class, a function, torch's data types


def _hints() -> dict[str, Any]:
    from vllm.config.quantization import QuantizationConfigArgs
    from vllm.engine.arg_utils import AsyncEngineArgs

    # vLLM itself imports this class for type checkers only.
    names = {"QuantizationConfigArgs": QuantizationConfigArgs}
    return get_type_hints(AsyncEngineArgs, localns=names, include_extras=True)


@pytest.mark.slow
def test_the_recorded_arguments_are_those_of_the_installed_vllm() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    hints = _hints()
    fields = [each.name for each in dataclasses.fields(AsyncEngineArgs) if not each.name.startswith("_")]
    recorded = get_type_hints(VllmArguments)
    assert list(recorded) == fields
    assert {name: recorded[name] for name in fields} == {name: _as_toml(hints[name]) for name in fields}


@pytest.mark.slow
def test_the_recorded_tables_and_quantizations_are_those_of_the_installed_vllm() -> None:
    from vllm.config import SpeculativeConfig
    from vllm.config.quantization import ONLINE_QUANT_SHORTHAND_NAMES

    hints = _hints() | {"speculative_config": SpeculativeConfig}
    classes = {
        name: next(each for each in (get_args(hint) or (hint,)) if dataclasses.is_dataclass(each))
        for name, hint in hints.items()
        if any(dataclasses.is_dataclass(each) for each in (hint, *get_args(hint)))
    }
    assert set(classes) - set(DECIDED) <= set(TABLES)
    for name, text in TABLES.items():
        declared = {each.name for each in dataclasses.fields(classes[name]) if each.init}
        assert set(text.split()) == {each for each in declared if not each.startswith("_")}, name
    assert {"fp8", *ONLINE_QUANT_SHORTHAND_NAMES} - {"online"} == set(QUANTIZATIONS)


def test_what_manta_decides_is_an_argument_and_the_option_to_use_exists() -> None:
    options = set(option_names(RunConfig))
    assert set(DECIDED) <= set(VllmArguments.__annotations__)
    for name, why in DECIDED.items():
        said = re.findall(r"\b((?:engine|learner|rollout|weights)\.[a-z_.]*[a-z_])(?![\w{])", why)
        assert {each for each in said if not each.startswith("engine.args.")} <= options, name


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("engine.args.max_num_batch_tokens=8", "no such argument; did you mean engine.args.max_num_batched_tokens?"),
        ("engine.args.zzz=8", "engine.args.zzz: vLLM 0.32 has no such argument"),
        ("engine.args.max_num_batched_tokens=true", "Input should be a valid integer (got True)"),
        ("engine.args.max_num_batched_tokens=8.5", "(got 8.5)"),
        ("engine.args.kv_cache_dtype=fp9", "'fp8_e5m2'"),
        ("engine.args.compilation_config.cudagraph_mod=FULL", "compilation_config.cudagraph_mode?"),
        ("engine.args.model=other", "use learner.model.path"),
        ("engine.args.max_model_len=4096", "use rollout.context_tokens"),
        ("engine.args.seed=1", "use seed"),
        ("engine.args.tensor_parallel_size=2", "use engine.tensor_parallel_size"),
        ("engine.args.enable_lora=true", "use learner.model.lora"),
        ("engine.args.logits_processors=['a:B']", "use the section sampling"),
        ("engine.args.worker_extension_cls=a.B", "receives and proves new weights"),
        ("engine.args.hf_overrides.head_dtype=float32", "engine.head_dtype"),
        ("engine.args.quantization=awq", "needs a quantized checkpoint"),
        ("engine.args.load_format=dummy", "leaves weights random"),
        ("engine.max_num_batched_tokens=8", "did you mean engine.args.max_num_batched_tokens?"),
        ("engine.speculative_config={method='ngram'}", "did you mean engine.args.speculative_config.method?"),
        ("rollout.pipeline_model_parallel_size=2", "did you mean engine.pipeline_parallel_size?"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_told_in_one_line(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config("frozen_lake", [override])
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_right_arguments_are_kept_as_they_are_given() -> None:
    given = (
        "engine.args.max_num_batched_tokens=8192",
        "engine.args.compilation_config={cudagraph_mode='FULL', cudagraph_capture_sizes=[1, 2]}",
        "engine.args.limit_mm_per_prompt.image=2",
    )
    engine = load_config("frozen_lake", given).engine
    assert isinstance(engine, VllmSettings)
    assert engine.args == {
        "max_num_batched_tokens": 8192,
        "compilation_config": {"cudagraph_mode": "FULL", "cudagraph_capture_sizes": [1, 2]},
        "limit_mm_per_prompt": {"image": 2},
    }
    check_arguments({"cpu_offload_gb": 4, "attention_backend": "FLASHINFER", "async_scheduling": None})
    assert RunConfig.model_validate_json(load_config("frozen_lake", given).model_dump_json()).engine == engine


@pytest.mark.slow
def test_a_value_within_a_configuration_of_vllms_is_refused_by_vllm_in_one_line() -> None:
    settings = VllmSettings(args={"compilation_config": {"cudagraph_mode": "SOMETIMES"}})
    with pytest.raises(ValueError, match=r"engine\.args\.compilation_config\S*: .*SOMETIMES") as refused:
        settings.require_here()
    assert "\n" not in str(refused.value)
    VllmSettings(
        args={"kernel_config": {"moe_backend": "triton"}, "kv_events_config": {"hwm": 3}}
    ).require_here()


@pytest.mark.slow
def test_vllm_is_started_with_the_recipes_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import CompilationConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    build_tiny(tmp_path, build_tokenizer(tmp_path, ("left", "right")), layers=1, width=32, heads=2, mlp=32)
    monkeypatch.setattr(AsyncLLM, "from_engine_args", lambda arguments: arguments)
    args = {"max_num_batched_tokens": 64, "compilation_config": {"cudagraph_mode": "FULL"}, "block_size": 16}
    settings = VllmSettings(tensor_parallel_size=2, pipeline_parallel_size=2, args=args)
    gpu, cpu = (start_llm(str(tmp_path), 64, settings, on_gpu) for on_gpu in (True, False))
    assert (gpu.max_num_batched_tokens, gpu.block_size, cpu.block_size) == (64, 16, 16)
    assert (gpu.tensor_parallel_size, gpu.pipeline_parallel_size) == (2, 2)
    assert isinstance(gpu.compilation_config, CompilationConfig)
    assert gpu.compilation_config.cudagraph_mode.name == "FULL"
    assert (gpu.enforce_eager, cpu.enforce_eager) == (False, True)
    assert (gpu.hf_overrides, cpu.hf_overrides) == ({"head_dtype": "float32"}, {})
