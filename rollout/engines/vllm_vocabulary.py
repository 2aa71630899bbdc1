"""Ids that no token has are never sampled: a model's vocabulary may be padded beyond its tokenizer's.

A logits processor of vLLM, for both of its model runners. vLLM imports it in its own processes.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2

from rollout.wire.model_folder import token_count


class KnownTokens(LogitsProcessor, LogitsProcessorV2):
    """Excludes every id from the tokenizer's number of tokens on, of all requests alike.

    The constructor's arguments beside the configuration, and those of `apply` beside the logits, differ between the two
    runners and are not used.
    """

    def __init__(self, vllm_config: Any, *unused: Any) -> None:
        count = token_count(vllm_config.model_config.model)
        assert count is not None, "started for a model with a tokenizer.json"
        self._count = count

    def apply(self, logits: torch.Tensor, *unused: Any) -> torch.Tensor:
        """Exclude the ids in place: logits [requests, vocabulary]."""
        logits[:, self._count :] = -torch.inf
        return logits

    def is_argmax_invariant(self) -> bool:
        return False  # the largest logit may be an excluded one's

    def update_state(self, batch_update: Any) -> None:
        pass  # the same for every request


PROCESSOR = f"{__name__}:{KnownTokens.__name__}"
