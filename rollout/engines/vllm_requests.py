"""Requests to vLLM: token ids and what they are sampled with in, a completion or logprobs out.

Prompts have the weight version as cache salt, so that a prefix computed by one version is never used by a request that
starts under another. Every wait for vLLM ends when its engine core does (vllm_process.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rollout.engines import vllm_images
from rollout.engines.engine import Completion, EngineFailed, Sampling, as_bytes
from rollout.wire.trajectory import Float32Array

if TYPE_CHECKING:
    from rollout.chat.perception import Perception
    from rollout.engines.vllm_process import CoreProcess


class Requests:
    """The requests to one engine, from its event loop. They raise EngineFailed and EngineDied.

    seeded: samples depend on a request's seed. In every method `version` is that of the weights, and `lora` vLLM's
    request of an adapter.
    """

    def __init__(
        self,
        llm: Any,
        core: CoreProcess,
        name: str,
        stop_token_ids: Sequence[int],
        seeded: bool,
        perception: Perception | None,
    ) -> None:
        self._llm = llm
        self._core = core
        self._name = name
        self._stop = list(stop_token_ids)
        self._seeded = seeded
        self._perception = perception
        self._ids = itertools.count()
        self._params: dict[tuple[float, float, int], Any] = {}  # of requests without a seed

    async def sample(
        self, prompt_ids: Sequence[int], sampling: Sampling, images: Sequence[str], version: int, lora: Any
    ) -> Completion:
        """Sample one completion."""
        output = await self._finished(prompt_ids, self._sampling_params(sampling), images, version, lora)
        completion = output.outputs[0]
        if completion.finish_reason not in ("stop", "length") or completion.weight_versions is None:
            raise EngineFailed(f"{self._name}: a request ended with {completion.finish_reason!r}")
        token_ids = np.asarray(completion.token_ids, dtype=np.int32)
        chosen = [
            rank[token].logprob for rank, token in zip(completion.logprobs, completion.token_ids, strict=True)
        ]
        versions = np.empty(len(token_ids), dtype=np.int32)
        for span in completion.weight_versions:
            versions[span.start : span.end] = int(span.version)
        logprobs, routed = np.asarray(chosen, dtype=np.float32), as_bytes(completion.routed_experts)
        return Completion(token_ids, logprobs, versions, completion.finish_reason, routed)

    async def score(self, token_ids: Sequence[int], version: int, lora: Any) -> Float32Array:
        """[T-1] logprob of every token after the first, at temperature 1."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        output = await self._finished(token_ids, params, (), version, lora)
        ranks = zip(output.prompt_logprobs[1:], token_ids[1:], strict=True)
        return np.asarray([rank[token].logprob for rank, token in ranks], dtype=np.float32)

    async def _finished(
        self, token_ids: Sequence[int], params: Any, images: Sequence[str], version: int, lora: Any
    ) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        # The type "token" is the output of vLLM's renderer: nothing is left to tokenize, in a thread for each request.
        prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": list(token_ids)}
        if images:
            prompt = vllm_images.prompt(self._perception, token_ids, images)
        prompt["cache_salt"] = str(version)
        request = f"{self._name}-{next(self._ids)}"
        try:
            generating = self._llm.generate(prompt, params, request, lora_request=lora)
            outputs = [out async for out in generating]
        except EngineDeadError as error:
            raise await self._core.death() from error
        except EngineGenerateError as error:
            if self._llm.errored:
                raise await self._core.death() from error
            raise EngineFailed(f"{self._name}: vLLM failed on a request: {error.__cause__!r}") from error
        if not outputs:
            raise EngineFailed(f"{self._name}: vLLM gave no output for a request of {len(token_ids)} tokens")
        if images:
            vllm_images.require_same(token_ids, outputs[-1].prompt_token_ids, images)
        return outputs[-1]

    def _sampling_params(self, sampling: Sampling) -> Any:
        if self._seeded and sampling.seed is not None:
            return self._new_params(sampling, sampling.seed)
        key = (sampling.temperature, sampling.top_p, sampling.max_tokens)
        if key not in self._params:
            self._params[key] = self._new_params(sampling, None)
        return self._params[key]

    def _new_params(self, sampling: Sampling, seed: int | None) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=None if seed is None else seed % 2**63,
            stop_token_ids=self._stop,
            logprobs=0,
            logit_bias=vllm_images.never_sampled(self._perception),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # no deep copy per request: these are never changed
        )
