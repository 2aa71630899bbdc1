"""What is learnt beside the main job, with the real vLLM: the tables and the picture of docs/environments.md.

    python -m tests.bench.environments [household] [assistant] [foreign] [transfer] [--seeds 3] [--folder DIR]

household, assistant   their recipes as they are: success on held-out tasks before and after, and the minutes it took
foreign                the assistant's questions, answered by an agent that knows only the `openai` client, through the
                       endpoint
transfer               commands of level 3, by a policy that has learned level 2 and by one that begins with nothing

What is there already is not run again. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deploy.config.load import load_config
from deploy.report.metrics import read_metrics
from tests.bench.runs import SMOOTHED, exported, from_model, run_to_end, success

NAMES = ("household", "assistant", "foreign", "transfer")
COMPOSED = (
    "env.options.level=3",
    "env.options.max_turns=16",
    "stages.0.source.episodes=512",
    "stages.0.source.error_rate=0.3",
    "learner.algorithm.advantage={kind='gigpo',gamma=0.9}",  # a turn among nine is seldom what decided
    "learner.optim.learning_rate=2e-3",
    "steps=60",
)
ENOUGH = 0.5  # success in training that a policy has to reach

Curve = tuple[np.ndarray, np.ndarray]  # episodes played so far, success


def learnt(recipe: str, seed: int, folder: Path) -> tuple[float, float, float]:
    """Success before and after, and minutes, of a recipe as it is; its first model is kept beside its last."""
    config = load_config(recipe, [f"seed={seed}", "checkpoint.keep=100"])
    return _figures(run_to_end(config, folder / f"{recipe}-{seed}"))


def through_the_endpoint(seed: int, folder: Path) -> tuple[float, float, float]:
    """The same of a foreign assistant, whose model was fine-tuned on what ours was, and nothing more."""
    learnt("assistant", seed, folder)
    agent, task = "function='tests.bench.openai_assistant:play'", "level=1,max_calls=2"
    overrides = [
        "env.id=program",
        f"env.options={{{agent},task={{{task},split='train'}}}}",
        f"evaluation.options={{{agent},task={{{task},split='heldout'}}}}",
        f"seed={seed}",
    ]
    model = exported(folder / f"assistant-{seed}", folder / f"assistant-fine-tuned-{seed}", 0)
    return _figures(run_to_end(from_model("assistant", model, overrides), folder / f"foreign-{seed}"))


def _figures(summary: dict[str, object]) -> tuple[float, float, float]:
    seconds = summary["seconds"]
    assert isinstance(seconds, dict)
    before, after = summary["success_before"], summary["success_after"]
    assert isinstance(before, float) and isinstance(after, float)
    return before, after, sum(seconds.values()) / 60


def moved_and_afresh(seed: int, folder: Path) -> tuple[Curve, Curve]:
    """How level 3 is learnt by the model that learned level 2, and by a new one: few demonstrations, then GRPO."""
    learnt("household", seed, folder)
    model = exported(folder / f"household-{seed}", folder / f"household-learnt-{seed}", None)
    curves = []
    for name, start in (("moved", ["tiny=", f"learner.model.path={model}"]), ("afresh", [])):
        run = folder / f"composed-{name}-{seed}"
        run_to_end(load_config("household", [f"seed={seed}", *start, *COMPOSED]), run)
        curves.append(curve(run))
    return curves[0], curves[1]


def curve(run: Path) -> Curve:
    """Success in training over the episodes played by then."""
    rows = read_metrics(run)
    episodes = np.cumsum([row["episodes"] for row in rows])
    return episodes[SMOOTHED - 1 :], success(rows)


def episodes_until(played: Curve, enough: float = ENOUGH) -> str:
    """How many episodes were played when success was enough."""
    episodes, reached = played
    there = np.flatnonzero(reached >= enough)
    return f"{episodes[there[0]]:,.0f}" if len(there) else f"not within {episodes[-1]:,.0f}"


def draw(pairs: Sequence[tuple[Curve, Curve]], file: Path) -> None:
    """One thin line a run, the mean of the seeds thick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, color, curves in (
        ("moved on from simple commands", "tab:blue", [pair[0] for pair in pairs]),
        ("started afresh", "tab:orange", [pair[1] for pair in pairs]),
    ):
        for episodes, reached in curves:
            axes.plot(episodes, reached, color=color, alpha=0.35, linewidth=0.8)
        steps = min(len(reached) for _, reached in curves)
        mean = np.mean([reached[:steps] for _, reached in curves], axis=0)
        axes.plot(curves[0][0][:steps], mean, color=color, linewidth=2.2, label=name)
    axes.axhline(ENOUGH, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="episodes of level 3", ylabel="success in training", ylim=(0, 1))
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", frameon=False)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.environments", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(NAMES)}; none: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/environments"))
    parser.add_argument("--figure", type=Path, default=Path("docs/transfer.svg"))
    asked = parser.parse_args()
    if unknown := sorted(set(asked.names) - set(NAMES)):
        parser.error(f"nothing is named {unknown[0]!r}; there are: {', '.join(NAMES)}")
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    names, seeds = asked.names or NAMES, range(asked.seeds)
    table = []
    for name in (each for each in names if each != "transfer"):
        for seed in seeds:
            foreign = name == "foreign"
            before, after, minutes = (
                through_the_endpoint(seed, folder) if foreign else learnt(name, seed, folder)
            )
            table.append(f"| {name} | {seed} | {before:.3f} | {after:.3f} | {minutes:.1f} |")
            print(table[-1], file=sys.stderr, flush=True)
    if table:
        print("| | seed | before | after | minutes |\n|---|---|---|---|---|", *table, sep="\n")
    if "transfer" in names:
        pairs = [moved_and_afresh(seed, folder) for seed in seeds]
        print(f"\n| seed | episodes of level 3 until {ENOUGH:.0%}: moved on | afresh |\n|---|---|---|")
        for seed, (moved, afresh) in zip(seeds, pairs, strict=True):
            print(f"| {seed} | {episodes_until(moved)} | {episodes_until(afresh)} |")
        draw(pairs, asked.figure)


if __name__ == "__main__":
    main()
