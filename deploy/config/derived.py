"""Defaults that depend on the job and the machine. Options set in the recipe take precedence.

    engine.dtype, learner.model.dtype     on CPUs: what the processor multiplies fastest; on GPUs bfloat16

Presets of algorithms leave these options open:

    aggregation_length        divisor of aggregation = "constant": the most tokens that an episode can sample
    overlong                  the last fifth of that length
    proximal, corrections     "learner" and truncated importance sampling, if engine and learner compute in different
                              types: the behavior policy then differs even at lag 0, and PPO's clip would drop tokens
                              for the engine's rounding
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from deploy.config.config import RunConfig
from deploy.config.environments import NamedEnvSettings
from deploy.config.processor import multiplies_bfloat16
from rollout.agents.agent import AgentSettings
from rollout.engines.engine import Sampling
from rollout.engines.vllm_start import VllmSettings
from rollout.episodes.worker import RolloutSettings

OVERLONG_MARGIN = 5  # the last fifth: 4096 of 20480 tokens in Yu et al. 2025 (DAPO), section 3.4


def longest_episode(max_turns: int, max_tokens: int, context_tokens: int, agent: AgentSettings) -> int:
    """The most tokens that an episode samples, by turns, tokens a turn and, with the whole history, the context."""
    most = max_turns * max_tokens
    return min(most, context_tokens) if agent.memory == "full" else most


def _longest_of_all(tree: dict[str, Any]) -> int:
    """The same over the environments of a configuration that is not validated yet. Raises ValidationError."""
    rollout = RolloutSettings.model_validate(tree.get("rollout", {}))
    sampling = Sampling.model_validate(tree.get("sampling", {}))
    agent = AgentSettings.model_validate(tree.get("agent", {}))
    longest = []
    for entry in tree.get("envs") or [{}]:
        said = NamedEnvSettings.model_validate({"id": "", "name": "env"} | entry)
        longest.append(
            longest_episode(
                said.max_turns or rollout.max_turns,
                said.max_tokens or sampling.max_tokens,
                rollout.context_tokens,
                said.agent or agent,
            )
        )
    return max(longest)


def with_data_types(tree: dict[str, Any]) -> dict[str, Any]:
    """Fill the open data types in a configuration that is not validated yet.

    vLLM, and a learner that begins from a checkpoint, compute in bfloat16 on GPUs, and where the processor multiplies
    it. Elsewhere both compute in float32, and so does everywhere a learner that begins from a tiny random model. The
    machine that begins the run decides for all; the run keeps what it decided.
    """
    engine, learner, rollout = (tree.get(name, {}) for name in ("engine", "learner", "rollout"))
    if not all(isinstance(section, dict) for section in (engine, learner, rollout)):
        return tree  # reported by the validation of the whole
    model = learner.get("model", {})
    if not isinstance(model, dict):
        return tree
    native = multiplies_bfloat16()
    if engine.get("kind", "vllm") == "vllm" and not rollout.get("gpus_per_worker"):
        engine = {"dtype": "bfloat16" if native else "float32"} | engine
    if model.get("path"):
        # On a GPU float32 has neither fast products nor the variable-length attention.
        fast = native or model.get("device") == "cuda"
        learner = learner | {"model": {"dtype": "bfloat16" if fast else "float32"} | model}
    return tree | {"engine": engine, "learner": learner}


def with_lengths(tree: dict[str, Any]) -> dict[str, Any]:
    """Fill the open lengths of the algorithm in a configuration that is not validated yet."""
    learner = tree.get("learner")
    algorithm = learner.get("algorithm") if isinstance(learner, dict) else None
    if not isinstance(algorithm, dict):
        return tree
    overlong = algorithm.get("overlong")
    open_overlong = (
        overlong if isinstance(overlong, dict) and not {"tokens", "margin"} <= overlong.keys() else None
    )
    has_constant = algorithm.get("aggregation") == "constant" and "aggregation_length" not in algorithm
    if open_overlong is None and not has_constant:
        return tree
    try:
        longest = _longest_of_all(tree)
    except (ValidationError, TypeError):
        return tree  # reported by the validation of the whole
    filled = dict(algorithm)
    if open_overlong is not None:
        tokens = open_overlong.get("tokens", longest)
        margin = max(1, tokens // OVERLONG_MARGIN) if isinstance(tokens, int) else 1
        filled["overlong"] = {"tokens": tokens, "margin": margin} | open_overlong
    if has_constant:
        filled["aggregation_length"] = longest
    return tree | {"learner": tree["learner"] | {"algorithm": filled}}


def with_correction(tree: dict[str, Any], config: RunConfig) -> dict[str, Any] | None:
    """The tree of `config` with the correction for different compute types; None if it needs none.

    A recipe that sets `proximal` or `corrections` is left unchanged. The weight is that of Yao et al. 2025, "Your
    Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    """
    learner = tree.get("learner", {})
    algorithm = learner.get("algorithm", {})
    engine = config.engine
    coarser = isinstance(engine, VllmSettings) and engine.coarseness > 1
    model = config.learner.model
    same_type = engine.dtype == model.dtype and not coarser and not model.float8
    if same_type or not {"proximal", "corrections"}.isdisjoint(algorithm):
        return None
    correction = {"proximal": "learner", "corrections": [{"kind": "tis"}]}
    return tree | {"learner": learner | {"algorithm": algorithm | correction}}
