// The last minutes, drawn from what /v1/figures says every other second.
import { $, el } from "./dom.js";
import { clock, number, t } from "./i18n.js";

const KEPT_MS = 5 * 60_000, GAP_MS = 15_000;
const CHARTS = [
  { title: "latency", digits: 0, lines: [["p50", f => f.click_to_recommendation_ms.p50], ["p99", f => f.click_to_recommendation_ms.p99]] },
  { title: "rate", digits: 1, lines: [["events", eventsASecond]] },
  { title: "hits", digits: 3, lines: [["served", f => f.hit_rate.served], ["popularity", f => f.hit_rate.popularity]] },
];
const points = []; // {now_ms, values: [[…], [], …]}
let last = null, drawn = [];

function eventsASecond(figures) {
  const seconds = last ? (figures.now_ms - last.now_ms) / 1000 : 0;
  return seconds > 0 && figures.events_total >= last.events_total ? (figures.events_total - last.events_total) / seconds : null;
}

const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function plot(chart, box) {
  const series = chart.lines.map(([key], at) => ({
    label: t(key), stroke: () => colour(`--line-${at + 1}`), width: 1.6, points: { show: false }, spanGaps: false,
  }));
  const axis = { stroke: () => colour("--quiet"), font: "11px system-ui", grid: { stroke: () => colour("--hair"), width: 1 }, ticks: { show: false } };
  const options = {
    ...size(box), legend: { show: false }, cursor: { show: false }, series: [{}, ...series],
    scales: { x: { range: (_, low, high) => [Math.min(low, high - 60), high] }, y: { range: (_, low, high) => [0, high > 0 ? high * 1.15 : 1] } },
    axes: [
      { ...axis, size: 22, values: (_, ticks) => ticks.map(tick => clock(tick * 1000).slice(0, 5)), incrs: [60, 120] },
      { ...axis, size: 40, space: 26, values: (_, ticks) => ticks.map(tick => number(tick, Math.min(2, chart.digits))) },
    ],
  };
  return new uPlot(options, data(chart), box);
}

const size = box => ({ width: Math.max(box.clientWidth, 120), height: 110 });
const data = chart => {
  const at = CHARTS.indexOf(chart);
  return [points.map(p => p.now_ms / 1000), ...chart.lines.map((_, line) => points.map(p => p.values?.[at][line] ?? null))];
};

// Anew: at the start, in another language, in another theme.
export function buildCharts() {
  drawn.forEach(({ plot }) => plot.destroy());
  drawn = CHARTS.map(chart => {
    const canvas = el("div", { className: "plot", role: "img" });
    const values = chart.lines.map(([key]) => el("span", {}, t(key), " ", el("b")));
    $("charts").append(el("figure", {}, el("figcaption", {}, t(chart.title), ...values), canvas));
    return { chart, canvas, values };
  });
  $("charts").replaceChildren(...drawn.map(({ canvas }) => canvas.parentElement));
  for (const one of drawn) one.plot = plot(one.chart, one.canvas);
  redraw();
}

function redraw() {
  const newest = points.at(-1)?.values;
  drawn.forEach(({ chart, canvas, values, plot }, at) => {
    plot.setData(data(chart));
    chart.lines.forEach((_, line) => {
      const value = newest?.[at][line];
      values[line].lastChild.textContent = value == null ? "–" : number(value, chart.digits);
    });
    canvas.ariaLabel = `${t(chart.title)}: ${values.map(value => value.textContent).join(", ")}`;
  });
}

export function addFigures(figures) {
  if (last && figures.now_ms - last.now_ms > GAP_MS) points.push({ now_ms: last.now_ms + 1 }); // a gap is shown as one
  points.push({ now_ms: figures.now_ms, values: CHARTS.map(chart => chart.lines.map(([, value]) => value(figures))) });
  while (figures.now_ms - points[0].now_ms > KEPT_MS) points.shift();
  last = figures;
  redraw();
}

addEventListener("resize", () => drawn.forEach(({ plot, canvas }) => plot.setSize(size(canvas))));
