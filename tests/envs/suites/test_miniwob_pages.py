"""MiniWoB++ in a real browser, against the page's own verdict. Needs the extra miniwob, Chromium and ChromeDriver."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("miniwob")
if shutil.which("chromedriver") is None:
    pytest.skip("there is no ChromeDriver here", allow_module_level=True)

from envs import registry
from envs.checks.check import check
from envs.images import decode_image
from envs.registry import EnvironmentUnknown
from envs.suites.miniwob_pages import Player, read

BUTTON, LOGIN = "miniwob/click-button-v1", "miniwob/login-user-v1"


@pytest.fixture(scope="module")
def button() -> Iterator[Any]:
    env = registry.make(BUTTON)
    yield env
    env.close()


def verdict(env: Any) -> dict[str, Any]:
    """What the page itself says of the episode, asked without the package."""
    told: dict[str, Any] = env.unwrapped.instance.driver.execute_script(
        "return {done: WOB_DONE_GLOBAL, reward: WOB_RAW_REWARD_GLOBAL};"
    )
    return told


def numbered(seen: str, line: str) -> int:
    found = re.search(rf"^(\d+) {line}", seen, re.MULTILINE)
    assert found is not None, f"no line {line!r} in:\n{seen}"
    return int(found[1])


def test_the_button_that_is_named_is_paid_and_another_is_not(button: Any) -> None:
    paid = set()
    for seed in range(6):
        seen = button.reset(seed=seed)[0]
        wanted = re.search(r'task: Click on the "(.+)" button', seen)
        assert wanted is not None
        buttons = re.findall(r'^(\d+) button "(.*)"', seen, re.MULTILINE)
        others = [number for number, text in buttons if text != wanted[1]]
        right = seed % 2 == 0 or not others
        number = next(number for number, text in buttons if text == wanted[1]) if right else others[0]
        _, reward, terminated, truncated, info = button.step(f"click({number})")
        assert {"done": terminated, "reward": reward} == verdict(button)
        assert (reward == 1.0, terminated, truncated) == (right, True, False) and info == {"success": right}
        paid.add(reward)
    assert 1.0 in paid and min(paid) < 0


def test_a_form_is_filled_by_what_is_typed() -> None:
    env = registry.make(LOGIN)
    seen = env.reset(seed=1)[0]
    wanted = re.search(r'username "(.+)" and the password "(.+)"', seen)
    assert wanted is not None
    for line, text in (("input_text", wanted[1]), ("input_password", wanted[2])):
        seen, reward, *rest = env.step(f"type({numbered(seen, line)}, {text})")
        assert (reward, rest) == (0.0, [False, False, {}])
    assert f'"{wanted[1]}"' in seen
    assert env.step(f"click({numbered(seen, 'button')})")[1:] == (1.0, True, False, {"success": True})
    assert verdict(env) == {"done": True, "reward": 1}
    env.close()


def test_no_clock_ends_an_episode(button: Any) -> None:
    button.reset(seed=0)
    driver: Any = button.unwrapped.instance.driver
    before = driver.execute_script(
        "core.EPISODE_MAX_TIME = 1; core.startEpisodeReal(); return core.EPISODE_MAX_TIME;"
    )
    assert before == 1
    button.reset(seed=0)
    assert not verdict(button)["done"]


def test_what_is_not_there_costs_a_turn_and_what_is_no_call_ends_it(button: Any) -> None:
    seen = button.reset(seed=0)[0]
    after, *rest = button.step("click(9999)")
    assert after.startswith("nothing happens\ntask: ") and rest == [0.0, False, False, {}]
    assert button.step("press(<F99>)")[0].startswith("nothing happens\n")
    assert seen.count("\n") > 2
    assert button.step("click on it")[1:] == (0.0, True, False, {"malformed": True, "success": False})


def test_calls_by_hand() -> None:
    assert read(" click(4)\n") == ("click", [4])
    assert read("type(3, 4711)") == ("type", [3, "4711"])
    assert read("drag(1, 2, 3, 4)") == ("drag", [1, 2, 3, 4])
    for wrong in (
        "",
        "click()",
        "click(ok)",
        "click(4) now",
        "click(4)\nclick(5)",
        "type(4)",
        "fly(1)",
        "click(4.5)",
    ):
        assert read(wrong) is None, wrong


def test_a_screenshot_is_the_task_in_pixels_and_pixels_can_be_clicked() -> None:
    env: Any = registry.make("miniwob/click-test-v1", observe="screenshot", instructions=False)
    [message] = env.reset(seed=0)[0]
    text, image = message["content"]
    assert text["text"] == "task: Click the button."
    assert decode_image(image).shape == (210, 160, 3) and decode_image(image).std() > 10
    place = env.unwrapped.instance.driver.execute_script(
        "const box = document.querySelector('button').getBoundingClientRect();"
        "return [Math.round(box.x + box.width / 2), Math.round(box.y + box.height / 2)];"
    )
    assert env.step(f"click_at({place[0]}, {place[1]})")[1:] == (1.0, True, False, {"success": True})
    env.close()


def test_the_scripted_player_finds_the_button(button: Any) -> None:
    for seed in range(4):
        player, done = Player(0.0, seed), False
        seen = button.reset(seed=seed)[0]
        while not done:
            seen, reward, terminated, truncated, info = button.step(player.act(seen))
            done = terminated or truncated
        assert (reward, info) == (1.0, {"success": True})


def test_it_keeps_what_environments_promise() -> None:
    assert check("miniwob/click-test-2-v1", turns=4, seconds=60) == []


def test_a_wrong_id_or_option_is_refused_in_one_line() -> None:
    for wanted, options, says in (
        ("miniwob/click-buton-v1", {}, "did you mean miniwob/click-button"),
        (BUTTON, {"observe": "sound"}, "must be text or screenshot"),
        (BUTTON, {"max_turns": 0}, "leaves no turn to play"),
    ):
        with pytest.raises(EnvironmentUnknown, match=says) as refused:
            registry.make(wanted, **options)
        assert "\n" not in str(refused.value)
