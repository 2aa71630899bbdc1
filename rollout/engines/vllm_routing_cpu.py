"""Routing of a mixture of experts, recorded by vLLM on CPUs as by its model runner on GPUs.

vLLM returns the experts of every token with a request (`enable_return_routed_experts`), those of tokens from the prefix
cache included. Its scheduler, its routers and the connector between them are the same on CPUs; only the model runner
there, the first version, does not call the connector. It is called here: before a step with the scheduler's news of
requests, and after it with the experts of the tokens that the step has computed, in the order of its batch.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.distributed.aux_output_connector.worker import get_aux_output_connector
from vllm.v1.worker.cpu_model_runner import CPUModelRunner


def record_routing() -> None:
    """Make the model runners of this process, and of processes forked from it, return the experts of every token."""
    initialize, execute = CPUModelRunner.initialize_kv_cache, CPUModelRunner.execute_model
    sample = CPUModelRunner.sample_tokens

    def initialize_kv_cache(self: Any, kv_cache_config: Any, *given: Any, **named: Any) -> None:
        initialize(self, kv_cache_config, *given, **named)
        self.routing = get_aux_output_connector(self.model, self.vllm_config, kv_cache_config)

    def execute_model(self: Any, scheduler_output: Any, *given: Any, **named: Any) -> Any:
        self.routing.begin_step(scheduler_output.aux_output_connector_metadata)
        return execute(self, scheduler_output, *given, **named)

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        if self.execute_model_state is None:  # nothing was computed
            return sample(self, grammar_output)
        # Read before sampling, which ends the step.
        pending = self.routing.prepare_output(_batch(self))
        sampled_B = 1 - self.discard_request_mask.np[: self.input_batch.num_reqs].astype(np.int64)
        output = sample(self, grammar_output)
        if pending is not None:  # the worker whose output is the engine's
            pending.enqueue_cpu_copy(sampled_B, np.zeros_like(sampled_B))
            output.aux_output_connector_output = pending.process_output()
        return output

    # vLLM would refuse this runner; what else it requires is so, or is checked with the recipe (engine_checks.py).
    VllmConfig._verify_aux_output_compatibility = lambda self: None
    CPUModelRunner.initialize_kv_cache = initialize_kv_cache
    CPUModelRunner.execute_model = execute_model
    CPUModelRunner.sample_tokens = sample_tokens


def _batch(runner: Any) -> SimpleNamespace:
    """The step's batch, as the connector reads it: requests, the borders of their tokens, and their earlier tokens."""
    batch, scheduled = runner.input_batch, runner.execute_model_state.scheduler_output.num_scheduled_tokens
    return SimpleNamespace(
        req_ids=batch.req_ids,
        query_start_loc_np=np.cumsum([0, *(scheduled[request] for request in batch.req_ids)]),
        num_computed_tokens_np=batch.num_computed_tokens_cpu[: batch.num_reqs].copy(),
    )
