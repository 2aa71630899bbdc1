"""A suite like those of other packages: a function that makes an environment from an id."""

from typing import Any

from envs import registry
from envs.registry import Env

IDS = ("Here-Lake", "Elsewhere-Lake")


def lake(env_id: str, slippery: bool = True) -> Env:
    if env_id != "Here-Lake":
        raise ValueError("did you mean Here-Lake?")
    made: Any = registry.make("FrozenLake-v1", is_slippery=slippery)
    return made
