"""The metrics that the learner writes, a row a learner step: name, unit, what each counts. Quick to import.

The files named by the groups compute them. docs/reference/metrics.md is written from these declarations, guards accept
the names, and a test compares them with the rows of runs.
"""

from __future__ import annotations

from rollout.wire.metrics import Metric, MetricGroup

_SHARE, _NATS = "share, 0 to 1", "nats per token"
_SCORED = "a token was scored"
_TRAINED = "the policy is trained, not the critic alone (`critic.warmup_steps`)"
_REUSED = "the step reuses a group (`buffer.reuse.groups`)"
_CRITIC = "`critic` is configured"
_CONSTRAINED = "`constraints` are configured"
_DISTILLED = "`distill` is configured, and a token was scored"
_SEVERAL = "the run has several environments, and the step an episode of it"


def _distribution(name: str, unit: str, what: str) -> tuple[Metric, ...]:
    """The mean of a quantity of an episode, its median, 95th percentile and maximum."""
    return (
        Metric(name, unit, f"{what}: mean over the episodes"),
        Metric(f"{name}_p50", unit, f"{what}: median"),
        Metric(f"{name}_p95", unit, f"{what}: 95th percentile"),
        Metric(f"{name}_max", unit, f"{what}: maximum"),
    )


def _moments(name: str, named: str, what: str, when: str = "", unit: str = "reward") -> tuple[Metric, ...]:
    """Mean, standard deviation, minimum and maximum over episodes. named: the names of all but the mean begin so."""
    return (
        Metric(name, unit, f"{what}: mean over the episodes", when),
        Metric(f"{named}std", unit, f"{what}: population standard deviation", when),
        Metric(f"{named}min", unit, f"{what}: minimum", when),
        Metric(f"{named}max", unit, f"{what}: maximum", when),
    )


EPISODES = MetricGroup(
    "Trained episodes",
    "learner/data/batch_stats.py",
    "Statistics of the episodes in the step's fresh groups, over all ranks and all trainable episodes: those that "
    "did not fail for reasons of infrastructure, however else they ended. Rewards are the environment's, before "
    "penalties.",
    (
        *_moments("reward", "reward_", "Reward of an episode (sum over its turns)"),
        *_moments(
            "rewards/{NAME}/mean",
            "rewards/{NAME}/",
            'Reward NAME of `info["rewards"]`, summed over the turns of an episode (0 if absent)',
            "an episode of the step has a reward of that name",
        ),
        *_moments(
            "costs/{NAME}/mean",
            "costs/{NAME}/",
            'Cost NAME of `info["costs"]`, summed over the turns of an episode (0 if absent)',
            "an episode of the step has a cost of that name",
            "unit of the cost",
        ),
        Metric(
            "success",
            _SHARE,
            "Episodes that the environment calls successful; one without a verdict counts as not successful",
            "the environment has given a verdict in this or an earlier step",
        ),
        Metric("episodes", "episodes", "Trainable episodes"),
        Metric(
            "untrainable_episodes",
            "episodes",
            "Episodes that failed or were cancelled: they are never trained on",
        ),
        *_distribution("turns", "turns", "Turns of an episode"),
        *_distribution("sampled_per_episode", "tokens", "Tokens that the policy sampled in an episode"),
        Metric(
            "repetition",
            _SHARE,
            "Runs of four sampled tokens that occurred earlier in the same turn, mean over the episodes; high values "
            "indicate a degenerate policy",
        ),
        Metric(
            "lag_mean",
            "weight versions",
            "Lag of a sampled token, the learner's version minus the version that sampled it; mean over the tokens",
        ),
        Metric("lag_max", "weight versions", "Lag of a sampled token, maximum; at most `buffer.max_lag`"),
    ),
)

ENVIRONMENTS = MetricGroup(
    "Environments",
    "learner/data/batch_stats.py",
    "The same of each environment of a run with several (`envs`), by its NAME.",
    (
        Metric("env/{NAME}/episodes", "episodes", "Trainable episodes", _SEVERAL),
        Metric("env/{NAME}/reward", "reward", "Reward of an episode: mean over the episodes", _SEVERAL),
        Metric(
            "env/{NAME}/reward_std", "reward", "Reward of an episode: population standard deviation", _SEVERAL
        ),
        Metric(
            "env/{NAME}/success",
            _SHARE,
            "Episodes that the environment calls successful",
            f"{_SEVERAL}, and it has given a verdict in the step",
        ),
        Metric("env/{NAME}/turns", "turns", "Turns of an episode: mean over the episodes", _SEVERAL),
        Metric(
            "env/{NAME}/sampled_per_episode",
            "tokens",
            "Tokens that the policy sampled in an episode: mean over the episodes",
            _SEVERAL,
        ),
    ),
)

REUSED = MetricGroup(
    "Reused groups",
    "learner/data/batch_stats.py",
    "Groups of earlier steps that this step trains on again. They are not part of the statistics above.",
    (
        Metric("groups_reused", "groups", "Reused groups of the step", _REUSED),
        Metric("reused_lag_mean", "weight versions", "Lag of their sampled tokens, mean", _REUSED),
        Metric(
            "reused_lag_max",
            "weight versions",
            "Lag of their sampled tokens, maximum; at most `buffer.reuse.max_lag`",
            _REUSED,
        ),
    ),
)

BATCH = MetricGroup(
    "The batch",
    "learner/training/learner.py",
    "What of the batch, fresh and reused groups together, contributes to the update.",
    (
        Metric(
            "zero_advantage_fraction",
            _SHARE,
            "Episodes whose advantage is zero at every token, as where all siblings earned the same; they have no "
            "policy gradient",
        ),
        Metric(
            "truncated_without_bootstrap",
            _SHARE,
            "Episodes that were truncated and have no critic's value for what would have followed; it counts as 0",
        ),
        Metric(
            "scored_share",
            _SHARE,
            "Sampled tokens that were computed: `tokens_scored / batch_tokens_sampled`; below 1 where "
            "`skip_zero_advantage` leaves sequences out",
        ),
        Metric("version", "weight version", "Weight version that the step made; equal to `step`"),
    ),
)

CONSTRAINTS = MetricGroup(
    "Constraints",
    "learner/algorithm/constraints.py",
    "Of each entry of `constraints`, by the NAME of its cost. Its mean is `costs/NAME/mean`.",
    (
        Metric(
            "constraint/{NAME}/multiplier",
            "reward per unit of the cost",
            "Multiplier that the step used: what a unit of the cost counts against the reward",
            _CONSTRAINED,
        ),
        Metric("constraint/{NAME}/limit", "unit of the cost", "The limit, a constant", _CONSTRAINED),
    ),
)

UPDATE = MetricGroup(
    "Policy update",
    "learner/training/step.py",
    "Means over the scored tokens of all ranks, unless stated otherwise. Scored tokens are the sampled tokens that "
    "the forward pass computed. A step of several optimizer steps (`minibatches`, `epochs`) has the mean over them, "
    "and the sum where a metric is a count.",
    (
        Metric(
            "loss", "no unit", "Value of the loss: weighted sum over tokens, penalties included", _TRAINED
        ),
        Metric(
            "grad_norm", "2-norm", "Norm of the gradient before it is clipped to `max_grad_norm`", _TRAINED
        ),
        Metric("learning_rate", "no unit", "Learning rate of the optimizer step", _TRAINED),
        Metric(
            "skipped_step",
            "optimizer steps",
            "Optimizer steps left out because loss or gradient was not finite. Such a batch is refused and counted in "
            "`nonfinite_batches`, so that a stored row has 0",
        ),
        Metric(
            "idle_step", "optimizer steps", "Steps left out, their gradient was zero everywhere", _TRAINED
        ),
        Metric(
            "router_balance", "no unit", "Load-balancing loss of the routers", "`router_balance` is above 0"
        ),
        Metric("entropy", _NATS, "Entropy of the policy's distribution at each token", _SCORED),
        Metric(
            "kl",
            _NATS,
            "KL divergence between the sampling policy and the learner's, KL(behavior, learner), by the k3 estimator",
            _SCORED,
        ),
        Metric(
            "behavior_gap",
            _NATS,
            "Absolute difference between the learner's logprob of a token and the one recorded while sampling",
            _SCORED,
        ),
        Metric(
            "behavior_gap_lag_{LAG}",
            _NATS,
            "The same, of tokens of one lag",
            "a token of that lag was scored",
        ),
        Metric(
            "effective_samples",
            _SHARE,
            "Effective sample size of the importance ratios w between learner and sampling policy, "
            "(sum w)^2 / (N sum w^2), over the whole step; 1: all tokens count alike",
            _SCORED,
        ),
        Metric(
            "effective_samples_lag_{LAG}",
            _SHARE,
            "The same over the tokens of one lag",
            "a token of that lag was scored",
        ),
        Metric(
            "clip_fraction",
            _SHARE,
            "Tokens whose gradient the loss's clip or mask removed; of `cispo`, tokens whose weight was clipped",
            "the loss clips (ppo, gspo, cispo, dppo) and a token was scored",
        ),
        Metric("correction", "factor", "Product of the corrections' weights", "`corrections` are configured"),
        Metric(
            "masked_fraction",
            _SHARE,
            "Tokens to which the corrections give weight 0",
            "`corrections` are configured",
        ),
        Metric(
            "reference_kl",
            _NATS,
            "Estimate of KL(policy, policy of version 0) by the estimator that `kl` configures",
            "`kl` is configured",
        ),
        Metric(
            "distill/kl",
            _NATS,
            "KL(policy, teacher) at sampled tokens: the logprob less the teacher's (k1), or, where `divergence` "
            "is not sampled, the exact one that is learned",
            _DISTILLED,
        ),
        Metric("distill/teacher_logprob", _NATS, "The teacher's logprob of a sampled token", _DISTILLED),
        Metric(
            "tokens_processed",
            "tokens",
            "Inputs of the forward pass, prompts included; a prefix that sequences of a row share counts once",
        ),
        Metric(
            "tokens_effective",
            "tokens",
            "Inputs of the forward pass if every sequence were computed alone; divided by `tokens_processed`, what "
            "shared prefixes save",
        ),
        Metric("tokens_scored", "tokens", "Sampled tokens of these"),
        Metric(
            "batch_tokens_sampled",
            "tokens",
            "Sampled tokens of the batch, those of skipped sequences included",
        ),
    ),
)

CRITIC = MetricGroup(
    "Critic",
    "learner/training/critic.py",
    "Means over the sampled tokens of all ranks; with a critic of turns over the places before and behind each action.",
    (
        Metric("value_loss", "squared reward", "Half the squared error, clipped as configured", _CRITIC),
        Metric("value", "reward", "Value that the critic predicts", _CRITIC),
        Metric("value_error", "reward", "Absolute difference between value and target", _CRITIC),
        Metric(
            "value_correlation",
            "correlation, -1 to 1",
            "Of Q - V with what followed - V, over turns that the critic has not learned from yet",
            '`critic.kind = "turns"`',
        ),
        Metric("value_grad_norm", "2-norm", "Norm of the critic's gradient before clipping", _CRITIC),
        Metric(
            "value_skipped_step",
            "optimizer steps",
            "The critic's optimizer steps left out because they were not finite; 0 in a stored row, as `skipped_step`",
            _CRITIC,
        ),
    ),
)

LOOP = MetricGroup(
    "The learner's time",
    "learner/training/loop.py",
    "One number a step.",
    (
        Metric("step", "learner steps", "Number of the learner step, from 1"),
        Metric("wait_s", "s", "Wait for the step's groups, also while engines load the version before"),
        Metric(
            "train_s",
            "s",
            "Time from decoded groups to new weights: advantages, forward, backward, optimizer",
        ),
        Metric("learner_tokens_per_s", "tokens/s", "`tokens_processed / train_s`"),
        Metric(
            "nonfinite_batches",
            "batches",
            "Batches that were refused before this step found one to learn from; their groups are dropped",
        ),
    ),
)

SYNC = MetricGroup(
    "Weight sync",
    "learner/training/loop.py",
    "What the engines report of the version that the step made.",
    (
        Metric(
            "sync_stall_ms",
            "ms",
            "Time in which generation was paused to load the version, maximum over the engines",
            "the run plays (no `--replay`)",
        ),
        Metric(
            "probe_difference",
            "nats",
            "Mean absolute difference between engine and learner on the logprobs of the probe prompt, maximum over the "
            "engines",
            "the run plays (no `--replay`)",
        ),
    ),
)

GROUPS = (EPISODES, ENVIRONMENTS, REUSED, BATCH, CONSTRAINTS, UPDATE, CRITIC, LOOP, SYNC)
