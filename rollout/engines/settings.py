"""Engines of a recipe, chosen by `engine.kind`: their settings, resources and starters.

Each kind names its starter as "module:function", like a user's own engine. It is imported when an engine starts, so
that vLLM need not be installed for the other kinds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from envs.user_functions import awaited, load_function
from rollout.engines.checked_engine import METHODS, CheckedEngine
from rollout.engines.engine import Engine, EngineStart, Placement
from rollout.engines.vllm_start import VllmSettings
from rollout.wire.own_part import OwnPart, OwnPartRefused

OWN = "module:name"  # tag of a user's own engine


class TransformersSettings(BaseModel):
    """Plain transformers in the worker's process, on CPUs, without batching: for laptops and debugging."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    starter: ClassVar[str] = "rollout.engines.hf_engine:start"

    kind: Literal["transformers"] = "transformers"
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="data type of the engine's weights and computation"
    )

    @property
    def placement(self) -> Placement:
        return Placement(device="cpu", tells_routing=True, sleeps="anywhere")

    def require_here(self) -> None:
        """Do nothing: transformers is always installed."""

    def reproducible(self) -> TransformersSettings:
        """Return settings under which a request's seed determines its samples, as it always does here."""
        return self

    async def start(self, start: EngineStart) -> Engine:
        """Load the model."""
        engine: Engine = await load_function(self.starter)(start, self)
        return engine


class OwnEngineSettings(OwnPart, extra="forbid", frozen=True):
    """A user's own engine: `kind` names the function that starts it.

    It is called as `name(start, **options)` with an `EngineStart`, and returns an `Engine` or an awaitable of one. A
    class whose constructor takes these arguments is such a function.
    """

    CALLED_WITH: ClassVar[tuple[str, ...]] = ("start",)

    kind: str = Field(OWN, description='function or class that starts the engine, as "module:name"')
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="data type in which the engine computes and in which it receives weights"
    )
    device: Literal["any", "cpu", "gpu"] = Field(
        "any",
        description="where the engine runs. gpu requires rollout.gpus_per_worker above 0, cpu requires it to "
        "be 0, any accepts both",
    )
    concurrent_requests: int = Field(
        16, gt=0, description="requests that an evaluation sends to the engine at once"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the function that starts the engine"
    )

    @property
    def keywords(self) -> dict[str, Any]:
        return self.options

    @property
    def placement(self) -> Placement:
        return Placement(device=self.device, maps_weights=True, concurrent_requests=self.concurrent_requests)

    def check_signature(self, function: Callable[..., Any]) -> None:
        """Raise OwnPartRefused for a function with other arguments, or a class that is no engine's."""
        super().check_signature(function)
        if inspect.isclass(function) and (missing := [m for m in METHODS if not hasattr(function, m)]):
            raise OwnPartRefused(
                f"{self.kind} has no method {', '.join(missing)} (see rollout/engines/engine.py)"
            )

    def require_here(self) -> None:
        """Raise ValueError, one line, if the function is missing or does not fit."""
        try:
            self.check_signature(load_function(self.kind))
        except OwnPartRefused as error:
            raise ValueError(str(error)) from error

    def reproducible(self) -> OwnEngineSettings:
        """Return the settings unchanged: whether a request's seed determines its samples is up to the engine."""
        return self

    async def start(self, start: EngineStart) -> Engine:
        """Call the user's function; its engine is verified like the built-in ones."""
        return CheckedEngine(await awaited(self.run(start)), start)


def _kind_of(given: Any) -> str:
    """Tag of engine settings; the default kind is vLLM."""
    kind = given.get("kind", "vllm") if isinstance(given, dict) else getattr(given, "kind", "vllm")
    return OWN if isinstance(kind, str) and ":" in kind else str(kind)


EngineSettings = Annotated[
    Annotated[VllmSettings, Tag("vllm")]
    | Annotated[TransformersSettings, Tag("transformers")]
    | Annotated[OwnEngineSettings, Tag(OWN)],
    Discriminator(_kind_of),
]
