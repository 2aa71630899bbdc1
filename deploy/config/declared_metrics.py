"""Every metric that a row of RUN/metrics.jsonl can have: the learner's, and those that the driver adds to them."""

from __future__ import annotations

from learner.metrics import GROUPS as LEARNER
from rollout.wire.metrics import Metric, MetricGroup

STEP = MetricGroup(
    "The step as a whole",
    "deploy/run/local.py, deploy/cluster/cluster.py",
    "Measured by the runtime.",
    (
        Metric("step_s", "s", "Time of the whole step: waiting, training and publishing"),
        Metric(
            "eval_wait_s",
            "s",
            "Time that the trained version waited for the evaluation of the one before",
            "the version before is evaluated (`evaluation.every_steps`)",
        ),
        Metric("publish_s", "s", "Time from the trained version to its proof by every engine; 0 in a replay"),
        Metric(
            "onload_s",
            "s",
            "Time in which engines fall asleep and the learner's state returns to the device; the way back is part of "
            "`publish_s`",
            "engines and learner take turns (`cluster.colocate`)",
        ),
        Metric(
            "workers",
            "rollout workers",
            "Rollout workers that serve",
            "the run is on Ray (no `--local`)",
        ),
    ),
)

ROLLOUT = MetricGroup(
    "Rollout",
    "deploy/report/metrics.py",
    "What the rollout workers did during the step, from their counters before and after it. With "
    "`buffer.max_lag` above 0 part of it is for later steps.",
    (
        Metric(
            "rollout_tokens_sampled",
            "tokens",
            "Tokens sampled by the workers, those of groups that are dropped included; 0 in a replay",
        ),
        Metric("rollout_tokens_per_s", "tokens/s", "`rollout_tokens_sampled / step_s`"),
        Metric(
            "tools_{REASON}",
            "calls per episode",
            "Tool calls with that outcome, divided by the episodes that ended in the step. "
            "[Agents](../agents.md#tools) explains the outcomes",
            "a tool was called before, and an episode ended in the step",
        ),
    ),
)

_VERDICTS = "the environment gives verdicts"
_SEVERAL = f"{_VERDICTS}, and a task has several samples"

# In RUN/evaluations/metrics.jsonl, not in the rows of steps: no guard of a step sees them.
EVALUATIONS = MetricGroup(
    "Evaluations",
    "deploy/report/evaluation.py",
    "In `RUN/evaluations/metrics.jsonl`, one row an evaluated version, and in `RUN/evaluations/tensorboard`. Those of "
    "a suite are called `eval_{SUITE}_success` and so on. Episodes that failed for reasons of infrastructure are left "
    "out.",
    (
        Metric("eval_success", "share, 0 to 1", "Episodes that the environment calls successful", _VERDICTS),
        Metric("eval_reward", "reward", "Reward of an episode, mean"),
        Metric(
            "eval_cost_{NAME}",
            "unit of the cost",
            "Cost NAME of an episode, mean",
            "the environment gives such a cost",
        ),
        Metric(
            "eval_pass@{K}",
            "share, 0 to 1",
            "Probability that one of K samples of a task succeeds, mean over the tasks; the unbiased estimator of "
            "Chen et al. 2021",
            _SEVERAL,
        ),
        Metric(
            "eval_maj@{K}",
            "share, 0 to 1",
            "Tasks where the answer that most of the K samples gave is right; of several such answers each counts "
            "in equal parts",
            f"{_SEVERAL}, which vote (`evaluation.majority`)",
        ),
    ),
)

GROUPS = (*LEARNER, STEP, ROLLOUT)
METRICS = tuple(metric for group in GROUPS for metric in group.metrics)


def is_declared(name: str) -> bool:
    """Whether a run can write a metric of that name."""
    return any(metric.covers(name) for metric in METRICS)
