"""The `manta` command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from deploy.commands import evaluate, jobs, label, look, models, rewards
from deploy.commands.evaluate import Memory, Trust
from deploy.commands.look import EnvOptions, Overrides
from deploy.report.console import errors, one_line, output, standard_streams, use_utf8, write
from deploy.run.mistakes import mistakes

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train language-model agents by reinforcement learning: Ray, vLLM and torch, on a laptop or a cluster.",
)
console = output()


def _show_version(asked: bool) -> None:
    if asked:
        from deploy.config.version import VERSION

        write(console, f"manta {VERSION}")
        raise typer.Exit


@app.callback()
def every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before a command."""


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="A .toml file, or the name of a recipe that ships with Manta.")
    ] = "",
    overrides: Overrides = None,
    resume: Annotated[
        Path | None, typer.Option(help="Run folder to continue from its newest checkpoint.")
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Run folder: created if absent, resumed if it holds the same run."),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder in which the run folder is created; default: runs.")
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(help="Folder of a finished run to train on its trajectories; nothing is played."),
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="Run everything in this process, without Ray.")
    ] = False,
    retries: Annotated[
        int,
        typer.Option(
            min=0,
            help="How often the driver may be started again, in the folder of --run-dir or --resume, after it was "
            "killed or ended by an error.",
        ),
    ] = 0,
    trust: Trust = False,
) -> None:
    """Train from a recipe, or continue a run.

    Examples:
    manta train frozen_lake

    manta train my_recipe.toml steps=20 learner.optim.learning_rate=3e-4 rollout.workers=2

    manta train --resume runs/frozen_lake-20260101-120000

    manta train --resume runs/frozen_lake-20260101-120000 learner.ranks=2

    manta train --resume runs/frozen_lake-20260101-120000 steps=200

    manta train rloo --replay runs/frozen_lake-20260101-120000

    manta train my_recipe.toml --run-dir /shared/runs/mine --retries 3
    """
    from deploy.run.retries import is_retried, require_folder, supervise

    if retries and not is_retried():
        folder = require_folder(run_dir, resume)
        raise typer.Exit(supervise(folder, retries, lambda text: write(errors(), f"note: {text}")))
    from deploy.run.launch import TrainRequest, launch

    launch(TrainRequest(recipe, overrides or (), resume, run_dir, output_dir, replay, local, trust), console)


@app.command()
def scale(
    run: Annotated[Path, typer.Argument(help="Folder of a running run.")],
    workers: Annotated[int, typer.Option(help="New number of rollout workers.")],
) -> None:
    """Change the number of rollout workers of a running job, without a restart or lost episodes.

    Example:
    manta scale runs/frozen_lake-20260101-120000 --workers 4
    """
    from deploy.cluster.control import ask_workers
    from deploy.config import run_folder

    run_folder.open_existing(run)
    ask_workers(run, workers)
    write(console, f"asked for {workers} rollout workers; who serves: {run / 'roster.json'}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder; the run may still be running.")],
) -> None:
    """Write the report.html of a run from the data that it has stored so far.

    Example:
    manta report runs/frozen_lake-20260101-120000
    """
    from deploy.report.report import write_report

    write(console, f"wrote {write_report(run)}")


@app.command()
def demos(
    env: Annotated[
        str, typer.Argument(help="Environment id; the environment must have a scripted player (manta envs).")
    ],
    out: Annotated[Path, typer.Option(help="Folder to create; it must not exist.")],
    n: Annotated[int, typer.Option("-n", min=1, help="Number of episodes, each with its own seed.")] = 10_000,
    error_rate: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Fraction of the player's turns that are random.")
    ] = 0.0,
    option: EnvOptions = None,
    first_seed: Annotated[int, typer.Option(min=0, help="Seed of the first episode; the others follow.")] = 0,
    model: Annotated[
        str | None,
        typer.Option(help="Hugging Face folder or id of the tokenizer; default: a tiny one is built."),
    ] = None,
    memory: Annotated[Memory, typer.Option(help="What a turn sees of the conversation.")] = Memory.full,
    context_tokens: Annotated[
        int, typer.Option(min=1, help="Context length, tokens; an episode that exceeds it ends.")
    ] = 32768,
) -> None:
    """Record episodes of a scripted player as rows of the stored schema.

    Example:
    manta demos frozen_lake -n 10000 --out demonstrations --error-rate 0.2 --option size=6
    """
    from deploy.commands.demos import Demonstrations, write_demonstrations
    from deploy.run.evaluate import parse_options

    asked = Demonstrations(
        env, parse_options(option or []), n, first_seed, error_rate, model, memory.value, context_tokens
    )
    outcome = write_demonstrations(asked, out, console)
    write(console, f"{outcome}\nwrote {out}")


app.add_typer(jobs.app)
app.add_typer(evaluate.app)
app.add_typer(label.app)
app.add_typer(look.app)
app.add_typer(models.app)
app.add_typer(rewards.app)


def main() -> None:
    """Run the command; a user's mistake is one line on stderr and exit code 2, anything else keeps its traceback."""
    use_utf8()
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):  # the run has a display of its own
        os.environ.setdefault(name, "1")
    if os.getcwd() not in sys.path:
        # "module:Class" may name a file beside the user; Ray's workers take it over.
        sys.path.insert(0, os.getcwd())
    standard_streams()
    try:
        sys.exit(app(standalone_mode=False))
    except SystemExit:
        raise  # an ordinary end: nothing more is imported for it
    except typer.Abort:
        sys.exit(1)
    except TyperException as error:
        if said := error.format_message():  # empty where the help was shown instead
            write(errors(), one_line(f"manta: {_renamed_flag(error) or said} (see {_help_of(error)})"), "red")
        sys.exit(error.exit_code)
    except mistakes() as error:
        write(errors(), one_line(f"manta: {_own(error)}"), "red")
        sys.exit(2)
    except _verdicts() as error:
        write(errors(), f"manta: {_own(error)}", "red")
        sys.exit(1)


def _own(error: Exception) -> Exception:
    """The error as it was raised: one that an actor raised comes with Ray's, whose text is the whole traceback."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, Exception) else error


def _renamed_flag(error: TyperException) -> str:
    """What to say of a flag that has another name now; nothing of any other error."""
    from deploy.config.renamed import RENAMED_FLAGS

    flag = getattr(error, "option_name", "")  # only unknown options have one
    return f"option {flag} is called {RENAMED_FLAGS[flag]} now" if flag in RENAMED_FLAGS else ""


def _help_of(error: TyperException) -> str:
    """The command that shows what an error's command takes."""
    context = getattr(error, "ctx", None)  # only errors of usage have one
    return f"manta {context.info_name} --help" if context and context.parent else "manta --help"


def _verdicts() -> tuple[type[Exception], ...]:
    """What ends a run on purpose. PartFailed, the supervisor's, names part, host, log file and the part's own error."""
    from deploy.config.guards import GuardTripped
    from deploy.config.supervise import PartFailed
    from rollout.buffer.failures import TooManyFailures
    from rollout.buffer.part_log import Fenced
    from rollout.wire.own_part import OwnPartError

    return PartFailed, GuardTripped, TooManyFailures, Fenced, OwnPartError


if __name__ == "__main__":
    main()
