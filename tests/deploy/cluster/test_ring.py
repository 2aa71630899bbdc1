"""Whole runs in one process: what they leave, what they account for, and how old what they train may be."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from deploy.config import run_folder
from deploy.config.load import parse
from deploy.report.metrics import read_metrics
from learner.data.advantage_log import read_advantages
from rollout.buffer.segments import read_rows
from tests.deploy.small_run import (
    Stopped,
    assert_balanced,
    configured,
    largest_lag,
    late_engine,
    ledger,
    parameters,
    same_bits,
    train,
    trained_rows,
)


def test_a_synchronous_run_repeats_itself_bit_for_bit(reference: Path, tmp_path: Path) -> None:
    train(configured(), tmp_path / "again")
    assert same_bits(reference, tmp_path / "again")


@pytest.mark.parametrize("sync", ["merged", "adapter"])
def test_a_run_that_trains_an_adapter_goes_on_after_a_stop_as_if_there_had_been_none(
    sync: str, reference: Path, tmp_path: Path
) -> None:
    model = reference / "checkpoints" / "version-00000004" / "model"
    tree = configured(f"learner.model.lora.sync={sync}").model_dump()
    tree["tiny"], tree["learner"]["model"]["path"] = None, str(model)
    config = parse(tree, "the test")
    train(config, tmp_path / "straight")
    with pytest.raises(Stopped):
        train(config, tmp_path / "stopped", stop_after=3)
    train(config, tmp_path / "stopped", resume=True)
    assert same_bits(tmp_path / "straight", tmp_path / "stopped")
    assert any(row["grad_norm"] > 0 for row in read_metrics(tmp_path / "straight"))
    base, now = load_file(model / "model.safetensors"), parameters(tmp_path / "straight")
    changed = {name for name in base if not np.array_equal(base[name].view(np.uint32), now[name])}
    assert changed == {name for name in base if name.endswith("_proj.weight")}


def test_what_is_compared_bit_for_bit_has_learned(reference: Path, tmp_path: Path) -> None:
    assert all(row["grad_norm"] > 0 for row in read_metrics(reference))
    train(configured("seed=1"), tmp_path / "other")
    assert not same_bits(reference, tmp_path / "other")


@pytest.mark.slow
def test_actors_change_nothing_about_a_synchronous_run(reference: Path, tmp_path: Path) -> None:
    import ray

    from deploy.cluster.cluster import RayRuntime
    from deploy.cluster.connect import connect

    # More loops than a Ray actor answers calls at once: those that wait for a slot must not keep others out.
    config = configured("rollout.concurrent_groups=1100")
    connect(config)
    try:
        train(config, tmp_path / "ray", ring_type=RayRuntime)
    finally:
        ray.shutdown()
    assert same_bits(reference, tmp_path / "ray")
    assert_balanced(tmp_path / "ray", config)


def test_a_run_leaves_everything_in_its_folder(reference: Path) -> None:
    files = {"config.json", "metrics.jsonl", "ledger.sqlite", "summary.json", "report.html"}
    folders = {"base", "groups", "checkpoints", "evaluations"}
    assert files | folders <= {path.name for path in reference.iterdir()}
    assert run_folder.open_existing(reference) == configured()
    assert [row["step"] for row in read_metrics(reference)] == [1, 2, 3, 4]
    assert {path.name for path in (reference / "checkpoints").iterdir()} == {
        "version-00000002",
        "version-00000004",
    }


def test_the_summary_is_what_was_counted(reference: Path) -> None:
    summary = json.loads((reference / "summary.json").read_text(encoding="utf-8"))
    groups = configured().steps * configured().buffer.groups_per_step
    assert summary["ledger"] == {
        "issued": groups, "in_flight": 0, "complete": 0, "taken": 0, "trained": groups, "dropped": 0,
    }  # fmt: skip
    stored = [
        row for name in ("before", "after") for row in read_rows(reference / "evaluations" / name).to_pylist()
    ]
    stored += read_rows(reference / "groups").to_pylist()
    assert summary["tokens_generated"] == sum(len(row["action_ids"]) for row in stored)
    for name in ("before", "after"):
        ends = [row for row in read_rows(reference / "evaluations" / name).to_pylist() if row["end_reason"]]
        assert len(ends) == configured().evaluation.tasks
        assert summary[f"success_{name}"] == np.mean([bool(row["success"]) for row in ends])


def test_every_group_is_accounted_for(reference: Path) -> None:
    assert_balanced(reference, configured())


def test_stored_rows_reproduce_every_steps_reward(reference: Path) -> None:
    returns: dict[int, dict[tuple[int, int], float]] = defaultdict(lambda: defaultdict(float))
    for row in trained_rows(reference):
        returns[row["taken_version"] + 1][row["group_id"], row["episode"]] += row["reward"]
    reported = {row["step"]: row["reward"] for row in read_metrics(reference)}
    assert reported == {step: pytest.approx(np.mean(list(each.values()))) for step, each in returns.items()}


def test_what_is_said_of_a_steps_tokens_is_what_its_rows_hold(reference: Path) -> None:
    sampled: Counter[int] = Counter()
    for row in trained_rows(reference):
        sampled[row["taken_version"] + 1] += len(row["action_ids"])
    rows = read_metrics(reference)
    assert {row["step"]: row["batch_tokens_sampled"] for row in rows} == sampled
    for row in rows:
        assert row["scored_share"] == row["tokens_scored"] / row["batch_tokens_sampled"]
        assert row["rollout_tokens_sampled"] == pytest.approx(row["rollout_tokens_per_s"] * row["step_s"])
    kept = [
        (r["version"], r["group_id"], r["episode"], r["turn"]) for r in read_advantages(reference).to_pylist()
    ]
    trained = [
        (r["taken_version"] + 1, r["group_id"], r["episode"], r["turn"]) for r in trained_rows(reference)
    ]
    assert sorted(kept) == sorted(trained), "every trained turn has its advantages, beside its version"
    # At lag 0 all that is played in training is trained, in the step that it was played in.
    assert sum(row["rollout_tokens_sampled"] for row in rows) == sum(sampled.values())


def test_no_evaluated_map_was_trained_on(reference: Path) -> None:
    def begins(name: str) -> set[str]:
        rows = read_rows(reference / name).to_pylist()
        return {row["observation"] for row in rows if row["turn"] == 0}

    trained, before, after = begins("groups"), begins("evaluations/before"), begins("evaluations/after")
    assert len(before) == configured().evaluation.tasks and before == after
    assert trained and not trained & before


@pytest.mark.parametrize("seed", range(3))
def test_nothing_older_than_the_lag_bound_is_trained(seed: int, tmp_path: Path) -> None:
    config = configured(
        "steps=6", "buffer.max_lag=2", f"seed={seed}", "evaluation.tasks=0", "stages.0.source.episodes=4",
        "rollout.workers=2", "checkpoint.every_steps=6",
    )  # fmt: skip
    train(config, tmp_path / "run", late_engine(seed))
    assert_balanced(tmp_path / "run", config)
    assert 1 <= largest_lag(tmp_path / "run") <= 2
    lags = {row["step"]: row["lag_max"] for row in read_metrics(tmp_path / "run")}
    for step, largest in lags.items():
        rows = [row for row in trained_rows(tmp_path / "run") if row["taken_version"] == step - 1]
        assert largest == max(step - 1 - min(row["versions"]) for row in rows)


def test_a_workers_failure_is_the_runs_error(tmp_path: Path) -> None:
    async def broken(config: object, name: str, path: str) -> object:
        raise OSError(f"{name} finds no device")

    with pytest.raises(OSError, match="rollout-0 finds no device"):
        train(configured(), tmp_path / "run", broken)  # type: ignore[arg-type]


def test_weights_move_with_every_step(tmp_path: Path) -> None:
    config = configured("checkpoint.every_steps=1", "checkpoint.keep=4", "evaluation.tasks=0", "steps=3")
    train(config, tmp_path / "run")
    versions = sorted((tmp_path / "run" / "checkpoints").iterdir())
    stored = [(folder / "model" / "model.safetensors").read_bytes() for folder in versions]
    assert all(one != two for one, two in pairwise(stored))
    assert parameters(tmp_path / "run")
    assert ledger(tmp_path / "run", "SELECT count(*) FROM groups WHERE state = 'trained'") == [(6,)]
