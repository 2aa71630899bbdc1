"""Parts of an algorithm from a user's own module: loss, advantage estimator, correction, regularizer.

Each has the signature of the built-in parts of its kind, tensors in and tensors out, with its options as keyword
arguments. Returned values are checked at every call. N: sampled tokens of a micro-batch or of an episode.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sized
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from learner.algorithm.episode import Episode, Values
from learner.algorithm.estimators import Advantages, Groups
from learner.algorithm.losses import Loss
from learner.parallel.ranks import ALONE, RankLost, Ranks
from rollout.wire.own_part import OwnPart, OwnPartRefused
from rollout.wire.trajectory import Float32Array

_LOGPROBS_N = (-0.1, -2.0, -0.7, -1.2, -0.3, -3.0)  # of the small example: three sequences
_SEQUENCE_N = (0, 0, 0, 1, 1, 2)


class OwnLoss(OwnPart):
    """A policy loss: (logprobs [N], proximal [N], advantages [N], sequence [N]) -> (loss [N], statistics)."""

    CALLED_WITH: ClassVar[tuple[str, ...]] = ("logprobs_N", "proximal_N", "advantages_N", "sequence_N")
    has_ratio: ClassVar[bool] = True  # assumed, as is clips: the function is not inspected
    clips: ClassVar[bool] = True

    def __call__(
        self, logprobs_N: Tensor, proximal_N: Tensor, advantages_N: Tensor, sequence_N: Tensor
    ) -> Loss:
        return _with_statistics(self, self.call(logprobs_N, proximal_N, advantages_N, sequence_N), logprobs_N)

    def try_out(self, critic: bool) -> None:
        logprobs_N = torch.tensor(_LOGPROBS_N, requires_grad=True)
        advantages_N = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, 0.5])
        loss_N, _ = self(logprobs_N, logprobs_N.detach() - 0.1, advantages_N, torch.tensor(_SEQUENCE_N))
        _require_gradient(self, loss_N, logprobs_N)


class OwnEstimator(OwnPart):
    """An advantage estimator: (groups of episodes, ranks) -> for each group, for each episode, advantages [N].

    In a run with a critic the episodes have its values, and the estimator returns a pair: advantages, and the critic's
    targets in the same shape.
    """

    CALLED_WITH: ClassVar[tuple[str, ...]] = ("groups", "ranks")
    turns: ClassVar[bool] = False
    critic: ClassVar[bool | None] = None  # with one or without
    shaped: ClassVar[bool] = True
    siblings: ClassVar[bool] = False  # unknown: the function has to handle groups of one
    totals: ClassVar[bool] = True

    def __call__(self, groups: Groups, ranks: Ranks = ALONE) -> Advantages:
        return self._checked(self.call(groups, ranks, passed=(RankLost,)), groups, "advantages")

    def with_targets(self, groups: Groups, ranks: Ranks = ALONE) -> tuple[Advantages, Advantages]:
        """Advantages and the critic's targets."""
        returned = self.call(groups, ranks, passed=(RankLost,))
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise OwnPartRefused(
                f"{self.kind} must return (advantages, targets) in a run with a critic, not {_shown(returned)}"
            )
        advantages, targets = returned
        return self._checked(advantages, groups, "advantages"), self._checked(targets, groups, "targets")

    def try_out(self, critic: bool) -> None:
        groups = [
            [_small_episode(critic, reward) for reward in rewards] for rewards in ((1.0, 0.0), (0.5, 0.25))
        ]
        found = self.with_targets(groups)[0] if critic else self(groups)
        if not all(np.isfinite(values_N).all() for of_group in found for values_N in of_group):
            raise OwnPartRefused(f"{self.kind} returned advantages that are not finite")

    def _checked(self, returned: Any, groups: Groups, what: str) -> Advantages:
        sizes = (
            [len(group) if isinstance(group, Sized) else -1 for group in returned]
            if isinstance(returned, Iterable)
            else []
        )
        if [len(group) for group in groups] != sizes:
            raise OwnPartRefused(
                f"{self.kind} must return {what} for every episode of every group, in their order"
            )
        return [
            [self._of_episode(values, episode, what) for values, episode in zip(of_group, group, strict=True)]
            for of_group, group in zip(returned, groups, strict=True)
        ]

    def _of_episode(self, values: Any, episode: Episode, what: str) -> Float32Array:
        values_N, size = np.asarray(values, np.float32), sum(episode.tokens_K)
        if values_N.shape != (size,):
            raise OwnPartRefused(
                f"{self.kind} must return {what} of shape ({size},) for an episode of {size} sampled tokens, not "
                f"{values_N.shape}; episode.over_tokens(number) repeats a number for all of them"
            )
        return values_N


class OwnCorrection(OwnPart):
    """An off-policy correction: (log ratio [N], sequence [N], lag [N]) -> weight of each token's loss [N]."""

    CALLED_WITH: ClassVar[tuple[str, ...]] = ("log_ratio_N", "sequence_N", "lag_N")
    needs_ratio: ClassVar[bool] = False  # it may use lags alone
    masks: ClassVar[bool] = True

    def __call__(self, log_ratio_N: Tensor, sequence_N: Tensor, lag_N: Tensor) -> Tensor:
        weight_N = self.call(log_ratio_N, sequence_N, lag_N)
        return _per_token(self, weight_N, log_ratio_N, "weights").to(log_ratio_N.dtype)

    def try_out(self, critic: bool) -> None:
        self(torch.tensor(_LOGPROBS_N) + 1.0, torch.tensor(_SEQUENCE_N), torch.tensor([0, 0, 0, 1, 1, 2]))


class OwnRegularizer(OwnPart):
    """A penalty on each token: (logprobs [N], entropy [N], reference [N] or None, sequence [N]) -> (penalty [N],
    statistics).
    """

    CALLED_WITH: ClassVar[tuple[str, ...]] = ("logprobs_N", "entropy_N", "reference_N", "sequence_N")

    reference: bool = Field(
        default=False,
        description="give it the logprobs of version 0, which is then kept and computed beside the policy",
    )

    def __call__(
        self, logprobs_N: Tensor, entropy_N: Tensor, reference_N: Tensor | None, sequence_N: Tensor
    ) -> Loss:
        reference_N = reference_N if self.reference else None
        return _with_statistics(self, self.call(logprobs_N, entropy_N, reference_N, sequence_N), logprobs_N)

    def try_out(self, critic: bool) -> None:
        logprobs_N = torch.tensor(_LOGPROBS_N, requires_grad=True)
        reference_N = logprobs_N.detach() - 0.1
        penalty_N, _ = self(logprobs_N, -logprobs_N, reference_N, torch.tensor(_SEQUENCE_N))
        _require_gradient(self, penalty_N, logprobs_N)


def _with_statistics(part: OwnPart, returned: Any, like_N: Tensor) -> Loss:
    if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[1], Mapping):
        raise OwnPartRefused(
            f"{part.kind} must return (a tensor [N], a dict of statistics [N]), not {_shown(returned)}"
        )
    values_N, statistics = returned
    checked = {
        str(name): _per_token(part, of_N, like_N, f"the statistic {name!r}").detach().float()
        for name, of_N in statistics.items()
    }
    return _per_token(part, values_N, like_N, "its loss"), checked


def _per_token(part: OwnPart, returned: Any, like_N: Tensor, what: str) -> Tensor:
    if not isinstance(returned, Tensor) or returned.shape != like_N.shape:
        raise OwnPartRefused(
            f"{part.kind} must return {what} as a tensor of shape {tuple(like_N.shape)}, a number for each token and "
            f"not reduced, not {_shown(returned)}"
        )
    return returned


def _require_gradient(part: OwnPart, values_N: Tensor, logprobs_N: Tensor) -> None:
    if not values_N.requires_grad:
        raise OwnPartRefused(f"{part.kind} returns a loss without a gradient; compute it from logprobs_N")
    (slope_N,) = torch.autograd.grad(values_N.sum(), logprobs_N, allow_unused=True)
    if slope_N is None or not torch.isfinite(slope_N).all():
        raise OwnPartRefused(f"{part.kind} has no finite gradient with respect to logprobs_N")


def _shown(returned: Any) -> str:
    if isinstance(returned, Tensor):
        return f"a tensor of shape {tuple(returned.shape)}"
    return f"{type(returned).__name__} {returned!r:.60}"


def _small_episode(critic: bool, reward: float) -> Episode:
    """An episode of two turns and three sampled tokens; every named reward exists."""
    named: Mapping[str, float] = defaultdict(lambda: reward)
    values = Values(np.array([0.1, 0.2, 0.3], np.float32), 0.0) if critic else None
    return Episode(
        np.array([0.0, reward]), (2, 1), ended=True, anchors_K=("first", "second"), named=named, values=values
    )
