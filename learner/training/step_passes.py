"""How often a learner step computes its packed rows, by what the recipe asks of it."""

from __future__ import annotations

from learner.algorithm.algorithm import OwnCriticSettings, SharedCriticSettings, TurnCriticSettings
from learner.parallel.traffic import Passes
from learner.settings import LearnerSettings


def passes_of(settings: LearnerSettings, rows: int) -> Passes:
    """The passes of a step whose episodes fill so many rows of a rank, at most.

    A row is scored once for the reference policy, for the logprobs before several updates and for a critic, and in
    every epoch for the load-balancing loss of a mixture of experts. A critic with a model of its own trains that too.
    """
    algorithm, critic = settings.algorithm, settings.algorithm.critic

    def divided(parts: int) -> int:
        """Rows of the same episodes in so many parts."""
        return parts * -(-rows // parts)

    own = algorithm.epochs * divided(algorithm.minibatches)
    trained, valued, summed = own, 0, algorithm.updates
    scored = rows * algorithm.needs_reference + own * bool(settings.model.router_balance)
    if isinstance(critic, TurnCriticSettings):  # which its slow copy gives its targets
        each = critic.passes * divided(critic.minibatches)
        trained, scored = trained + each, scored + rows + each
        valued, summed = rows + 2 * each, summed + critic.passes * critic.minibatches
    elif critic is not None:
        scored, valued = scored + rows, rows + own
        if isinstance(critic, OwnCriticSettings):
            trained, summed = trained + own, summed + algorithm.updates
    # A critic on the policy's own hidden states reads its logprobs too.
    if algorithm.fixes_proximal and not isinstance(critic, SharedCriticSettings):
        scored += rows
    taught = 0
    if algorithm.distill is not None:
        taught = rows if algorithm.distill.divergence == "sampled" else own
    return Passes(trained, scored, valued, taught, summed)
