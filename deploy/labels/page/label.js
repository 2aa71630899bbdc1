// The page: shows a pair, collects what the annotator says of it, sends it, shows the next.
// Text of episodes is foreign: it is only ever set as textContent.

import { ask, key, pause, put, send } from "./outbox.js";

const VERDICTS = { 1: "left", 2: "right", 3: "tie", 4: "both_bad" };
const PNG = "data:image/png;base64,";
const byId = (id) => document.getElementById(id);
const say = (text) => { byId("notice").textContent = text; };

let annotator = localStorage.getItem("manta-annotator") ?? "";
let pair = null;      // what is shown
let marks = null;     // "episode/turn" -> { episode, turn, up, text } of the shown pair
let shownAt = 0;
let asked = 0;        // how often a pair was asked for: an older question is given up for a newer one

// Control characters and marks of text direction as escapes, as in the report.
const visible = (text) => text.replace(/[^\P{C}\n\t\u200c\u200d]|[\u2028\u2029]/gu, (c) => `\\u{${c.codePointAt(0).toString(16)}}`);

const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

function element(tag, { text, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

function content(said) {
  const parts = Array.isArray(said) ? said : [{ type: "text", text: said }];
  return parts.map((part) => {
    if (part.type === "image" && String(part.image).startsWith(PNG)) return element("img", { src: part.image, alt: "picture" });
    const text = typeof part.text === "string" ? part.text : JSON.stringify(part, null, 1);
    return element("pre", { text: visible(text) });
  });
}

function message({ role, content: said, tools }) {
  const shown = [element("p", { class: "role", text: role }), element("div", { class: "said" }, ...content(said))];
  if (tools) shown.push(element("details", { class: "said" }, element("summary", { class: "quiet", text: `tools: ${tools.length}` }), element("pre", { text: visible(JSON.stringify(tools, null, 1)) })));
  return shown;
}

function turnItem(turn, number, episode, hideMessages) {
  const mark = { episode, turn: number, up: null, text: "" };
  marks.set(`${episode}/${number}`, mark);
  const good = element("button", { type: "button", class: "good", "aria-pressed": "false" }, "good ", element("kbd", { text: "g" }));
  const bad = element("button", { type: "button", class: "bad", "aria-pressed": "false" }, "bad ", element("kbd", { text: "b" }));
  const correct = element("button", { type: "button", class: "correct", "aria-pressed": "false" }, "correct ", element("kbd", { text: "e" }));
  const text = element("textarea", { rows: 3, maxlength: 100000, hidden: "", "aria-label": "what the turn should have answered" });
  const thumb = (up) => {
    mark.up = mark.up === up ? null : up;
    good.setAttribute("aria-pressed", mark.up === true);
    bad.setAttribute("aria-pressed", mark.up === false);
  };
  good.onclick = () => thumb(true);
  bad.onclick = () => thumb(false);
  correct.onclick = () => {
    if (text.hidden) text.value ||= turn.answer;
    text.hidden = false;
    text.focus();
  };
  // The answer unchanged is no correction.
  text.oninput = () => {
    mark.text = text.value === turn.answer ? "" : text.value;
    correct.setAttribute("aria-pressed", mark.text !== "");
  };
  text.onblur = () => { text.hidden = mark.text === ""; };
  return element("li", { tabindex: 0, "aria-label": `turn ${number + 1}` },
    ...(hideMessages ? [] : turn.messages.flatMap(message)),
    element("p", { class: "role", text: `answer ${number + 1}` }),
    element("div", { class: "said answer" }, element("pre", { text: visible(turn.answer) })),
    element("div", { class: "marks" }, good, bad, correct), text);
}

function show() {
  const [left, right] = pair.sides;
  const first = left.turns[0].messages;
  const shared = JSON.stringify(first) === JSON.stringify(right.turns[0].messages);
  marks = new Map();
  byId("task").replaceChildren(
    element("p", { class: "quiet", text: visible(`${pair.env_id}, seed ${pair.seed}`) }), ...(shared ? first.flatMap(message) : []));
  byId("sides").replaceChildren(...[["Left", left], ["Right", right]].map(([name, side]) =>
    element("section", { class: "card", "aria-label": name }, element("h2", { text: name }),
      element("ol", {}, ...side.turns.map((turn, number) => turnItem(turn, number, side.episode, shared && number === 0))))));
  byId("verdict").reset();
  for (const id of ["pair", "verdict"]) byId(id).hidden = false;
  byId("save").disabled = byId("skip").disabled = false;
  shownAt = performance.now();
  scrollTo(0, 0);
  byId("sides").querySelector("li").focus({ preventScroll: true });
}

async function next() {
  const number = ++asked;
  for (;;) {
    try {
      const answer = await ask(`api/next?annotator=${encodeURIComponent(annotator)}`);
      if (number !== asked) return;
      const { mine, all, annotators, agreement } = answer.counts;
      byId("counts").textContent = `${mine} by you, ${all} in all` + (annotators > 1 && agreement !== null ? `, agreement ${agreement.toFixed(2)}` : "");
      if (answer.pair) {
        pair = answer.pair;
        show();
        return;
      }
      say("You have seen every pair. More are shown as the run stores them.");
    } catch (error) {
      say(error.status === 401 ? error.message : `no answer from manta label (${error.message}); trying again`);
      if (error.status === 401) return;
    }
    byId("pair").hidden = byId("verdict").hidden = true;
    await pause();
    if (number !== asked) return;
    say("");
  }
}

async function judge(verdict) {
  if (!pair || byId("save").disabled) return;
  byId("save").disabled = byId("skip").disabled = true;
  const all = [...marks.values()];
  const [left, right] = pair.sides.map((side) => side.episode);
  put({
    id: newId(), annotator, group_id: pair.group_id, attempt: pair.attempt, left, right, verdict,
    thumbs: all.filter((mark) => mark.up !== null).map(({ episode, turn, up }) => ({ episode, turn, up })),
    corrections: all.filter((mark) => mark.text).map(({ episode, turn, text }) => ({ episode, turn, text })),
    comment: byId("comment").value, seconds: (performance.now() - shownAt) / 1000,
  });
  pair = null;
  await send(say);
  await next();
}

byId("verdict").onsubmit = (event) => {
  event.preventDefault();
  const verdict = new FormData(event.target).get("verdict");
  if (verdict) judge(verdict);
  else say("Choose first: 1 left, 2 right, 3 tie, 4 both bad; or s to skip.");
};
byId("verdict").onchange = () => say("");
byId("skip").onclick = () => judge("skip");

function move(turns, sides) {
  const lists = [...byId("sides").querySelectorAll("ol")].map((list) => [...list.children]);
  const here = document.activeElement.closest("li");
  const side = Math.max(0, lists.findIndex((list) => list.includes(here)));
  const place = Math.max(0, lists[side].indexOf(here));
  const to = lists[Math.min(1, Math.max(0, side + sides))];
  const item = to[Math.min(to.length - 1, Math.max(0, place + turns))];
  item.focus();
  item.scrollIntoView({ block: "nearest", inline: "start" });
}

const press = (kind) => document.activeElement.closest("li")?.querySelector(`.${kind}`).click();
const KEYS = {
  j: () => move(1, 0), k: () => move(-1, 0), h: () => move(0, -1), l: () => move(0, 1),
  g: () => press("good"), b: () => press("bad"), e: () => press("correct"),
  c: () => byId("comment").focus(), s: () => judge("skip"), "?": () => byId("help").click(),
};

document.addEventListener("keydown", (event) => {
  const here = event.target;
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (here.matches("textarea, #annotator")) {
    if (event.key === "Escape") (here.closest("li") ?? byId("sides").querySelector("li"))?.focus();
    return;
  }
  if (!pair) return;
  const verdict = VERDICTS[event.key];
  if (verdict) {
    byId("verdict").elements.verdict.value = verdict;
    say("");
  } else if (event.key === "Enter" && !here.matches("button, summary, input")) byId("verdict").requestSubmit();
  else if (KEYS[event.key]) KEYS[event.key]();
  else return;
  event.preventDefault();
});

byId("help").onclick = () => {
  byId("keys").hidden = !byId("keys").hidden;
  byId("help").setAttribute("aria-expanded", !byId("keys").hidden);
};

function askName() {
  byId("name").hidden = false;
  byId("annotator").value = annotator;
  byId("annotator").focus();
}

async function start() {
  byId("who").textContent = annotator;
  byId("name").hidden = true;
  await send(say);
  await next();
}

byId("who").onclick = askName;
byId("name").onsubmit = (event) => {
  event.preventDefault();
  annotator = byId("annotator").value.trim();
  localStorage.setItem("manta-annotator", annotator);
  if (annotator) start();
};

if (!key) say("Open the address that manta label prints, with its key behind the #.");
else if (annotator) start();
else askName();
