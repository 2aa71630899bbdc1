"""What `manta recipes` shows: the recipes and the algorithm presets that ship with Manta."""

from __future__ import annotations

from deploy.config.recipe_files import algorithm_names, first_line, recipe_names
from deploy.report.console import Console, write, write_table


def show_recipes(console: Console) -> None:
    """Names, each with the line that says what it is for."""
    write_table(console, ("recipe", "what it is for"), [(name, first_line(name)) for name in recipe_names()])
    presets = [(name, first_line(name, algorithm=True)) for name in algorithm_names()]
    write_table(console, ("algorithm", "what it is"), presets)
    write(
        console,
        'A recipe starts from another with extends = "NAME" and chooses an algorithm with algorithm = "NAME"; '
        "manta config NAME prints all of its options.",
        wrap=True,
    )
