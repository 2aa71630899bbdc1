"""An adapter for every person, learned from that person's labels alone, and all of them served by one vLLM.

    python -m tests.bench.personal_adapters [--seeds 3] [--labels 256] [--folder DIR]

The base answers in any taste: it imitates a player of `personal` that errs always, and nobody says anything. It answers
the same questions twice for each of four people, who prefer one of the two answers, or none. Their pairs, a file each,
train an adapter each by ORPO, which imitates the better answer too: DPO on them unlearns how to answer. One engine
then holds all adapters, and answers new questions of every person with each adapter and without one, all of it at once.
What is there already is not run again. Prints Markdown. Needs vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deploy import load_recipe
from deploy.assembly.build import load_chat
from deploy.report.statistics import clustered_interval
from envs.builtin.personal import TOPIC, Answer, Personal, Question, share_met
from rollout.engines.engine import Sampling
from rollout.engines.vllm_engine import VllmEngine
from rollout.engines.vllm_start import VllmSettings
from tests.bench.runs import exported, run_here

PEOPLE = (
    "ann detailed imperial warm money",
    "ben brief metric plain sport",
    "cleo detailed metric plain health",
    "dan brief imperial warm politics",
)
FIRST_NEW = 1_000_000  # seeds from here on are questions of the evaluation
NEW = 256  # of them
CONTEXT = 128
SILENT = {"level": 1, "silent": True, "instructions": False}
Asked = tuple[str, int, str | None]  # person, seed of the question, adapter


class Judged(NamedTuple):
    """What a person thinks of an answer: the share of the tastes that it meets, and whether it has the topic."""

    met: float
    forbidden: bool

    @property
    def liking(self) -> float:
        """Nothing makes up for the forbidden topic."""
        return self.met - 2 * self.forbidden


def asked(person: str, seed: int) -> tuple[str, Question]:
    """A person's first question under a seed."""
    env = Personal(**SILENT, person=person)
    return str(env.reset(seed=seed)[0]), env.questions[0]


def judged(person: str, question: Question, said: str) -> Judged:
    """A person's judgement; what is no answer, or not true, meets nothing."""
    answer = Answer.of(said)
    if answer is None:
        return Judged(0.0, False)
    met = sum(share_met(answer, question, person.split()[0]).values())
    return Judged(met * answer.true(question), answer.topic == question.wishes[TOPIC])


def base_model(seed: int, folder: Path) -> Path:
    """A model that answers truly, in any taste."""
    run = folder / f"base-run-{seed}"
    config = load_recipe(
        "personal",
        seed=seed,
        steps=0,
        engine={"kind": "transformers"},
        **{
            "evaluation.tasks": 0,
            "env.options": {**SILENT, "split": "train"},
            "stages.0.source.error_rate": 1.0,
            "stages.0.threads": 1,
        },
    )
    run_here(config, run)
    return exported(run, folder / f"base-{seed}", 0)


async def answers(model: Path, requests: Sequence[Asked], adapters: Mapping[str, Path]) -> list[str]:
    """The answers of one engine to all of them at once."""
    chat = load_chat(str(model))
    settings = VllmSettings(dtype="float32", kv_cache_gib=0.5)
    engine = await VllmEngine.start("people", str(model), chat.stops, CONTEXT, settings, adapters=adapters)
    try:
        await engine.adopt_loaded(0)
        prompts = [
            chat.opening([{"role": "user", "content": asked(person, seed)[0]}])
            for person, seed, _ in requests
        ]
        began = time.perf_counter()
        said = await asyncio.gather(
            *(
                engine.generate(prompt, Sampling(max_tokens=16), adapter=adapter)
                for prompt, (*_, adapter) in zip(prompts, requests, strict=True)
            )
        )
        seconds = time.perf_counter() - began
        print(
            f"{len(requests)} answers, {len(adapters)} adapters: {seconds:.1f} s", file=sys.stderr, flush=True
        )
    finally:
        await engine.close()
    return [chat.text(each.token_ids.tolist()) for each in said]


def labelled(model: Path, count: int, folder: Path) -> dict[str, Path]:
    """A file of pairs for each person, from two answers to each of so many questions."""
    files = {person: folder / person.split()[0] / "pairs.jsonl" for person in PEOPLE}
    if all(file.is_file() for file in files.values()):
        return files
    requests: list[Asked] = [
        (person, seed, None) for person, seed, _ in product(PEOPLE, range(count), range(2))
    ]
    said = asyncio.run(answers(model, requests, {}))
    rows: dict[str, list[str]] = {person: [] for person in PEOPLE}
    for (person, seed, _), one, other in zip(requests[::2], said[::2], said[1::2], strict=True):
        prompt, question = asked(person, seed)
        worse, better = sorted((one, other), key=lambda each: judged(person, question, each).liking)
        if judged(person, question, better).liking > judged(person, question, worse).liking:
            rows[person].append(json.dumps({"prompt": prompt, "chosen": better, "rejected": worse}) + "\n")
    for person, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(rows[person]), encoding="utf-8")
    return files


def adapter_of(pairs: Path, model: Path, seed: int) -> Path:
    """The folder of an adapter that learns one person's pairs; it lies beside them."""
    stage = {
        "kind": "preference",
        "source": {"kind": "dataset", "path": str(pairs)},
        "loss": {"kind": "orpo", "weight": 1.0},
        "pairs_per_step": 16,
        "epochs": 8,
        "optim": {"learning_rate": 3e-3, "schedule": "linear", "warmup_steps": 5},
    }
    config = load_recipe(
        "personal",
        seed=seed,
        steps=0,
        tiny=None,
        stages=[stage],
        engine={"kind": "transformers"},
        **{
            "evaluation.tasks": 0,
            "learner.model.path": str(model),
            "learner.model.lora": {"rank": 8, "alpha": 16},
        },
    )
    run_here(config, pairs.parent / "run")
    return exported(pairs.parent / "run", pairs.parent / "model", 0) / "adapter"


def compared(model: Path, adapters: Mapping[str, Path]) -> dict[tuple[str, str | None], list[Judged]]:
    """What every person thinks of new answers, by the adapter that gave them; None: without one."""
    pairs = list(product(adapters, (None, *adapters)))
    requests: list[Asked] = [
        (person, FIRST_NEW + at, adapter) for person, adapter in pairs for at in range(NEW)
    ]
    said = asyncio.run(answers(model, requests, adapters))
    found: dict[tuple[str, str | None], list[Judged]] = {pair: [] for pair in pairs}
    for (person, seed, adapter), each in zip(requests, said, strict=True):
        found[person, adapter].append(judged(person, asked(person, seed)[1], each))
    return found


def row(person: str, seeds: Sequence[Mapping[tuple[str, str | None], Sequence[Judged]]]) -> str:
    """A line of the table: tastes met without an adapter, with one's own, with others'; the same of the topic."""

    def cell(adapters: Sequence[str | None], what: str) -> str:
        judgements = [found[person, adapter] for found in seeds for adapter in adapters]
        values = [[float(getattr(each, what)) for each in of_one] for of_one in judgements]
        low, high = clustered_interval(list(zip(*values, strict=True)))
        return f"{np.mean(values):.3f} ({low:.3f} to {high:.3f})"

    others = [each for each in PEOPLE if each != person]
    cells = [cell(of, what) for what in Judged._fields for of in ([None], [person], others)]
    return f"| {person} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.personal_adapters", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--labels", type=int, default=256, help="questions that each person is answered twice"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/personal_adapters"))
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    seeds = []
    for seed in range(given.seeds):
        base = base_model(seed, folder)
        files = labelled(base, given.labels, folder / f"people-{seed}")
        counts = [len(file.read_text(encoding="utf-8").splitlines()) for file in files.values()]
        print(f"seed {seed}: pairs {counts}", file=sys.stderr, flush=True)
        adapters = {person: adapter_of(file, base, seed) for person, file in files.items()}
        seeds.append(compared(base, adapters))
        for person in PEOPLE:
            print(row(person, seeds[-1:]), file=sys.stderr, flush=True)
    print(
        "| person | tastes met: base | own adapter | others' | forbidden topic: base | own adapter | others' |"
    )
    print("|---|---|---|---|---|---|---|")
    for person in PEOPLE:
        print(row(person, seeds))


if __name__ == "__main__":
    main()
