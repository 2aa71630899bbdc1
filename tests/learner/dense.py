"""A learner step as the formulas have it: each segment alone through transformers' own model, token by token.

Nothing is packed, nothing is skipped, and every gradient that a paper derives is put in by hand. float64 throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests import reference
from tests.reference import Episode, Token

Recipe = dict[str, Any]
Valued = Callable[
    [Episode], tuple[list[Tensor], Tensor]
]  # values before sampled tokens, and after the last token


def load(folder: Path) -> PreTrainedModel:
    """transformers' own model, with its plain attention."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double().eval()


def with_weights(model: PreTrainedModel, weights: dict[str, Tensor]) -> PreTrainedModel:
    """The same model with others."""
    other = deepcopy(model)
    other.load_state_dict(weights)
    return other


def segments(story: Episode) -> list[list[Token]]:
    """Its runs of tokens with one unbroken history."""
    count = story.tokens[-1].segment + 1
    return [[token for token in story.tokens if token.segment == segment] for segment in range(count)]


class Dense:
    """A step of a learner at `version`.

    policy: as it stands; first: as it stood at version 0; critic: what states are worth, where the recipe has one.
    """

    def __init__(
        self,
        recipe: Recipe,
        version: int,
        temperature: float,
        policy: PreTrainedModel,
        first: PreTrainedModel,
        critic: Valued | None = None,
    ) -> None:
        self._recipe, self._version, self._temperature = recipe, version, temperature
        self._policy, self._first, self._critic = policy, first, critic

    def step(self, stories: list[list[Episode]], last: int = 0) -> tuple[float, list[Tensor]]:
        """Loss and gradients. last: only so many episodes are in the loss, the last ones; 0: all."""
        recipe = self._recipe
        shaped = [[self._shaped(story) for story in siblings] for siblings in stories]
        advantages = reference.advantages(recipe["advantage"], shaped)
        if self._divergence == "sampled":
            both = zip(shaped, advantages, strict=True)
            advantages = [[self._taught(*pair) for pair in zip(*each, strict=True)] for each in both]
        pairs = [
            pair for siblings in zip(shaped, advantages, strict=True) for pair in zip(*siblings, strict=True)
        ]
        found = [self._objective(story, advantages) for story, advantages in pairs[-last:]]
        values, moving = zip(*found, strict=True)
        how = (recipe["aggregation"], recipe.get("aggregation_length"))
        reference.aggregate(moving, *how).backward()
        return reference.aggregate(values, *how), gradients(self._policy)

    def _shaped(self, story: Episode) -> Episode:
        """The episode with its reward as the recipe shapes it, and with the critic's values."""
        kl, overlong = self._recipe.get("kl"), self._recipe.get("overlong")
        if overlong:
            share = reference.overlong(len(story.sampled), overlong["tokens"], overlong["margin"])
            story = replace(
                story, rewards=(*story.rewards[:-1], story.rewards[-1] + overlong["weight"] * share)
            )
        if kl and kl["where"] == "reward":
            pairs = zip(story.sampled, self._plain(self._first, story), strict=True)
            apart = [reference.kl(token.behavior, first, kl["estimator"])[0] for token, first in pairs]
            story = replace(story, extra=tuple(-kl["coefficient"] * x for x in apart))
        return story if self._critic is None else with_values(story, self._critic)

    def _taught(self, story: Episode, advantages: list[float]) -> list[float]:
        """The advantages, and what a teacher adds that is the policy of version 0."""
        factor = self._recipe["distill"]["coefficient"]
        both = zip(advantages, story.sampled, self._plain(self._first, story), strict=True)
        return [advantage + factor * (taught - token.behavior) for advantage, token, taught in both]

    def _objective(self, story: Episode, advantages: list[float]) -> tuple[list[float], list[Tensor]]:
        """Of each sampled token: its loss, and what has the gradient of it."""
        recipe, bonus = self._recipe, self._recipe.get("entropy_bonus", 0.0)
        logprobs, entropies = self._distributions(self._policy, story)
        pairs = self._corrected(story, [x.item() for x in logprobs], advantages)
        if recipe.get("kl", {}).get("where") == "loss":
            weight, estimator = recipe["kl"]["coefficient"], recipe["kl"]["estimator"]
            both = zip(logprobs, self._plain(self._first, story), strict=True)
            added = [reference.kl(x.item(), first, estimator) for x, first in both]
            pairs = [(a + weight * c, b + weight * d) for (a, b), (c, d) in zip(pairs, added, strict=True)]
        values = [value - bonus * h.item() for (value, _), h in zip(pairs, entropies, strict=True)]
        moving = [slope * x - bonus * h for (_, slope), x, h in zip(pairs, logprobs, entropies, strict=True)]
        if self._divergence in ("reverse", "forward"):
            factor, apart = recipe["distill"]["coefficient"], self._apart(story)
            values = [value + factor * x.item() for value, x in zip(values, apart, strict=True)]
            moving = [one + factor * x for one, x in zip(moving, apart, strict=True)]
        return values, moving

    @property
    def _divergence(self) -> str | None:
        """What is learned from a teacher; None: there is none."""
        distill = self._recipe.get("distill")
        return None if distill is None else str(distill.get("divergence", "sampled"))

    def _apart(self, story: Episode) -> list[Tensor]:
        """The divergence from the teacher where each token was sampled, summed over the vocabulary."""
        found = []
        with torch.no_grad():
            taught = self._before(self._first, story)
        for own_V, other_V in zip(self._before(self._policy, story), taught, strict=True):
            left_V, right_V = (own_V, other_V) if self._divergence == "reverse" else (other_V, own_V)
            found.append((left_V.exp() * (left_V - right_V)).sum())
        return found

    def _corrected(
        self, story: Episode, logprobs: list[float], advantages: list[float]
    ) -> list[reference.Pair]:
        """The policy loss and its slope, times what corrections say."""
        behavior = [token.behavior for token in story.sampled]
        proximal = logprobs if self._recipe.get("proximal") == "learner" else behavior
        places = [token.segment for token in story.sampled]
        lags = [self._version - token.version for token in story.sampled]
        pairs = reference.loss(self._recipe["loss"], logprobs, proximal, advantages, places)
        for section in self._recipe.get("corrections", []):
            ratios = [p - b for p, b in zip(proximal, behavior, strict=True)]
            weights = reference.correction(section, ratios, places, lags)
            pairs = [(w * value, w * slope) for w, (value, slope) in zip(weights, pairs, strict=True)]
        return pairs

    def _distributions(self, model: PreTrainedModel, story: Episode) -> tuple[list[Tensor], list[Tensor]]:
        """Logprob of each sampled token, and the entropy of what it was drawn from."""
        pairs = list(zip(story.sampled, self._before(model, story), strict=True))
        entropies = [-(before_V.exp() * before_V).sum() for _, before_V in pairs]
        return [before_V[token.id] for token, before_V in pairs], entropies

    def _before(self, model: PreTrainedModel, story: Episode) -> list[Tensor]:
        """Logprobs of the whole vocabulary where each token was sampled."""
        found = []
        for tokens in segments(story):
            logits_TV = model(torch.tensor([[token.id for token in tokens]]), use_cache=False).logits[0]
            logprobs_TV = (logits_TV / self._temperature).log_softmax(-1)
            found += [logprobs_TV[place - 1] for place, token in enumerate(tokens) if token.sampled]
        return found

    def _plain(self, model: PreTrainedModel, story: Episode) -> list[float]:
        return [x.item() for x in self._distributions(model, story)[0]]


def valued(trunk: PreTrainedModel, head: nn.Linear) -> Valued:
    """A function from an episode to what a critic says of its states."""

    def look(story: Episode) -> tuple[list[Tensor], Tensor]:
        before: list[Tensor] = []
        for tokens in segments(story):
            ids = torch.tensor([[token.id for token in tokens]])
            values_T = head(trunk.base_model(ids).last_hidden_state[0])[:, 0]
            before += [values_T[place - 1] for place, token in enumerate(tokens) if token.sampled]
        return before, values_T[-1]

    return look


def with_values(story: Episode, critic: Valued) -> Episode:
    """The episode, and what the critic says of it."""
    before, after = critic(story)
    return replace(story, values=tuple(x.item() for x in before), after=after.item())


def gradients(*modules: nn.Module) -> list[Tensor]:
    """Of all parameters, in order."""
    return [p.grad.clone() for module in modules for p in module.parameters() if p.grad is not None]
