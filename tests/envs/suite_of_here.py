"""A suite as another package would bring it: importing it makes its ids known."""

from envs import registry

registry.register("Here-Lake", lambda: registry.make("FrozenLake-v1"))
