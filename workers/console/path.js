// One click's way, hop by hop. Server times are compared with server times and browser times with browser times;
// the ways between the two are given apart only where the clocks agree.
import { $, el } from "./dom.js";
import { number, t } from "./i18n.js";

export const LATE_S = 10;
let shown = null;

// click: {event_id, title, posted_ms, place: {partition, offset}?, path?, shown_ms?, state: sent|retrying|late|refused|done}
export function drawPath(click = shown) {
  shown = click;
  $("path").replaceChildren(...(click ? content(click) : [el("p", { className: "note" }, t("noPath"))]));
}

function content(click) {
  const { path, place } = click;
  const done = click.state === "done";
  const there = done ? path.clicked_ms - click.posted_ms : 0, back = done ? click.shown_ms - path.pushed_ms : 0;
  const agree = there >= 0 && back >= 0;
  const hop = (label, ms, detail = null) => ({ label: t(label), ms, detail });
  const at = path ?? place;
  const hops = [
    hop("posted", null, click.title),
    hop("taken", done && agree ? there : null, at ? t("place", at) : null),
    hop("updated", path?.updated_ms ? path.updated_ms - path.clicked_ms : null),
    hop("made", done ? path.sent_ms - (path.updated_ms ?? path.clicked_ms) : null),
    hop("published", done ? path.published_ms - path.sent_ms : null),
    hop("read", done ? path.seen_ms - path.published_ms : null),
    hop("pushed", done ? path.pushed_ms - path.seen_ms : null),
    hop("shown", done ? (agree ? back : there + back) : null, done && !agree ? t("network") : null),
  ];
  const reached = done ? hops.length : at ? 2 : 1;
  const status = {
    sent: t("waiting"),
    retrying: t("retrying"),
    late: t("late", { s: LATE_S }),
    refused: t("refused", { why: click.why }),
    done: done ? t("total", { ms: number(click.shown_ms - click.posted_ms) }) : "",
  }[click.state];
  return [
    el("ol", { className: "hops" }, ...hops.map((one, index) => el("li", { className: index < reached ? "reached" : "" },
      el("span", {}, one.label, one.detail ? el("small", {}, one.detail) : null),
      el("b", {}, one.ms === null ? (index >= reached ? "·" : "") : `${number(one.ms)} ms`)))),
    el("p", { className: `sum ${click.state}`, role: "status" }, status),
    done && !agree ? el("p", { className: "note" }, t("clocks")) : "",
    el("p", { className: "event-id" }, click.event_id),
  ];
}
