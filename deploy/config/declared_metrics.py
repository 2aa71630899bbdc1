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
        Metric("publish_s", "s", "Time from the trained version to its proof by every engine; 0 in a replay"),
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

GROUPS = (*LEARNER, STEP, ROLLOUT)
METRICS = tuple(metric for group in GROUPS for metric in group.metrics)


def is_declared(name: str) -> bool:
    """Whether a run can write a metric of that name."""
    return any(metric.covers(name) for metric in METRICS)
