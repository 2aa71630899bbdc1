"""The engines that a recipe chooses by `engine.kind`: their settings, what they take of a machine, how one is started.

Each kind names its starter as "module:function", a user's own engine as much as Manta's: nothing is imported before an
engine is started, so vLLM need not be installed where another engine is chosen.
"""

from __future__ import annotations

import inspect
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from envs.user_functions import awaited, load_function
from rollout.engines.checked_engine import METHODS, CheckedEngine
from rollout.engines.engine import Engine, EngineStart, Placement
from rollout.engines.vllm_start import VllmSettings

OWN = "module:name"  # stands for the kind of every engine that is a user's own


class TransformersSettings(BaseModel):
    """Plain transformers in the worker's own process, on CPUs, without batching: for laptops and debugging."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    starter: ClassVar[str] = "rollout.engines.hf_engine:start"

    kind: Literal["transformers"] = "transformers"
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="compute type of the engine")

    @property
    def placement(self) -> Placement:
        return Placement(device="cpu")

    def require_here(self) -> None:
        """Raise ValueError where this engine cannot be started on this machine; transformers is always installed."""

    def reproducible(self) -> TransformersSettings:
        """Return the settings under which a request's seed decides what is sampled: it always does here."""
        return self

    async def start(self, start: EngineStart) -> Engine:
        """Load the model."""
        engine: Engine = await load_function(self.starter)(start, self)
        return engine


class OwnEngineSettings(BaseModel):
    """An engine of the user's own: `kind` names what starts it.

    It is called as `name(start, **options)` with an `EngineStart` and returns an `Engine`, or an awaitable of one. A
    class whose constructor takes these arguments is such a function.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str = Field(OWN, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="type in which weights are sent to the engine and in which it computes"
    )
    device: Literal["any", "cpu", "gpu"] = Field(
        "any",
        description='where the engine runs: "gpu" needs rollout.gpus_per_worker above 0, "cpu" needs it at 0',
    )
    concurrent_requests: int = Field(
        16, gt=0, description="requests an evaluation sends to the engine at once"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the function that starts the engine"
    )

    @property
    def placement(self) -> Placement:
        return Placement(device=self.device, maps_weights=True, concurrent_requests=self.concurrent_requests)

    def require_here(self) -> None:
        """Raise ValueError, one line, where the function is missing, takes other arguments, or is no engine's class."""
        starter = load_function(self.kind)
        try:
            inspect.signature(starter).bind(None, **self.options)
        except TypeError as error:
            raise ValueError(
                f"it is called as {self.kind.partition(':')[2]}(start, **engine.options), but: {error}"
            ) from error
        if inspect.isclass(starter) and (missing := [m for m in METHODS if not hasattr(starter, m)]):
            raise ValueError(f"its class has no method {', '.join(missing)} (see rollout/engines/engine.py)")

    def reproducible(self) -> OwnEngineSettings:
        """Return the settings under which a request's seed decides what is sampled: the engine's own business here."""
        return self

    async def start(self, start: EngineStart) -> Engine:
        """Call the user's function; the engine is held to what Manta's own engines prove."""
        made: Any = await awaited(load_function(self.kind)(start, **self.options))
        return CheckedEngine(made, start)


def _kind_of(given: Any) -> str:
    """The tag of the settings meant; a recipe without a kind means vLLM."""
    kind = given.get("kind", "vllm") if isinstance(given, dict) else getattr(given, "kind", "vllm")
    return OWN if isinstance(kind, str) and ":" in kind else str(kind)


EngineSettings = Annotated[
    Annotated[VllmSettings, Tag("vllm")]
    | Annotated[TransformersSettings, Tag("transformers")]
    | Annotated[OwnEngineSettings, Tag(OWN)],
    Discriminator(_kind_of),
]
