"""Commands that show something and change nothing: recipes, options, environments, and what this machine lacks."""

from __future__ import annotations

from typing import Annotated

import typer

from deploy.report.console import output, write

app = typer.Typer()
console = output()

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.OPTION=VALUE]...", help="Change the recipe.")
]
EnvOptions = Annotated[
    list[str] | None, typer.Option("--option", help="Environment option NAME=VALUE; may be repeated.")
]


@app.command()
def recipes() -> None:
    """List the recipes and the presets of algorithms that ship with Manta, each with what it is for.

    Example:
    manta recipes
    """
    from deploy.commands.recipe_list import show_recipes

    show_recipes(console)


@app.command()
def config(
    recipe: Annotated[
        str, typer.Argument(help="A .toml file, or the name of a recipe that ships with Manta.")
    ],
    overrides: Overrides = None,
) -> None:
    """Print a resolved recipe as TOML: every option with its description, and its default where they differ.

    Example:
    manta config frozen_lake

    manta config my_recipe.toml algorithm=dapo steps=20
    """
    from deploy.commands.show_config import config_text
    from deploy.config.load import load_config

    write(console, config_text(load_config(recipe, overrides or ())), end="")


@app.command()
def envs() -> None:
    """List the environments there are: ours, optional suites with their extras, and Gymnasium's.

    Example:
    manta envs
    """
    from deploy.commands.envs_command import show_environments

    show_environments(console)


@app.command("check-env")
def check_env(
    env: Annotated[str, typer.Argument(metavar="ID", help="Environment id.")],
    option: EnvOptions = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Limit for a reset or a step.")] = 10.0,
    turns: Annotated[int, typer.Option(min=1, help="Turns played an episode.")] = 30,
) -> None:
    """Examine an environment: seeds, isolation, limits, answers, snapshots; exit status 1 where something is wrong.

    Example:
    manta check-env Taxi-v4

    manta check-env frozen_lake --option size=8 --option slippery=true
    """
    from deploy.commands.envs_command import check_environment
    from deploy.run.evaluate import parse_options

    raise typer.Exit(check_environment(env, parse_options(option or []), seconds, turns, console))


@app.command()
def doctor() -> None:
    """Show versions, cores and memory, and what is missing.

    Example:
    manta doctor
    """
    from deploy.commands.doctor import diagnose, show

    raise typer.Exit(show(diagnose(), console))
