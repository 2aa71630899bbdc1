"""`manta submit`, `manta status`, `manta logs`, `manta stop` and `manta drain`: their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.commands.look import Overrides
from deploy.report.console import output, without_colours, write

app = typer.Typer()
console = output()

Address = Annotated[
    str | None,
    typer.Option(
        help="URL of the cluster's dashboard; default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."
    ),
]
Target = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="Run folder, here or, with --address, on the cluster; or the id of its job."
    ),
]
Here = Annotated[bool, typer.Option("--here", hidden=True, help="Ask no cluster.")]


OutputDir = Annotated[
    Path | None,
    typer.Option(help="Folder in which the run folder is created; a path on the cluster. Default: runs."),
]
RunDir = Annotated[
    Path | None,
    typer.Option(help="Run folder on the cluster: created if absent, resumed if it holds the same run."),
]
WorkingDir = Annotated[
    Path | None,
    typer.Option(help="Folder to upload, with the modules that the recipe names; the job runs in it."),
]
PyModules = Annotated[
    list[Path] | None, typer.Option(help="Package folder or wheel to upload; may be repeated.")
]
EnvVar = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Environment variable of the job and all its processes; NAME alone sends its value here. May be repeated. "
        "Whoever may see the cluster's dashboard may see it.",
    ),
]
RuntimeEnvFile = Annotated[
    Path | None,
    typer.Option(
        help="File with Ray's runtime environment, YAML or JSON: packages that uv, pip or conda install for the job, "
        "and all other fields. The options above add to it."
    ),
]


@app.command()
def submit(
    recipe: Annotated[
        str, typer.Argument(help="A .toml file, or the name of a recipe that ships with Manta.")
    ],
    overrides: Overrides = None,
    address: Address = None,
    output_dir: OutputDir = None,
    run_dir: RunDir = None,
    working_dir: WorkingDir = None,
    py_modules: PyModules = None,
    env_var: EnvVar = None,
    runtime_env: RuntimeEnvFile = None,
    retries: Annotated[
        int,
        typer.Option(
            min=0, help="How often the job's driver is started again after it was killed or failed."
        ),
    ] = 0,
    wait: Annotated[bool, typer.Option(help="Follow the job and exit with its status.")] = True,
) -> None:
    """Submit a training run to a Ray cluster as a job.

    Examples:
    manta submit frozen_lake rollout.workers=8 --address http://cluster:8265 --output-dir /shared/runs

    manta submit mine.toml --working-dir . --env-var HF_TOKEN --runtime-env uv.yaml --retries 3
    """
    from deploy.commands.cluster_jobs import default_address, follow, succeeded
    from deploy.commands.submit import submit as submit_job
    from deploy.config.config_errors import ConfigError

    if run_dir is not None and output_dir is not None:
        raise ConfigError(
            f"--run-dir {run_dir} is the run's folder itself: leave --output-dir {output_dir} away"
        )
    client, job = submit_job(
        recipe,
        overrides or (),
        address,
        (output_dir or Path("runs")).resolve(),
        working_dir,
        py_modules or (),
        env_var or (),
        runtime_env,
        retries,
        run_dir and run_dir.resolve(),
    )
    write(
        console,
        f"submitted {job} to {address or default_address()}; see manta status {job}, manta stop {job}",
    )
    if wait:
        for text in follow(client, job):
            write(console, without_colours(text), end="")
        if not succeeded(client, job):
            raise typer.Exit(1)


@app.command()
def status(
    run: Target,
    address: Address = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object, for scripts (docs/clusters.md has its fields)."),
    ] = False,
    here: Here = False,
) -> None:
    """Show the state of a run: phase, step, success, workers, restarts, the last notice, a failure.

    Examples:
    manta status runs/frozen_lake-20260101-120000

    manta status frozen_lake-20260101-120000-1a2b3c --address http://cluster:8265 --json
    """
    from deploy.commands.status import described, state_of

    state = state_of(run, address, here)
    write(console, state.model_dump_json(indent=2) if as_json else described(state))


@app.command()
def logs(
    run: Target,
    address: Address = None,
    part: Annotated[
        str,
        typer.Option(
            help="Part of the run whose own log is shown, such as rollout-0, learner, or with several policies "
            "keeper/rollout-0; default: the driver."
        ),
    ] = "",
    follow: Annotated[bool, typer.Option(help="Go on until the run has ended.")] = False,
    here: Here = False,
) -> None:
    """Show the log of a run's driver, or of one of its parts.

    Examples:
    manta logs runs/frozen_lake-20260101-120000 --follow

    manta logs frozen_lake-20260101-120000-1a2b3c --address http://cluster:8265 --part rollout-0
    """
    from deploy.commands.status import log_of

    for text in log_of(run, address, part, follow, here):
        write(console, without_colours(text), end="")


@app.command()
def stop(
    run: Target,
    address: Address = None,
    seconds: Annotated[float, typer.Option(min=0, help="Longest time to wait for its end, seconds.")] = 150.0,
) -> None:
    """Stop a run in order, as Ctrl-C does: a checkpoint that is being written is finished; it can be resumed.

    Example:
    manta stop frozen_lake-20260101-120000-1a2b3c --address http://cluster:8265
    """
    from deploy.commands.status import stop_run

    write(console, stop_run(run, address, seconds))


@app.command()
def drain(
    seconds: Annotated[
        float, typer.Option(min=0, help="Longest time to wait for their end, seconds.")
    ] = 120.0,
) -> None:
    """Let this host's rollout workers and drivers leave in order, before the host goes: the preStop hook of a pod.

    Exits with status 1 if some are left.

    Example:
    manta drain --seconds 120
    """
    from deploy.run.drain import drain as drain_host

    told, left = drain_host(seconds)
    write(console, f"{told - left} of {told} processes have left")
    if left:
        raise typer.Exit(1)
