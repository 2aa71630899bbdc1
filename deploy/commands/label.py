"""The command `manta label`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from deploy.report.console import output, write

app = typer.Typer()
console = output()


@app.command()
def label(
    run: Annotated[Path, typer.Argument(help="Run folder; the run may still be running.")],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the page on 127.0.0.1; 0: a free one.")
    ] = 8484,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="File of manta score: ask the most uncertain pair. It may come, and be replaced, while the page is up."
        ),
    ] = None,
    overlap: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of pairs asked that another annotator has judged.")
    ] = 0.2,
    groups: Annotated[
        int, typer.Option(min=1, help="Pairs are taken from so many of the newest groups.")
    ] = 1000,
    export: Annotated[
        Path | None,
        typer.Option(help="Folder to create: write the labels as TRL's files, and serve nothing."),
    ] = None,
) -> None:
    """Let people judge pairs of a run's episodes on a local page, or export what they judged.

    Examples:
    manta label runs/frozen_lake-20260101-120000

    manta label runs/frozen_lake-20260101-120000 --scores scores.jsonl

    manta label runs/frozen_lake-20260101-120000 --export labels
    """
    from deploy.config.config_errors import ConfigError

    if not (run / "config.json").is_file():
        raise ConfigError(f"{run} is not a run folder: it has no config.json")
    if export:
        _export(run, export)
    else:
        _serve(run, port, scores, overlap, groups)


def _serve(run: Path, port: int, scores: Path | None, overlap: float, groups: int) -> None:
    from deploy.labels.judgements import Labels
    from deploy.labels.pool import Pool
    from deploy.labels.scores import ScoreFile
    from deploy.labels.server import LabelPage, serve
    from deploy.serving.loopback import address, listen, serve_until_told

    found = ScoreFile(scores) if scores else None
    pool = Pool(run, groups)
    with closing(Labels(run)) as labels, listen(port) as listener:
        page = f"{address(listener)}/#{labels.key()}"
        if found is not None:
            asked = f"{len(found):,} episodes have scores" if found else "pairs are random until it comes"
            write(console, f"scores {scores}: {asked}")
        write(console, f"{len(pool.pairs):,} pairs in {run}\nopen {page}\nCtrl-C ends the page")
        serve_until_told(serve(LabelPage(pool, labels, overlap, found), listener))


def _export(run: Path, target: Path) -> None:
    from deploy.commands.export import fresh_folder
    from deploy.config.config_errors import ConfigError
    from deploy.labels.export import export
    from deploy.labels.judgements import FILE, FOLDER, Labels, agreement

    if not (run / FOLDER / FILE).is_file():
        raise ConfigError(f"{run} has no labels; collect some with manta label {run}")
    with closing(Labels(run)) as labels, fresh_folder(target) as partial:
        rows, alpha = export(labels, partial), agreement(labels)
    for name, count in rows.items():
        write(console, f"{count:6,} {name}")
    agreed = "no pair was judged by two" if alpha is None else f"Krippendorff's alpha {alpha:.3f}"
    write(console, f"agreement: {agreed}\nwrote {target}")
