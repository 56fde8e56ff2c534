"""What `upwell evaluate` found, as PNG plots and one self-contained page. Needs the extra `report`."""

import base64
import html
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from workers.figures import Figures

MODES = {"strict": "strict: events of one stamp do not see each other", "line": "line by line: leaks within a stamp"}
COLUMNS = ("events", "hr@10", "hr@20", "ndcg@10", "mrr", "coverage", "gini", "novelty", "us_per_event")
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}table{border-collapse:"
    "collapse;margin:1rem 0}td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #ddd}td:first-child,"
    "th:first-child{text-align:left}img{max-width:49%}"
)


def write_report(results: Figures, out: Path) -> Path:
    """report.html and the PNGs that it embeds; every figure says its mode."""
    body = [f"<h1>{html.escape(results['stream'])}: test, then learn</h1>", _facts(results)]
    for mode, found in results["modes"].items():
        body += [f"<h2>{MODES[mode]}</h2>", arms_table(found["arms"]), paired_table(found.get("upwell_minus", {}))]
        body += [_image(path) for path in plots(results["stream"], mode, found["arms"], out)]
    page = f"<!doctype html><meta charset=utf-8><title>Upwell evaluation</title><style>{STYLE}</style>{''.join(body)}"
    (out / "report.html").write_text(page, encoding="utf-8")
    return out / "report.html"


def _facts(results: Figures) -> str:
    said = (f"{name}: {value}" for name, value in results.items() if name not in ("modes", "stream"))
    return f"<p>{html.escape('; '.join(said))}</p>"


def arms_table(arms: Mapping[str, Figures]) -> str:
    """One line an arm, the best NDCG first; 95 % intervals over users."""
    head = "".join(f"<th>{name}</th>" for name in ("arm", *COLUMNS, "NDCG@10 interval", "with repeats"))
    lines = []
    for name, found in sorted(arms.items(), key=lambda pair: -pair[1]["ndcg@10"]):
        low, high = found["intervals"]["ndcg@10"]
        cells = [html.escape(name), *(_number(found[c]) for c in COLUMNS), f"{low:.4f} to {high:.4f}"]
        cells.append(f"{found['repeats']['ndcg@10']:.4f}")
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def paired_table(differences: Mapping[str, Figures]) -> str:
    """Upwell minus each other arm on the same events."""
    lines = [
        f"<tr><td>upwell − {html.escape(name)}</td>"
        + "".join(f"<td>{mean:+.4f} ({low:+.4f} to {high:+.4f})</td>" for mean, low, high in found.values())
        + "</tr>"
        for name, found in differences.items()
    ]
    return f"<table><tr><th>paired</th><th>HR@10</th><th>NDCG@10</th></tr>{''.join(lines)}</table>" if lines else ""


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if value < 10 else f"{value:,.0f}"


def plots(stream: str, mode: str, arms: Mapping[str, Figures], out: Path) -> list[Path]:
    """HR@10 over time, by history length and by item age, and the cost of an event."""
    return [
        _plot(out / f"{mode}-over-time.png", f"{stream}, {mode}: HR@10 over time", arms, _line("over_time"), "event"),
        _plot(out / f"{mode}-by-history.png", f"{stream}, {mode}: HR@10 by history length", arms,
              _bucketed("by_history"), "events of the user before"),
        _plot(out / f"{mode}-by-item-age.png", f"{stream}, {mode}: HR@10 by item age", arms,
              _bucketed("by_item_age"), "events on the item before"),
        _plot(out / f"{mode}-cost.png", f"{stream}, {mode}: µs an event (score and learn, one core)", arms,
              _line("cost_over_time", log=True), "event"),
    ]  # fmt: skip


def _line(key: str, log: bool = False) -> Callable[[Axes, str, Figures], None]:
    def draw(axes: Axes, name: str, found: Figures) -> None:
        axes.plot(*zip(*found[key], strict=True), label=name)
        axes.set_yscale("log" if log else "linear")

    return draw


def _bucketed(key: str) -> Callable[[Axes, str, Figures], None]:
    def draw(axes: Axes, name: str, found: Figures) -> None:
        axes.plot(list(found[key]), [bucket["hr@10"] for bucket in found[key].values()], marker="o", label=name)

    return draw


def _plot(
    path: Path, title: str, arms: Mapping[str, Figures], draw: Callable[[Axes, str, Figures], None], below: str
) -> Path:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, found in arms.items():
        draw(axes, name, found)
    axes.set_title(title)
    axes.set_xlabel(below)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _image(path: Path) -> str:
    coded = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{coded}">'
