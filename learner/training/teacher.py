"""The teacher of on-policy distillation: a frozen model beside the policy, which scores what the policy sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from learner.algorithm.distillation import DistillSettings, signal
from learner.data.batch import MicroBatch
from learner.data.prepare import Example
from learner.model.divergence import Opposite
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
        self.settings = settings
        own = model.beside.model_copy(
            update={
                "path": settings.teacher,
                "lora": None,
                "gradient_checkpointing": False,
                "router_balance": 0.0,
                "expert_parallel": False,
            }
        )
        self.policy = frozen(Policy(own, ranks))

    def held(self) -> Iterator[Tensor]:
        """Its weights, which lie on the device."""
        return self.policy.model.parameters()

    def judge(
        self, examples: Sequence[Example], score: Callable[[Sequence[Example], Policy], list[Float32Array]]
    ) -> None:
        """Add the teacher's signal to the advantage of every sampled token, and keep its logprobs as a column.

        Of the divergence `sampled` alone; the others are a loss. score: logprobs that a policy gives the sampled
        tokens, float32 [N] for each example. Ranks compute together.
        """
        if self.settings.divergence != "sampled":
            return
        for example, teacher_N in zip(examples, score(examples, self.policy), strict=True):
            example.columns["teacher_logprobs"] = teacher_N
            signal_N = signal(example.behavior_logprobs_N, teacher_N)
            example.advantages_N = example.advantages_N + self.settings.coefficient * signal_N

    def against(self, micro: MicroBatch) -> Opposite | None:
        """What the policy is compared with at the row's pairs; None: the teacher is learned from as an advantage."""
        direction = self.settings.divergence
        return None if direction == "sampled" else Opposite(self.policy.head(micro), direction)
