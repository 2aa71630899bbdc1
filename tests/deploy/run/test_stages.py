"""What comes before reinforcement learning in a whole run: in order, once each, also where a run was stopped within."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from deploy.assembly.runtime import Row
from deploy.assembly.stage_data import gather, past_episodes
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.config.resources import reservations
from deploy.report.metrics import read_metrics, stage_folder
from deploy.run.local import LocalRuntime
from deploy.run.preflight import check
from deploy.run.train import stage_stride
from learner.stages.settings import RunSource
from rollout.wire.schema import decode
from tests.deploy.small_run import Stopped, configured, ledger, same_bits, train
from tests.smollm2 import FOLDER, needs_smollm2

PLAYED = "source={kind='player', episodes=16, error_rate=0.2}"
TWO = (
    "steps=2", "evaluation.tasks=0", "checkpoint.stage_steps=10",
    f"stages=[{{kind='sft', {PLAYED}, episodes_per_step=4, epochs=3}},"
    f" {{kind='sft', {PLAYED}, episodes_per_step=1}}]",
)  # fmt: skip


def stopped(begun: list[int], after: int | None = None) -> Callable[..., LocalRuntime]:
    """A runtime that is interrupted instead of making more steps of stages after so many calls; `begun`: its stages."""

    def start(config: RunConfig, folder: Path, engine: Any) -> LocalRuntime:
        ring = LocalRuntime(config, folder, engine)
        begin, advance, calls = ring.begin_stage, ring.advance_stage, 0

        async def begin_stage(index: int) -> tuple[int, int]:
            begun.append(index)
            return await begin(index)

        async def advance_stage(steps: int) -> list[Row]:
            nonlocal calls
            if calls == after:
                raise Stopped
            calls += 1
            return await advance(steps)

        ring.begin_stage, ring.advance_stage = begin_stage, advance_stage  # type: ignore[method-assign]
        return ring

    return start


def test_a_run_stopped_within_a_stage_ends_where_the_uninterrupted_one_does(
    reference: Path, tmp_path: Path
) -> None:
    config, folder = configured("checkpoint.stage_steps=20"), tmp_path / "run"
    with pytest.raises(Stopped):
        train(config, folder, ring_type=stopped([], after=3))
    assert len(read_metrics(stage_folder(folder, 0))) == 21  # of 48, and a checkpoint then
    begun: list[int] = []
    train(config, folder, resume=True, ring_type=stopped(begun))
    assert begun == [0]
    assert same_bits(reference, folder)
    rows = [read_metrics(stage_folder(each, 0)) for each in (reference, folder)]
    assert rows[0] == rows[1] and [row["step"] for row in rows[1]] == list(range(1, 49))
    assert not (folder / "stages" / "checkpoints").exists()


def test_a_stage_that_has_ended_is_not_made_again(tmp_path: Path) -> None:
    config, folder, straight = configured(*TWO), tmp_path / "run", tmp_path / "straight"
    begun: list[int] = []
    with pytest.raises(Stopped):  # 12 steps of the first in 3 calls and one that says so, then 1 and 10 of 16
        train(config, folder, ring_type=stopped(begun, after=6))
    assert begun == [0, 1]
    begun.clear()
    train(config, folder, resume=True, ring_type=stopped(begun))
    assert begun == [1]
    begun.clear()
    train(config, folder, resume=True, ring_type=stopped(begun))
    assert begun == []
    train(config, straight, ring_type=stopped(begun))
    assert begun == [0, 1]
    assert same_bits(straight, folder)


def test_steps_of_a_stage_are_asked_for_one_by_one_where_they_take_long() -> None:
    assert [stage_stride(1, seconds) for seconds in (0.01, 2.0, 5.0, 300.0)] == [10, 10, 4, 1]
    assert stage_stride(10, 20.0) == 10 and stage_stride(4, 40.0) == 2


def test_a_stage_learns_from_the_episodes_of_a_finished_run(reference: Path, tmp_path: Path) -> None:
    source = f"kind='run', path={str(reference)!r}"
    own = "{kind='tests.own_parts:Preferences', passes=1, source={" + source + "}}"
    config = configured(
        "steps=1", "evaluation.tasks=0", f"stages=[{own}, {{kind='sft', source={{{source}}}}}]"
    )
    check(config)
    train(config, tmp_path / "run")
    groups = ledger(reference, "SELECT count(*) FROM groups")[0][0]
    assert len(read_metrics(stage_folder(tmp_path / "run", 0))) == groups == 8
    assert len(read_metrics(stage_folder(tmp_path / "run", 1))) == 1  # 32 episodes in a step


def test_a_past_gives_the_episodes_that_are_asked_for(reference: Path) -> None:
    def rewards(**asked: Any) -> list[float]:
        batches = past_episodes(RunSource(path=str(reference), **asked), "stages.0.source")
        return [episode.reward for batch in batches for episode in decode(batch).trajectories]

    everything = rewards()
    assert len(everything) == 32 and set(everything) == {0.0, 1.0}
    assert rewards(min_reward=1.0) == [reward for reward in everything if reward == 1.0]
    assert rewards(episodes=5) == everything[:5]
    groups = [everything[first : first + 4] for first in range(0, 32, 4)]
    assert {len(set(each)) for each in groups} == {1, 2}  # some have several of the most reward
    best = [
        episode
        for batch in past_episodes(RunSource(path=str(reference), keep="best_of_group"), "")
        for episode in decode(batch).trajectories
    ]
    assert [(each.reward, each.index) for each in best] == [(max(of), of.index(max(of))) for of in groups]
    assert rewards(keep="best_of_group", min_reward=1.0) == [1.0 for of in groups if 1.0 in of]
    with pytest.raises(ValueError, match="leaves one episode of a group, which makes no pair"):
        configured("stages=[{kind='preference', source={kind='run', path='x', keep='best_of_group'}}]")


def spoken(*messages: str) -> list[dict[str, str]]:
    return [
        {"role": ("user", "assistant")[place % 2], "content": message}
        for place, message in enumerate(messages)
    ]


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return f"source={{kind='dataset', path={str(path)!r}}}"


def test_a_run_may_be_its_stages_alone_over_files_of_conversations_and_of_pairs(tmp_path: Path) -> None:
    talks = written(tmp_path / "talks.jsonl", [{"messages": spoken("left", "right", "up", "down")}] * 4)
    pairs = written(tmp_path / "pairs.jsonl", [{"prompt": "left", "chosen": "up", "rejected": "right"}] * 4)
    optim = "optim={learning_rate=2e-2}"
    config = configured(
        "steps=0", "evaluation.tasks=2", f"stages=[{{kind='sft', {talks}, epochs=16, {optim}}},"
        f" {{kind='preference', {pairs}, epochs=8, loss={{kind='simpo'}}, {optim}}}]",
    )  # fmt: skip
    check(config)
    summary = train(config, tmp_path / "run")
    sft, preference = (read_metrics(stage_folder(tmp_path / "run", index)) for index in (0, 1))
    assert (len(sft), len(preference), summary["steps"]) == (16, 8, 0)
    assert sft[-1]["loss"] < 0.1 < sft[0]["loss"]
    assert (preference[0]["reward_accuracy"], preference[-1]["reward_accuracy"]) == (0.0, 1.0)
    assert [each.name for each in (tmp_path / "run" / "checkpoints").iterdir()] == ["version-00000000"]
    assert summary["success_after"] == summary["success_before"]


def test_a_run_that_plays_nothing_starts_no_engine(tmp_path: Path) -> None:
    config = configured("steps=0", "evaluation.tasks=0", f"stages=[{{kind='sft', {PLAYED}}}]")
    assert [each.count for each in reservations(config) if each.part == "rollout worker"] == [0]
    summary = train(config, tmp_path / "run", engine=unwanted)
    assert (tmp_path / "run" / "checkpoints" / "version-00000000").is_dir() and summary["steps"] == 0


async def unwanted(*given: Any) -> Any:
    raise AssertionError(f"an engine was started: {given}")


@needs_smollm2
def test_conversations_are_in_the_models_own_template(tmp_path: Path) -> None:
    talk = spoken("What is 3 + 4?", "7", "And 5 + 6?", "It is 11.")
    source = written(tmp_path / "talks.jsonl", [{"messages": talk}, {"messages": spoken("x " * 900, "y")}])
    config = configured(f"stages=[{{kind='sft', {source}}}]", "rollout.context_tokens=400")
    (batch,) = gather(config, 0, str(FOLDER))  # the second row is too long
    (episode,) = decode(batch).trajectories
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    ids = [*chain(*((*turn.prompt_ids, *turn.action_ids) for turn in episode.turns))]
    assert tokenizer.decode(ids) + "\n" == tokenizer.apply_chat_template(talk, tokenize=False)
    learned = [tokenizer.decode(turn.action_ids) for turn in episode.turns]
    assert learned == ["7<|im_end|>", "It is 11.<|im_end|>"]


@pytest.mark.parametrize(
    ("kind", "row", "told"),
    [
        ("sft", {"prompt": "left", "chosen": "up", "rejected": "right"}, 'Use kind = "preference"'),
        ("preference", {"prompt": "left", "completion": "up"}, "needs columns chosen and rejected"),
        ("sft", {"text": "left"}, r"rows.jsonl:1: no column of the usual names"),
    ],
)
def test_a_file_that_does_not_fit_its_stage_is_refused_in_one_line(
    kind: str, row: dict[str, Any], told: str, tmp_path: Path
) -> None:
    config = configured(f"stages=[{{kind='{kind}', {written(tmp_path / 'rows.jsonl', [row])}}}]")
    with pytest.raises(ConfigError, match=rf"^stages\.0\.source: .*{told}"):
        check(config)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"path": "nowhere"}, r"^stages\.0\.source: .*nowhere: no ledger\.sqlite"),
        (
            {"min_reward": 2.0},
            r"^stages\.0\.source: no episode of .* has a reward of min_reward=2\.0 or more",
        ),
        ({}, r"^stages\.0\.source: the tokenizer of the tiny model is not that of"),
    ],
)
def test_a_past_that_does_not_fit_is_refused_in_one_line(
    changes: dict[str, Any], said: str, reference: Path
) -> None:
    source = RunSource.model_validate({"path": str(reference)} | changes)
    words = () if changes else ("tiny.words=['left', 'right']",)
    config = configured(*words)
    stages = (config.stages[0].model_copy(update={"source": source}),)
    with pytest.raises(ConfigError, match=said):
        check(config.model_copy(update={"stages": stages}))
