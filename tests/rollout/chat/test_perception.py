"""Pictures on the way from an observation to a sampled turn: as many tokens as features, and the policy sees them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from envs import registry
from envs.builtin.patches import Patches
from envs.hosting.host import HostSettings
from envs.images import image_observation
from learner.data.batch import row_of, sequences_of
from learner.model.policy import Policy
from learner.settings import ModelSettings
from rollout.agents.agent import Agent, AgentSettings, Conversation
from rollout.agents.part import reset_context, with_text_after, with_text_before
from rollout.chat.chat import Chat, ChatError
from rollout.chat.perception import Perception, PerceptionError
from rollout.engines.engine import EngineFailed, Sampling
from rollout.engines.hf_engine import HfEngine
from rollout.engines.scripted_engine import ScriptedEngine
from rollout.episodes.episode import EpisodeLimits, EpisodeSpec
from rollout.episodes.group import play
from rollout.episodes.pool import EnvironmentPool
from rollout.wire import images
from rollout.wire.schema import decode, encode
from rollout.wire.trajectory import Group, PartialEpisode, Slot, Task
from tests.seeing import CONTEXT, build, picture

torch.set_num_threads(1)


class Rig:
    def __init__(self, folder: Path) -> None:
        build("llava", folder)
        self.path = str(folder)
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        perception = Perception.load(self.path)
        assert perception is not None
        self.perception = perception
        self.chat = Chat(self.processor.tokenizer, perception)
        self.engine = HfEngine.load(self.path, [self.processor.tokenizer.eos_token_id])

    def agent(self, engine: Any = None, **settings: Any) -> Agent:
        sampling = Sampling(max_tokens=3)
        return Agent(engine or self.engine, self.chat, sampling, CONTEXT, AgentSettings(**settings))


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    return Rig(tmp_path_factory.mktemp("llava"))


def said(text: str, *pictures: str) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": each} for each in pictures]
    return [{"role": "user", "content": [{"type": "text", "text": text}, *parts]}]


def test_turn_by_turn_the_tokens_are_those_of_the_models_own_processor(rig: Rig) -> None:
    turns = [said("red", picture(1)), said("a", picture(2), picture(3)), said("b")]
    answers = ["blue", "green"]
    ids = list(rig.chat.opening(turns[0]))
    for answer, turn in zip(answers, turns[1:], strict=True):
        sampled = rig.chat.encode_action(answer)
        ids += [*sampled, *rig.chat.delta(turn, sampled)]
    text = (
        "<|user|>red<image><|assistant|>blue<|end|><|user|>a<image><image><|assistant|>green<|end|>"
        "<|user|>b<|assistant|>"
    )
    pictures = rig.processor.image_processor.fetch_images([picture(1), picture(2), picture(3)])
    assert ids == rig.processor(text=[text], images=pictures, encoding="utf-8")["input_ids"][0]
    assert ids.count(rig.perception.placeholder_id) == 3 * 4
    collapsed = rig.perception.collapsed(ids, [picture(1), picture(2), picture(3)])
    assert rig.processor.tokenizer.decode(collapsed) == text


def test_what_cannot_be_shown_is_refused_in_one_line(rig: Rig, chat: Chat) -> None:
    with pytest.raises(ChatError, match="1 pictures, but the rendered text has 2 times <image>"):
        rig.chat.opening(said("look: <image>", picture(1)))
    with pytest.raises(ChatError, match="reads text only"):
        chat.opening(said("red", picture(1)))
    with pytest.raises(ChatError, match="a picture is a data URL"):
        rig.chat.opening(said("red", "http://somewhere/else.png"))
    with pytest.raises(ChatError, match="a part of a message has no type"):
        rig.chat.opening([{"role": "user", "content": ["red"]}])
    with pytest.raises(ChatError, match="a picture is not a PNG"):
        rig.chat.opening(said("red", "data:image/png;base64,AAAA"))
    with pytest.raises(PerceptionError, match="a picture cannot be read"):
        rig.chat.opening(said("red", picture(1)[:80]))
    bomb = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgABAAAAAQAA"  # a header that says 65536 x 65536
    with pytest.raises(ChatError, match="a picture has 65536 x 65536 pixels"):
        rig.chat.opening(said("red", bomb))
    with pytest.raises(
        PerceptionError, match="5 image tokens, but the processor makes 4 features of 1 pictures"
    ):
        rig.perception.check([rig.perception.placeholder_id] * 5, [picture(1)])


def test_the_row_is_named_and_an_episode_holds_so_many_bytes(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(observations: list[Any]) -> None:
        agent, conversation = rig.agent(), Conversation(seed=0)
        for observation in observations:
            await agent.turn(conversation, observation)

    with pytest.raises(ChatError, match=r"turn 1, segment 0: 0 pictures, but .* 1 times <image>"):
        asyncio.run(run([said("red", picture(1)), "an <image> that is none"]))
    monkeypatch.setattr("rollout.agents.agent.MAX_EPISODE_BYTES", len(picture(1)) + 1)
    with pytest.raises(ChatError, match="turn 1: the episode has shown"):
        asyncio.run(run([said("red", picture(1)), said("red", picture(2))]))
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 100)
    with pytest.raises(ChatError, match="pixels or 100 bytes; make it smaller"):
        asyncio.run(run([said("red", picture(1))]))


def plain_logprobs(model: Any, inputs: dict[str, Any], ids: list[int], count: int, never: int) -> np.ndarray:
    """Of the last `count` tokens, all at once and without a cache, no placeholder being possible."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), **inputs).logits[0].float()
    logits[:, never] = -torch.inf
    chosen = logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return chosen[-count:].numpy()


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl"])
def test_what_is_sampled_has_the_models_own_logprobs(family: str, tmp_path: Path) -> None:
    build(family, tmp_path)
    processor: Any = AutoImageProcessor.from_pretrained(tmp_path)
    model: Any = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    never = model.config.image_token_id
    per_picture = 4
    whole = SimpleNamespace(  # what is used of a processor; Qwen's own needs torchvision for videos
        image_processor=processor,
        image_token="#",
        image_token_id=never,
        replace_image_token=lambda inputs, image_idx: "#" * per_picture,
    )
    engine = HfEngine(model, [], perception=Perception(whole))
    shows = [picture(1), picture(2)]
    prompt = [5, *[never] * 4, 6, 7, *[never] * 4, 8]
    other = [9, *[never] * 4, 10]

    async def together() -> Any:
        return await asyncio.gather(
            engine.generate(prompt, Sampling(max_tokens=20, seed=1), shows),
            engine.generate(other, Sampling(max_tokens=20, seed=2), shows[:1]),
            engine.generate([5, 6, 7], Sampling(max_tokens=20, seed=3)),
        )

    for asked, pictures, completion in zip(
        (prompt, other, [5, 6, 7]), (shows, shows[:1], []), asyncio.run(together()), strict=True
    ):
        ids = [*asked, *completion.token_ids.tolist()]
        assert never not in completion.token_ids
        inputs: dict[str, Any] = {}
        if pictures:
            inputs = dict(processor(images=processor.fetch_images(pictures), return_tensors="pt"))
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (torch.tensor([ids]) == never).int()
        expected = plain_logprobs(model, inputs, ids, 20, never)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
    with pytest.raises(PerceptionError, match="8 image tokens, but the processor makes 4 features"):
        asyncio.run(engine.generate(prompt, Sampling(max_tokens=2), shows[:1]))


def test_an_episode_with_pictures_is_stored_resumed_and_scored_as_it_was_sampled(rig: Rig) -> None:
    slot = Slot(0, 0, Task.of("patches", 3, {"level": 3}), 0)
    asked: list[tuple[list[int], list[str]]] = []

    class Noted(HfEngine):
        async def generate(self, prompt_ids: Any, sampling: Sampling, images: Any = ()) -> Any:
            asked.append((list(prompt_ids), list(images)))
            return await super().generate(prompt_ids, sampling, images)

    engine = Noted(rig.engine._model, [3], perception=rig.perception)
    engine.version = 0

    def played(resume_from: PartialEpisode | None = None) -> Group:
        async def run() -> Group:
            pool = EnvironmentPool(make=lambda env_id, **options: Lenient(**options))
            episode = play(
                EpisodeSpec(slot, 0, seed=5),
                pool,
                rig.agent(engine),
                EpisodeLimits(4, 60.0),
                resume_from=resume_from,
            )
            return Group(slot, (await episode,))

        return decode(encode(asyncio.run(run())))

    (trajectory,) = played().trajectories
    assert trajectory.error is None and len(trajectory.turns) == 2
    assert [len(pictures) for _, pictures in asked] == [1, 2]
    (again,) = played(PartialEpisode(trajectory.turns[:1], None, None)).trajectories
    assert asked[2] == asked[1], "what goes on after a crash is shown what was shown before"
    assert again.turns[1].action_ids.tolist() == trajectory.turns[1].action_ids.tolist()
    policy = Policy(ModelSettings(path=rig.path))
    row = row_of(sequences_of(trajectory, np.zeros(trajectory.num_sampled, np.float32)))
    with torch.no_grad():
        scored, _ = policy.score(row, 1.0)
    np.testing.assert_allclose(scored.numpy(), row.behavior_logprobs_N.numpy(), atol=1e-4)


class Lenient(Patches):
    """Any word is a colour."""

    def step(self, action: str) -> Any:
        return super().step("red")


def test_a_scripted_engine_answers_by_what_it_is_shown(rig: Rig) -> None:
    engine = ScriptedEngine(rig.processor.tokenizer, lambda prompt, rng: str(rng.randrange(10**6)))

    def answer(*pictures: str) -> list[int]:
        completion = asyncio.run(engine.generate([1, 2], Sampling(seed=1), pictures))
        return list(completion.token_ids.tolist())

    assert answer(picture(1)) == answer(picture(1)) != answer(picture(2))
    assert answer() == asyncio.run(engine.generate([1, 2], Sampling(seed=1))).token_ids.tolist()


def test_an_engine_without_eyes_says_so(rig: Rig) -> None:
    blind = HfEngine(rig.engine._model, [])
    with pytest.raises(EngineFailed, match="reads text only"):
        asyncio.run(blind.generate([1, 2], Sampling(max_tokens=1), [picture(1)]))


def test_parts_of_an_agent_add_to_pictures_what_they_say() -> None:
    observation = image_observation(np.zeros((4, 4, 3), np.uint8), "look")
    first = with_text_before("Plan: go", observation)[0]["content"]
    last = with_text_after(observation, "Write a plan.")[-1]["content"]
    asked = [{"role": "user", "content": "and?"}]
    both = reset_context([*observation, *asked], asked)[0]["content"]
    kinds = [[part["type"] for part in content] for content in (first, last, both)]
    assert kinds == [["text", "text", "image"], ["text", "image", "text"], ["text", "image", "text"]]
    assert first[0]["text"] == "Plan: go\n" and last[2]["text"] == "\nWrite a plan."
    assert observation == image_observation(np.zeros((4, 4, 3), np.uint8), "look")


def test_a_replica_in_a_process_of_its_own_shows_the_same() -> None:
    task = Task.of("patches", 0)

    async def run() -> Any:
        pool = EnvironmentPool(host=HostSettings(where="process"))
        replica = await pool.take(task)
        try:
            return await replica.reset(0)
        finally:
            await pool.discard(task, replica)

    assert asyncio.run(run()) == registry.make("patches").reset(seed=0)[0]
