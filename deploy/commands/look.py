"""Commands without side effects: recipes, options, environments, this machine, and the reference pages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from deploy.report.console import errors, output, write

app = typer.Typer()
console = output()

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="SECTION.OPTION=VALUE", help="Options of the recipe to override."),
]
EnvOptions = Annotated[
    list[str] | None, typer.Option("--option", help="Option of the environment, NAME=VALUE; may be repeated.")
]


@app.command()
def recipes() -> None:
    """List the recipes and algorithm presets that ship with Manta, with their purpose.

    Example:
    manta recipes
    """
    from deploy.commands.show_config import show_recipes

    show_recipes(console)


@app.command()
def config(
    recipe: Annotated[
        str, typer.Argument(help="A .toml file, or the name of a recipe that ships with Manta.")
    ],
    overrides: Overrides = None,
) -> None:
    """Print a resolved recipe as TOML: every option with its description, and its default where it differs.

    Example:
    manta config frozen_lake

    manta config my_recipe.toml algorithm=dapo steps=20
    """
    from deploy.commands.show_config import config_text
    from deploy.config.load import load_config

    write(console, config_text(load_config(recipe, overrides or ())), end="")


@app.command()
def check(
    recipe: Annotated[
        str, typer.Argument(help="A .toml file, or the name of a recipe that ships with Manta.")
    ],
    overrides: Overrides = None,
    config_json: Annotated[
        Path | None,
        typer.Option(help="config.json of the model, if the model is not on this machine."),
    ] = None,
    gpu_gib: Annotated[float, typer.Option(min=1.0, help="Memory of each GPU, GiB.")] = 80.0,
    node_gpus: Annotated[int, typer.Option(min=1, help="GPUs of each node.")] = 8,
) -> None:
    """Check a recipe without starting anything: memory of each process, size of the job, what looks wrong.

    Exits with status 1 for a recipe that a run would refuse.

    Examples:
    manta check smollm2_sums

    manta check qwen3_8b_gsm8k --config-json config.json --gpu-gib 80 rollout.workers=4
    """
    from deploy.commands.check import show
    from deploy.config.load import load_config
    from deploy.run.recipe_check import Machine, check_recipe

    checked = check_recipe(load_config(recipe, overrides or ()), Machine(gpu_gib, node_gpus), config_json)
    raise typer.Exit(show(checked, console))


@app.command()
def envs() -> None:
    """List the available environments: Manta's own, optional suites with their extras, and Gymnasium's.

    Example:
    manta envs
    """
    from deploy.commands.envs_command import show_environments

    show_environments(console)


@app.command("check-env")
def check_env(
    env: Annotated[str, typer.Argument(metavar="ID", help="Environment id.")],
    option: EnvOptions = None,
    seconds: Annotated[
        float, typer.Option(min=0.01, help="Time limit for a reset or a step, seconds.")
    ] = 10.0,
    turns: Annotated[int, typer.Option(min=1, help="Most turns played per episode.")] = 30,
) -> None:
    """Check an environment: seeding, isolation, time limits, answers, snapshots. Exits with status 1 on a finding.

    Example:
    manta check-env Taxi-v4

    manta check-env frozen_lake --option size=8 --option slippery=true
    """
    from deploy.commands.envs_command import check_environment
    from deploy.run.evaluate import parse_options

    raise typer.Exit(check_environment(env, parse_options(option or []), seconds, turns, console))


@app.command()
def doctor() -> None:
    """Check this machine: package versions, cores, memory, GPUs, and what is missing.

    Example:
    manta doctor
    """
    from deploy.commands.doctor import diagnose, show

    raise typer.Exit(show(diagnose(), console))


@app.command()
def docs(
    context: typer.Context,
    out: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder to write the pages into; created if absent.")
    ] = Path("docs/reference"),
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Write nothing; name the pages that are out of date, with exit status 1."
        ),
    ] = False,
) -> None:
    """Write the reference pages: every option of a recipe, every metric of a run, every command.

    Example:
    manta docs

    manta docs --check
    """
    from deploy.commands.reference import stale_pages, write_pages

    manta = context.find_root().command
    assert isinstance(manta, TyperGroup)
    if not check:
        for page in write_pages(manta, out):
            write(console, f"wrote {page}")
    elif stale := stale_pages(manta, out):
        write(errors(), f"manta: out of date: {', '.join(map(str, stale))}; run manta docs {out}", "red")
        raise typer.Exit(1)
