"""The critic that a recipe names."""

from __future__ import annotations

from pathlib import Path

from learner.algorithm.algorithm import AnyCritic, SharedCriticSettings, TurnCriticSettings
from learner.model.policy import Policy
from learner.training.critic import TRUNK, Critic, OwnCritic, SharedCritic
from learner.training.turn_critic import SLOW_TRUNK, TurnCritic


def critic_of(
    settings: AnyCritic, policy: Policy, total_steps: int | None = None, stored: Path | None = None
) -> Critic:
    """The critic of a recipe, beginning where the policy stands, or with what a writer left in the folder `stored`.

    total_steps: of its optimizer, whose state is not in the folder.
    """

    def trunk(name: str) -> Policy:
        if stored is None:
            return policy.twin()
        return Policy.restored(policy.settings.beside, stored / name, policy.ranks)

    critic: Critic
    if isinstance(settings, SharedCriticSettings):
        critic = SharedCritic(settings, policy, total_steps)
    elif isinstance(settings, TurnCriticSettings):
        critic = TurnCritic(settings, trunk(TRUNK), trunk(SLOW_TRUNK), total_steps)
    else:
        critic = OwnCritic(settings, trunk(TRUNK), total_steps)
    if stored is not None:
        critic.load(stored)
    return critic
