"""Parts of an agent in a recipe, and environments wrapped in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, ClassVar

from pydantic import Field

from rollout.agents.forbidden import ForbidSettings
from rollout.agents.library import LibrarySettings
from rollout.agents.memory import NotebookSettings, SummarySettings, WindowSettings
from rollout.agents.part import Env
from rollout.agents.planning import PlanSettings
from rollout.agents.reflection import ReflectSettings
from rollout.agents.thinking import ThinkSettings
from rollout.agents.tools import ToolsSettings
from rollout.wire.own_part import BUILT_IN, BY_KIND, OWN, OwnPart

_FORGETFUL = ("window", "summary")
# (part, other, reason): `part` must not be listed before `other`.
_ORDER = (
    ("window", "summary", "it would remove the summaries"),
    ("forbid", "tools", "it would not see their calls"),
    ("reflect", "tools", "a second attempt would begin with the calls and the servers of the first"),
)


class OwnAgentPart(OwnPart):
    """A user's own wrapper: environment -> wrapped environment, with text on both sides."""

    CALLED_WITH: ClassVar[tuple[str, ...]] = ("env",)

    def wrap(self, env: Env) -> Env:
        """Wrap an environment in this part."""
        wrapped: Env = self.run(env)
        return wrapped


_BuiltIn = Annotated[
    ThinkSettings
    | PlanSettings
    | NotebookSettings
    | WindowSettings
    | SummarySettings
    | ReflectSettings
    | LibrarySettings
    | ToolsSettings
    | ForbidSettings,
    Field(discriminator="kind"),
]
PartSettings = Annotated[Annotated[_BuiltIn, BUILT_IN] | Annotated[OwnAgentPart, OWN], BY_KIND]


def check_together(parts: Sequence[PartSettings], memory: str) -> None:
    """Raise ValueError, with a remedy, for parts that contradict each other.

    parts: from the environment outwards. memory: of the agent, "full" or "last".
    """
    kinds = [part.kind for part in parts]
    twice = [kind for kind in dict.fromkeys(kinds) if kind != "tools" and kinds.count(kind) > 1]
    if twice:
        raise ValueError(f"the part {twice[0]} is listed {kinds.count(twice[0])} times; list it once")
    for kind, other, why in _ORDER:
        if kind in kinds and other in kinds[kinds.index(kind) :]:
            raise ValueError(f"the part {kind} is listed before {other}: {why}; list {other} before {kind}")
    if "think" in kinds[:-1]:
        raise ValueError(
            f"the part think is listed before {kinds[-1]}, which would receive thoughts; list think last"
        )
    styles = {part.style for part in parts if isinstance(part, ToolsSettings | NotebookSettings)}
    if len(styles) > 1:
        raise ValueError(
            f"tools and notebook are called in the styles {' and '.join(sorted(styles))}; give both one style"
        )
    silent = [part for part in parts if isinstance(part, PlanSettings) and not part.remind]
    if silent and set(_FORGETFUL) & set(kinds[kinds.index("plan") :]):
        raise ValueError(
            "the part plan with remind=false is listed before one that removes the plan; use remind=true, or list it "
            "after window and summary"
        )
    if memory == "last":
        _check_last(parts)


def _check_last(parts: Sequence[PartSettings]) -> None:
    for part in parts:
        if isinstance(part, PlanSettings) and not part.remind:
            raise ValueError("memory='last' loses a plan that remind=false shows once; use remind=true")
        if part.kind in _FORGETFUL or (isinstance(part, ThinkSettings) and not part.keep):
            what = "think with keep=false" if part.kind == "think" else part.kind
            raise ValueError(
                f"memory='last' drops the conversation with every turn, and the part {what} would restore it; "
                "remove the part, or use memory='full'"
            )


def evaluated(parts: Sequence[PartSettings]) -> tuple[PartSettings, ...]:
    """The same parts for an evaluation, in which they do not learn."""
    return tuple(
        part.model_copy(update={"learns": False}) if isinstance(part, LibrarySettings) else part
        for part in parts
    )


def wrapped(make: Callable[[], Env], parts: Sequence[PartSettings]) -> Env:
    """Make an environment and wrap it in its parts, from the environment outwards."""
    env = make()
    for part in parts:
        env = part.wrap(env)
    return env


def wrapping(make: Callable[[], Env], parts: Sequence[PartSettings]) -> Callable[[], Env]:
    """Bind `wrapped` to make and parts; without parts it is `make`, whose process then need not import them."""
    return partial(wrapped, make, parts) if parts else make
