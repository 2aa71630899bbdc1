"""Commands for learned rewards: pairs from a run, and a reward model's server."""

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


@app.command("serve-reward")
def serve_reward(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a reward model, as a stage of kind reward_model leaves it.")
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1.")] = 8002,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Serve a reward model on this machine, for rewards of kind "model", until interrupted.

    The key is MANTA_REWARD_KEY; without one a new key is made and shown.

    Examples:
    manta export runs/reward-20260101-120000 reward_model

    manta serve-reward reward_model
    """
    from deploy.serving.reward_scorer import RewardScorer
    from deploy.serving.reward_server import reward_server
    from envs.rewards.reward_model import KEY

    given = os.environ.get(KEY)
    key = given or secrets.token_urlsafe(24)
    server = reward_server(RewardScorer(folder, device), key, port)
    write(console, f"reward model {folder} on http://127.0.0.1:{port}")
    if given is None:
        write(console, f"export {KEY}={key}")
    server.run()
