"""A run's configuration: each package's own settings side by side, from a TOML recipe and `a.b=c` overrides.

Nothing is configured twice and nothing is ignored: an unknown key is an error that names the nearest valid one, and so
is a pair that contradicts itself.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deploy.guards import DEFAULTS, Guard
from deploy.refusals import explain
from deploy.supervise import SupervisionSettings
from envs.host import HostSettings
from learner.schedule import learning_rate
from learner.settings import LearnerSettings
from rollout.agent import AgentSettings
from rollout.engine import Sampling
from rollout.vllm_engine import VllmSettings
from rollout.wire.store import BufferSettings
from rollout.wire.weights import PROBE_TOKENS
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
        if bool(self.learner.model.path) == (self.tiny is not None):
            raise ValueError(
                "give exactly one of learner.model.path (a checkpoint) and the section tiny (one is built; tiny= "
                "leaves it out)"
            )
        credit = self.learner.algorithm.credit
        if self.rollout.group_size < 2 and credit.siblings:
            raise ValueError(
                f"rollout.group_size=1 leaves learner.algorithm.credit.kind={credit.kind!r} without a baseline: an "
                "advantage is a reward compared with its siblings'; use 2 or more, or reinforce_pp, returns or gae"
            )
        reuse = self.buffer.reuse
        if reuse.groups and reuse.sampler.kind == "prioritized" and self.rollout.group_size < 2:
            raise ValueError(
                "buffer.reuse.sampler.kind='prioritized' prefers groups whose rewards differ, but "
                "rollout.group_size=1: use 2 or more, or 'uniform'"
            )
        if self.rollout.max_turns == 1 and credit.turns:
            raise ValueError(
                f"learner.algorithm.credit.kind={credit.kind!r} compares turns, but rollout.max_turns=1; "
                "allow more turns, or use kind = 'group'"
            )
        if self.sampling.top_p < 1:
            raise ValueError(
                "sampling.top_p<1 changes what can be sampled, and the learner's logprobs would be of another "
                "distribution; use sampling.top_p=1"
            )
        if self.sampling.seed is not None:
            raise ValueError(
                "sampling.seed is one request's seed, which the run derives from its own: leave it away and set seed"
            )
        ranks, groups = self.learner.ranks, self.buffer.groups_per_step
        if ranks > groups:
            raise ValueError(
                f"learner.ranks={ranks} share the groups of a step, but buffer.groups_per_step={groups}: a group is "
                "not divided; have at least as many groups as ranks"
            )
        if ranks > 1 and self.learner.model.lora is not None:
            raise ValueError(
                f"learner.model.lora trains an adapter in one process, but learner.ranks={ranks}; use learner.ranks=1"
            )
        if ranks > 1 and self.weights.transfer != "object_store":
            raise ValueError(
                f"weights.transfer={self.weights.transfer!r} sends from one process, but learner.ranks={ranks}; "
                "use 'object_store', or learner.ranks=1"
            )
        if self.rollout.context_tokens <= PROBE_TOKENS:
            raise ValueError(
                f"rollout.context_tokens={self.rollout.context_tokens} must exceed {PROBE_TOKENS}, the length of "
                "the probe that proves every weight sync"
            )
        if self.sampling.max_tokens >= self.rollout.context_tokens:
            raise ValueError(
                f"sampling.max_tokens={self.sampling.max_tokens} leaves no room for a prompt in "
                f"rollout.context_tokens={self.rollout.context_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _schedules_fit_the_run(self) -> Self:
        learner = self.learner
        schedules = [("learner.optim", learner.optim, self.steps * learner.algorithm.updates)]
        if critic := learner.algorithm.critic:
            schedules.append(("learner.algorithm.critic.optim", critic.optim, schedules[0][2]))
        if self.warm_start:
            steps = learner.imitation.steps(self.warm_start.episodes)
            schedules.append(("learner.imitation.optim", learner.imitation.optim, steps))
        for name, optim, steps in schedules:
            try:
                learning_rate(optim, 0, steps)
            except ValueError as error:
                raise ValueError(f"{name}: {error}; lower {name}.warmup_steps or train longer") from error
        return self

    @model_validator(mode="after")
    def _adapters_can_travel(self) -> Self:
        lora = self.learner.model.lora
        if lora is None or lora.sync == "merged":
            return self
        if self.weights.transfer != "object_store":
            raise ValueError(
                f"learner.model.lora.sync='adapter' does not travel by weights.transfer={self.weights.transfer!r}, "
                "which sends whole weights; use 'object_store', or sync='merged'"
            )
        if self.rollout.gpus_per_worker and self.engine.dtype == "float32":
            raise ValueError(
                "learner.model.lora.sync='adapter' needs engine.dtype='bfloat16' or 'float16' on GPUs, where vLLM "
                "multiplies adapters in half precision only; set it, or use sync='merged'"
            )
        return self

    @model_validator(mode="after")
    def _transfer_has_its_gpus(self) -> Self:
        transfer, gpus = self.weights.transfer, self.rollout.gpus_per_worker
        if transfer == "object_store":
            return self
        if not gpus:
            raise ValueError(
                f"weights.transfer={transfer!r} needs GPUs, but rollout.gpus_per_worker=0; "
                "use 'object_store' or give the workers a GPU"
            )
        if self.learner.model.device != "cuda":
            raise ValueError(
                f"weights.transfer={transfer!r} sends from the learner's GPU, but learner.model.device='cpu'; "
                "use 'object_store' or train on 'cuda'"
            )
        if transfer == "nccl" and gpus < self.engine.tensor_parallel_size:
            raise ValueError(
                f"weights.transfer='nccl' needs whole GPUs, but rollout.gpus_per_worker={gpus:g} for "
                f"engine.tensor_parallel_size={self.engine.tensor_parallel_size}; give a worker as many as it spans"
            )
        if transfer == "ipc" and (self.rollout.workers * gpus >= 1 or self.engine.tensor_parallel_size > 1):
            raise ValueError(
                "weights.transfer='ipc' needs engines of one GPU each that share the learner's: keep rollout.workers * "
                "rollout.gpus_per_worker below 1 and engine.tensor_parallel_size at 1, or use 'nccl'"
            )
        return self


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe (a path, or the name of one that ships with Manta), apply overrides, check everything.

    A recipe that `extends` one that ships with Manta says only what differs. An override "section=" with nothing behind
    it leaves the section out.
    """
    tree = _read(recipe)
    for override in overrides:
        _apply(tree, override)
    return parse(tree, recipe)


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
        return path.read_text()
    shipped = {entry.name.removesuffix(".toml"): entry for entry in files("deploy.recipes").iterdir()}
    names = sorted(name for name, entry in shipped.items() if entry.name.endswith(".toml"))
    if recipe not in names:
        raise ConfigError(f"recipe {recipe!r} is neither a .toml file nor one of: {', '.join(names)}")
    return shipped[recipe].read_text()


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
