"""The parts a recipe can give an agent, and an environment dressed in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

from pydantic import Field

from rollout.parts.library import LibrarySettings
from rollout.parts.memory import SummarySettings, WindowSettings
from rollout.parts.part import Env
from rollout.parts.planning import PlanSettings
from rollout.parts.reflection import ReflectSettings
from rollout.parts.thinking import ThinkSettings
from rollout.parts.tools import ToolsSettings

PartSettings = Annotated[
    ThinkSettings
    | PlanSettings
    | WindowSettings
    | SummarySettings
    | ReflectSettings
    | LibrarySettings
    | ToolsSettings,
    Field(discriminator="kind"),
]


def dressed(make: Callable[[], Env], parts: Sequence[PartSettings]) -> Env:
    """A new replica in its parts, from the environment outwards."""
    env = make()
    for part in parts:
        env = part.dress(env)
    return env
