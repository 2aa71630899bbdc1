"""The metrics that stages before reinforcement learning write, a row an optimizer step. Others are in metrics.py.

They are rows of their own, in the form of a run's; guards do not see them. Quick to import.
"""

from __future__ import annotations

from rollout.wire.metrics import Metric, MetricGroup

_ILQL = "the stage is of kind `ilql`"
_KTO = "the stage is of kind `kto`"
_REWARD = "the stage is of kind `reward_model`"
_COMPARED = "the stage is of kind `preference` or `reward_model`"
_JUDGED = "the stage is of kind `preference`, `kto` or `reward_model`"
STAGES = MetricGroup(
    "Stages",
    "learner/stages/",
    "A stage before reinforcement learning has a file of its own, `RUN/stages/0/metrics.jsonl` and so on, with one row "
    "an optimizer step. Stages of kinds `sft`, `preference`, `kto`, `reward_model` and `ilql` write `step`, `loss`, "
    "`grad_norm`, `learning_rate`, `skipped_step`, `idle_step`, `tokens_processed`, `tokens_effective`, "
    "`tokens_scored` and `batch_tokens_sampled` as above, and all but `reward_model` `entropy`. A step that "
    "is not finite stands there with `skipped_step` 1.",
    (
        Metric("epoch", "epochs", "Pass over the episodes, from 0"),
        Metric(
            "chosen_reward",
            "nats",
            "What the better answer, or a good one, is worth: to the policy, beta log(pi/ref), or to the reward model; "
            "mean",
            _JUDGED,
        ),
        Metric("rejected_reward", "nats", "The same of the worse answer, or a bad one", _JUDGED),
        Metric("reward_margin", "nats", "Difference of the two", _JUDGED),
        Metric("reward_accuracy", "fraction", "Share of pairs whose better answer is worth more", _COMPARED),
        Metric(
            "reference_point",
            "nats",
            "Mean log(pi/ref) of answers that belong to other prompts, at least 0: the divergence that good answers "
            "are to exceed",
            _KTO,
        ),
        Metric("heldout_accuracy", "fraction", "The same of the pairs set aside, after an epoch", _REWARD),
        Metric("heldout_loss", "nats", "Mean loss of the pairs set aside, after an epoch", _REWARD),
        Metric("head_grad_norm", "2-norm", "Norm of the head's gradient before clipping", _REWARD),
        Metric("q", "reward", "Value of a sampled token, mean of both heads and over the tokens", _ILQL),
        Metric("v", "reward", "Value of the state before a sampled token", _ILQL),
        Metric("advantage", "reward", "The lower of both slow action values, minus the state value", _ILQL),
        Metric("td_error", "reward", "Absolute difference between action value and target", _ILQL),
        Metric("td_loss", "squared reward", "Squared difference, sum of both heads", _ILQL),
        Metric("expectile_loss", "squared reward", "Loss of the state value", _ILQL),
        Metric("cql_loss", "nats", "Conservative loss, sum of both heads, without its factor", _ILQL),
        Metric("policy_loss", "nats per token", "Weighted negative log-likelihood", _ILQL),
        Metric("policy_weight", "factor", "Weight exp(advantage / temperature), limited", _ILQL),
        Metric(
            "effective_samples",
            "share, 0 to 1",
            "Effective sample size of these weights w, (sum w)^2 / (N sum w^2); 1: all tokens count alike",
            _ILQL,
        ),
        Metric("value_grad_norm", "2-norm", "Norm of the heads' gradient before clipping", _ILQL),
    ),
)
