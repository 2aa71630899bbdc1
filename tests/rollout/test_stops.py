"""A turn ends where the chat template ends it, whatever the tokenizer calls its own end, for every engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from deploy import build, evaluate
from deploy.config import parse
from learner.model import build_tiny
from rollout.agent import Agent, Turn
from rollout.chat import Chat
from rollout.engine import Engine, Sampling
from rollout.hf_engine import HfEngine
from rollout.scripted_engine import ScriptedEngine
from rollout.vllm_engine import VllmEngine
from tests.rollout.test_chat import CHATML, bpe

TOKENIZER = bpe(CHATML, eos="<|end|>")  # ChatML, and yet another token that ends a text
TURN, TEXT = (TOKENIZER.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|end|>"))


@pytest.fixture
def model(tmp_path: Path) -> str:
    TOKENIZER.save_pretrained(tmp_path)
    build_tiny(tmp_path, TOKENIZER, layers=1, width=16, heads=2, mlp=32, context=256)
    return str(tmp_path)


def said(engine: Engine) -> tuple[str, str | None, int]:
    async def run() -> Turn:
        agent = Agent(engine, Chat(TOKENIZER), Sampling(max_tokens=50), 256)
        turn = await agent.turn(agent.begin(0), "where to?")
        assert isinstance(turn, Turn)
        return turn

    turn = asyncio.run(run())
    return turn.action, turn.completion.finish_reason, int(turn.completion.token_ids[-1])


@pytest.mark.parametrize("end", [TURN, TEXT])
def test_a_model_is_stopped_at_either_end(model: str, end: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = (TOKENIZER.encode(text, add_special_tokens=False) for text in ("left", "right"))
    wants = iter([*left, end, *right])
    monkeypatch.setattr(
        HfEngine,
        "_forward",
        lambda *given, **beside: (
            torch.nn.functional.one_hot(torch.tensor(next(wants)), len(TOKENIZER)) * 1e9,
            None,
        ),
    )
    engine = HfEngine.load(model, build.load_chat(model).stops)
    assert said(engine) == ("left", "stop", end)


def test_a_script_and_a_demonstration_end_as_the_template_does() -> None:
    assert said(ScriptedEngine(TOKENIZER, lambda prompt, rng: "left")) == ("left", "stop", TURN)
    assert Chat(TOKENIZER).encode_action("left")[-1] == TURN
    assert set(Chat(TOKENIZER).stops) == {TURN, TEXT}
    assert Chat(bpe(CHATML)).stops == (TURN,), "one token is both"


def test_vllm_is_told_both_in_a_run_and_in_an_evaluation(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[set[int]] = []

    class Started(Exception):
        pass

    async def start(name: str, path: str, stops: Any, *more: Any, **others: Any) -> VllmEngine:
        told.append(set(stops))
        raise Started

    monkeypatch.setattr(VllmEngine, "start", start)
    config = parse(
        {"name": "stops", "steps": 1, "env": {"id": "frozen_lake"}, "learner": {"model": {"path": model}}}, ""
    )
    with pytest.raises(Started):
        asyncio.run(build.vllm_engine(config, "rollout-0", model))
    conditions = evaluate.Conditions(context_tokens=256)
    with pytest.raises(Started):
        evaluate.evaluate_checkpoint(model, "frozen_lake", range(2), conditions)
    assert told == [{TURN, TEXT}] * 2
