"""What several ranks learn, keep and publish together is what one does alone."""

from __future__ import annotations

import re
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from learner.algorithm.schedule import OptimSettings
from learner.model.tiny import build_tiny, tiny_config
from learner.model.tokenizer import build_tokenizer
from learner.parallel.ranks import RankLost, Ranks
from learner.stages.settings import IlqlSettings, KtoSettings, RewardModelSettings
from learner.training.checkpoint import latest
from tests.learner.ranked import (
    SFT,
    Found,
    beyond_floats,
    divided,
    parted,
    refused,
    resumed,
    saved,
    staged,
    stepped,
    without_logprobs,
)
from tests.learner.together import in_turn, together

GAE: dict[str, Any] = {"kind": "gae", "gamma": 0.9, "lam": 0.8}
CRITIC: dict[str, Any] = {"advantage": GAE, "critic": {"optim": {"learning_rate": 0.03}}}
SHARED: dict[str, Any] = {
    "advantage": GAE,
    "critic": {"kind": "shared", "warmup_steps": 1, "optim": {"learning_rate": 0.03}},
    "proximal": "learner",
    "epochs": 2,
    "skip_zero_advantage": False,
}
TURNS: dict[str, Any] = {
    "advantage": {"kind": "turns"},
    "critic": {
        "kind": "turns",
        "passes": 2,
        "minibatches": 1,
        "trust": 0.0,
        "optim": {"learning_rate": 0.03},
    },
}
CODED: dict[str, Any] = {
    "advantage": GAE,
    "critic": {"optim": {"learning_rate": 0.03, "moments": "8bit"}},
}
EIGHT_BIT = {"moments": "8bit"}
RISK: dict[str, Any] = {"name": "risk", "limit": 0.5, "update": {"kind": "dual", "rate": 0.5}}
# (recipe, learner steps, settings of the model); UNTIED stands for a model whose head is a matrix of its own
UNTIED = "untied"
WINDOWS = "windows"  # for one whose second layer has a sliding window
CASES: list[Any] = [
    ({"advantage": {"kind": "grpo"}}, 1, {}),
    ({"advantage": {"kind": "reinforce_pp"}, "constraints": [RISK]}, 2, {}),
    (
        {
            "advantage": {"kind": "reinforce_pp", "gamma": 0.9},
            "aggregation": "constant",
            "aggregation_length": 16,
            "proximal": "learner",
            "corrections": [{"kind": "tis", "cap": 1.2}],
            "kl": {"coefficient": 0.3, "where": "loss"},
            "skip_zero_advantage": False,
        },
        2,
        {"gradient_checkpointing": True, "sum_gradients": "step"},
    ),
    ({"advantage": {"kind": "returns", "baseline": "batch"}, "aggregation": "sequence"}, 1, {}),
    ({"advantage": {"kind": "none"}, "distill": {"coefficient": 0.5}}, 2, {}),
    (
        {
            "advantage": {"kind": "none"},
            "distill": {"coefficient": 0.5, "divergence": "reverse"},
            "skip_zero_advantage": False,
        },
        2,
        {},
    ),
    (
        {"advantage": {"kind": "gdpo", "weights": {"goal": 1.0, "form": 0.5}}, "loss": {"kind": "gspo"}},
        1,
        {"gradient_checkpointing": "selective"},
    ),
    (
        CRITIC | {"aggregation": "sequence", "constraints": [RISK]},
        2,
        {"path": UNTIED, "sum_gradients": "step"},
    ),
    (SHARED, 3, {"lora": {"rank": 4, "alpha": 8}}),
    (SHARED, 3, {}),
    (TURNS, 2, {}),
    (
        {"advantage": {"kind": "grpo"}, "kl": {"coefficient": 0.3}, "skip_zero_advantage": False},
        3,
        {"lora": {"rank": 2, "alpha": 8}},
    ),
    ({"advantage": {"kind": "grpo"}}, 1, {"path": WINDOWS, "gradient_checkpointing": True}),
    (SHARED, 2, {"lora": {"rank": 2, "alpha": 8, "quantize_base": "nf4"}}),
    (CRITIC, 1, {"lora": {"rank": 2, "alpha": 8}}),
    (TURNS, 1, {"lora": {"rank": 2, "alpha": 8, "quantize_base": "nf4"}}),
    (CODED, 3, EIGHT_BIT),
]


def _same(one: list[Any], other: list[Any], atol: float = 0.0) -> None:
    for left, right in zip_longest(one, other):
        np.testing.assert_allclose(left, right, rtol=0, atol=atol)


def _packed(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics without the one that says how sequences were packed: ranks share no prefixes with each other."""
    return {name: value for name, value in metrics.items() if name != "tokens_processed"}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The cases, with a folder for the model that is no fixture of others."""
    folder = tmp_path_factory.mktemp(UNTIED)
    shape = {"layers": 1, "width": 32, "heads": 4, "mlp": 48, "context": 128}
    build_tiny(folder, build_tokenizer(folder), **shape, tie=False, seed=2)
    windows = tmp_path_factory.mktemp(WINDOWS)
    tokenizer = build_tokenizer(windows)
    config = tiny_config(tokenizer, 2, 32, heads=4, head_width=8, mlp=40, context=128, tie=True)
    kinds = ["full_attention", "sliding_attention"]
    config.update({"use_sliding_window": True, "sliding_window": 3, "layer_types": kinds})
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(windows)
    tokenizer.save_pretrained(windows)
    folders = {UNTIED: folder, WINDOWS: windows}
    return [
        (recipe, steps, model | ({"path": str(folders[model["path"]])} if "path" in model else {}))
        for recipe, steps, model in CASES
    ]


@pytest.fixture(scope="module")
def alone(tiny: Path, cases: list[Any]) -> list[Found]:
    """What one rank makes of every case."""
    (found,) = together(1, stepped, tiny, cases)
    return found


RARE = [(4, None, 1, 2), (4, 2, 1, 2), (2, None, 2, 1), (4, None, 4, 3)]


@pytest.mark.parametrize(
    ("size", "over", "context", "every"),
    [
        (2, None, 1, 1),
        (4, 2, 2, 2),
        *(pytest.param(*each, marks=pytest.mark.rare) for each in RARE),
    ],
)
def test_a_step_of_several_ranks_is_that_of_one(
    size: int,
    over: int | None,
    context: int,
    every: int,
    tiny: Path,
    cases: list[Any],
    alone: list[Found],
) -> None:
    by_rank = together(size, stepped, tiny, cases[::every], over=over, context=context)
    fewer = False
    for case, expected in enumerate(alone[::every]):
        found = [of_rank[case] for of_rank in by_rank]
        fewer |= len({each["rows"] for each in found}) > 1
        for each in found:
            assert _packed(each["metrics"]) == pytest.approx(_packed(expected["metrics"]), abs=1e-6)
            rows = [pytest.approx(_packed(row), abs=1e-6) for row in expected["fine_tuned"]]
            assert [_packed(row) for row in each["fine_tuned"]] == rows
            for what in ("gradients", "parameters", "critic"):
                _same(each[what], expected[what], atol=1e-6)
    assert fewer or context == size, "no rank ever had fewer rows than another"


LORA = {"rank": 4, "alpha": 8}
MERGED = {"lora": LORA, "dtype": "bfloat16"}
ADAPTER = {"lora": LORA | {"sync": "adapter"}}
QUANTIZED = {"lora": LORA | {"quantize_base": "nf4"}, "dtype": "bfloat16"}
HYBRID = 4  # ranks, sharded over two at a time
SLICED = 3  # stands for two ranks that compute every row together


def _met(size: int, work: Any, *args: Any) -> list[Found]:
    if size == SLICED:
        return together(2, work, *args, context=2)
    return together(size, work, *args, over=2 if size == HYBRID else None)


@pytest.mark.parametrize(
    ("before", "after", "cases"),
    [
        (
            2,
            1,
            [
                (CRITIC, {}),
                (SHARED, {}),
                (TURNS, {}),
                (SHARED, MERGED),
                (CRITIC, QUANTIZED),
                (CODED, EIGHT_BIT),
            ],
        ),
        (1, 2, [(CRITIC, {}), (SHARED, ADAPTER)]),
        (HYBRID, 2, [(CRITIC, {}), (SHARED, QUANTIZED), (CODED, EIGHT_BIT)]),
        (1, HYBRID, [(SHARED, {}), (SHARED, MERGED)]),
        (SLICED, 1, [(CRITIC, {})]),
        (1, SLICED, [(TURNS, {})]),
        (HYBRID, SLICED, [(SHARED, MERGED)]),
    ],
)
def test_a_checkpoint_is_continued_by_any_number_of_ranks(
    before: int, after: int, cases: list[Any], tiny: Path, tmp_path: Path
) -> None:
    runs = [tmp_path / str(place) for place in range(len(cases))]
    each = [(tiny, recipe, run, model) for (recipe, model), run in zip(cases, runs, strict=True)]
    wrote, *_ = _met(before, in_turn, saved, each)
    same, *_ = _met(before, in_turn, resumed, each)
    by_rank = _met(after, in_turn, resumed, each)
    for place, case in enumerate(cases):
        found = [of_rank[place] for of_rank in by_rank]
        _continued(*case, runs[place], wrote[place], same[place], *found)


def _continued(
    recipe: dict[str, Any],
    model: dict[str, Any],
    run: Path,
    wrote: Found,
    same: Found,
    other: Found,
    *rest: Found,
) -> None:
    """same: as many ranks as wrote the checkpoint; other, rest: the first of as many as went on, and the others."""
    assert same["cursor"] == other["cursor"] == {"step": 1}
    steps = 1 if recipe == TURNS else 2  # without learned values of turns no action is better than another
    assert same["steps"] == other["steps"] == wrote["steps"] == steps
    for what in ("parameters", "moments"):
        _same(same[what], wrote[what])
        _same(other[what], wrote[what])
    # Ranks pack rows differently, which bfloat16 rounds.
    near = 0.05 if "dtype" in model else 1e-4
    assert _packed(other["metrics"]) == pytest.approx(_packed(same["metrics"]), abs=near)
    # One snapshot, whoever took it; its bytes are in one place.
    assert other["manifest"] == same["manifest"] and all(spec.checksum for spec in same["manifest"])
    np.testing.assert_allclose(other["probe"], same["probe"], atol=1e-5)
    assert other["bytes"] == same["bytes"] > 0
    assert all(each["bytes"] == 0 for each in rest)
    newest = latest(run)
    assert newest is not None
    files = {"optimizer.safetensors", "optimizer.safetensors.blocks", "state.json"}
    assert {path.name for path in newest.iterdir()} == {"model", "critic"} | files


@pytest.mark.parametrize(("size", "moments"), [(1, "float32"), (2, "float32"), (2, "8bit")])
def test_moments_in_host_memory_change_neither_numbers_nor_files(
    size: int, moments: str, tiny: Path, tmp_path: Path
) -> None:
    cases = []
    for offload in (False, True):
        critic = {"optim": {"learning_rate": 0.03, "moments": moments, "offload": offload}}
        model = {"moments": moments, "offload": offload}
        cases.append((tiny, {"advantage": GAE, "critic": critic}, tmp_path / str(offload), model))
    wrote, *_ = together(size, in_turn, saved, cases)
    files = [latest(run) for _, _, run, _ in cases]
    assert None not in files
    states = [{p.name: p.read_bytes() for p in f.glob("*.safetensors*")} for f in files if f is not None]
    assert states[0] == states[1] and len(states[0]) == 2
    for what in ("parameters", "moments"):
        _same(wrote[1][what], wrote[0][what])
    # Either continues from the other's checkpoint.
    plain, offloaded = cases
    swapped = [(*plain[:2], offloaded[2], plain[3]), (*offloaded[:2], plain[2], offloaded[3])]
    one, other = together(size, in_turn, resumed, swapped)[0]
    assert one["metrics"] == other["metrics"]


KL: dict[str, Any] = {"kl": {"coefficient": 0.3}, "skip_zero_advantage": False}


AWAY: list[Any] = [
    (CRITIC | KL | {"distill": {"coefficient": 0.5}}, {"dtype": "bfloat16"}),
    (TURNS, {"offload": True}),
    (CODED, EIGHT_BIT | {"dtype": "bfloat16", "float8": True}),
    (SHARED | KL, MERGED),
    (SHARED | KL, QUANTIZED),
]


@pytest.mark.parametrize("size", [1, 2])
def test_a_state_that_was_away_goes_on_as_one_that_stayed(size: int, tiny: Path) -> None:
    cases = [(tiny, recipe, model, away) for recipe, model in AWAY for away in (False, True)]
    for found in together(size, in_turn, parted, cases):
        for stayed, went in zip(found[::2], found[1::2], strict=True):
            assert went["moved"]
            _same(went["parameters"], stayed["parameters"])
            assert (went["metrics"], went["manifest"]) == (stayed["metrics"], stayed["manifest"])


ILQL = IlqlSettings(
    episodes_per_step=4,
    epochs=2,
    target_rate=0.2,
    optim=OptimSettings(learning_rate=1e-2),
    value_optim=OptimSettings(learning_rate=1e-2),
)


KTO = KtoSettings(episodes_per_step=4, epochs=2, optim=OptimSettings(learning_rate=1e-2))
REWARD = RewardModelSettings(pairs_per_step=1, epochs=2, optim=OptimSettings(learning_rate=1e-2))


def test_a_stage_is_continued_from_its_checkpoint_by_any_number_of_ranks(tiny: Path, tmp_path: Path) -> None:
    cases = [(tiny, tmp_path / stage.kind, stage) for stage in (SFT, KTO, REWARD, ILQL)]
    of_two, again = (together(2, in_turn, staged, cases)[0] for _ in range(2))
    (of_one,) = together(1, in_turn, staged, cases)
    for whole, same, other in zip(of_two, again, of_one, strict=True):
        assert (whole["begun"], same["begun"], other["begun"]) == (0, 2, 2)
        assert same["metrics"] == whole["metrics"][2:] and len(same["metrics"]) > 2
        _same(same["parameters"], whole["parameters"])
        _same(other["parameters"], whole["parameters"], atol=1e-5)


def test_ranks_of_unequal_shares_make_the_same_optimizer_steps(tiny: Path) -> None:
    (one, found), (other, same) = together(2, divided, tiny)
    assert {one, other} == {3, 6}
    _same(found.pop("parameters"), same.pop("parameters"))
    assert found == same
    # One of the ten parts has no episode with an advantage.
    assert found["steps"] + found["metrics"]["idle_step"] == 10 and found["metrics"]["skipped_step"] == 0


@pytest.mark.parametrize(
    ("recipe", "spoilt", "moments", "message"),
    [
        (
            {},
            {"behavior_logprobs": without_logprobs},
            "float32",
            r"^group 3, episode 2: its behavior logprobs are not finite$",
        ),
        *(
            (
                {"advantage": {"kind": "grpo", "divide": False}, "minibatches": 3, "epochs": 2},
                {"reward": beyond_floats},
                moments,
                r"^an optimizer step is not finite: loss .*grad_norm (inf|nan)$",
            )
            for moments in ("float32", "8bit")
        ),
    ],
)
def test_a_batch_that_is_spoilt_on_one_rank_is_refused_by_all(
    recipe: dict[str, Any], spoilt: dict[str, Any], moments: str, message: str, tiny: Path
) -> None:
    said = together(2, refused, tiny, recipe, spoilt, moments)
    assert said[0] == said[1]
    assert re.match(message, said[0][0]) and said[0][2]
    assert bool(said[0][1]) == ("minibatches" in recipe), "what an update before it moved was put back"


def test_ranks_that_do_not_come_are_missed_by_name() -> None:
    with pytest.raises(RankLost, match=r"^rank 1 of the learner did not meet the other 1 at 127.0.0.1:9 "):
        Ranks.join(1, 2, "127.0.0.1:9", "cpu", 1.0)
