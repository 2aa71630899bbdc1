from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from learner.algorithm.algorithm import AlgorithmSettings

EVERY_TOKEN = {"skip_zero_advantage": False}
# (what is composed, what the refusal says is wrong, what it says would fit)
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"entropy_bonus": 0.01}, "entropy_bonus", "skip_zero_advantage = false"),
    ({"kl": {"coefficient": 0.1}}, "kl", "skip_zero_advantage = false"),
    ({"aggregation": "constant"}, "'constant'", "aggregation_length"),
    ({"corrections": [{"kind": "tis"}]}, "'tis'", "proximal = 'learner'"),
    ({"corrections": [{"kind": "mask", "of": "sequence"}]}, "'mask'", "proximal = 'learner'"),
    (
        {"corrections": [{"kind": "lag", "max_lag": 1}, {"kind": "icepop"}]},
        "'icepop'",
        "proximal = 'learner'",
    ),
    ({"advantage": {"kind": "gae"}}, "'gae'", "add the section critic"),
    ({"critic": {}}, "'grpo'", "remove the section critic"),
    ({"advantage": {"kind": "gae"}, "critic": {"kind": "shared"}}, "'shared'", "skip_zero_advantage = false"),
    (
        {"kl": {"coefficient": 0.1, "estimator": "k1"}, **EVERY_TOKEN},
        "'k1' has no effect in the loss",
        "'k2', 'k3' or 'k3+'",
    ),
    ({"loss": {"kind": "reinforce"}, "epochs": 2}, "'reinforce' has no importance ratio", "'cispo'"),
    (
        {"loss": {"kind": "reinforce"}, "minibatches": 2, "proximal": "learner"},
        "'reinforce'",
        "use 1 of each",
    ),
]
ACCEPTED: list[dict[str, Any]] = [
    {},
    {"entropy_bonus": 0.01, "kl": {"coefficient": 0.1}, **EVERY_TOKEN},
    {"kl": {"coefficient": 0.1, "where": "reward"}},
    {"aggregation": "constant", "aggregation_length": 256},
    {"corrections": [{"kind": "tis"}, {"kind": "lag", "max_lag": 2}], "proximal": "learner"},
    {"corrections": [{"kind": "lag", "max_lag": 2}]},
    {"advantage": {"kind": "gae"}, "critic": {}},
    {"advantage": {"kind": "gae"}, "critic": {"kind": "shared"}, **EVERY_TOKEN},
    {"kl": {"coefficient": 0.1, "estimator": "k2"}, **EVERY_TOKEN},
    {"loss": {"kind": "cispo"}, "epochs": 2, "minibatches": 2},
]


@pytest.mark.parametrize(("recipe", "wrong", "fits"), REFUSED, ids=str)
def test_parts_that_do_not_fit_are_refused_in_one_line_that_says_what_fits(
    recipe: dict[str, Any], wrong: str, fits: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        AlgorithmSettings.model_validate(recipe)
    (error,) = refused.value.errors()
    assert "\n" not in error["msg"]
    assert wrong in error["msg"].partition(fits)[0]
    assert fits in error["msg"]


@pytest.mark.parametrize("recipe", ACCEPTED, ids=str)
def test_what_the_refusals_recommend_is_accepted(recipe: dict[str, Any]) -> None:
    AlgorithmSettings.model_validate(recipe)


def test_every_estimator_that_needs_no_critic_is_named_by_the_one_that_does() -> None:
    with pytest.raises(ValidationError) as refused:
        AlgorithmSettings.model_validate({"advantage": {"kind": "gae"}})
    built_in, _ = AlgorithmSettings.model_json_schema()["properties"]["advantage"]["oneOf"]
    kinds = built_in["discriminator"]["mapping"]
    assert all(kind in str(refused.value) for kind in kinds)


@pytest.mark.parametrize(
    ("recipe", "kinds"),
    [
        ({"advantage": {"kind": "group"}}, ["grpo", "rloo", "gae"]),
        ({"loss": {"kind": "clip"}}, ["ppo", "gspo", "cispo"]),
        ({"corrections": [{"kind": "cap"}]}, ["tis", "mask", "icepop", "lag"]),
    ],
)
def test_an_unknown_kind_is_told_the_known_ones(recipe: dict[str, Any], kinds: list[str]) -> None:
    with pytest.raises(ValidationError) as refused:
        AlgorithmSettings.model_validate(recipe)
    assert all(f"'{kind}'" in str(refused.value) for kind in kinds)
