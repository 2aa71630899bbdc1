"""The parts a recipe can give an agent, and an environment dressed in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, ClassVar

from pydantic import Field

from rollout.agents.library import LibrarySettings
from rollout.agents.memory import NotebookSettings, SummarySettings, WindowSettings
from rollout.agents.part import Env
from rollout.agents.planning import PlanSettings
from rollout.agents.reflection import ReflectSettings
from rollout.agents.thinking import ThinkSettings
from rollout.agents.tools import ToolsSettings
from rollout.wire.own_part import BUILT_IN, BY_KIND, OWN, OwnPart

_FORGETFUL = ("window", "summary")
# Of two parts the one that may not be listed before the other, and why.
_ORDER = (
    ("window", "summary", "it would forget the summaries"),
    ("reflect", "tools", "a second attempt would begin with the calls and the servers of the first"),
)


class OwnAgentPart(OwnPart):
    """A wrapper of a user's own: (environment, text on both sides) -> the environment as the policy has it."""

    CALLED_WITH: ClassVar[tuple[str, ...]] = ("env",)

    def dress(self, env: Env) -> Env:
        """The environment as the policy has it."""
        dressed: Env = self.run(env)
        return dressed


_BuiltIn = Annotated[
    ThinkSettings
    | PlanSettings
    | NotebookSettings
    | WindowSettings
    | SummarySettings
    | ReflectSettings
    | LibrarySettings
    | ToolsSettings,
    Field(discriminator="kind"),
]
PartSettings = Annotated[Annotated[_BuiltIn, BUILT_IN] | Annotated[OwnAgentPart, OWN], BY_KIND]


def check_together(parts: Sequence[PartSettings], memory: str) -> None:
    """Refuse parts that would undo one another: a ValueError says which, and what to do.

    parts: from the environment outwards. memory: that of the agent, "full" or "last".
    """
    kinds = [part.kind for part in parts]
    twice = [kind for kind in dict.fromkeys(kinds) if kind != "tools" and kinds.count(kind) > 1]
    if twice:
        raise ValueError(f"the part {twice[0]} is there {kinds.count(twice[0])} times; have it once")
    for kind, other, why in _ORDER:
        if kind in kinds and other in kinds[kinds.index(kind) :]:
            raise ValueError(f"the part {kind} is listed before {other}: {why}; list {other} before {kind}")
    if "think" in kinds[:-1]:
        raise ValueError(
            f"the part think is listed before {kinds[-1]}, which would hear thoughts; list think last"
        )
    styles = {part.style for part in parts if isinstance(part, ToolsSettings | NotebookSettings)}
    if len(styles) > 1:
        raise ValueError(
            f"tools and notebook are called in the styles {' and '.join(sorted(styles))}; give both one style"
        )
    silent = [part for part in parts if isinstance(part, PlanSettings) and not part.remind]
    if silent and set(_FORGETFUL) & set(kinds[kinds.index("plan") :]):
        raise ValueError(
            "the part plan with remind=false is listed before one that forgets the plan; use remind=true, or list it "
            "behind window and summary"
        )
    if memory == "last":
        _check_last(parts)


def _check_last(parts: Sequence[PartSettings]) -> None:
    for part in parts:
        if isinstance(part, PlanSettings) and not part.remind:
            raise ValueError("memory='last' forgets a plan that remind=false says once; use remind=true")
        if part.kind in _FORGETFUL or (isinstance(part, ThinkSettings) and not part.keep):
            what = "think with keep=false" if part.kind == "think" else part.kind
            raise ValueError(
                f"memory='last' forgets everything with every turn, and the part {what} would bring it back; "
                "leave it away, or use memory='full'"
            )


def evaluated(parts: Sequence[PartSettings]) -> tuple[PartSettings, ...]:
    """The same parts for an evaluation: what is played there teaches them nothing."""
    return tuple(
        part.model_copy(update={"learns": False}) if isinstance(part, LibrarySettings) else part
        for part in parts
    )


def dressed(make: Callable[[], Env], parts: Sequence[PartSettings]) -> Env:
    """A new replica in its parts, from the environment outwards."""
    env = make()
    for part in parts:
        env = part.dress(env)
    return env


def dressing(make: Callable[[], Env], parts: Sequence[PartSettings]) -> Callable[[], Env]:
    """The recipe of such replicas; without parts it is `make`, whose process need not import what dresses it."""
    return partial(dressed, make, parts) if parts else make
