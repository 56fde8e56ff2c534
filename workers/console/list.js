// The ranked list: rows keep their place in the document by item, so that they can be seen to move.
import { $, calm, el, say } from "./dom.js";
import { number, percent, t } from "./i18n.js";

const list = $("list");
const rows = new Map(); // item_id -> <li>

const name = entry => entry.title || entry.item_id;

function row(item, onClick) {
  const button = el("button", { type: "button", className: "item", onclick: () => onClick(item) });
  return el("li", {}, el("b"), el("div", {}, button, el("p")), el("i"), el("span", { className: "score" }));
}

function why({ because = [], explained }) {
  if (!because.length) return "";
  const reasons = because.map(reason => `${name(reason)} · ${percent(reason.share)}`).join(", ");
  return `${t("because", { reasons })} ${explained ? t("explained", { share: percent(explained) }) : ""}`;
}

function fill(li, item, at, change, top) {
  const [place, body, move, score] = li.children;
  place.textContent = at + 1;
  body.firstChild.textContent = name(item);
  body.lastChild.textContent = why(item);
  move.className = change === null ? "new" : change > 0 ? "up" : change < 0 ? "down" : "";
  move.textContent = change === null ? t("isNew") : change > 0 ? `▲ ${change}` : change < 0 ? `▼ ${-change}` : "";
  if (change) move.ariaLabel = t(change > 0 ? "up" : "down", { n: Math.abs(change) });
  else move.removeAttribute("aria-label");
  move.role = change ? "img" : null;
  score.textContent = number(item.score, 3);
  score.style.setProperty("--part", top > 0 ? Math.max(0, item.score / top) : 0);
}

// Draws `answer`; `before` (the answer shown until now, of the same user) says what has moved.
export function drawList(answer, before, onClick) {
  const places = new Map(before?.items.map((item, at) => [item.item_id, at]));
  const focused = document.activeElement, focusedAt = [...list.children].findIndex(li => li.contains(focused));
  const tops = new Map([...rows].map(([id, li]) => [id, li.getBoundingClientRect().top]));
  for (const id of rows.keys()) {
    if (answer.items.some(item => item.item_id === id)) continue;
    rows.get(id).remove();
    rows.delete(id);
  }
  answer.items.forEach((item, at) => {
    if (!rows.has(item.item_id)) rows.set(item.item_id, row(item, onClick));
    const li = rows.get(item.item_id), was = places.get(item.item_id);
    fill(li, item, at, before ? (was === undefined ? null : was - at) : 0, answer.items[0].score);
    if (list.children[at] !== li) list.insertBefore(li, list.children[at] ?? null);
  });
  if (focusedAt >= 0) { // moving a row takes the focus from it; where it is gone, its place has it
    const heir = list.contains(focused) ? focused : list.children[focusedAt]?.querySelector("button");
    heir?.focus({ preventScroll: true });
  }
  const moved = Boolean(before) && answer.items.some((item, at) => places.get(item.item_id) !== at);
  if (moved && !calm()) animate(tops);
  drawFacts(answer);
  if (moved) announce(t("moved", { title: name(answer.items[0]) }));
}

export function clearList() {
  rows.clear();
  list.replaceChildren();
  say($("note"), $("source").textContent = $("as-of").textContent = "");
}

function announce(text) {
  if ($("announce").textContent !== text) $("announce").textContent = text; // set again, it is read out again
}

function animate(tops) {
  for (const [id, li] of rows) {
    const by = tops.has(id) ? tops.get(id) - li.getBoundingClientRect().top : 0;
    const from = tops.has(id) ? { transform: `translateY(${by}px)` } : { opacity: 0, transform: "translateX(12px)" };
    if (by || !tops.has(id)) li.animate([from, { transform: "none", opacity: 1 }], { duration: 420, easing: "ease-out" });
  }
}

function drawFacts(answer) {
  const source = $("source");
  source.textContent = t(answer.source);
  source.dataset.source = answer.source;
  const notes = [];
  if (answer.stale) notes.push(t("stale"));
  if (!answer.items.length) notes.push(t("nothing"));
  else if (answer.source === "popular" && answer.as_of?.offset < 0) notes.push(t("coldStart"));
  else if (answer.fallback) notes.push(t("fallback", { why: answer.fallback }));
  say($("note"), notes.join(" "));
  $("note").dataset.kind = answer.stale ? "warn" : "calm";
  const facts = answer.as_of?.offset >= 0 ? [t("asOf", answer.as_of)] : [];
  if (answer.arm && answer.arm !== "default") facts.push(t("arm", { arm: answer.arm }));
  $("as-of").textContent = facts.join(" · ");
}
