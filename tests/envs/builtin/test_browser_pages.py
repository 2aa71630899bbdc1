"""The browser's shop, without a browser: valid links, a complete table, and the reward."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pytest

from envs.builtin.browser_pages import COLUMNS, LEVELS, PAGE_ROWS, PEOPLE, Fields, Goal, Site, draw, paid

ORDER = {
    "number": "123",
    "name": "ann berg",
    "count": "2",
    "colour": "red",
    "delivery": "post",
    "wrapping": "on",
}


def drawn(level: int, seed: int) -> tuple[Site, Goal]:
    return draw(np.random.default_rng(seed), level)


class Links(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found.append(dict(attributes)["href"] or "")


def fetched(site: Site, link: str) -> str:
    return site.respond("GET", urlsplit(link).path, dict(parse_qsl(urlsplit(link).query)))


def crawled(site: Site) -> dict[str, str]:
    """Every page that links lead to from the first one."""
    pages, left = {}, ["/"]
    while left:
        if (link := left.pop()) not in pages:
            pages[link] = fetched(site, link)
            left += Links(pages[link]).found
    return pages


def rows(page: str) -> list[list[str]]:
    found = (re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", page))
    return [row for row in found if row != list(COLUMNS)]


def test_links_lead_to_every_item_and_every_person_and_nowhere_else() -> None:
    site, _ = drawn(1, 0)
    pages = crawled(site)
    assert not [link for link, page in pages.items() if "no such page" in page]
    assert {each.path for each in site.items} <= set(pages)
    turned = [rows(pages[link]) for link in pages if link.startswith("/people?")]
    assert sorted(row for page in turned for row in page) == sorted(
        [each.name, each.trade, each.town, each.phone] for each in site.people
    )
    assert len(site.people) == PEOPLE and max(map(len, turned)) == PAGE_ROWS


def test_nobody_shares_what_a_question_tells_them_apart_by() -> None:
    for seed in range(50):
        site, _ = drawn(3, seed)
        for told in (lambda p: p.name, lambda p: p.phone, lambda p: (p.trade, p.town)):
            assert len(set(map(told, site.people))) == PEOPLE
        assert len({each.number for each in site.items}) == len({each.path for each in site.items}) == 20


@pytest.mark.parametrize("name", ["ann", "o", "ANN ", "", "zzz", "<b>\"&'", "%"])
def test_the_table_is_searched_by_name_and_says_what_was_searched_for(name: str) -> None:
    site, _ = drawn(3, 1)
    found = [each.name for each in site.people if name.lower() in each.name]
    page = site.respond("GET", "/people", {"name": name})
    shown = [row[0] for row in rows(page)]
    while following := [
        link for link in Links(page).found if link.endswith(f"page={len(shown) // PAGE_ROWS + 1}")
    ]:
        page = fetched(site, following[-1])
        shown += [row[0] for row in rows(page)]
    assert shown == found
    assert "<b>" not in page


def test_what_is_asked_for_is_what_the_pages_say() -> None:
    for seed in range(100):
        for level in LEVELS:
            site, goal = drawn(level, seed)
            people = {each.name: each for each in site.people}
            works = {f"the {each.trade} of {each.town}": each for each in site.people}
            if level == 1:
                item = next(each for each in site.items if each.path == goal.page)
                assert goal.task == f"open the page of the {item.name}"
            elif level == 3:
                asked = goal.task.removeprefix("what is the phone of ").removeprefix("who is ")
                person = people.get(asked) or works[asked]
                assert goal.answer == (person.name if goal.task.startswith("who") else person.phone)
            else:
                order = goal.order
                assert order is not None
                item = next(each for each in site.items if each.number == order["number"])
                person = people[order["name"]]
                what, who = {2: (f"number {item.number}", person.name)}.get(
                    level, (f"the {item.name}", f"the {person.trade} of {person.town}")
                )
                wrapped = "with" if order.get("wrapping") == "on" else "without"
                told = (
                    f"order {order['count']} of {what} in {order['colour']} for {who} by {order['delivery']}"
                )
                assert goal.task == f"{told} {wrapped} wrapping"


@pytest.mark.parametrize(
    ("goal", "page", "answer", "sent", "reward"),
    [
        (Goal("", page="/shop/x/y"), "/shop/x/y", "", [], 1.0),
        (Goal("", page="/shop/x/y"), "/shop/x", "", [], 0.0),
        (Goal("", page="/shop/x/y"), "/shop/x/y", "/shop/x/y", [], 0.0),
        (Goal("", page="/shop/x/y"), "/shop/x/y", "", [ORDER], 0.0),
        (Goal("", answer="1234"), "/", "1234", [], 1.0),
        (Goal("", answer="1234"), "/people", "", [], 0.0),
        (Goal("", answer="1234"), "/people", "1234 1235", [], 0.0),
        (Goal("", answer="1234"), "/people", "1234", [ORDER], 0.0),
        (Goal("", order=ORDER), "/order", "", [ORDER], 1.0),
        (Goal("", order=ORDER), "/order", "", [], 0.0),
        (Goal("", order=ORDER), "/order", "", [ORDER, ORDER], 0.0),
        (Goal("", order=ORDER), "/order", "", [ORDER | {"count": "3"}], 0.0),
        (Goal("", order=ORDER), "/order", "", [ORDER | {"note": ""}], 0.0),
        (Goal("", order=ORDER), "/order", "", [{k: v for k, v in ORDER.items() if k != "wrapping"}], 0.0),
    ],
)
def test_what_is_paid(goal: Goal, page: str, answer: str, sent: list[Fields], reward: float) -> None:
    assert paid(goal, page, answer, sent) == reward
