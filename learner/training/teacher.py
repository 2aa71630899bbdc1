"""The teacher of on-policy distillation: a frozen model beside the policy, which scores what the policy sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from learner.algorithm.distillation import DistillSettings, signal
from learner.data.prepare import Example
from learner.model.policy import Policy
from learner.parallel.ranks import ALONE, Ranks
from learner.settings import ModelSettings
from learner.training.reference_policy import frozen
from rollout.wire.trajectory import Float32Array


class Teacher:
    """Loaded at once, so that a teacher that cannot be held fails at the start. ModelError, as of any model.

    model: how the policy is computed; the teacher is too, whole, on the same ranks.
    """

    def __init__(self, settings: DistillSettings, model: ModelSettings, ranks: Ranks = ALONE) -> None:
        self._coefficient = settings.coefficient
        own = model.model_copy(
            update={"path": settings.teacher, "lora": None, "gradient_checkpointing": False}
        )
        self.policy = frozen(Policy(own, ranks))

    def judge(
        self, examples: Sequence[Example], score: Callable[[Sequence[Example], Policy], list[Float32Array]]
    ) -> None:
        """Add the teacher's signal to the advantage of every sampled token, and keep its logprobs as a column.

        score: logprobs that a policy gives the sampled tokens, float32 [N] for each example. Ranks compute together.
        """
        for example, teacher_N in zip(examples, score(examples, self.policy), strict=True):
            example.columns["teacher_logprobs"] = teacher_N
            signal_N = signal(example.behavior_logprobs_N, teacher_N)
            example.advantages_N = example.advantages_N + self._coefficient * signal_N
