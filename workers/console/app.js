// The console: one user's list as it moves, and what one click does on its way there.
import { Refused, call, follow, sendEvent, storeKey, storedKey, wait } from "./api.js";
import { addFigures, buildCharts } from "./charts.js";
import { $, el, say } from "./dom.js";
import { clock, day, nextLanguage, number, t, translate } from "./i18n.js";
import { clearList, drawList } from "./list.js";
import { LATE_S, drawPath } from "./path.js";
import { drawPeople, eventId, makePersonas, people, stopPlaying, watchAlso } from "./people.js";

const K = 12, CATALOGUE = 200, FIGURES_MS = 2000;
const TYPES = ["click", "view", "like", "play", "complete", "cart", "purchase", "share", "skip", "hide", "dislike"];
const THEMES = ["light dark", "light", "dark"];

let user = people[0].id, answer = null, previous = null, updated_ms = null, stream = null, health = { state: "connecting" };
let connected = null; // whether the server is, to Kafka, as this user's stream said last
let items = [], catalogue = [], click = null; // click: the one whose path is drawn
let figures = null, profile = null, receipt = null;

const path = (id, rest = "") => `/v1/users/${encodeURIComponent(id)}${rest}`;

// ---- what state the console is in, said in one place

const TONES = { live: "good", connecting: "wait", starting: "wait", reconnecting: "wait" };

function setHealth(state, why = "") {
  health = { state, why };
  drawHealth();
}

const served = () => setHealth(connected === false ? "broker" : "live");

function drawHealth() {
  const time = updated_ms ? clock(updated_ms) : "–";
  $("status").textContent = t(health.state, { why: health.why, time });
  $("status").dataset.state = TONES[health.state] ?? "bad";
}

function explain(error) {
  if (!(error instanceof Refused)) setHealth("reconnecting");
  else if (error.wantsKey) setHealth("locked");
  else if (error.status === 503) setHealth("starting", error.message);
  else setHealth("failed", error.message);
}

// ---- the list of the chosen user

const ids = list => list.items.map(item => item.item_id).join();

function show(next) {
  const same = answer?.user_id === next.user_id;
  if (!same || ids(answer) !== ids(next)) previous = same ? answer : null; // the same list, explained, has not moved
  answer = next;
  updated_ms = Date.now();
  drawList(answer, previous, item => send(user, item, $("type").value));
}

function dropList() {
  answer = previous = updated_ms = null;
  clearList();
}

// least: the offset that the list must not be older than. Who may not read the state, or has none, sees the list alone.
async function refresh(least = -1) {
  const asked = `/recommendations?k=${K}&explain=true${least < 0 ? "" : `&min_offset=${least}`}`;
  const list = await call(path(user, asked));
  const newer = answer?.user_id === user && answer.as_of?.offset > (list.as_of?.offset ?? -1);
  if (list.user_id === user && !newer) show(list);
  const known = await call(path(list.user_id)).catch(() => null);
  if (list.user_id !== user) return;
  profile = known;
  drawProfile();
}

function watch(id) {
  stream?.abort();
  stream = new AbortController();
  user = id;
  connected = receipt = profile = null;
  if (answer && answer.user_id !== id) dropList(); // should this one's not come, the other's would stand under this name
  if (click?.user_id !== id) drawPath((click = null));
  drawUser();
  drawProfile();
  const { signal } = stream;
  const current = () => !signal.aborted && user === id;
  refresh().catch(error => current() && explain(error));
  follow(id, {
    state(state) {
      if (!current()) return;
      if (state === "lost") setHealth("reconnecting");
      else if (state !== "open") explain(state);
      else if (health.state !== "live") refresh().then(() => current() && served(), error => current() && explain(error));
    },
    event(name, data) {
      if (!current()) return;
      if (name === "status") {
        connected = data.connected;
        served();
      }
      if (name === "recommendations" && data.user_id === id) arrived(data);
    },
  }, signal);
}

function arrived(next) {
  show({ ...next, items: next.items.slice(0, K) });
  if (health.state !== "live") served();
  const way = next.path;
  if (way && click?.state !== "done" && covers(way)) {
    Object.assign(click, { path: way, state: "done", shown_ms: Date.now() });
    requestAnimationFrame(() => {
      click.shown_ms = Date.now();
      drawPath(click);
    });
  }
  refresh(next.as_of?.offset).catch(explain); // the worker explains the first places only
}

// A list answers the newest click of its batch: ours is in it when it is that one or came before it.
const covers = way => click && (way.event_id === click.event_id ||
  (click.place && way.partition === click.place.partition && way.offset >= click.place.offset));

// ---- clicks

async function send(user_id, item, event_type) {
  const event = { event_id: eventId(), user_id, item_id: item.item_id, event_type };
  const sent = { ...event, title: item.title || item.item_id, posted_ms: Date.now(), state: "sent" };
  const change = news => {
    Object.assign(sent, sent.state === "done" ? {} : news);
    if (sent === click) drawPath(sent);
  };
  if (user_id === user) drawPath((click = sent));
  try {
    const place = await sendEvent(event, () => change({ state: "retrying" }));
    change({ place, state: "sent" });
    await wait(1000 * LATE_S);
    if (sent.state === "sent") change({ state: "late" });
  } catch (error) {
    change({ state: "refused", why: error.message });
    if (error instanceof Refused && error.wantsKey) {
      stopPlaying(user_id);
      explain(error);
    }
  }
}

async function loadItems() {
  const query = $("search").value.trim();
  const found = (await call(`/v1/items?limit=${CATALOGUE}${query && `&q=${encodeURIComponent(query)}`}`)).items;
  if (query !== $("search").value.trim()) return;
  items = found;
  if (!query) catalogue = found;
  if (!query) makePersonas(catalogue);
  drawItems();
  drawUser();
}

async function forget() {
  stopPlaying(user);
  try {
    const given = await call(path(user), "DELETE");
    receipt = { receipt: given.receipt, date: given.gone_by_ms && day(given.gone_by_ms) };
    drawPath((click = null));
    dropList();
    profile = null;
    await refresh();
  } catch (error) {
    explain(error);
  }
  drawProfile();
}

// ---- drawing

function drawUser() {
  const person = people.find(one => one.id === user);
  drawPeople(user, { choose: watch, click: (id, item) => send(id, item, "click"), items: () => catalogue });
  $("whom").textContent = person?.name() ?? user;
  $("whom").title = user;
  $("forget").textContent = t(user === people[0].id ? "forget" : "forgetOther");
}

function drawItems() {
  const rows = items.map(item => el("li", {}, el("button", {
    type: "button", disabled: !item.available, onclick: () => send(user, item, $("type").value),
  }, el("span", {}, item.title || item.item_id), el("small", {}, item.available ? item.categories.join(" · ") : t("unavailable")))));
  const empty = t($("search").value.trim() ? "noItems" : "emptyCatalogue");
  $("items").replaceChildren(...(rows.length ? rows : [el("li", { className: "note" }, empty)]));
}

function drawProfile() {
  const past = profile?.history ?? [];
  const rows = past.map(entry => el("li", {}, el("span", {}, entry.title || entry.item_id), el("small", {}, number(entry.weight, 1))));
  $("history").replaceChildren(...(rows.length ? rows : [el("li", { className: "note" }, t("noHistory"))]));
  say($("receipt"), receipt ? t(receipt.date ? "forgotten" : "forgottenKept", receipt) : "");
}

function drawGeneration() {
  const generation = figures?.generation;
  if (!generation) return;
  $("generation-name").textContent = generation.name;
  const created = generation.created_ms ? ` · ${t("since", { time: clock(generation.created_ms) })}` : "";
  $("generation-about").textContent = t("swaps", { n: number(generation.swaps), items: number(generation.items) }) + created;
}

function drawTypes() {
  const chosen = $("type").value || TYPES[0];
  $("type").replaceChildren(...TYPES.map(type => new Option(t(`type.${type}`), type, false, type === chosen)));
}

function drawAll() {
  translate();
  drawTypes();
  drawUser();
  drawItems();
  drawProfile();
  drawGeneration();
  drawPath();
  drawHealth();
  buildCharts();
  if (answer) drawList(answer, previous, item => send(user, item, $("type").value));
}

// ---- the page

function nextTheme() {
  const now = localStorage.getItem("upwell.theme") ?? THEMES[0];
  localStorage.setItem("upwell.theme", THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
  setTheme();
}

function setTheme() {
  document.documentElement.style.colorScheme = localStorage.getItem("upwell.theme") ?? THEMES[0];
  buildCharts();
}

function ask(dialog, then) {
  dialog.returnValue = "";
  dialog.onclose = () => dialog.returnValue && dialog.returnValue !== "cancel" && then(dialog.returnValue);
  dialog.showModal();
}

let typing = 0;
$("search").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => loadItems().catch(explain), 200);
});
$("other").addEventListener("submit", event => {
  event.preventDefault();
  const id = event.target.elements.user.value.trim();
  if (!id) return;
  watchAlso(id);
  watch(id);
  event.target.reset();
});
$("language").addEventListener("click", () => { nextLanguage(); drawAll(); });
$("theme").addEventListener("click", nextTheme);
$("key").addEventListener("click", () => {
  const field = $("key-dialog").querySelector("input");
  field.value = storedKey();
  ask($("key-dialog"), () => {
    storeKey(field.value.trim());
    loadItems().catch(explain);
    watch(user);
  });
});
$("forget").addEventListener("click", () => {
  $("forget-title").textContent = t("forgetAsk", { user: people.find(one => one.id === user)?.name() ?? user });
  ask($("forget-dialog"), forget);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", buildCharts);

async function tick() {
  try {
    figures = await call("/v1/figures");
    addFigures(figures);
    drawGeneration();
    if (!catalogue.length) await loadItems();
    if (!answer) await refresh();
  } catch (error) {
    if (health.state !== "reconnecting" && health.state !== "broker") explain(error);
  }
  setTimeout(tick, FIGURES_MS);
}

drawAll();
setTheme();
watch(user);
loadItems().catch(explain);
tick();
