"""A run's configuration: each package's own settings side by side, from a TOML recipe and `a.b=c` overrides.

Nothing is configured twice and nothing is ignored: an unknown key is an error that names the nearest valid one, and so
is a pair that contradicts itself (contradictions.py).
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deploy.contradictions import require_consistent
from deploy.guards import DEFAULTS, Guard
from deploy.refusals import explain
from deploy.supervise import SupervisionSettings
from envs.host import HostSettings
from learner.settings import LearnerSettings
from rollout.agent import AgentSettings
from rollout.engine import Sampling
from rollout.vllm_engine import VllmSettings
from rollout.wire.store import BufferSettings
from rollout.worker import RolloutSettings

Nested = dict[str, Any]
Model = TypeVar("Model", bound=BaseModel)
Word = Annotated[str, Field(pattern="^[a-z]+$")]


class ConfigError(ValueError):
    """A recipe or an override is wrong; the message is for the person who wrote it."""


class Settings(BaseModel):
    """Base of the settings that belong to deployment itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TinySettings(Settings):
    """A small random model and tokenizer, built where the run starts: nothing is downloaded."""

    layers: int = Field(4, gt=0)
    width: int = Field(128, gt=0, description="hidden size")
    heads: int = Field(4, gt=0)
    head_width: int = Field(
        32, gt=0, multiple_of=32, description="of each head; vLLM on CPUs wants multiples of 32"
    )
    mlp: int = Field(384, gt=0, description="width of the feed-forward layers")
    tie: bool = Field(True, description="share input and output embeddings")
    pixels: int = Field(
        0, ge=0, multiple_of=8, description="wide and high: a model that sees such pictures; 0: text alone"
    )
    words: tuple[Word, ...] = Field((), description="lower-case words that are one token each")
    environment_words: bool = Field(False, description="besides them all that the environment says")


class EnvSettings(Settings):
    """The environment trained on."""

    id: str = Field(
        description='one of ours, "program" (a foreign agent), or any gymnasium.make id (see manta envs)'
    )
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the environment")
    host: HostSettings = Field(default_factory=HostSettings, description="where its replicas live")


class EvaluationSettings(Settings):
    """How success is measured before and after."""

    tasks: int = Field(
        256, ge=0, description="tasks; their first observations differ where there is a split; 0: none"
    )
    seconds: float = Field(1800.0, gt=0, description="limit for one evaluation")
    first_seed: int = Field(0, ge=0, description="seeds are tried from here on")
    options: dict[str, Any] = Field(
        default_factory=dict, description="environment options that differ from training"
    )


class WarmStartSettings(Settings):
    """Imitation of a scripted player before reinforcement learning."""

    episodes: int = Field(4096, gt=0, description="demonstrations played")
    error_rate: float = Field(0.5, ge=0, le=1, description="share of the player's moves that are random")


class CheckpointSettings(Settings):
    """When the learner's state lands on disk."""

    every_steps: int = Field(10, gt=0)
    keep: int = Field(2, gt=0, description="checkpoints kept, the newest")


class ClusterSettings(Settings):
    """How Ray is reached and how long anything may take."""

    address: str = Field("", description="Ray cluster to join; empty: start a local one")
    learner_cpus: float = Field(
        1.0,
        ge=0,
        description="CPUs that each rank of the learner claims; it claims a GPU where it trains on one",
    )
    dashboard_port: int = Field(
        0, ge=0, le=65535, description="port of a local Ray's dashboard; 0: no dashboard"
    )
    start_seconds: float = Field(300.0, gt=0, description="limit for starting engines and the learner")
    step_seconds: float = Field(
        600.0,
        gt=0,
        description="limit for a step's groups to come together, and as long again for the step itself",
    )
    capacity_seconds: float = Field(30.0, gt=0, description="how long to wait for missing cluster resources")

    @property
    def joins(self) -> bool:
        """Whether a cluster that is there is joined, named here or by the Ray job that runs us."""
        return bool(self.address) or "RAY_ADDRESS" in os.environ


class WeightSyncSettings(Settings):
    """How new weights travel."""

    transfer: Literal["object_store", "nccl", "ipc"] = Field(
        "object_store", description="nccl and ipc need GPUs"
    )
    sync_seconds: float = Field(120.0, gt=0, description="limit for one engine to load one version")


class RunConfig(Settings):
    """Everything a run does. Stored with the run as config.json."""

    name: str = Field("run", description="first part of the run folder's name")
    seed: int = Field(0, ge=0)
    steps: int = Field(gt=0, description="learner steps, each one weight version")
    replay: str | None = Field(
        None,
        description="folder of a finished run whose trajectories are learned from; nothing is played then",
    )
    tiny: TinySettings | None = Field(
        None, description="build a tiny model instead of loading learner.model.path"
    )
    env: EnvSettings
    agent: AgentSettings = Field(default_factory=AgentSettings)
    sampling: Sampling = Field(default_factory=Sampling)
    rollout: RolloutSettings = Field(default_factory=RolloutSettings)
    engine: VllmSettings = Field(default_factory=VllmSettings)
    buffer: BufferSettings = Field(default_factory=BufferSettings)
    learner: LearnerSettings = Field(default_factory=LearnerSettings)
    warm_start: WarmStartSettings | None = None
    weights: WeightSyncSettings = Field(default_factory=WeightSyncSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)
    supervision: SupervisionSettings = Field(default_factory=SupervisionSettings)
    guards: tuple[Guard, ...] = Field(DEFAULTS, description="bounds of metrics that warn or end the run")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        require_consistent(self)
        return self


# What may be another when a run goes on: where, how and how far it runs, never what is played and learned.
MOVABLE = (
    "cluster",
    "supervision",
    "learner.ranks",
    "learner.threads",
    "rollout.workers",
    "rollout.cpus_per_worker",
    "rollout.gpus_per_worker",
    "steps",  # more of them
)


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe (a path, or the name of one that ships with Manta), apply overrides, check everything.

    A recipe that `extends` one that ships with Manta says only what differs. An override "section=" with nothing behind
    it leaves the section out.
    """
    tree = _read(recipe)
    for override in overrides:
        _apply(tree, override)
    return parse(tree, recipe)


def moved(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """A stored run's configuration for going on elsewhere or for longer.

    ConfigError for overrides of anything that is not MOVABLE, and for fewer steps.
    """
    tree = config.model_dump(mode="json")
    for override in overrides:
        name = override.partition("=")[0].strip()
        if not any(name == each or name.startswith(f"{each}.") for each in MOVABLE):
            raise ConfigError(
                f"override {override!r}: a run goes on playing and learning what it did; what may differ: "
                f"{', '.join(MOVABLE)}"
            )
        _apply(tree, override)
    changed = parse(tree, f"run {config.name}")
    if changed.steps < config.steps:
        raise ConfigError(
            f"steps={changed.steps} is fewer than the run's {config.steps}: a run that goes on may be given more; "
            "to end it earlier, stop it"
        )
    return changed


def _read(recipe: str) -> Nested:
    """A recipe over what it extends."""
    try:
        tree = tomllib.loads(recipe_text(recipe))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {recipe}: not valid TOML: {error}") from error
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str) or base.endswith(".toml"):
        raise ConfigError(f"recipe {recipe}: extends names a recipe that ships with Manta, not {base!r}")
    return _merged(_read(base), tree)


def _merged(base: Nested, changes: Nested) -> Nested:
    """Options of sections that both have stand side by side; one with another `kind` or `id` is another section."""
    merged = dict(base)
    for name, value in changes.items():
        old = base.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            other = any(key in value and value[key] != old.get(key) for key in ("kind", "id"))
            merged[name] = value if other else _merged(old, value)
        else:
            merged[name] = value
    return merged


def recipe_text(recipe: str) -> str:
    """The text of a recipe; an unknown name is an error that lists what there is."""
    path = Path(recipe)
    if path.suffix == ".toml":
        if not path.is_file():
            raise ConfigError(f"recipe {recipe}: no such file")
        return _text(path)
    shipped = {entry.name.removesuffix(".toml"): entry for entry in files("deploy.recipes").iterdir()}
    names = sorted(name for name, entry in shipped.items() if entry.name.endswith(".toml"))
    if recipe not in names:
        raise ConfigError(f"recipe {recipe!r} is neither a .toml file nor one of: {', '.join(names)}")
    return shipped[recipe].read_text(encoding="utf-8")


def _text(path: Path) -> str:
    """The text of a file that a user wrote: UTF-8, with or without a byte-order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"recipe {path}: not UTF-8 text (byte 0x{error.object[error.start]:02x} in line {line}); save it as UTF-8"
        ) from error


def parse(tree: Nested, source: str) -> RunConfig:
    """Validate a nested dict; all faults together become one line."""
    return validated(RunConfig, tree, source)


def validated(model: type[Model], tree: Nested, source: str) -> Model:
    """The same for any settings."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        faults = [explain(fault, model) for fault in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(faults)) from None


def _apply(tree: Nested, override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {override!r} is not of the form section.option=value")
    *sections, option = path.strip().split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {section} is an option, not a section")
    if not text.strip() and isinstance(node.get(option), dict):
        del node[option]
    else:
        node[option] = toml_value(text.strip())


def toml_value(text: str) -> Any:
    """A TOML value where the text reads as one (numbers, booleans, lists, quoted strings), else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
