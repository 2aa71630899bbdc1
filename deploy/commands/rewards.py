"""Commands for learned rewards: pairs from a run, scores of its episodes, and a reward model's server."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated

import typer

from deploy.report.console import output, write

app = typer.Typer()
console = output()


@app.command()
def pairs(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    out: Annotated[Path, typer.Argument(help="File to create, .jsonl or .parquet; it must not exist.")],
    margin: Annotated[
        float, typer.Option(min=0.0, help="Rewards of a pair must differ by more than this.")
    ] = 0.0,
) -> None:
    """Write pairs of answers from a run's groups, the best against the worst, as TRL and stages read them.

    Example:
    manta pairs runs/smollm2_sums-20260101-120000 pairs.jsonl
    """
    from deploy.commands.pairs import write_pairs

    count = write_pairs(run, out, margin)
    said = f", {count.rewritten} left out (rewritten conversations)" if count.rewritten else ""
    write(console, f"wrote {count.pairs} pairs of {count.groups} groups to {out}{said}")


@app.command()
def score(
    run: Annotated[Path, typer.Argument(help="Run folder; the run may still be running.")],
    models: Annotated[
        list[Path], typer.Argument(help="Folder of a reward model; several give each episode several scores.")
    ],
    out: Annotated[Path, typer.Option(help="File of JSON lines, which is replaced as a whole.")],
    groups: Annotated[int, typer.Option(min=1, help="Score so many of the newest groups.")] = 1000,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Score a run's episodes by reward models, so that manta label asks the pair that they leave most uncertain.

    Example:
    manta score runs/frozen_lake-20260101-120000 reward_model --out scores.jsonl
    """
    from deploy.commands.scores import score_run

    count = score_run(run, models, out, groups, device)
    left = f", {count.left_out} left out, which the model cannot read" if count.left_out else ""
    write(console, f"scored {count.scored} episodes of {run} into {out}{left}")


@app.command("serve-reward")
def serve_reward(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a reward model, as a stage of kind reward_model leaves it.")
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0: a free one.")] = 8002,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Serve a reward model on this machine, for rewards of kind "model", until interrupted.

    The key is MANTA_REWARD_KEY; without one a new key is made and shown.

    Examples:
    manta export runs/reward-20260101-120000 reward_model

    manta serve-reward reward_model
    """
    from deploy.serving.loopback import address, listen, serve_until_told
    from deploy.serving.reward_scorer import RewardScorer
    from deploy.serving.reward_server import RewardServer
    from envs.rewards.reward_model import KEY

    given = os.environ.get(KEY)
    key = given or secrets.token_urlsafe(24)
    with listen(port) as listener:
        server = RewardServer(RewardScorer(folder, device), key)
        write(console, f"reward model {folder} on {address(listener)}")
        if given is None:
            write(console, f"export {KEY}={key}")
        serve_until_told(server.serve(listener))
