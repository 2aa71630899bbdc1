from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deploy.config.guards import Guard
from deploy.report.evaluation import Evaluation
from learner.algorithm.algorithm import AlgorithmSettings
from learner.algorithm.losses import ClippedLoss
from learner.algorithm.schedule import OptimSettings
from learner.data.batch import MicroBatch, longest_row
from learner.data.batch_checks import BatchRefused
from learner.data.batch_stats import describe
from learner.model.loading import ModelError
from learner.settings import LearnerSettings, ModelSettings
from learner.stages.settings import SftSettings
from learner.training.critic import OwnCritic
from learner.training.learner import Learner
from rollout.buffer.ledger import EpisodeRow
from rollout.wire.trajectory import EndReason, Group
from tests.learner.staged import learned

Groups = Callable[..., Group]
Algorithm = dict[str, Any]
GAE: Algorithm = {"advantage": {"kind": "gae"}, "skip_zero_advantage": False}
WITH_ALL: Algorithm = GAE | {"critic": {"kind": "own"}, "kl": {"coefficient": 0.1}}
CORRECTED = [{"kind": "tis"}, {"kind": "lag", "max_lag": 1}]
SHARED: Algorithm = GAE | {"critic": {"kind": "shared"}}


def _settings(tiny: Path, **changes: object) -> LearnerSettings:
    fields: dict[str, object] = {
        "model": ModelSettings(path=str(tiny)),
        "optim": OptimSettings(learning_rate=3e-3),
        "tokens_per_microbatch": 50,
    }
    return LearnerSettings.model_validate({**fields, **changes})


def _with_versions(group: Group, version: int) -> Group:
    episodes = []
    for episode in group.trajectories:
        steps = tuple(replace(s, versions=np.full_like(s.versions, version)) for s in episode.turns)
        episodes.append(replace(episode, turns=steps))
    return replace(group, trajectories=tuple(episodes))


def _failed(group: Group, index: int) -> Group:
    episodes = list(group.trajectories)
    episodes[index] = replace(episodes[index], end_reason=EndReason.FAILED)
    return replace(group, trajectories=tuple(episodes))


def _ended(group: Group, *verdicts: bool | None) -> Group:
    """The same episodes; those without a verdict were malformed."""
    episodes = [
        replace(t, success=verdict, end_reason=t.end_reason if verdict is not None else EndReason.MALFORMED)
        for t, verdict in zip(group.trajectories, verdicts, strict=True)
    ]
    return replace(group, trajectories=tuple(episodes))


def test_training_and_evaluation_count_success_of_the_same_episodes(group_of: Groups) -> None:
    # One of eight succeeded; six could not be read and have no verdict. One more failed by infrastructure.
    group = _failed(_ended(group_of(0, [0.0] * 9), True, False, *[None] * 6, True), 8)
    described = describe([group], version=7)
    evaluation = Evaluation.of([EpisodeRow.of(trajectory) for trajectory in group.trajectories])
    assert described["success"] == evaluation.success == 1 / 8
    assert described["episodes"] == evaluation.episodes == 8
    # A step in which nobody came to a verdict is one without success, where the environment gives verdicts.
    malformed = _ended(group_of(0, [0.0, 0.0]), None, None)
    assert describe([malformed], version=7, verdicts=True)["success"] == 0.0
    assert "success" not in describe([malformed], version=7)


def test_a_step_without_a_verdict_is_no_gap_once_there_was_one(tiny: Path, group_of: Groups) -> None:
    learner = Learner(_settings(tiny))
    rows = [
        learner.step([_ended(group_of(0, [1.0, 0.0]), *v)])
        for v in [(None, None), (True, None), (None, None)]
    ]
    assert [row.get("success") for row in rows] == [None, 0.5, 0.0]


def test_every_named_reward_is_described_over_all_episodes(group_of: Groups) -> None:
    group = group_of(0, [0.0] * 3, turns=2)
    said = [['{"goal": 1, "form": -0.5}', '{"goal": 2}'], [None, '{"goal": 0, "form": 0.25}'], [None, None]]
    episodes = [
        replace(t, turns=tuple(replace(s, named_rewards=n) for s, n in zip(t.turns, names, strict=True)))
        for t, names in zip(group.trajectories, said, strict=True)
    ]
    described = describe([replace(group, trajectories=tuple(episodes))], version=7)
    for name, sums in {"goal": [3, 0, 0], "form": [-0.5, 0.25, 0]}.items():
        assert described[f"rewards/{name}/mean"] == pytest.approx(statistics.mean(sums))
        assert described[f"rewards/{name}/std"] == pytest.approx(statistics.pstdev(sums))
        assert described[f"rewards/{name}/min"] == min(sums)
        assert described[f"rewards/{name}/max"] == max(sums)
    assert Guard(metric="rewards/goal/mean", below=0.1).metric == "rewards/goal/mean"


def test_description_is_recomputed_from_trainable_episodes_alone(group_of: Groups) -> None:
    groups = [
        _with_versions(group_of(0, [1.0, 0.0], turns=1), 3),
        _failed(_with_versions(group_of(1, [0.0, 0.5, 100.0], turns=3), 5), 2),
    ]
    described = describe(groups, version=7)
    tokens = [t.num_sampled for g in groups for t in g.trainable]
    assert described["reward"] == pytest.approx(1.5 / 4)
    assert described["success"] == pytest.approx(2 / 4)
    assert described["turns"] == 2.0
    assert described["episodes"] == 4.0
    assert described["untrainable_episodes"] == 1.0
    assert described["sampled_per_episode"] == pytest.approx(np.mean(tokens))
    assert described["lag_max"] == 4.0
    assert described["lag_mean"] == pytest.approx((4 * sum(tokens[:2]) + 2 * sum(tokens[2:])) / sum(tokens))
    lengths = [1, 1, 3, 3]
    assert [described[f"turns_{way}"] for way in ("p50", "p95", "max")] == [2, 3, 3]
    assert described["turns"] == np.mean(lengths)
    assert described["sampled_per_episode_p50"] == np.median(tokens)
    assert described["sampled_per_episode_max"] == max(tokens)
    rewards = [1.0, 0.0, 0.0, 0.5]
    assert described["reward_std"] == pytest.approx(statistics.pstdev(rewards))
    assert (described["reward_min"], described["reward_max"]) == (0.0, 1.0)
    # Reused groups say how old they are, and nothing else.
    reused = [
        replace(_with_versions(group_of(2, [9.0, 9.0]), 1), reuse=1),
        replace(_failed(_with_versions(group_of(3, [9.0, 9.0, 9.0]), 4), 0), reuse=3),
    ]
    of_each = [sum(t.num_sampled for t in group.trainable) for group in reused]
    assert describe([*groups, *reused], version=7) == described | {
        "groups_reused": 2.0,
        "reused_lag_max": 6.0,
        "reused_lag_mean": pytest.approx((6 * of_each[0] + 3 * of_each[1]) / sum(of_each)),
    }


@pytest.mark.parametrize("proximal", ["behavior", "learner"])
@pytest.mark.parametrize("minibatches", [1, 3])
def test_good_actions_become_likelier_and_bad_ones_less(
    tiny: Path, group_of: Groups, proximal: str, minibatches: int
) -> None:
    loss = ClippedLoss(clip_high=5.0, clip_low=0.99)
    algorithm = AlgorithmSettings(minibatches=minibatches, proximal=proximal, loss=loss)
    learner = Learner(_settings(tiny, algorithm=algorithm))
    group = group_of(0, [1.0, 0.0, 0.0, 1.0])

    def logprob(index: int) -> float:
        steps = group.trajectories[index].turns
        ids = np.concatenate([np.concatenate([s.prompt_ids, s.action_ids]) for s in steps])
        sampled = np.concatenate(
            [np.r_[np.zeros(len(s.prompt_ids)), np.ones(len(s.action_ids))] for s in steps]
        )
        return float((learner.policy.score_ids(ids.tolist()) * sampled[1:]).sum())

    before = [logprob(i) for i in range(4)]
    for _ in range(4):
        metrics = learner.step([group])
    after = [logprob(i) for i in range(4)]
    assert after[0] - before[0] > after[1] - before[1]
    assert after[3] - before[3] > after[2] - before[2]
    assert learner.version == 4
    assert metrics["version"] == 4.0
    assert metrics["batch_tokens_sampled"] == sum(t.num_sampled for t in group.trajectories)


def test_a_fixed_proximal_policy_is_the_one_before_the_first_minibatch(tiny: Path, group_of: Groups) -> None:
    # The behavior policy is unrelated to the learner's, yet the ratio to the learner's own is exactly 1.
    algorithm = AlgorithmSettings(proximal="learner", minibatches=2)
    learner = Learner(_settings(tiny, algorithm=algorithm, optim=OptimSettings(learning_rate=1e-30)))
    metrics = learner.step([group_of(0, [1.0, 0.0, 0.5, 2.0])])
    assert metrics["clip_fraction"] == 0.0
    assert metrics["behavior_gap"] > 0.05


def test_steps_are_reproducible(tiny: Path, group_of: Groups) -> None:
    def run() -> list[torch.Tensor]:
        settings = _settings(tiny, algorithm=AlgorithmSettings(minibatches=2))
        learner = Learner(settings, stages=[SftSettings()])
        learned(learner, [group_of(9, [1.0, 1.0])])
        learner.step([group_of(0, [1.0, 0.0]), group_of(1, [0.0, 1.0, 1.0])])
        return [p.detach() for p in learner.policy.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("algorithm", [{}, WITH_ALL, SHARED], ids=["policy", "with all", "shared"])
def test_a_rehearsal_changes_nothing(tiny: Path, group_of: Groups, algorithm: Algorithm) -> None:
    def run(rehearsed: bool) -> list[torch.Tensor]:
        torch.manual_seed(3)
        learner = Learner(_settings(tiny, algorithm=algorithm), total_steps=5)
        if rehearsed:
            learner.rehearse(longest=100)
        learner.step([group_of(0, [1.0, 0.0])])
        return [torch.get_rng_state(), *(p.detach() for p in learner.policy.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))


def test_a_rehearsal_holds_what_a_step_in_the_middle_of_a_run_holds(
    tiny: Path, group_of: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    values = OwnCritic._values

    def weighed(critic: OwnCritic, micro: MicroBatch) -> torch.Tensor:
        if torch.is_grad_enabled():
            held.append(_bytes_alive())
        return values(critic, micro)

    monkeypatch.setattr(OwnCritic, "_values", weighed)
    learner = Learner(_settings(tiny, algorithm=WITH_ALL, tokens_per_microbatch=1000))
    learner.rehearse(longest=100)
    (rehearsed,) = held
    for _ in range(2):
        learner.step([group_of(0, [1.0, 0.0])])
    assert rehearsed >= 0.99 * held[-1]


def _bytes_alive() -> int:
    """Of all tensors and gradients that there are."""
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    found += [x.grad for x in found if x.is_leaf and x.grad is not None]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}.values())


def test_a_row_that_does_not_fit_is_one_line_that_says_what_to_lower(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = Learner(_settings(tiny))

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 3.00 GiB\nmore")

    monkeypatch.setattr(learner.policy, "score", full)
    with pytest.raises(ModelError, match=r"^a row of [^\n]*3\.00 GiB[^\n]*tokens_per_microbatch=50[^\n]*$"):
        learner.rehearse(longest=100)


@pytest.mark.parametrize("model", [{}, {"dtype": "bfloat16"}], ids=["float32", "bfloat16"])
def test_what_a_row_will_hold_is_told_by_short_ones(
    tiny: Path, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr("learner.training.memory_dry_run._require_free", told.append)
    settings = ModelSettings(path=str(tiny), **model)
    learner = Learner(_settings(tiny, model=settings, tokens_per_microbatch=1100))
    learner.rehearse(longest=26)
    held: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept_alive = learner.policy.score(longest_row(26, 1100), 1.0)
    weights = {p.untyped_storage().data_ptr() for p in learner.policy.parameters()}
    copies = sum(p.nbytes // 2 for p in learner.policy.parameters()) if model else 0
    activations = sum(size for place, size in held.items() if place not in weights)
    assert activations - copies <= told[0] * 1.02 and told[0] <= activations
    del kept_alive


def test_a_host_without_room_for_the_largest_row_is_one_line(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**20))
    monkeypatch.setattr("psutil.swap_memory", lambda: SimpleNamespace(free=0))
    learner = Learner(_settings(tiny, tokens_per_microbatch=4000))
    with pytest.raises(
        ModelError, match=r"^a row of 3960 tokens .* of which 0\.000977 GiB are free\); lower"
    ):
        learner.rehearse(longest=100)
    with pytest.raises(ModelError, match=r"tokens_per_microbatch=4000 or rollout\.context_tokens=100"):
        learner.rehearse(longest=100)


@pytest.mark.parametrize(
    "algorithm", [{}, WITH_ALL, SHARED | {"corrections": CORRECTED, "proximal": "learner"}]
)
def test_every_metric_of_a_step_can_be_bounded(tiny: Path, group_of: Groups, algorithm: Algorithm) -> None:
    reused = replace(group_of(1, [1.0, 0.0]), reuse=1)
    metrics = Learner(_settings(tiny, algorithm=algorithm)).step([group_of(0, [1.0, 0.0]), reused])
    for name in metrics.keys() - {"version"}:
        Guard(metric=name, below=0.0)


def test_the_share_of_tokens_that_statistics_are_of_is_said(tiny: Path, group_of: Groups) -> None:
    told, uniform = group_of(0, [1.0, 0.0]), group_of(1, [1.0, 1.0])
    counts = [sum(t.num_sampled for t in group.trajectories) for group in (told, uniform)]
    learner = Learner(_settings(tiny))
    assert learner.step([told, uniform])["scored_share"] == pytest.approx(counts[0] / sum(counts))
    alone = learner.step([uniform])
    assert alone["scored_share"] == 0.0 and "entropy" not in alone
    assert alone["zero_advantage_fraction"] == alone["idle_step"] == 1.0


def test_bfloat16_with_gradient_checkpointing_learns(tiny: Path, group_of: Groups) -> None:
    model = ModelSettings(path=str(tiny), dtype="bfloat16", gradient_checkpointing=True)
    learner = Learner(_settings(tiny, model=model))
    before = [p.detach().clone() for p in learner.policy.parameters()]
    metrics = learner.step([group_of(0, [1.0, 0.0])])
    assert np.isfinite(list(metrics.values())).all()
    assert not all(torch.equal(a, b) for a, b in zip(before, learner.policy.parameters(), strict=True))


def test_a_group_without_siblings_is_one_line(tiny: Path, group_of: Groups) -> None:
    learner = Learner(_settings(tiny))
    with pytest.raises(BatchRefused, match=r"^group 4 has 1 trainable episodes[^\n]*$"):
        learner.step([_failed(group_of(4, [1.0, 0.0]), 0)])
    assert learner.version == 0


def test_an_entropy_bonus_refuses_skipped_sequences() -> None:
    with pytest.raises(ValueError, match="skip_zero_advantage = false"):
        AlgorithmSettings(entropy_bonus=0.01)
