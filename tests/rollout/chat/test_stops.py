"""A turn ends where the chat template ends it, whatever the tokenizer calls its own end, for every engine."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.assembly import build
from deploy.config.load import parse
from deploy.run import evaluate
from envs.base import Message
from learner.model.tiny import build_tiny
from rollout.agents.agent import Agent, SampledTurn
from rollout.chat.chat import Chat
from rollout.chat.end_tokens import end_tokens
from rollout.engines.engine import Engine, Sampling
from rollout.engines.hf_engine import HfEngine
from rollout.engines.scripted_engine import ScriptedEngine
from rollout.engines.vllm_engine import VllmEngine
from rollout.wire.model_folder import ModelMissing
from tests.rollout.chat.test_chat import CHATML, bpe
from tests.smollm2 import FOLDER, needs_smollm2

TOKENIZER = bpe(CHATML, eos="<|end|>")  # ChatML, and yet another token that ends a text
TURN, TEXT, CALL = (TOKENIZER.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|end|>", "<|stop|>"))
TOOLS_CALLED = "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"


@pytest.fixture
def model(tmp_path: Path) -> str:
    TOKENIZER.save_pretrained(tmp_path)
    build_tiny(tmp_path, TOKENIZER, layers=1, width=16, heads=2, mlp=32, context=256)
    return str(tmp_path)


def said(engine: Engine, chat: Chat | None = None) -> tuple[str, str | None, int]:
    async def run() -> SampledTurn:
        agent = Agent(engine, chat or Chat(TOKENIZER), Sampling(max_tokens=50), 256)
        turn = await agent.turn(agent.begin(0), "where to?")
        assert isinstance(turn, SampledTurn)
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


def also_ended_by(model: str, token: int, file: str) -> None:
    """The model's own files name another token that ends a turn."""
    path = Path(model) / file
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"eos_token_id": [TEXT, token]}),
        encoding="utf-8",
    )


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_every_token_that_the_models_files_name_ends_a_turn(
    model: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    also_ended_by(model, CALL, file)
    stops = build.load_chat(model).stops
    assert stops == (TURN, TEXT, CALL)
    left, right = (TOKENIZER.encode(text, add_special_tokens=False) for text in ("left", "right"))
    for end in stops:
        wants = iter([*left, end, *right])
        monkeypatch.setattr(
            HfEngine,
            "_forward",
            lambda *given, wants=wants, **beside: (
                torch.nn.functional.one_hot(torch.tensor(next(wants)), len(TOKENIZER)) * 1e9,
                None,
            ),
        )
        assert said(HfEngine.load(model, stops), build.load_chat(model)) == ("left", "stop", end)
        words = f"left{TOKENIZER.convert_ids_to_tokens(end)}right"
        script = ScriptedEngine(TOKENIZER, lambda prompt, rng, words=words: words, stop_token_ids=stops)  # type: ignore[misc]
        assert said(script, build.load_chat(model)) == ("left", "stop", end)


def test_a_turn_is_closed_once_behind_whichever_token_ended_it() -> None:
    # As Llama 3.1: a call ends with a token of its own, in the place of the turn's.
    written = CHATML.replace("<|im_end|>", "{{ '<|stop|>' if m.tool_calls else '<|im_end|>' }}")
    tokenizer = bpe(TOOLS_CALLED.join(written.split("{{ m.content }}")), eos="<|end|>")
    chat = Chat(tokenizer, ends=[TEXT, CALL])
    call = {"id": "1", "type": "function", "function": {"name": "left", "arguments": {}}}
    history: list[Message] = [{"role": "user", "content": "go"}]
    rendered = tokenizer.apply_chat_template(
        [
            *history,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "ok"},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    spoken = tokenizer.encode("left", add_special_tokens=False)
    result: list[Message] = [{"role": "tool", "content": "ok"}]

    def whole(end: int) -> str:
        return str(
            tokenizer.decode([*chat.opening(history), *spoken, end, *chat.delta(result, [*spoken, end])])
        )

    assert whole(CALL) == rendered
    assert whole(TURN) == rendered.replace("<|stop|>", "<|im_end|>")
    # The end of a whole text is none that the template writes: it closes the turn as ever.
    assert whole(TEXT) == rendered.replace("<|stop|>", "<|end|><|im_end|>")
    assert chat.continue_turn({"role": "assistant", "content": "x"}, [*spoken, CALL]) == chat.delta(
        [{"role": "user", "content": "x"}], [*spoken, CALL]
    )


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ([7, 5], 7, (7, 5)),
        (7, [5, 7], (7, 5)),
        (None, None, ()),
        ([7, None, -1, True], 7, (7,)),
    ],
)
def test_every_end_token_of_both_files_is_read(
    tmp_path: Path, generation: Any, config: Any, ends: tuple[int, ...]
) -> None:
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": generation}), encoding="utf-8"
    )
    (tmp_path / "config.json").write_text(
        json.dumps({"text_config": {"eos_token_id": config}}), encoding="utf-8"
    )
    assert end_tokens(str(tmp_path)) == ends
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object"):
        end_tokens(str(tmp_path))
    with pytest.raises(ModelMissing):
        end_tokens(str(tmp_path / "gone"))


@needs_smollm2
def test_the_real_smollm2_is_ended_by_one_token() -> None:
    assert build.load_chat(str(FOLDER)).stops == (2,)


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
        asyncio.run(build.start_engine(config, "rollout-0", model))
    conditions = evaluate.Conditions(context_tokens=256)
    with pytest.raises(Started):
        evaluate.evaluate_checkpoint(model, "frozen_lake", range(2), conditions)
    assert told == [{TURN, TEXT}] * 2
