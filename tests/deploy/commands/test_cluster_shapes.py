"""The table of cluster shapes in docs/gpus.md holds what `manta check` says of models of the true shapes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import AutoConfig

from deploy.assembly.memory_plan import GIB, MemoryPlan, ModelFacts
from deploy.config.load import load_config
from deploy.run.job_size import JobSize, nodes, rows_of_rank
from tests.qwen3 import QWEN3_8B, QWEN3_30B_A3B, QWEN3_32B

PAGE = Path(__file__).resolve().parents[3] / "docs" / "gpus.md"
ROWS = [(7_473, 1_319)]  # of the recipe's data: training, held out
PAIRS = ["rollout.workers=8", "rollout.gpus_per_worker=2", "engine.tensor_parallel_size=2"]
LONG = [
    "rollout.context_tokens=131072",
    "learner.tokens_per_microbatch=131072",
    "buffer.groups_per_step=16",
]
MODELS = {"Qwen3-8B": QWEN3_8B, "Qwen3-32B": QWEN3_32B, "Qwen3-30B-A3B": QWEN3_30B_A3B}


def _rows() -> list[list[str]]:
    """The cells of the table, row by row: a name that begins with the model's, four figures, overrides."""
    section = PAGE.read_text(encoding="utf-8").partition("## Cluster shapes")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (Qwen3-.+) \|$", section, re.MULTILINE)
    return [cells for row in rows if len(cells := row.split(" | ")) == 6]


@pytest.mark.parametrize("row", _rows(), ids=lambda row: row[0])
def test_the_table_holds_what_is_told(row: list[str]) -> None:
    name, *figures, overrides = row
    model = MODELS[name.partition(",")[0]]
    config = load_config("qwen3_8b_gsm8k", [] if overrides == "none" else overrides.strip("`").split(" "))
    facts = ModelFacts.of(AutoConfig.for_model(**model.config()), config)
    assert facts.shape.parameters == model.parameters
    plan = MemoryPlan.of(config, facts, 80 * GIB)
    learner, rows = plan.process("learner"), rows_of_rank(config, JobSize.of(config, ROWS))
    sent, most = plan.traffic, max(node.host_bytes for node in nodes([(config, plan)], 8))
    assert figures == [
        f"{learner.peak(on_host=False) / GIB:.0f}",
        f"{most / GIB:.0f}",
        f"{rows} x {sent.row / GIB:.0f}" + (f" + {sent.sums / GIB:.0f}" if sent.sums else ""),
        f"{sent.version / GIB:.0f}",
    ]


def test_the_table_has_every_model_in_its_shapes() -> None:
    names = [name.partition(",")[0] for name, *_ in _rows()]
    assert {name: names.count(name) for name in MODELS} == {"Qwen3-8B": 4, "Qwen3-32B": 8, "Qwen3-30B-A3B": 5}


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
