"""Feedback from people, end to end: labels of the page, a reward model of them, and a policy that learns from it.

    python -m tests.bench.feedback [--seeds 3] [--steps 40] [--folder DIR] [--figure FILE.svg] [--screenshots DIR]

A tiny model, fine-tuned to say words at random, plays. A script with a taste that nothing else knows judges pairs on
the page of `manta label`, by keyboard in Chromium; pairs are asked at random in one run, and by the reward model's
uncertainty in another. Reward models of the first 20, 40, ... labels are compared with the taste on pairs of held-out
prompts. The last one is then the only reward of a run on Ray with vLLM, whose answers to held-out prompts are compared
with the taste before and after. What is there already is not run again. Prints Markdown, and writes the same as
feedback.json into the folder. Needs the extra `browser`, and Chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deploy import load_recipe
from deploy.commands.scores import score_run
from deploy.labels.export import export
from deploy.labels.judgements import Labels
from deploy.labels.messages import conversation, shown_turns
from deploy.labels.pool import Pool
from deploy.report.comparison import Difference
from deploy.report.metrics import read_metrics
from deploy.report.statistics import clustered_interval
from deploy.serving.reward_scorer import RewardScorer
from envs.rewards.reward_model import KEY
from rollout.buffer.segments import read_rows
from tests.bench.annotator import annotating, serving
from tests.bench.runs import exported, run_here, run_to_end

# From the least liked to the most.
WORDS = ["mud", "rust", "fog", "thorn", "stone", "sand", "road", "lake", "leaf", "song", "honey", "sun"]
WORTH = dict(zip(WORDS, np.linspace(-1.0, 1.0, len(WORDS)).tolist(), strict=True))
BREVITY = 0.5  # what a word costs; any other word than these is worth as little as the least liked
NAMES = ["anna", "ben", "clara", "david", "emma", "felix", "grace", "henry", "ida", "jack", "kate", "leo"]
PLACES = ["hill", "wood", "gate", "lake", "road", "sea", "sand", "stone"]
SEASONS = ["spring", "summer", "autumn", "winter"]
HELD_OUT = 64  # prompts
PLAYED = {"train": 128, "heldout": HELD_OUT}  # groups of four answers
WAYS = {"random": "C0", "uncertain": "C1"}
LABELS = (20, 40, 80, 120, 200, 300)  # at which a reward model is made
WANTED = 0.85  # agreement
TAUGHT = "uncertain"  # whose last reward model the policy learns from
GROUPS_PER_STEP = 16
SHORT = {
    "evaluation.tasks": 0,
    "rollout.max_turns": 1,
    "rollout.context_tokens": 48,
    "sampling.max_tokens": 20,
    "learner.optim.warmup_steps": 0,
}
Rows = Sequence[Mapping[str, Any]]  # one for each number of labels
Asked = Mapping[str, Sequence[Rows]]  # by way and seed


class Compared(NamedTuple):
    """A pair of a held-out prompt: its group, and both conversations."""

    group: int
    better: list[dict[str, Any]]
    worse: list[dict[str, Any]]


def taste(answer: str) -> float:
    """How much the annotator likes an answer."""
    words = answer.split()
    return sum(WORTH.get(word, WORTH[WORDS[0]]) for word in words) - BREVITY * len(words)


def written(folder: Path) -> dict[str, str]:
    """The prompts, as options of the environment, and beside them the conversations that the model begins with."""
    rng = np.random.default_rng(0)
    asked = [(name, place, season) for name in NAMES for place in PLACES for season in SEASONS]
    rows = [
        {"prompt": f"tell {asked[at][0]} of the {asked[at][1]} in {asked[at][2]}", "answer": asked[at][1]}
        for at in rng.permutation(len(asked))
    ]
    said = [
        {"prompt": rows[at]["prompt"], "completion": " ".join(rng.choice(WORDS, size=rng.integers(3, 9)))}
        for at in rng.integers(HELD_OUT, len(rows), size=4096)
    ]
    files = {"heldout": rows[:HELD_OUT], "prompts": rows[HELD_OUT:], "talks": said}
    for name, content in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in files}


def played(split: str, seed: int, folder: Path, model: Path | None = None) -> Path:
    """A run that plays groups of either split with a model, or one that it fine-tunes first: its version 0.

    The environment's own reward, whether the answer has the place that was asked for, is not the taste.
    """
    files, run = written(folder), folder / f"{split}-{seed}"
    words = sorted({*WORDS, *NAMES, *PLACES, *SEASONS, "tell", "of", "the", "in"})
    stage = {
        "kind": "sft",
        "source": {"kind": "dataset", "path": files["talks"]},
        "episodes_per_step": 32,
        "epochs": 2,
        "optim": {"learning_rate": 3e-3, "schedule": "linear", "warmup_steps": 10},
    }
    tiny = {"layers": 2, "width": 64, "heads": 2, "mlp": 128, "words": words}
    options = {"path": files["prompts"], "heldout_path": files["heldout"], "split": split}
    config = load_recipe(
        "scratch",
        seed=seed,
        steps=1,
        env={"id": "dataset", "options": options | {"rewards": {"kind": "contains"}}},
        engine={"kind": "transformers"},
        **SHORT
        | {"rollout.group_size": 4, "buffer.groups_per_step": PLAYED[split]}
        | ({"tiny": None, "learner.model.path": str(model)} if model else {"tiny": tiny, "stages": [stage]}),
    )
    run_here(config, run)
    return run


def model_of(run: Path) -> Path:
    """The fine-tuned model of a run that played, as a folder."""
    return exported(run, run.with_name(f"{run.name}-model"), 0)


def heldout_pairs(run: Path) -> list[Compared]:
    """The pairs of a run that the taste tells apart."""
    pool, found = Pool(run, 10_000), []
    talks = {key: conversation(shown_turns(episode)) for key, episode in pool.episodes().items()}
    for pair in pool.pairs:
        sides = [talks[(*pair[:2], place)] for place in pair[2:]]
        worse, better = sorted(sides, key=lambda talk: taste(talk[-1]["content"]))
        if taste(better[-1]["content"]) - taste(worse[-1]["content"]) > 1e-6:
            found.append(Compared(pair.group_id, better, worse))
    return found


def reward_model(name: str, pairs: Path, seed: int, model: Path, folder: Path) -> Path:
    """The folder of a reward model that learns these pairs, beginning from the policy."""
    run, target = folder / f"{name}-run", folder / name
    if target.is_dir():
        return target
    shutil.rmtree(run, ignore_errors=True)
    count = len(pairs.read_text(encoding="utf-8").splitlines())
    stage = {
        "kind": "reward_model",
        "source": {"kind": "dataset", "path": str(pairs)},
        "pairs_per_step": 16,
        "epochs": -(-100 * 16 // count),  # about 100 steps
        "optim": {"learning_rate": 1e-3, "weight_decay": 0.1, "schedule": "linear"},
        "head_optim": {"learning_rate": 1e-2, "schedule": "linear"},
        "centre": 0.01,
        "heldout_share": 0.0,
    }
    config = load_recipe(
        "scratch",
        seed=seed,
        steps=0,
        tiny=None,
        env={"id": "dataset", "options": {"path": written(folder)["prompts"], "rewards": "contains"}},
        stages=[stage],
        engine={"kind": "transformers"},
        **SHORT | {"learner.model.path": str(model)},
    )
    run_here(config, run)
    return exported(run, target, None)


def agreement(model: Path, pairs: Sequence[Compared]) -> dict[str, Any]:
    """The share of pairs whose better conversation has the higher score, with its interval over groups."""
    scorer = RewardScorer(model)
    talks = [talk for pair in pairs for talk in (pair.better, pair.worse)]
    scores = np.array(scorer.scores([scorer.tokens(talk) for talk in talks])).reshape(-1, 2)
    by_group: dict[int, list[float]] = defaultdict(list)
    for pair, (better, worse) in zip(pairs, scores, strict=True):
        by_group[pair.group].append(float(better > worse))
    return {
        "agreement": float(np.mean(scores[:, 0] > scores[:, 1])),
        "interval": clustered_interval([*by_group.values()]),
        "pairs": len(pairs),
    }


def labelled(
    way: str, seed: int, run: Path, heldout: Sequence[Compared], folder: Path, screenshots: Path | None
) -> list[dict[str, Any]]:
    """Ask for labels on the page in one way; what a reward model of the first ones comes to, by their number."""
    stored = folder / f"{way}-{seed}.json"
    if stored.is_file():
        return list(json.loads(stored.read_text(encoding="utf-8")))
    asked, scores, found = folder / f"{way}-{seed}", folder / f"{way}-{seed}-scores.jsonl", []
    for left in folder.glob(f"{way}-{seed}*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    asked.mkdir()
    shutil.copy(run / "config.json", asked)
    shutil.copytree(run / "groups", asked / "groups")
    command = ["label", str(asked), "--port", "0"]
    with (
        serving([*command, "--scores", str(scores)] if way == "uncertain" else command) as address,
        annotating(address, "ann", taste) as annotator,
    ):
        for before, count in zip((0, *LABELS), LABELS, strict=False):
            annotator.judge(count - before)
            labels = folder / f"{way}-{seed}-{count}-labels"
            labels.mkdir()
            with closing(Labels(asked)) as judged:
                rows = export(judged, labels)
            model = reward_model(f"{way}-{seed}-{count}", labels / "pairs.jsonl", seed, model_of(run), folder)
            found.append({"labels": count, "pairs": rows["pairs"]} | agreement(model, heldout))
            print(f"{way} {seed}: {found[-1]}", file=sys.stderr, flush=True)
            if way == "uncertain":
                score_run(asked, [model], scores, groups=10_000)
                annotator.reload()
        if screenshots:
            annotator.screenshot(screenshots / f"{way}-{seed}.png", key="1")
    stored.write_text(json.dumps(found), encoding="utf-8")
    return found


def learned(seed: int, reward: Path, model: Path, steps: int, folder: Path) -> Path:
    """A run on Ray with vLLM, whose only reward is a reward model behind its server."""
    files, run = written(folder), folder / f"policy-{seed}"
    if (run / "summary.json").is_file():
        return run
    shutil.rmtree(run, ignore_errors=True)
    os.environ.setdefault(KEY, secrets.token_urlsafe(24))
    with serving(["serve-reward", str(reward), "--port", "0"]) as address:
        options = {"path": files["prompts"], "heldout_path": files["heldout"], "split": "train"}
        config = load_recipe(
            "scratch",
            seed=seed,
            steps=steps,
            tiny=None,
            env={"id": "dataset", "options": options | {"rewards": {"kind": "model", "base_url": address}}},
            **SHORT
            | {
                "learner.model.path": str(model),
                "learner.optim.learning_rate": 1e-3,
                "rollout.group_size": 8,
                "buffer.groups_per_step": GROUPS_PER_STEP,
                "evaluation.tasks": HELD_OUT,
                "evaluation.samples": 4,
                "evaluation.options": {"split": "heldout"},
            },
        )
        run_to_end(config, run)
    return run


def tastes(run: Path, when: str) -> Mapping[int, float]:
    """The taste of the answers to each held-out prompt, by its seed; the mean of its samples."""
    rows = read_rows(run / "evaluations" / when)
    by_task: dict[int, list[float]] = defaultdict(list)
    for seed, answer in zip(rows["seed"].to_pylist(), rows["action"].to_pylist(), strict=True):
        by_task[seed].append(taste(answer))
    return {seed: float(np.mean(values)) for seed, values in by_task.items()}


def improvement(run: Path) -> dict[str, Any]:
    """The taste before and after training, its difference paired by prompt, and both it and the reward over steps."""
    before, after = tastes(run, "before"), tastes(run, "after")
    change = Difference.of([(after[seed], before[seed]) for seed in before])
    rows = read_rows(run / "groups")
    by_step: dict[int, list[float]] = defaultdict(list)
    for group, answer in zip(rows["group_id"].to_pylist(), rows["action"].to_pylist(), strict=True):
        by_step[group // GROUPS_PER_STEP].append(taste(answer))
    return {
        "before": change.second,
        "after": change.first,
        "difference": change.difference,
        "interval": change.interval,
        "taste": [float(np.mean(by_step[step])) for step in sorted(by_step)],
        "reward": [row["reward"] for row in read_metrics(run)],
    }


def needed(rows: Rows) -> int | None:
    """The first number of labels at which the agreement is the wanted one."""
    return next((row["labels"] for row in rows if row["agreement"] >= WANTED), None)


def table(asked: Asked, policies: Sequence[Mapping[str, Any]]) -> str:
    """Both tables, as Markdown."""
    heads = [f"agreement at {count}" for count in LABELS]
    lines = [
        f"| pairs asked | labels to {WANTED:.0%} | {' | '.join(heads)} |",
        "|---|---|" + "---|" * len(heads),
    ]
    for way, seeds in asked.items():
        counts = ", ".join(str(needed(rows) or f"over {LABELS[-1]}") for rows in seeds)
        means = " | ".join(f"{mean:.3f}" for mean in curves(seeds).mean(0))
        lines.append(f"| {way} | {counts} | {means} |")
    lines += [
        "",
        "| seed | held-out agreement | taste before | after | difference |",
        "|---|---|---|---|---|",
    ]
    for seed, (rows, policy) in enumerate(zip(asked[TAUGHT], policies, strict=True)):
        cells = [f"{rows[-1]['agreement']:.3f} ({_interval(rows[-1])})"]
        cells += [f"{policy[when]:.2f}" for when in ("before", "after")]
        cells += [f"{policy['difference']:+.2f} ({_interval(policy)})"]
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curves(seeds: Sequence[Rows]) -> np.ndarray:
    """Agreement, float [seeds, len(LABELS)]."""
    return np.array([[row["agreement"] for row in rows] for rows in seeds])


def _interval(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{low:.2f} to {high:.2f}"


def draw(file: Path, asked: Asked, policies: Sequence[Mapping[str, Any]]) -> None:
    """Agreement by labels, a thin curve a seed and their mean; and the taste over the steps of the policies."""
    from matplotlib.figure import Figure

    chart = Figure(figsize=(9, 3.2), layout="constrained")
    labels, steps = chart.subplots(1, 2)
    for way, seeds in asked.items():
        for curve in curves(seeds):
            labels.plot(LABELS, curve, color=WAYS[way], lw=0.6, alpha=0.6)
        labels.plot(LABELS, curves(seeds).mean(0), color=WAYS[way], lw=2, label=way)
    labels.axhline(WANTED, color="black", lw=0.8, ls="--")
    labels.set(title="agreement on held-out pairs", xlabel="labels")
    labels.legend(frameon=False, title="pairs asked")
    for seed, policy in enumerate(policies):
        steps.plot(policy["taste"], color=f"C{seed + 2}", lw=1, label=f"seed {seed}")
    steps.set(title="the annotator's taste of the policy's answers", xlabel="step")
    steps.legend(frameon=False)
    chart.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.feedback", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", type=Path, default=Path("runs/feedback"))
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--screenshots", type=Path, help="folder for a picture of the page in each run")
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    for each in filter(None, (folder, asked.screenshots)):
        each.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[list[dict[str, Any]]]] = {way: [] for way in WAYS}
    policies = []
    for seed in range(asked.seeds):
        run = played("train", seed, folder)
        heldout = heldout_pairs(played("heldout", seed, folder, model_of(run)))
        for way, seeds in found.items():
            seeds.append(labelled(way, seed, run, heldout, folder, asked.screenshots))
        reward = folder / f"{TAUGHT}-{seed}-{LABELS[-1]}"
        policies.append(improvement(learned(seed, reward, model_of(run), asked.steps, folder)))
        print(f"seed {seed}: {policies[-1]}", file=sys.stderr, flush=True)
    result = {"asked": found, "policies": policies}
    (folder / "feedback.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(table(found, policies))
    if asked.figure:
        draw(asked.figure, found, policies)


if __name__ == "__main__":
    main()
