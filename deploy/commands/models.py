"""Commands that write a model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.report.console import output, write

app = typer.Typer()
console = output()


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    target: Annotated[Path, typer.Argument(help="Folder to create; it must not exist.")],
    version: Annotated[
        int | None, typer.Option(help="Weight version of the checkpoint; default: the newest.")
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="The best checkpoint by checkpoint.best_metric, not the newest.")
    ] = False,
) -> None:
    """Export the model of a checkpoint in Hugging Face format, as transformers, vLLM and `manta eval` load it.

    Example:
    manta export runs/frozen_lake-20260101-120000 my_model
    """
    from deploy.commands.export import export_model

    written = export_model(run, target, version, best)
    write(console, f"wrote version {written} to {target}")


@app.command()
def fetch(
    model: Annotated[
        str, typer.Argument(help="A .gguf file, an id of the Hugging Face hub (owner/name), or a folder.")
    ],
    target: Annotated[Path, typer.Argument(help="Folder to create; it must not exist.")],
) -> None:
    """Make a Hugging Face folder of a model, ready for learner.model.path.

    The weights of a GGUF file are dequantized to float32. An id of the hub is downloaded whole.

    Example:
    manta fetch SmolLM2-135M-Instruct.Q4_1.gguf smollm2
    """
    from deploy.commands.fetch import fetch_model

    size = fetch_model(model, target)
    write(console, f"wrote {size / 1e6:,.0f} MB to {target}")
