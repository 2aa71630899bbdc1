"""docs/reference/metrics.md: every metric of a run, from the declarations."""

from __future__ import annotations

from deploy.commands.markdown import GENERATED, code, link, prose, sentence, table
from deploy.config.declared_metrics import EVALUATIONS
from deploy.config.declared_metrics import GROUPS as RUN_GROUPS
from learner.stage_metrics import STAGES
from rollout.wire.metrics import Metric, MetricGroup

GROUPS = (*RUN_GROUPS, EVALUATIONS, STAGES)
_INTRODUCTION = """\
A run writes one row a learner step into `RUN/metrics.jsonl`, one JSON object a line, and the same numbers into
`RUN/tensorboard`. A number that is not finite is `null` in the file. `RUN/report.html` draws most of them, and
[`guards`](configuration.md#guards) warn or end the run when one is out of bounds.

    from deploy.report.metrics import read_metrics

    rows = read_metrics("RUN")  # a list of dicts; null reads as NaN

SQL reads the file as it is:

    import duckdb

    duckdb.sql("SELECT step, reward, step_s FROM read_json('RUN/metrics.jsonl', union_by_name = true)")

In a name, `{LAG}` stands for a number of weight versions, `{NAME}` for the name of a reward of the environment,
`{REASON}` for an outcome of a tool call and `{K}` for a number of samples. A loss or a regularizer
[of your own](../extending.md) may return statistics: each is a metric under the name that it gives.

"""


def metrics_page() -> str:
    """Return the page: an index, then a section for each part of a run that writes metrics."""
    index = "".join(
        f"- {link(group.title, group.title)}: {', '.join(code(metric.name) for metric in group.metrics)}\n"
        for group in GROUPS
    )
    sections = "".join(map(_section, GROUPS))
    return f"# Metrics\n\n{GENERATED}{_INTRODUCTION}{index}\n{sections}".rstrip() + "\n"


def _section(group: MetricGroup) -> str:
    writers = ", ".join(code(writer) for writer in group.writer.split(", "))
    rows = [(code(metric.name), metric.unit, _meaning(metric)) for metric in group.metrics]
    return (
        f"## {group.title}\n\n{prose(sentence(group.about))} Computed by {writers}.\n\n"
        f"{table(('metric', 'unit', 'what it counts'), rows)}"
    )


def _meaning(metric: Metric) -> str:
    about = metric.about if "](" in metric.about else prose(metric.about)
    condition = f" Only if {prose(metric.when)}." if metric.when else ""
    return sentence(about) + condition
