"""A shop in a real Chromium: observations, actions and rewards. Needs the extra browser, and Chromium."""

from __future__ import annotations

import base64
import shutil
import struct
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("playwright")
if shutil.which("chromium") is None:
    pytest.skip("there is no Chromium here", allow_module_level=True)

from envs import registry
from envs.builtin.browser import NOTHING, WORDS, Browser, PageView, Player, line_of, read
from envs.builtin.browser_pages import LEVELS, draw
from envs.builtin.browser_tab import Tab, find_chromium
from envs.registry import EnvironmentUnknown
from tests.envs.playing import played

HOME = "1 link home\n2 link shop\n3 link people\n4 link order\nheading home\ntext welcome to the shop"
FORM = """1 link home
2 link shop
3 link people
4 link order
heading order
5 textbox number:
6 textbox name:
7 textbox count:
8 combobox colour: choose of choose, red, green, blue, white, black
9 radio post: off
10 radio courier: off
11 radio pickup: off
12 checkbox wrapping: off
13 button send"""
FILLED = {"name:": "name: ann", "choose of": "blue of", "courier: off": "courier: on", "ing: off": "ing: on"}


@pytest.fixture(scope="module", autouse=True)
def browser() -> Iterator[None]:
    """One that runs from the first test to the last."""
    tab = Tab(find_chromium())
    yield
    tab.close()


@pytest.fixture(scope="module", params=LEVELS)
def env(request: pytest.FixtureRequest) -> Iterator[Browser]:
    made = Browser(request.param, instructions=False)
    yield made
    made.close()


@pytest.fixture(scope="module")
def form() -> Iterator[Browser]:
    made = Browser(2, instructions=False)
    yield made
    made.close()


def page_of(observation: Any) -> str:
    return observation.partition("\n")[2]


def test_pages_are_observed_as_a_screen_reader_has_them(form: Browser) -> None:
    observation, _ = form.reset(seed=0)
    assert observation == f"task: {form._goal.task}\n{HOME}"
    for action in ("click(4)", "type(6, x)", "type(6, ann)", "select(8, blue)", "click(9)", "click(10)"):
        form.step(action)
    filled = FORM
    for empty, full in FILLED.items():
        filled = filled.replace(empty, full)
    assert page_of(form.step("click(12)")[0]) == filled
    assert page_of(form.step("click(4)")[0]) == FORM, "what was not sent is forgotten"


@pytest.mark.parametrize(
    "action",
    ["click(99)", "click(0)", "click(-3)", "type(1, ann)", "select(2, red)", "back()", "select(2, home)"],
)
def test_what_cannot_be_done_here_is_answered_and_costs_a_turn(form: Browser, action: str) -> None:
    task = form.reset(seed=0)[0].partition("\n")[0]
    assert form.step(action) == (f"{NOTHING}\n{task}\n{HOME}", 0.0, False, False, {})


def test_turns_are_bounded() -> None:
    env = Browser(1, max_turns=2)
    env.reset(seed=0)
    assert env.step("click(2)")[1:] == (0.0, False, False, {})
    assert env.step("click(77)")[1:] == (0.0, False, True, {"success": False})
    env.close()


def test_a_closed_environment_begins_again_with_its_next_reset() -> None:
    env = Browser(2, instructions=False)
    with pytest.raises(RuntimeError, match="before reset"):
        env.step("click(1)")
    first = env.reset(seed=0)
    env.close()
    env.close()
    assert env.reset(seed=0) == first
    env.close()


def test_going_back_leads_to_the_page_before_and_never_to_an_earlier_episode(form: Browser) -> None:
    form.reset(seed=0)
    shop = form.step("click(2)")[0]
    section = form.step("click(5)")[0]
    form.step("click(5)")
    assert [form.step("back()")[0] for _ in range(3)] == [section, shop, form.step("click(1)")[0]]
    form.reset(seed=1)
    assert form.step("back()")[0].startswith(NOTHING)


@pytest.mark.parametrize(
    "action",
    [
        "",
        "click",
        "click()",
        "click(ann)",
        "click(1.0)",
        "click(true)",
        "click(1, 2)",
        "click(1) click(2)",
        "click(1)\nclick(2)",
        "I click(1)",
        "type(5)",
        "type(ann, 5)",
        "type(5, ann, berg)",
        'type(5, "a\\nb")',
        'type(5, "\\u00e9")',
        f"type(5, {'a' * 61})",
        "select(5)",
        "back(1)",
        "done(1, 2)",
        "done(null)",
        "submit(5)",
        "goto(http://example.com)",
    ],
)
def test_what_is_no_action_ends_unpaid(form: Browser, action: str) -> None:
    form.reset(seed=0)
    assert form.step(action)[1:] == (0.0, True, False, {"malformed": True, "success": False})


def test_actions_are_read_with_their_texts_as_they_stand() -> None:
    assert read(" click( 3 )\n") == ("click", "3")
    assert read("type(5, ann berg)") == ("type", "5", "ann berg")
    assert read("type(5, 0123)") == ("type", "5", "0123")
    assert read("type(5, 4711)") == read('type(5, "4711")') == ("type", "5", "4711")
    assert read('type(5, "a, b")') == ("type", "5", "a, b")
    assert (read("done()"), read("done(4711)"), read('type(5, "")')) == (
        ("done",),
        ("done", "4711"),
        ("type", "5", ""),
    )


def test_a_text_is_typed_as_it_is(form: Browser) -> None:
    form.reset(seed=0)
    form.step("click(3)")
    for text in ("<b>x</b>&amp;", "it's 100%+1 #?;", "a\\b", "-"):
        assert f"5 textbox name: {text}\n" in form.step(f"type(5, {text})")[0]
        assert f"5 textbox name: {text}\n" in form.step("click(6)")[0], "what was searched for is said again"
    assert '5 textbox name: say "x", y' in form.step('type(5, "say \\"x\\", y")')[0]


def ended(env: Browser, *actions: str) -> tuple[float, bool]:
    """The reward and the verdict of the last of these actions, which ends the episode."""
    env.reset(seed=3)
    for action in actions[:-1]:
        assert env.step(action)[1:] == (0.0, False, False, {})
    _, reward, terminated, truncated, info = env.step(actions[-1])
    assert terminated and not truncated
    return reward, info["success"]


@pytest.mark.parametrize("actions", [["done()"], ["click(4)", "click(13)"], ["click(4)", "done()"]])
def test_nothing_done_or_a_form_sent_empty_earns_nothing(env: Browser, actions: list[str]) -> None:
    assert ended(env, *actions) == (0.0, False)


def test_every_answer_at_once_and_the_task_said_back_earn_nothing() -> None:
    env = Browser(3)
    env.reset(seed=3)
    phones = " ".join(each.phone for each in env._site.people)
    assert ended(env, f'done("{phones[:60]}")') == (0.0, False)
    assert ended(env, f"done({env._goal.task})") == (0.0, False)
    assert ended(env, f"done({env._goal.answer.upper()})") == (1.0, True)
    env.close()


def test_one_field_that_is_wrong_loses_the_order(form: Browser) -> None:
    form.reset(seed=3)
    order = form._goal.order
    assert order is not None
    radio = 9 + ("post", "courier", "pickup").index(order["delivery"])
    rest = [
        f"select(8, {order['colour']})",
        f"click({radio})",
        *(["click(12)"] if "wrapping" in order else []),
    ]
    filled = [
        "click(4)",
        f"type(5, {order['number']})",
        f"type(6, {order['name']})",
        f"type(7, {order['count']})",
    ]
    assert ended(form, *filled, *rest, "click(13)") == (1.0, True)
    assert ended(form, *filled, *rest, "click(12)", "click(13)") == (0.0, False)
    assert ended(form, *filled, *rest, "type(7, 1)", "click(13)") == (0.0, False)
    assert ended(form, *filled[:-1], *rest, "click(13)") == (0.0, False)


def test_a_player_without_errors_solves_every_task(env: Browser) -> None:
    for seed in range(3):
        episode = played(env, Player(0.0, seed), seed)
        assert (episode.reward, episode.success) == (1.0, True), episode.actions


def test_a_player_recovers_from_errors_and_one_of_errors_only_fails(form: Browser) -> None:
    episodes = [played(form, Player(rate, seed), seed) for rate in (0.15, 1.0) for seed in range(4)]
    assert any(each.reward for each in episodes[:4]) and not any(each.reward for each in episodes[4:])


def test_every_word_said_is_among_words(env: Browser) -> None:
    said = set()
    for seed in range(2):
        said |= played(env, Player(0.4, seed), seed).words
    assert said <= set(WORDS)


def test_what_a_line_says_is_read_back(form: Browser) -> None:
    form.reset(seed=0)
    for action in ("click(4)", "type(6, ann)", "click(12)", "click(3)"):
        observation = form.step(action)[0]
        assert "\n".join(map(line_of, PageView(observation).elements)) == page_of(observation)


def test_train_and_heldout_tasks_never_meet() -> None:
    tasks = []
    for split in ("train", "heldout"):
        env = Browser(1, split=split, instructions=False)
        tasks.append({env.reset(seed=seed)[0].partition("\n")[0] for seed in range(12)})
        env.close()
    assert not tasks[0] & tasks[1]


def test_a_picture_shows_the_page_and_the_same_episode() -> None:
    env, text = Browser(4, observe="screenshot", instructions=False), Browser(4, instructions=False)
    [message], _ = env.reset(seed=0)
    heard = text.reset(seed=0)[0]
    player, pictures, done = Player(0.0, 0), [], False
    while not done:
        told, picture = message["content"]
        assert told == {"type": "text", "text": heard.partition("\n")[0]}
        kind, _, encoded = picture["image"].partition(",")
        assert (picture["type"], kind) == ("image", "data:image/png;base64")
        pictures.append(base64.b64decode(encoded))
        assert struct.unpack(">4s2I", pictures[-1][12:24]) == (b"IHDR", 640, 480)
        action = player.act(heard)
        heard, *outcome = text.step(action)
        seen, *same = env.step(action)
        assert same == outcome
        done = outcome[1]
        message = None if done else seen[0]
    assert outcome[0] == 1.0 and seen == heard == "right"
    assert len(set(pictures)) == len(pictures), "each of these actions is seen"
    with pytest.raises(ValueError, match='observe="text"'):
        player.act([{"role": "user", "content": []}])
    env.close(), text.close()


def test_every_page_fits_into_a_picture() -> None:
    env = Browser(4)
    env.reset(seed=0)
    assert env._tab is not None
    paths = ["/", "/shop", "/order", "/people?page=2", *(f"/shop/{each.section}" for each in env._site.items)]
    for path in dict.fromkeys([*paths, env._site.items[0].path]):
        env._tab.open(env._site.respond, path)
        height, width = env._tab._do(
            lambda page: page.evaluate(
                "[document.documentElement.scrollHeight, document.documentElement.scrollWidth]"
            )
        )
        assert height <= 480 and width <= 640, path
    env.close()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"level": 5}, "must be one of 1, 2, 3, 4"),
        ({"observe": "html"}, "must be text or screenshot"),
        ({"split": "test"}, "must be all, train or heldout"),
        ({"max_turns": 0}, "use 1 or more"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Browser(**options)


def test_a_machine_without_chromium_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EnvironmentUnknown, match="apt-get install chromium") as refused:
        registry.make("browser")
    assert "\n" not in str(refused.value)


def test_what_is_no_browser_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"^/bin/false did not start: ") as refused:
        Browser(executable="/bin/false")
    assert "\n" not in str(refused.value)


def test_a_seed_fixes_the_pages_without_a_browser(env: Browser) -> None:
    env.reset(seed=7)
    site, goal = env._site, env._goal
    env.reset(seed=7)
    assert (env._site, env._goal) == (site, goal)
    env.reset(seed=8)
    assert env._site != site
    assert draw(env.np_random, 1)[1].page
