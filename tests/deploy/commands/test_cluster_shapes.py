"""The table of cluster shapes in docs/gpus.md holds what `manta check` says of models of the true shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from deploy.assembly.memory_plan import GIB, MemoryPlan, ModelFacts
from deploy.config.load import load_config
from deploy.run.job_size import JobSize, nodes, rows_of_rank
from tests.qwen3 import QWEN3_8B, QWEN3_30B_A3B, QWEN3_32B, Qwen3

PAGE = Path(__file__).resolve().parents[3] / "docs" / "gpus.md"
ROWS = [(7_473, 1_319)]  # of the recipe's data: training, held out
PAIRS = ["rollout.workers=8", "rollout.gpus_per_worker=2", "engine.tensor_parallel_size=2"]
LORA = ["learner.ranks=1", "learner.model.lora.rank=32", "rollout.workers=7"]
LONG = [
    "rollout.context_tokens=131072",
    "learner.tokens_per_microbatch=131072",
    "buffer.groups_per_step=16",
]
TRAVEL = "learner.model.expert_parallel=true"
SHAPES: list[tuple[str, Qwen3, list[str]]] = [
    ("Qwen3-8B, one node: 4 ranks, 4 engines", QWEN3_8B, []),
    ("Qwen3-8B, four nodes: 16 ranks, 16 engines", QWEN3_8B, ["learner.ranks=16", "rollout.workers=16"]),
    (
        "Qwen3-8B, four nodes: 16 ranks, sharded over 8, 16 engines",
        QWEN3_8B,
        ["learner.ranks=16", "learner.sharded_over=8", "rollout.workers=16"],
    ),
    ("Qwen3-8B, adapter of rank 32, one node: 1 rank, 7 engines", QWEN3_8B, LORA),
    (
        "Qwen3-32B, adapter of rank 32, base in NF4, one node: 1 rank, 3 engines of 2 GPUs",
        QWEN3_32B,
        [*PAIRS, *LORA, "rollout.workers=3", "learner.model.lora.quantize_base=nf4"],
    ),
    (
        "Qwen3-32B, adapter of rank 32, one node: 4 ranks, 2 engines of 2 GPUs",
        QWEN3_32B,
        [*PAIRS, "rollout.workers=2", "learner.model.lora.rank=32"],
    ),
    (
        "Qwen3-30B-A3B, adapter of rank 8 with experts, one node: 4 ranks, 2 engines of 2 GPUs",
        QWEN3_30B_A3B,
        [*PAIRS, "rollout.workers=2", "learner.model.lora.rank=8"],
    ),
    ("Qwen3-32B, one node: 4 ranks, 2 engines of 2 GPUs", QWEN3_32B, [*PAIRS, "rollout.workers=2"]),
    (
        "Qwen3-32B, one node: the same, moments in host memory",
        QWEN3_32B,
        [*PAIRS, "rollout.workers=2", "learner.optim.offload=true"],
    ),
    (
        "Qwen3-32B, one node: the same, moments in 8 bits",
        QWEN3_32B,
        [*PAIRS, "rollout.workers=2", "learner.optim.moments=8bit"],
    ),
    ("Qwen3-32B, four nodes: 16 ranks, 8 engines of 2 GPUs", QWEN3_32B, [*PAIRS, "learner.ranks=16"]),
    (
        "Qwen3-32B, four nodes: the same, moments in 8 bits",
        QWEN3_32B,
        [*PAIRS, "learner.ranks=16", "learner.optim.moments=8bit"],
    ),
    ("Qwen3-30B-A3B, four nodes: 16 ranks, 8 engines of 2 GPUs", QWEN3_30B_A3B, [*PAIRS, "learner.ranks=16"]),
    (
        "Qwen3-32B, rows of 131,072 tokens, four nodes: 16 ranks, eight to a row, 8 engines of 2 GPUs",
        QWEN3_32B,
        [*PAIRS, "learner.ranks=16", "learner.context_parallel_size=8", *LONG],
    ),
    (
        "Qwen3-30B-A3B, four nodes: 16 ranks, sharded over 8, 8 engines of 2 GPUs",
        QWEN3_30B_A3B,
        [*PAIRS, "learner.ranks=16", "learner.sharded_over=8"],
    ),
    (
        "Qwen3-30B-A3B, four nodes: 16 ranks, expert parallel, 8 engines of 2 GPUs",
        QWEN3_30B_A3B,
        [*PAIRS, "learner.ranks=16", TRAVEL],
    ),
    (
        "Qwen3-30B-A3B, four nodes: 16 ranks, sharded over 8, expert parallel, 8 engines of 2 GPUs",
        QWEN3_30B_A3B,
        [*PAIRS, "learner.ranks=16", "learner.sharded_over=8", TRAVEL],
    ),
]


@pytest.mark.parametrize(("name", "model", "overrides"), SHAPES, ids=[name for name, *_ in SHAPES])
def test_the_table_holds_what_is_told(name: str, model: Qwen3, overrides: list[str]) -> None:
    config = load_config("qwen3_8b_gsm8k", overrides)
    facts = ModelFacts.of(AutoConfig.for_model(**model.config()), config)
    assert facts.shape.parameters == model.parameters
    plan = MemoryPlan.of(config, facts, 80 * GIB)
    learner, rows = plan.process("learner"), rows_of_rank(config, JobSize.of(config, ROWS))
    sent, most = plan.traffic, max(node.host_bytes for node in nodes([(config, plan)], 8))
    figures = [
        f"{learner.peak(on_host=False) / GIB:.0f}",
        f"{most / GIB:.0f}",
        f"{rows} x {sent.row / GIB:.0f}" + (f" + {sent.sums / GIB:.0f}" if sent.sums else ""),
        f"{sent.version / GIB:.0f}",
    ]
    row = f"| {name} | {' | '.join(figures)} |"
    assert row in PAGE.read_text(encoding="utf-8"), row


def test_a_long_row_is_too_much_for_a_gpu_alone() -> None:
    plans = []
    for together in (1, 8):
        overrides = [*PAIRS, "learner.ranks=16", f"learner.context_parallel_size={together}", *LONG]
        config = load_config("qwen3_8b_gsm8k", overrides)
        facts = ModelFacts.of(AutoConfig.for_model(**QWEN3_32B.config()), config)
        plans.append(MemoryPlan.of(config, facts, 80 * GIB))
    alone, shared = plans
    peak = alone.process("learner").peak(on_host=False)
    slices = shared.traffic.row - alone.traffic.row
    # A layer: 64 heads and 8 key heads of 128, each way, in bfloat16; the forward pass twice.
    by_hand = 3 * 64 * 2 * 128 * (64 + 8) * 131_071 * 7 / 8**2 * 2
    assert slices == pytest.approx(by_hand, rel=1e-3)
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert f"takes {peak / GIB:.0f} GiB on a GPU alone" in page
    assert f"receives for it, {slices / GIB:.0f} GiB are of other slices" in page
