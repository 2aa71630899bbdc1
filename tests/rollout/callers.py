"""Foreign agents of every kind: functions that know the openai client and nothing of Manta."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

from openai import AsyncOpenAI, OpenAI

Task = dict[str, Any]
PATIENT = 60.0  # an upper bound of what any of them waits, in seconds

heard: dict[int, list[Any]] = {}  # by a task's seed, what a function was told
gate = threading.Event()


def client(base_url: str, api_key: str) -> OpenAI:
    return OpenAI(base_url=base_url, api_key=api_key, timeout=PATIENT)


def ask(openai: Any, messages: list[Any], **more: Any) -> Any:
    return openai.chat.completions.create(model="policy", messages=messages, **more)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def planned(base_url: str, api_key: str, task: Task) -> float:
    """Follow a plan: extend the history, drop its beginning, edit it, or speak in a second conversation."""
    openai = client(base_url, api_key)
    told = heard[task["seed"]] = []
    messages: list[Any] = [user("turn 0")]
    for number, move in enumerate(task["plan"]):
        answer = ask(openai, messages)
        said = answer.choices[0].message
        told.append((messages, said.content, answer.usage))
        # A client may give the answer back as it came, or in its own words.
        back = said if number % 2 else {"role": "assistant", "content": said.content}
        nxt = user(f"turn {number + 1}")
        match move:
            case "extend":
                messages = [*messages, back, nxt]
            case "parts":
                nxt = {"role": "user", "content": [{"type": "text", "text": nxt["content"]}]}
                messages = [*messages, back, nxt]
            case "shorten":
                messages = [*messages[-1:], back, nxt]
            case "edit":
                messages = [*messages, {"role": "assistant", "content": "left"}, nxt]
            case "again":
                messages = list(messages)
            case "anew":
                messages = [user(f"seed {number}")]
    return 0.5


async def at_once(base_url: str, api_key: str, task: Task) -> dict[str, Any]:
    """Two requests at the same time."""
    import asyncio

    openai = AsyncOpenAI(base_url=base_url, api_key=api_key, timeout=PATIENT)
    answers = await asyncio.gather(*(ask(openai, [user(f"turn {place}")]) for place in range(2)))
    heard[task["seed"]] = [answer.choices[0].message.content for answer in answers]
    return {"reward": 1, "success": True, "rewards": {"speed": 0.25, "truth": 0.75}}


def tools(base_url: str, api_key: str, task: Task) -> float:
    """Offer a tool, do what is called, and give the results back."""
    openai = client(base_url, api_key)
    schema = {"type": "object", "properties": {"turn": {"type": "integer"}}}
    offered = [{"type": "function", "function": {"name": "left", "parameters": schema}}]
    messages: list[Any] = [user("turn")]
    told = heard[task["seed"]] = []
    for turn in range(task["turns"]):
        limit = {"max_tokens": task["limits"][turn]} if "limits" in task else {}
        choice = ask(openai, messages, tools=offered, **limit).choices[0]
        told.append(choice)
        messages.append(choice.message)
        for call in choice.message.tool_calls or ():
            messages.append({"role": "tool", "tool_call_id": call.id, "content": call.function.arguments})
        messages.append(user("turn"))
    return 1.0


def streaming(base_url: str, api_key: str, task: Task) -> float:
    openai = client(base_url, api_key)
    heard[task["seed"]] = list(
        ask(openai, [user("turn")], stream=True, stream_options={"include_usage": True})
    )
    return 1.0


def posting(base_url: str, api_key: str, task: Task) -> None:
    """Post the reward, and ask once more after it."""
    openai = client(base_url, api_key)
    ask(openai, [user("turn")])
    posted = openai.post("/episodes/reward", body=task["body"], cast_to=object)
    told = heard[task["seed"]] = [posted]
    try:
        ask(openai, [user("turn")])
    except Exception as error:
        told.append(error)
    gate.set()


def refused(base_url: str, api_key: str, task: Task) -> float:
    """Collect what becomes of wrong requests."""
    openai = client(base_url, api_key)
    told = heard[task["seed"]] = []
    wrong: list[Any] = [
        lambda: ask(client(base_url, "another key"), [user("turn")]),
        lambda: ask(openai, [user("turn")], n=2),
        lambda: ask(openai, [user("turn")], logprobs=True),
        lambda: ask(openai, []),
        lambda: ask(
            openai, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
        ),
        lambda: openai.embeddings.create(model="policy", input="turn"),
        lambda: openai.post("/episodes/reward", body={"reward": "much"}, cast_to=object),
        lambda: ask(openai, [user("turn")], tool_choice="required"),
        lambda: ask(openai, [{"role": "wizard", "content": "turn"}]),
        lambda: ask(openai, [user("turn")], stop=["", "left"]),
        lambda: ask(openai, [user("größer")]),
    ]
    for request in wrong:
        try:
            request()
        except Exception as error:
            told.append(error)
    told += [openai.models.list().data[0].id, openai.models.retrieve("policy").id]
    unheard = {"top_k": 5, "chat_template_kwargs": {"enable_thinking": False}, "min_p": None}
    ask(openai, [user("turn")], temperature=0.1, max_tokens=1, user="me", logprobs=False, extra_body=unheard)
    return 1.0


def stopping(base_url: str, api_key: str, task: Task) -> float:
    """Have answers end before a word, and go on with what was given of them."""
    openai = client(base_url, api_key)
    told = heard[task["seed"]] = []
    messages: list[Any] = [user("turn")]
    for _ in range(3):
        choice = ask(openai, messages, stop=["heard", " turn"]).choices[0]
        told.append((choice.message.content, choice.finish_reason))
        messages = [*messages, choice.message, user("turn")]
    return 1.0


def impatient(base_url: str, api_key: str, task: Task) -> float:
    """Give up the first request while the policy is at work, and ask the same again."""
    import openai

    hasty = OpenAI(base_url=base_url, api_key=api_key, timeout=0.5, max_retries=0)
    try:
        ask(hasty, [user("turn")])
    except openai.APITimeoutError:
        gate.set()  # only now is it answered
    heard[task["seed"]] = [ask(client(base_url, api_key), [user("turn")]).choices[0].message.content]
    return 1.0


def raising(base_url: str, api_key: str, task: Task) -> float:
    ask(client(base_url, api_key), [user("turn")])
    raise ZeroDivisionError("no such tile")


def silent(base_url: str, api_key: str, task: Task) -> float:
    return 1.0


def rewardless(base_url: str, api_key: str, task: Task) -> None:
    ask(client(base_url, api_key), [user("turn")])


def never(task: Task, messages: list[Any], output: str) -> float:
    threading.Event().wait()
    return 1.0


def wrong(task: Task, messages: list[Any], output: str) -> float:
    raise ZeroDivisionError("no such tile")


def judge(task: Task, messages: list[Any], output: str) -> float:
    heard[task["seed"]] = [task, messages, output]
    return 0.25


async def judge_async(task: Task, messages: list[Any], output: str) -> dict[str, Any]:
    await asyncio.sleep(0)
    return {"reward": judge(task, messages, output), "success": True}


class Judge:
    """A callable object that no one can tell to be a coroutine function."""

    async def __call__(self, task: Task, messages: list[Any], output: str) -> dict[str, Any]:
        return await judge_async(task, messages, output)


judge_object = Judge()
judge_returned = lambda *given: judge_async(*given)  # noqa: E731


def judge_text(task: Task, messages: list[Any], output: str) -> str:
    return "1"


async def speaker(base_url: str, api_key: str, task: Task) -> float:
    await asyncio.to_thread(ask, client(base_url, api_key), [user("turn")])
    return 0.5


class Speaker:
    async def __call__(self, base_url: str, api_key: str, task: Task) -> float:
        return await speaker(base_url, api_key, task)


speaker_object = Speaker()


async def sleeper(base_url: str, api_key: str, task: Task) -> None:
    await speaker(base_url, api_key, task)
    time.sleep(1.5)  # a blocking call in a coroutine
