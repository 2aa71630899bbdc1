"""Several environments in one run: each group plays one, by its entry of the recipe, and each is told apart."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.assembly.stage_data import gather
from deploy.config import run_folder
from deploy.config.config_errors import ConfigError
from deploy.config.trust import executed
from deploy.report.metrics import read_metrics
from deploy.run.evaluate import conditions_of, environment_id, environment_of
from deploy.run.preflight import check
from rollout.buffer.segments import read_rows
from rollout.wire.schema import decode
from tests.deploy.small_run import (
    Stopped,
    assert_balanced,
    configured,
    ledger,
    same_bits,
    train,
    trained_rows,
)

LAKE = (
    "{name='lake', share=2, id='frozen_lake', options={split='train', instructions=false, view='map', size=3, "
    "max_turns=6}}"
)
SUMS = (
    "{name='sums', id='arithmetic', options={level=1, split='train', instructions=false}, agent={memory='full'}, "
    "max_turns=1, max_tokens=5}"
)
TWO = ("env=", f"envs=[{LAKE}, {SUMS}]", "buffer.groups_per_step=3", "rollout.context_tokens=96")
IDS = {"lake": "frozen_lake", "sums": "arithmetic"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "run"
    train(configured(*TWO), folder)
    return folder


def episodes(rows: list[dict[str, Any]], *key: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    found = defaultdict(list)
    for row in rows:
        found[tuple(row[each] for each in key)].append(row)
    return found


def test_every_step_has_the_shares_and_no_group_mixes(run: Path) -> None:
    assert_balanced(run, configured(*TWO))
    steps = ledger(run, "SELECT taken_version, env_id, count(*) FROM groups GROUP BY 1, 2 ORDER BY 1, 2")
    assert steps == [
        (step, env_id, count)
        for step in range(4)
        for env_id, count in (("arithmetic", 1), ("frozen_lake", 2))
    ]
    for rows in episodes(trained_rows(run), "group_id").values():
        assert len({(row["env_id"], row["env_options"], row["seed"]) for row in rows}) == 1


def test_limits_and_agent_are_those_of_the_entry(run: Path) -> None:
    for (env_id, *_), rows in episodes(trained_rows(run), "env_id", "group_id", "episode").items():
        longest = max(len(row["action_ids"]) for row in rows)
        if env_id == "arithmetic":
            assert len(rows) == 1 and longest <= 5
        else:
            assert longest <= 2  # sampling.max_tokens
            assert [row["segment"] for row in rows] == list(range(len(rows)))  # agent.memory = "last"
    turns = Counter(row["env_id"] for row in trained_rows(run))
    assert turns["frozen_lake"] > 4 * 2 * 4, "more than one turn an episode"


def test_metrics_of_each_environment_are_those_of_its_stored_rows(run: Path) -> None:
    stored = episodes(trained_rows(run), "taken_version", "env_id", "group_id", "episode")
    for row in read_metrics(run):
        rewards: dict[str, list[float]] = {}
        for name, env_id in IDS.items():
            own = [rows for key, rows in stored.items() if key[:2] == (row["step"] - 1, env_id)]
            rewards[name] = [sum(turn["reward"] for turn in rows) for rows in own]
            assert row[f"env/{name}/episodes"] == len(own) == {"lake": 8, "sums": 4}[name]
            assert row[f"env/{name}/reward"] == pytest.approx(np.mean(rewards[name]))
            assert row[f"env/{name}/reward_std"] == pytest.approx(np.std(rewards[name]))
            assert row[f"env/{name}/success"] == np.mean([bool(rows[-1]["success"]) for rows in own])
            assert row[f"env/{name}/turns"] == np.mean([len(rows) for rows in own])
        assert row["reward"] == pytest.approx(np.mean(rewards["lake"] + rewards["sums"]))


def test_a_run_of_one_environment_has_no_metrics_of_each(reference: Path) -> None:
    assert not [name for row in read_metrics(reference) for name in row if name.startswith("env/")]
    assert "environments" not in json.loads((reference / "summary.json").read_text(encoding="utf-8"))


def test_each_environment_is_evaluated_on_its_own_tasks(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["held_out"] and list(summary["environments"]) == ["lake", "sums"]
    for when in ("before", "after"):
        ends = [row for row in read_rows(run / "evaluations" / when).to_pylist() if row["end_reason"]]
        assert all(json.loads(row["env_options"])["split"] == "heldout" for row in ends)
        for name, env_id in IDS.items():
            own = [bool(row["success"]) for row in ends if row["env_id"] == env_id]
            assert len(own) == 4  # evaluation.tasks
            assert summary["environments"][name][f"success_{when}"] == np.mean(own)
        assert summary[f"success_{when}"] == np.mean([bool(row["success"]) for row in ends])


def test_the_report_shows_each_environment(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Success on lake" in page and "Success on sums" in page and "Success on held-out tasks" in page
    assert "Reward of each environment" in page


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(run: Path, tmp_path: Path) -> None:
    config, folder = configured(*TWO), tmp_path / "run"
    with pytest.raises(Stopped):
        train(config, folder, stop_after=3)
    train(config, folder, resume=True)
    assert same_bits(run, folder)
    tasks = "SELECT group_id, env_id, env_options, seed FROM groups ORDER BY 1"
    assert ledger(run, tasks) == ledger(folder, tasks)


def test_one_entry_is_a_run_of_env(reference: Path, tmp_path: Path) -> None:
    """`[env]` and a single entry of `[[envs]]` are the same run, bit for bit."""
    train(configured("env=", f"envs=[{LAKE}]"), tmp_path / "run")
    assert same_bits(reference, tmp_path / "run")


def test_demonstrations_are_of_every_environment_by_its_share(run: Path) -> None:
    stage = "stages=[{kind='sft', source={kind='player', episodes=9}}]"
    config = configured("env=", f"envs=[{LAKE}, {SUMS}]", "rollout.context_tokens=96", stage)
    groups = [decode(batch) for batch in gather(config, 0, str(run / "base"))]
    assert Counter(group.slot.task.env_id for group in groups) == {"frozen_lake": 6, "arithmetic": 3}
    assert [group.slot.group_id for group in groups] == list(range(9))


def test_a_checkpoint_is_evaluated_on_an_environment_by_its_name(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 2 environments; --env lake \| sums"):
        environment_of(str(run))
    conditions = conditions_of(str(run), "sums")
    assert environment_id(str(run), "sums") == "arithmetic"
    assert (conditions.max_turns, conditions.sampling.max_tokens, conditions.agent.memory) == (1, 5, "full")
    assert conditions.env_options == {"level": 1, "split": "heldout", "instructions": False}
    assert run_folder.open_existing(run) == configured(*TWO)


@pytest.mark.rare
def test_actors_change_nothing_about_a_run_of_several(run: Path, tmp_path: Path) -> None:
    import ray

    from deploy.cluster.cluster import RayRuntime
    from deploy.cluster.connect import connect

    config = configured(*TWO)
    connect(config)
    try:
        train(config, tmp_path / "ray", ring_type=RayRuntime)
    finally:
        ray.shutdown()
    assert same_bits(run, tmp_path / "ray")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([f"envs=[{LAKE}]"], "this recipe has both. clear = ['env'] removes the section"),
        (["env="], "a run has one environment, [env], or several, [[envs]]; this recipe has neither"),
        ([*TWO, "envs.1.name=lake"], "envs.1.name='lake' is the name of another environment"),
        ([*TWO, "envs.1.name=a/b"], "envs.1.name: "),
        ([*TWO, "envs.0.share=0"], "envs.0.share: Input should be greater than 0 (got 0)"),
        ([*TWO, "envs.0.share=-1"], "envs.0.share: "),
        ([*TWO, "envs.0.share=inf"], "envs.0.share: "),
        ([*TWO, "envs.0.shar=1"], "unknown option envs.0.shar; did you mean envs.0.share?"),
        ([*TWO, "envs.1.max_tokens=96"], "envs.1.max_tokens=96 leaves no room for a prompt"),
        ([*TWO, "envs.1.max_turn=2"], "did you mean envs.1.max_turns?"),
        (
            [*TWO, f"envs=[{LAKE}, {LAKE.replace('lake', 'other', 1)}]"],
            "envs 'lake' and 'other' play the same tasks",
        ),
        (
            [*TWO, f"envs=[{LAKE}, {LAKE.replace('lake', 'other', 1).replace('train', 'heldout')}]"],
            "envs 'lake' and 'other' play the same tasks",  # one trains on what the other is evaluated with
        ),
    ],
)
def test_environments_that_cannot_be_told_apart_are_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        configured(*overrides)
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("envs.1.id=nothing", "nothing"),
        ("envs.1.options={levle=2}", "levle"),
        ("envs.1.evaluation_options={split='held_out'}", "held_out"),
        ("envs.1.options={level=5, instructions=true, split='train'}", "the first prompt of arithmetic has"),
    ],
)
def test_each_environment_is_checked_before_the_run(override: str, says: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=says):
        check(configured(*TWO, override))


def test_code_of_every_environment_is_trusted_by_name() -> None:
    own = "{name='own', id='mine:Env', options={judge='mine:judge'}, reward='mine:pay', agent={parts=['mine:part']}}"
    config = configured(*TWO, f"envs=[{LAKE}, {own}]")
    names = [entry.partition("=")[0] for entry in executed(config)]
    assert names == ["envs.1.id", "envs.1.options.judge", "envs.1.agent.parts[0]", "envs[1].reward"]
