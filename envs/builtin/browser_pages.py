"""The pages of a small shop, new for every seed, and the tasks in it.

A site is a function from requests to HTML pages without scripts. The only state that a visitor changes is the orders.

    /  home     /shop     /shop/kitchen     /shop/kitchen/copper-kettle     /people?name=ann&page=2     /order
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import product
from urllib.parse import urlencode

import numpy as np

SECTIONS = {
    "kitchen": ("kettle", "teapot", "pan", "jug"),
    "garden": ("spade", "rake", "bucket", "hose"),
    "office": ("lamp", "clock", "stapler", "ruler"),
    "travel": ("trunk", "flask", "compass", "torch"),
}
LOOKS = ("copper", "small", "old", "round", "heavy", "painted", "cheap", "antique")
GIVEN = ("ann", "ben", "cora", "dan", "eva", "finn", "gina", "hugo", "ida", "jon", "kira", "leo")
FAMILY = ("berg", "cole", "dahl", "evans", "frost", "grant", "holt", "ivers", "jung", "klein", "lund", "moss")
TRADES = ("baker", "doctor", "farmer", "miller", "painter", "tailor")
TOWNS = ("arlen", "brook", "corby", "dover", "elms", "fern")
COLOURS = ("red", "green", "blue", "white", "black")
DELIVERIES = ("post", "courier", "pickup")
COLUMNS = ("name", "trade", "town", "phone")
LEVELS = {1: "links", 2: "form", 3: "table", 4: "composition"}

ITEMS_PER_SECTION = 5
PEOPLE = 24
PAGE_ROWS = 6
WRAPPING = "wrapping"  # the checkbox; sent as "on", or not at all

Fields = dict[str, str]


@dataclass(frozen=True, slots=True)
class Item:
    """An item of the shop."""

    name: str
    section: str
    number: str
    price: str

    @property
    def path(self) -> str:
        return f"/shop/{self.section}/{self.name.replace(' ', '-')}"


@dataclass(frozen=True, slots=True)
class Person:
    """A row of the table of people. Names, phones, and pairs of trade and town are unique."""

    name: str
    trade: str
    town: str
    phone: str


@dataclass(frozen=True, slots=True)
class Goal:
    """The task: a page that must be open at done, an answer, or one form to send."""

    task: str
    page: str = ""
    answer: str = ""
    order: Fields | None = None


def paid(goal: Goal, page: str, answer: str, sent: Sequence[Fields]) -> float:
    """The reward at the end, from the open page, the answer ("" for none), and all orders sent."""
    if goal.order is not None:
        return float(list(sent) == [goal.order])
    return float(not sent and page == (goal.page or page) and answer == goal.answer)


@dataclass(slots=True)
class Site:
    """A shop with its items, people, and the orders sent so far."""

    items: tuple[Item, ...]
    people: tuple[Person, ...]
    sent: list[Fields] = field(default_factory=list)

    def respond(self, method: str, path: str, fields: Fields) -> str:
        """The HTML page for a request; an order is stored verbatim."""
        place = [part for part in path.split("/") if part]
        match place:
            case []:
                return _page("home", "<p>welcome to the shop</p>")
            case ["shop"]:
                return _page("shop", _links((f"/shop/{section}", section) for section in SECTIONS))
            case ["shop", section] if section in SECTIONS:
                return _page(section, _links((i.path, i.name) for i in self.items if i.section == section))
            case ["shop", _, _] if item := next((each for each in self.items if each.path == path), None):
                return _page(item.name, f"<p>number {item.number}</p><p>price {item.price}</p>")
            case ["people"]:
                return self._people(fields.get("name", ""), int(fields.get("page", "1")))
            case ["order"] if method == "POST":
                self.sent.append(fields)
                return _page("order", "<p>your order was sent</p>")
            case ["order"]:
                return _page("order", _ORDER)
        return _page("missing", "<p>there is no such page</p>")

    def _people(self, name: str, page: int) -> str:
        found = [person for person in self.people if name.lower() in person.name]
        pages = max(1, -(-len(found) // PAGE_ROWS))
        rows = found[(page - 1) * PAGE_ROWS : page * PAGE_ROWS]
        ways = [
            (f"/people?{urlencode({'name': name, 'page': there})}", word)
            for word, there in (("previous", page - 1), ("next", page + 1))
            if 1 <= there <= pages
        ]
        cells = [[each.name, each.trade, each.town, each.phone] for each in rows]
        return _page("people", _SEARCH.format(name=escape(name)) + _table(cells, page, pages) + _links(ways))


def draw(rng: np.random.Generator, level: int) -> tuple[Site, Goal]:
    """A site and a task of a level."""
    items, people = _items(rng), _people(rng)
    item, person = items[rng.integers(len(items))], people[rng.integers(len(people))]
    if LEVELS[level] == "links":
        goal = Goal(f"open the page of the {item.name}", page=item.path)
    elif LEVELS[level] == "table":
        goal = _question(person, int(rng.integers(3)))
    else:
        known = LEVELS[level] == "form"
        what = f"number {item.number}" if known else f"the {item.name}"
        goal = _order(
            rng, item, person, what, person.name if known else f"the {person.trade} of {person.town}"
        )
    return Site(items, people), goal


def _question(person: Person, kind: int) -> Goal:
    """Ask by name, which can be searched for, or by trade and town, which requires paging through the table."""
    if kind == 0:
        return Goal(f"what is the phone of {person.name}", answer=person.phone)
    who = f"the {person.trade} of {person.town}"
    if kind == 1:
        return Goal(f"what is the phone of {who}", answer=person.phone)
    return Goal(f"who is {who}", answer=person.name)


def _order(rng: np.random.Generator, item: Item, person: Person, what: str, who: str) -> Goal:
    count = str(rng.integers(2, 10))
    colour = COLOURS[rng.integers(len(COLOURS))]
    delivery = DELIVERIES[rng.integers(len(DELIVERIES))]
    wrapped = bool(rng.integers(2))
    order = {
        "number": item.number,
        "name": person.name,
        "count": count,
        "colour": colour,
        "delivery": delivery,
    }
    if wrapped:
        order[WRAPPING] = "on"
    task = f"order {count} of {what} in {colour} for {who} by {delivery} {'with' if wrapped else 'without'} {WRAPPING}"
    return Goal(task, order=order)


def _items(rng: np.random.Generator) -> tuple[Item, ...]:
    numbers = iter(rng.permutation(np.arange(100, 1000))[: ITEMS_PER_SECTION * len(SECTIONS)])
    items = []
    for section, kinds in SECTIONS.items():
        names = [f"{look} {kind}" for look, kind in product(LOOKS, kinds)]
        for index in rng.permutation(len(names))[:ITEMS_PER_SECTION]:
            items.append(Item(names[index], section, str(next(numbers)), str(rng.integers(5, 100))))
    return tuple(items)


def _people(rng: np.random.Generator) -> tuple[Person, ...]:
    names = [f"{given} {family}" for given, family in product(GIVEN, FAMILY)]
    works = list(product(TRADES, TOWNS))
    called, doing = rng.permutation(len(names))[:PEOPLE], rng.permutation(len(works))[:PEOPLE]
    phones = 1000 + rng.permutation(9000)[:PEOPLE]
    return tuple(
        Person(names[name], works[work][0], works[work][1], str(phone))
        for name, work, phone in zip(called, doing, phones, strict=True)
    )


# What a page looks like ------------------------------------------------------------------------------------------

_STYLE = """
body { margin: 0; font: 16px/1.4 sans-serif; color: #222; background: #f4f5f7 }
nav { background: #24476b; padding: 8px 24px }
nav a { color: #fff; margin-right: 28px; text-decoration: none }
main { margin: 14px 24px; padding: 10px 24px; background: #fff; border: 1px solid #d5d9de; border-radius: 6px }
h1 { font-size: 22px; margin: 0 0 8px }
p, form { margin: 6px 0 }
a { color: #1658a5 }
ul { margin: 8px 0; padding: 0; list-style: none }
li { margin: 0 0 6px; padding-left: 8px }
table { border-collapse: collapse }
th, td { text-align: left; padding: 4px 22px 4px 0; border-bottom: 1px solid #e3e6ea }
form div { margin-bottom: 9px }
label { margin-right: 22px }
label.wide { display: inline-block; width: 80px; margin: 0 }
input, select, button { font: inherit }
input[type=text] { width: 190px }
button { padding: 3px 18px }
input + button { margin-left: 16px }
"""
_NAVIGATION = "".join(
    f'<a href="{path}">{name}</a>'
    for path, name in (("/", "home"), ("/shop", "shop"), ("/people", "people"), ("/order", "order"))
)
_SEARCH = (
    '<form action="/people" autocomplete="off"><label for="name">name</label> '
    '<input type="text" id="name" name="name" value="{name}"> <button>search</button></form>'
)


def _field(name: str, control: str) -> str:
    return f'<div><label class="wide" for="{name}">{name}</label> {control}</div>'


_ORDER = "".join(
    (
        '<form method="post" action="/order" autocomplete="off">',
        *(
            _field(name, f'<input type="text" id="{name}" name="{name}">')
            for name in ("number", "name", "count")
        ),
        _field(
            "colour",
            '<select id="colour" name="colour"><option value="">choose</option>'
            f"{''.join(f'<option>{colour}</option>' for colour in COLOURS)}</select>",
        ),
        "<div>",
        *(f'<label><input type="radio" name="delivery" value="{way}"> {way}</label>' for way in DELIVERIES),
        f'</div><div><label><input type="checkbox" name="{WRAPPING}"> {WRAPPING}</label></div>',
        "<button>send</button></form>",
    )
)


def _page(title: str, body: str) -> str:
    return (
        f'<!doctype html><html lang="en"><head><title>{title}</title><style>{_STYLE}</style></head>'
        f"<body><nav>{_NAVIGATION}</nav><main><h1>{title}</h1>{body}</main></body></html>"
    )


def _links(ways: Iterable[tuple[str, str]]) -> str:
    return "<ul>" + "".join(f'<li><a href="{escape(path)}">{name}</a></li>' for path, name in ways) + "</ul>"


def _table(rows: Sequence[Sequence[str]], page: int, pages: int) -> str:
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table><p>page {page} of {pages}</p>"
