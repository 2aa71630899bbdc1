"""What a rank is asked to do in the tests of several: plain functions that its process can import."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

import learner.model.policy
from learner.algorithm.schedule import OptimSettings
from learner.data.batch import rows_of
from learner.data.batch_checks import BatchRefused
from learner.data.prepare import Example
from learner.model.loading import ModelError
from learner.model.policy import Policy
from learner.parallel.ranks import Ranks
from learner.parallel.shards import gathered
from learner.settings import LearnerSettings, ModelSettings
from learner.stages.settings import AnyStage, SftSettings
from learner.training.checkpoint import newest
from learner.training.device_state import DeviceState
from learner.training.learner import Learner
from learner.training.optim import StepReport
from learner.training.publish import take_snapshot
from rollout.wire.schema import as_reused, decode, encode
from rollout.wire.trajectory import Group, Turn
from tests.learner.episodes import group, random_groups
from tests.learner.staged import learned
from tests.learner.wide import widened

LIMIT = 12  # tokens of a row: every rank has several
Found = dict[str, Any]


@contextmanager
def float64() -> Iterator[None]:
    """Every model and head made meanwhile computes in float64."""
    blank = learner.model.policy.blank

    def doubled(settings: ModelSettings) -> tuple[Path, PreTrainedModel]:
        folder, model = blank(settings)
        return folder, widened(model)

    learner.model.policy.blank = doubled
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        learner.model.policy.blank = blank


SFT = SftSettings(episodes_per_step=4, epochs=2, optim=OptimSettings(learning_rate=1e-2))


def built(
    ranks: Ranks,
    tiny: Path,
    recipe: dict[str, Any],
    stage: AnyStage = SFT,
    offload: bool = False,
    moments: str = "float32",
    **model: Any,
) -> Learner:
    if "distill" in recipe:
        recipe = recipe | {"distill": {"teacher": str(tiny), **recipe["distill"]}}
    settings = {
        "model": {"path": str(tiny), **model},
        "optim": {
            "learning_rate": 1e-2,
            "max_grad_norm": 0.3,
            "weight_decay": 0.1,
            "moments": moments,
            "offload": offload,
        },
        "algorithm": recipe,
        "tokens_per_microbatch": LIMIT,
    }
    return Learner(
        LearnerSettings.model_validate(settings), temperature=0.8, total_steps=8, ranks=ranks, stages=[stage]
    )


def groups_of(seed: int, count: int = 5) -> list[Group]:
    """Groups of unequal length."""
    return [group(story, place) for place, story in enumerate(random_groups(seed, groups=count))]


def own(ranks: Ranks, groups: list[Group]) -> list[Group]:
    """The share of a step that the replay buffer would give this rank; the step has its last group once more."""
    *fresh, last = [encode(each) for each in groups]
    return [decode(batch) for batch in ranks.share.of([*fresh, as_reused(last, 2)])]


def rows(groups: list[Group]) -> int:
    """Micro-batches that a rank makes of its share."""
    sequences = [s for each in groups for t in each.trainable for s in Example.of(t).sequences()]
    return len(rows_of(sequences, LIMIT))


def plain(tensors: Any) -> list[Any]:
    """Whole tensors as arrays, which travel between processes by themselves."""
    return [gathered(tensor.detach()).numpy().copy() for tensor in tensors]


def stepped(ranks: Ranks, tiny: Path, cases: list[Any]) -> list[Found]:
    """For each (recipe, steps, model settings): a stage, so many learner steps, and what the last one left."""
    found = []
    for recipe, steps, model in cases:
        with float64():
            made = built(ranks, tiny, recipe, **model)
            made._begin()
        fine_tuned = learned(made, groups_of(100, count=3))
        for step in range(steps):
            share = own(ranks, groups_of(step))
            metrics = made.step(share)
        critic = [] if made._critic is None else made._critic.optimizer._parameters
        found.append(
            {
                "fine_tuned": fine_tuned,
                "metrics": metrics,
                "gradients": plain(p.grad for p in made.policy.parameters() if p.grad is not None),
                "parameters": plain(made.policy.parameters()),
                "critic": plain(critic),
                "rows": rows(share),
            }
        )
    return found


def divided(ranks: Ranks, tiny: Path) -> tuple[int, Found]:
    """Episodes of this rank, and what a step of many parts and passes left."""
    made = built(ranks, tiny, {"minibatches": 5, "epochs": 2})
    share = own(ranks, groups_of(0, count=3))
    metrics = made.step(share)
    state = {"parameters": plain(made.policy.parameters()), "generator": made._rng.bit_generator.state}
    return sum(len(each.trainable) for each in share), state | {
        "metrics": metrics,
        "steps": made.optimizer.steps,
    }


def saved(ranks: Ranks, tiny: Path, recipe: dict[str, Any], run: Path, model: dict[str, Any]) -> Found:
    """A learner that made two steps and a checkpoint."""
    made = built(ranks, tiny, recipe, **model)
    for step in range(2):
        made.step(own(ranks, groups_of(step)))
        made.save(run, {"step": step}, keep=1)
    return _state(made)


def resumed(ranks: Ranks, tiny: Path, recipe: dict[str, Any], run: Path, model: dict[str, Any]) -> Found:
    """A learner that went on from a checkpoint: what it held then, what it published, and its next step."""
    made = built(ranks, tiny, recipe, **model)
    cursor = made.load(run)
    state = _state(made)
    snapshot = take_snapshot(made.policy, made.version, "bfloat16")
    metrics = made.step(own(ranks, groups_of(7)))
    return state | {
        "cursor": cursor,
        "manifest": snapshot.manifest.tensors,
        "probe": snapshot.manifest.probe.logprobs,
        "bytes": sum(array.nbytes for array in snapshot.arrays),
        "metrics": metrics,
    }


def parted(ranks: Ranks, tiny: Path, recipe: dict[str, Any], model: dict[str, Any], away: bool) -> Found:
    """What two steps and a snapshot leave; away: the state went to host memory and came back before each of them."""
    made = built(ranks, tiny, recipe, **model)
    state, moved = DeviceState(made), []

    def leave() -> None:
        if away:
            held = state.device_bytes
            moved.append(held > 0 and state.offload() == held and state.device_bytes == 0)
            moved.append(state.onload() == held == state.device_bytes)

    for step in range(2):
        leave()
        metrics = made.step(own(ranks, groups_of(step)))
    leave()
    snapshot = take_snapshot(made.policy, made.version, "bfloat16")
    found = {"metrics": metrics, "parameters": plain(made.policy.parameters()), "moved": all(moved)}
    return found | {"manifest": snapshot.manifest}


def staged(ranks: Ranks, tiny: Path, run: Path, stage: AnyStage) -> Found:
    """What a stage makes up to its end, from the run's checkpoint in it or else with one written after step 2."""
    made = built(ranks, tiny, {}, stage)
    if newest(run) is not None:
        made.load(run)
    begun, steps = made.begin_stage(0, groups_of(100, count=3))
    metrics = made.advance_stage(2 - begun)
    if not begun:
        made.save(run)
    metrics += made.advance_stage(steps)
    return {"begun": begun, "metrics": metrics, "parameters": plain(made.policy.parameters())}


def model_refused(ranks: Ranks, folder: Path, model: dict[str, Any]) -> str:
    """What a rank says to a model that it cannot train; empty where it can."""
    try:
        Policy(ModelSettings.model_validate({"path": str(folder)} | model), ranks)
    except ModelError as error:
        return str(error)
    return ""


def refused(
    ranks: Ranks, tiny: Path, recipe: dict[str, Any], spoilt: dict[str, Any], moments: str
) -> tuple[str, int, bool]:
    """What a learner says to a batch of which one episode is spoilt; optimizer steps it made before; is it what it was?

    spoilt: what is changed in each of the episode's turns.
    """
    made = built(ranks, tiny, recipe, moments=moments)
    made.step(own(ranks, groups_of(1)))
    before, drawn = _moved(made), made._rng.bit_generator.state
    applied: list[int] = []
    step = made.optimizer.step

    def counted(finite: bool = True) -> StepReport:
        report = step(finite)
        applied.extend([1] * report.applied)
        return report

    vars(made.optimizer)["step"] = counted
    groups = groups_of(0)
    *others, last = groups[3].trajectories
    turns = tuple(
        replace(turn, **{name: change(turn) for name, change in spoilt.items()}) for turn in last.turns
    )
    groups[3] = replace(groups[3], trajectories=(*others, replace(last, turns=turns)))
    try:
        made.step(own(ranks, groups))
    except BatchRefused as error:
        same = all(np.array_equal(a, b) for a, b in zip(before, _moved(made), strict=True))
        return str(error), len(applied), same and drawn == made._rng.bit_generator.state
    return "", len(applied), False


def without_logprobs(step: Turn) -> Any:
    return np.full_like(step.behavior_logprobs, np.nan)


def beyond_floats(step: Turn) -> float:
    return 3e38


def _moved(made: Learner) -> list[Any]:
    """What optimizer steps change."""
    moments = [moment for entry in made.optimizer._adamw.state.values() for moment in entry.values()]
    return plain([*made.policy.parameters(), *moments])


def _state(made: Learner) -> Found:
    """Parameters of policy and critic, and the optimizers' state, whole."""
    assert made._critic is not None
    parameters = [*made.policy.parameters(), *made._critic.optimizer._parameters]
    moments = [
        gathered(tensor).numpy().copy()  # the next step moves what it was
        for optimizer in (made.optimizer, made._critic.optimizer)
        for entry in optimizer.state_dict()["moments"].values()
        for tensor in entry.values()
    ]
    return {"parameters": plain(parameters), "moments": moments, "steps": made.optimizer.steps}
