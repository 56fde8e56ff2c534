// Who can be watched: you, a few ready-made users made from the catalogue's own categories, anyone by id.
import { $, el } from "./dom.js";
import { t } from "./i18n.js";

const KEY = "upwell.me", PACE_MS = 1500;

const random = () => [...crypto.getRandomValues(new Uint8Array(6))].map(byte => byte.toString(16).padStart(2, "0")).join("");
export const eventId = () => `console-${random()}${random()}`;

function me() {
  const id = localStorage.getItem(KEY) ?? `guest-${random()}`;
  localStorage.setItem(KEY, id);
  return id;
}

export const people = [{ id: me(), name: () => t("you"), about: () => t("youAre"), fixed: true }];
const playing = new Map(); // user id -> timer

// Three of the commonest categories make fans of them; one person clicks on anything.
export function makePersonas(items) {
  const counts = new Map();
  for (const category of items.flatMap(item => item.categories)) counts.set(category, (counts.get(category) ?? 0) + 1);
  const commonest = [...counts].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1)).slice(0, 3);
  const session = people[0].id.slice(-4); // personas of one browser are not another's
  const personas = commonest.map(([category], at) => ({
    id: `persona-${at + 1}-${session}`,
    name: () => t("fan", { name: category }),
    likes: item => item.categories.includes(category),
  }));
  personas.push({ id: `persona-0-${session}`, name: () => t("drifter"), likes: () => true });
  people.splice(1, people.filter(person => person.likes).length, ...personas);
}

export function watchAlso(id) {
  if (people.some(person => person.id === id)) return;
  people.splice(0, people.length, ...people.filter(person => person.fixed || person.likes));
  people.push({ id, name: () => id, about: () => t("watched") });
}

export const isPlaying = id => playing.has(id);

export function stopPlaying(id) {
  clearInterval(playing.get(id));
  playing.delete(id);
}

function togglePlaying(person, items, click) {
  if (isPlaying(person.id)) return stopPlaying(person.id);
  const next = () => {
    const liked = items().filter(item => item.available && person.likes(item));
    if (liked.length) click(person.id, liked[Math.floor(Math.random() * liked.length)]);
  };
  next();
  return playing.set(person.id, setInterval(next, PACE_MS));
}

export function drawPeople(current, { choose, click, items }) {
  const rows = people.map(person => {
    const radio = el("input", { type: "radio", name: "person", value: person.id, checked: person.id === current, onchange: () => choose(person.id) });
    const about = person.about ? el("small", {}, person.about()) : null;
    const label = el("label", { title: person.id }, radio, el("span", {}, person.name(), about));
    if (!person.likes) return el("li", {}, label);
    const active = isPlaying(person.id);
    const play = el("button", {
      type: "button", className: "play", "aria-pressed": active, ariaLabel: t(active ? "pause" : "play", { name: person.name() }),
      onclick: () => {
        togglePlaying(person, items, click);
        choose(person.id);
        document.querySelector(`input[value="${CSS.escape(person.id)}"]`).closest("li").querySelector("button").focus();
      },
    }, active ? "❚❚" : "▶");
    return el("li", {}, label, play);
  });
  const focused = document.activeElement?.matches?.("#people input");
  $("people").replaceChildren(...rows);
  if (focused) $("people").querySelector("input:checked")?.focus();
}
