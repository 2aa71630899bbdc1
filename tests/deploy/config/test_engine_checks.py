"""Engines and their GPUs: what contradicts itself is refused in one line, with values that would fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import AutoConfig

from deploy.config.config_errors import ConfigError
from deploy.run.model_checks import check_architecture
from rollout.engines.vllm_start import VllmSettings
from tests.deploy.small_run import configured
from tests.qwen3 import QWEN3_8B, QWEN3_30B_A3B

IPC = ("weights.transfer=ipc", "rollout.gpus_per_worker=0.5", "learner.model.device=cuda")
TURNS = ("cluster.colocate=turns", "rollout.gpus_per_worker=1", "learner.model.device=cuda")
EXPERTS = (
    "tiny=",
    "learner.model.path=mixture",
    "engine.expert_parallel=true",
    "engine.data_parallel_size=4",
    "engine.tensor_parallel_size=2",
)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["rollout.gpus_per_worker=2"], "runs on 1 GPUs, but a worker claims rollout.gpus_per_worker=2"),
        (
            [
                "engine.tensor_parallel_size=2",
                "engine.pipeline_parallel_size=2",
                "rollout.gpus_per_worker=2",
                "tiny.layers=2",
            ],
            "engine.tensor_parallel_size=2 * engine.pipeline_parallel_size=2 runs on 4 GPUs",
        ),
        (["engine.tensor_parallel_size=2", "rollout.gpus_per_worker=1"], "use rollout.gpus_per_worker=2"),
        (["engine.tensor_parallel_size=2", "rollout.gpus_per_worker=0.5"], "use rollout.gpus_per_worker=2"),
        (["engine.data_parallel_size=2", "rollout.gpus_per_worker=2"], "raise rollout.workers instead"),
        (["engine.dtype=float16", "engine.args.quantization=fp8"], "use engine.dtype='bfloat16'"),
        (["engine.dtype=float32", "engine.args.kv_cache_dtype=fp8"], "use engine.dtype='bfloat16'"),
        (["engine.tensor_parallel_size=4"], "does not divide the model's 2 attention heads"),
        ([*TURNS, "buffer.max_lag=1"], "buffer.max_lag=1; use buffer.max_lag=0"),
        ([*TURNS, "weights.transfer=nccl"], "sends its live parameters; use 'object_store'"),
        ([*TURNS, "league.keep=2", "policies.one={}", "policies.two={}"], "meets no past versions"),
        (["cluster.colocate=turns"], "vLLM's sleep mode unmaps memory of CUDA, and does nothing on a CPU"),
        ([*TURNS, "rollout.gpus_per_worker=0.5"], "one whole GPU each, but rollout.gpus_per_worker=0.5"),
        (
            [*TURNS, "rollout.gpus_per_worker=2", "engine.tensor_parallel_size=2"],
            "one whole GPU each, but rollout.gpus_per_worker=2",
        ),
        ([*TURNS, "learner.model.device=cpu"], "learner.model.device='cpu' and rollout.gpus_per_worker=1"),
        ([*TURNS, "learner.ranks=2"], "learner.ranks=2 exceeds rollout.workers=1"),
        ([*TURNS, "engine={kind='own:engine'}"], "engine.kind='own:engine' is not"),
        (["engine.args.enable_sleep_mode=true"], "use cluster.colocate"),
    ],
)  # fmt: skip
def test_contradictions_of_engines_are_refused(overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        configured(*overrides)
    assert named in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["engine.tensor_parallel_size=3"], "does not divide the model's 32 attention heads"),
        (["engine.tensor_parallel_size=32"], ""),
        (["engine.pipeline_parallel_size=37"], "exceeds the model's 36 layers"),
        (["engine.expert_parallel=true"], "the model has no experts"),
    ],
)
def test_a_model_that_is_not_divided_evenly_is_refused(
    overrides: list[str], named: str, tmp_path: Path
) -> None:
    architecture = AutoConfig.from_pretrained(QWEN3_8B.write(tmp_path).parent)
    config = configured("tiny=", f"learner.model.path={tmp_path}", *overrides)
    if named:
        with pytest.raises(ConfigError, match=f"^model {tmp_path}: .*{named}"):
            check_architecture(config, architecture)
    else:
        check_architecture(config, architecture)
    mixture = AutoConfig.for_model("qwen3_moe")
    check_architecture(
        configured("tiny=", f"learner.model.path={tmp_path}", "engine.expert_parallel=true"), mixture
    )


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [
        (["rollout.gpus_per_worker=0"], 0),
        (["engine.tensor_parallel_size=2"], 0),  # two processes on CPUs
        ([*IPC, "engine.kv_cache_gib=4"], 0.5),
        (["engine.tensor_parallel_size=2", "rollout.gpus_per_worker=2"], 2),
        ([*EXPERTS, "rollout.gpus_per_worker=8"], 8),
    ],
)  # fmt: skip
def test_a_worker_claims_what_its_engine_runs_on(overrides: list[str], gpus: float) -> None:
    config = configured(*overrides)
    assert config.rollout.gpus_per_worker == gpus
    if gpus >= 1:
        assert config.engine.placement.gpus == gpus


def test_what_is_compiled_and_where_logits_are_summed_follow_the_device() -> None:
    engine = VllmSettings()
    assert (engine.eager(on_gpu=True), engine.eager(on_gpu=False)) == (False, True)
    assert (engine.float32_head(on_gpu=True), engine.float32_head(on_gpu=False)) == (True, False)
    assert VllmSettings(enforce_eager=True).eager(on_gpu=True)
    assert not VllmSettings(enforce_eager=False).eager(on_gpu=False)
    assert not VllmSettings(head_dtype="model").float32_head(on_gpu=True)
    assert not VllmSettings(dtype="float32").float32_head(on_gpu=True), "it is already"


@pytest.mark.parametrize(
    ("args", "coarseness"),
    [
        ({}, 1),
        ({"kv_cache_dtype": "bfloat16", "max_num_batched_tokens": 64}, 1),
        ({"quantization": "fp8"}, 16),
        ({"kv_cache_dtype": "fp8_e4m3"}, 16),
        ({"quantization": "nvfp4_per_token"}, 64),
        ({"quantization": "fp8", "kv_cache_dtype": "turboquant_4bit_nc"}, 64),
    ],
)
def test_how_much_coarser_an_engine_rounds_is_two_to_the_bits_of_precision_that_it_lacks(
    args: dict[str, object], coarseness: float
) -> None:
    # bfloat16 has 8 bits of precision, e4m3 has 4, e2m1 has 2.
    assert VllmSettings(args=args).coarseness == coarseness


@pytest.mark.parametrize(
    ("option", "value", "off"), [("router_balance", "0.001", "0"), ("router_replay", "true", "false")]
)
def test_what_is_done_with_routers_needs_routers(option: str, value: str, off: str) -> None:
    config = configured("tiny=", "learner.model.path=mixture", f"learner.model.{option}={value}")
    check_architecture(config, AutoConfig.for_model(**QWEN3_30B_A3B.config()))
    with pytest.raises(ConfigError, match=rf"has no routers of experts.*{option}={off}$"):
        check_architecture(config, AutoConfig.for_model(**QWEN3_8B.config()))


def test_experts_that_ranks_cannot_divide_are_refused_before_a_run() -> None:
    ranks = ("buffer.groups_per_step=12", "learner.ranks=12", "learner.model.expert_parallel=true")
    mixture = AutoConfig.for_model(**QWEN3_30B_A3B.config())
    config = configured("tiny=", "learner.model.path=mixture", *ranks)
    with pytest.raises(
        ConfigError, match=r"has 128 experts in model\.layers\.0\.mlp\.experts, which 12 ranks do not"
    ):
        check_architecture(config, mixture)
    adapted = configured(
        "tiny=", "learner.model.path=mixture", *ranks, "learner.sharded_over=4", "learner.model.lora.rank=4"
    )
    with pytest.raises(ConfigError, match=r"trains an adapter of experts .*\.expert_parallel=false$"):
        check_architecture(adapted, mixture)
    quantized = configured(
        "tiny=",
        "learner.model.path=mixture",
        *ranks,
        "learner.sharded_over=4",
        "learner.model.lora={rank=4, quantize_base='nf4', targets=['q_proj']}",
    )
    with pytest.raises(ConfigError, match=r"stores its base in fewer bits, .*leave out .*\.quantize_base$"):
        check_architecture(quantized, mixture)
    with pytest.raises(ConfigError, match=r"no experts .*set learner\.model\.expert_parallel=false$"):
        check_architecture(config, AutoConfig.for_model(**QWEN3_8B.config()))
    check_architecture(
        configured("tiny=", "learner.model.path=mixture", *ranks, "learner.sharded_over=4"), mixture
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["learner.model.path="], "is for a mixture of experts, which a tiny model is not"),
        (
            ["tiny=", "engine.kind=mine:Engine"],
            "engine.kind='mine:Engine' does not say which experts it chose",
        ),
        (
            ["tiny=", "engine.pipeline_parallel_size=2", "rollout.gpus_per_worker=2"],
            "vLLM does not say which experts it chose in engine.pipeline_parallel_size=2 parts",
        ),
    ],
)
def test_routing_is_replayed_of_engines_that_say_it(changes: list[str], message: str) -> None:
    replayed = ("learner.model.path=mixture", "learner.model.router_replay=true")
    with pytest.raises(ConfigError, match=re.escape(message)):
        configured(*replayed, *changes)
