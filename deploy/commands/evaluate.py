"""The command `manta eval`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from deploy.commands.look import EnvOptions
from deploy.report.console import output

app = typer.Typer()
console = output()


class Dtype(StrEnum):
    """Compute types of an engine."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Memory(StrEnum):
    """What a turn sees."""

    full = "full"
    last = "last"


class Votes(StrEnum):
    """What samples vote with."""

    none = "none"
    text = "text"
    number = "number"
    choice = "choice"


_TRUST = (
    "Allow the stored run to execute the modules, commands and servers that its configuration names. "
    "The answer is remembered."
)
Trust = Annotated[bool, typer.Option("--trust", help=_TRUST)]
TrustModel = Annotated[
    bool,
    typer.Option("--trust", help=f"{_TRUST} Code that comes with another model is executed this once."),
]


Checkpoint = Annotated[
    str,
    typer.Argument(
        help="Run folder, one of its checkpoints, a Hugging Face folder or id, the URL of an OpenAI-compatible "
        "server (http://.../v1), or a folder with a stored evaluation, of which nothing is played."
    ),
]
Env = Annotated[
    str | None,
    typer.Option(help="Environment id, or its name in the checkpoint's run; default: that run's own."),
]
Like = Annotated[
    Path | None,
    typer.Option(
        help="Run folder whose environment and conditions apply; default: the checkpoint's own run."
    ),
]
Suite = Annotated[str | None, typer.Option(help="Suite of the run: its environment, tasks and conditions.")]
Best = Annotated[bool, typer.Option("--best", help="The best checkpoint of the run instead of its newest.")]
Model = Annotated[
    str, typer.Option(help="Model of the server; default: its only one. The key is OPENAI_API_KEY.")
]
Compare = Annotated[
    str | None,
    typer.Option(
        help="Checkpoint, server or stored evaluation to compare with, task by task under the same conditions."
    ),
]
Seeds = Annotated[str, typer.Option(help="Seeds of the tasks, A:B, B excluded.")]
Samples = Annotated[int | None, typer.Option(min=1, help="Episodes of each task; several give pass@k.")]
Majority = Annotated[Votes | None, typer.Option(help="What the samples of a task vote with, for maj@N.")]
ContextTokens = Annotated[int | None, typer.Option(help="Context length, tokens.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens sampled per turn.")]
Temperature = Annotated[float | None, typer.Option(help="Sampling temperature; 0: greedy.")]
TopP = Annotated[float | None, typer.Option(help="Probability mass of nucleus sampling.")]
Gpu = Annotated[bool | None, typer.Option("--gpu/--cpu", help="Run the engine on a GPU or on CPU.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder to create for rows, episodes.jsonl, evaluation.json; default: one in runs/."),
]


@app.command("eval")
def evaluate(
    checkpoint: Checkpoint,
    env: Env = None,
    like: Like = None,
    suite: Suite = None,
    best: Best = False,
    model: Model = "",
    compare: Compare = None,
    seeds: Seeds = "0:256",
    samples: Samples = None,
    majority: Majority = None,
    option: EnvOptions = None,
    context_tokens: ContextTokens = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    memory: Annotated[Memory | None, typer.Option(help="What a turn sees of the conversation.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Data type of the engine.")] = None,
    gpu: Gpu = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all sampling.")] = 0,
    out: Out = None,
    show: Annotated[int, typer.Option(min=0, help="Number of episodes to print as transcripts.")] = 0,
    trust: TrustModel = False,
) -> None:
    """Evaluate a checkpoint or a server on an environment: success rate, or mean reward, with its 95% interval.

    Conditions that are not given are those of the run that the checkpoint belongs to. The same seed plays the same
    episodes again.

    Examples:
    manta eval runs/frozen_lake-20260101-120000 --seeds 0:256

    manta eval runs/frozen_lake-20260101-120000 --samples 8 --show 3 --out evaluated

    manta eval runs/frozen_lake-20260101-120000 --compare runs/frozen_lake-20260101-120000/base

    manta eval http://127.0.0.1:8001/v1 --like runs/frozen_lake-20260101-120000

    manta eval runs/frozen_lake-20260101-120000/evaluations/after --show 3
    """
    from deploy.commands.evaluation import Request, run_evaluation

    changes = {
        "": _given(context_tokens=context_tokens, on_gpu=gpu, seed=seed, samples=samples, majority=majority),
        "sampling": _given(max_tokens=max_tokens, temperature=temperature, top_p=top_p),
        "agent": _given(memory=memory),
        "engine": _given(dtype=dtype),
    }
    which = (checkpoint, env, like, suite, best, model, compare, seeds, option or ())
    run_evaluation(Request(*which, changes, out, show, trust), console)


def _given(**values: object) -> dict[str, object]:
    return {name: value for name, value in values.items() if value is not None}
