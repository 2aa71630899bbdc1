"""AdamW with a learning-rate schedule, a bounded gradient norm, and no step on a gradient not finite, or zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from learner.algorithm.schedule import OptimSettings, learning_rate
from learner.parallel.shards import gathered, local
from learner.training.stored_moments import StoredMoments


@contextmanager
def subnormals_as_zero() -> Iterator[None]:
    """Numbers below 1e-38 are zero in what the calling thread, and threads it starts meanwhile, compute on a CPU.

    Probabilities of attention times gradients are full of them, as are moments of rows that no token reaches any more,
    and each takes a core a hundred cycles.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did."""

    grad_norm: float  # 2-norm before scaling
    learning_rate: float
    applied: bool  # False: nothing was changed
    finite: bool = True  # False: the norm was not, or the caller's loss

    @property
    def idle(self) -> bool:
        """Nothing was to be learned: the gradient was zero."""
        return self.finite and not self.applied


class Optimizer:
    """AdamW over a model's trainable parameters. `steps` counts applied steps and drives the schedule."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], settings: OptimSettings, total_steps: int | None = None
    ) -> None:
        learning_rate(settings, 0, total_steps)  # a schedule that cannot be followed fails here, not mid-run
        self.settings = settings
        self._total_steps = total_steps
        self.steps = 0
        self._parameters = [p for p in parameters if p.requires_grad]
        matrices = [p for p in self._parameters if p.ndim >= 2]
        vectors = [p for p in self._parameters if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
        eight_bit = settings.moments == "8bit"
        self._moments = StoredMoments(self._adamw, on_host=settings.offload, eight_bit=eight_bit)
        self._as_stored = not (
            settings.offload or eight_bit
        )  # torch's optimizer updates them as they are stored

    def zero_grad(self) -> None:
        """Forget every gradient: the next backward pass hands its own over, where zeros would have to be added to."""
        for parameter in self._parameters:
            parameter.grad = None

    @subnormals_as_zero()
    def step(self, finite: bool = True) -> StepReport:
        """Scale the gradients down to max_grad_norm and apply them.

        The step is skipped where the norm is not finite, or the caller's loss was not; and where the gradient is zero
        everywhere: there was nothing to learn from, and old momentum would move the parameters all the same.
        """
        rate = learning_rate(self.settings, self.steps, self._total_steps)
        norm = self.grad_norm()
        finite = finite and math.isfinite(norm)
        if not (finite and norm):
            return StepReport(norm, rate, applied=False, finite=finite)
        if norm > self.settings.max_grad_norm:
            torch._foreach_mul_(self._gradients, self.settings.max_grad_norm / norm)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        (self._adamw if self._as_stored else self._moments).step()
        self.steps += 1
        return StepReport(norm, rate, applied=True)

    def grad_norm(self) -> float:
        """2-norm of the gradients that lie there, of all ranks; every rank has to ask."""
        return float(gathered(nn.utils.get_total_norm(self._gradients)))

    def moments_to_come(self) -> list[Tensor]:
        """Room for the moments that the first step will have on the device, beside those that are there."""
        return self._moments.to_come(self._parameters)

    def held(self) -> list[Tensor]:
        """The moments that lie on the parameters' device."""
        states = [] if self.settings.offload else self._adamw.state.values()
        return [moment for state in states for moment in state.values() if moment.ndim]

    @torch.no_grad()
    def keep(self) -> Callable[[], None]:
        """What puts parameters and moments back, to the bit, as they are now: host memory holds a copy of both."""
        steps, copies = self.steps, []
        for parameter in self._parameters:
            moments = self._adamw.state.get(parameter, {})
            copies.append((_copy(parameter), {name: _copy(tensor) for name, tensor in moments.items()}))

        @torch.no_grad()
        def put_back() -> None:
            self.steps = steps
            for parameter, (value, moments) in zip(self._parameters, copies, strict=True):
                local(parameter).copy_(value)
                for name, moment in moments.items():
                    local(self._adamw.state[parameter][name]).copy_(moment)
                if not moments:
                    self._adamw.state.pop(parameter, None)

        return put_back

    @property
    def _gradients(self) -> list[Tensor]:
        """Of all parameters; zeros where no computed row reached one.

        Its moments must still be decayed, so that leaving sequences without advantage out of the forward pass changes
        nothing; and all ranks take part in the norm.
        """
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in self._parameters if p.grad is not None]

    def state_dict(self) -> dict[str, Any]:
        """Step count, and the moments of each parameter by its number; those of sharded parameters are sharded."""
        moments = self._adamw.state_dict()["state"]
        return {"steps": self.steps, "moments": {str(place): dict(entry) for place, entry in moments.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the stored state of an optimizer over the same parameters, keeping own settings.

        Moments become what these say: those in float32 are quantized, or those in eight bits dequantized.

        The leaves of "moments" are tensors of a file, of which this rank reads the rows that it needs.
        """
        parameters = [p for group in self._adamw.param_groups for p in group["params"]]
        self._adamw.state.clear()
        for place, entry in state["moments"].items():
            parameter = parameters[int(place)]
            self._adamw.state[parameter] = self._moments.read(entry, parameter)
        self.steps = int(state["steps"])


def _copy(tensor: Tensor) -> Tensor:
    """In host memory, of what this rank holds."""
    return local(tensor.detach()).to("cpu", copy=True)
