"""The page: figures, tables and the data that its script draws from."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly import graph_objects
from plotly.offline import get_plotlyjs

from utils.config.schema import TAGS
from utils.report.calibration import Bin, calibration_error
from utils.report.confusion import Confusion
from utils.report.run_files import Run
from utils.report.verified import HEAD

FOLDER = Path(__file__).resolve().parent
# One per run. Palettes of plotly and matplotlib with so many have some that vanish on a light or on a dark background.
COLOURS = (
    "#3b82c4", "#e07b39", "#2fa37c", "#aa1478", "#f082fa", "#785000", "#8cbef0", "#aac800", "#643cbe", "#c82800",
    "#b46ea0", "#007800", "#00646e", "#f0aaaa", "#9678fa", "#28d2b4", "#968200", "#faaa00", "#aaaa78", "#78506e",
)  # fmt: skip
GREY, LINES = "#7d8590", "rgba(128, 128, 128, 0.22)"  # visible on light and on dark backgrounds
MOST_CLASSES = 100  # of a confusion matrix that is drawn
SHOWN_EPOCHS = 12  # epochs whose histograms are on the page
CURVES = (  # heading, column of the training, column of the validation
    ("Loss", "train_loss", "val_loss"),
    ("Top-1 accuracy, %", "train_top1", "val_top1"),
    ("Learning rate", "lr", ""),
)


def render(runs: Sequence[Run]) -> str:
    """The page about these runs."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    figures = {f"curve{i}": _curve(runs, *columns) for i, columns in enumerate(CURVES)}
    if sum(run.summary is not None for run in runs) > 1:
        figures["size"] = _accuracy_over_size(runs)
    curves = list(figures)
    if any(run.layers for run in runs):
        figures["operations"] = _operations(runs)
    evaluated = [run for run in runs if run.confusion is not None]
    for i, run in enumerate(evaluated):
        if run.confusion is not None and len(run.confusion.classes) <= MOST_CLASSES:
            figures[f"confusion{i}"] = _confusion(run.confusion)
        if run.confusion is not None and run.confusion.bins:
            figures[f"reliability{i}"] = _reliability(run.confusion.bins)
    data = {
        "figures": {name: json.loads(str(figure.to_json())) for name, figure in figures.items()},
        "runs": [_explored(run, colour(i)) for i, run in enumerate(runs)],
        "examples": [run.confusion.examples for run in evaluated if run.confusion is not None],
    }
    return environment.get_template("page.html").render(
        runs=runs,
        colours=[colour(i) for i in range(len(runs))],
        overview=_overview(runs),
        curves=curves,
        fields=_fields(runs),
        evaluated=evaluated,
        verified=[run for run in runs if run.verified],
        verified_head=HEAD,
        most_classes=MOST_CLASSES,
        calibration_error=calibration_error,
        quantized=[run for run in runs if run.quantizers],
        tags=TAGS,
        style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        script=Markup((FOLDER / "page.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
        # Inside a script element only a `<` could end it or begin a comment.
        data=Markup(json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")),
    )


def colour(i: int) -> str:
    """The colour of the i-th run."""
    return COLOURS[i % len(COLOURS)]


def _plain(text: str) -> str:
    """Escape text for plotly, which interprets some HTML."""
    return html.escape(text, quote=False)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _overview(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row per run; None where it is not known yet."""
    first = _last_top1(runs[0])
    rows = []
    for run in runs:
        top1, summary = _last_top1(run), run.summary or {}
        best = [row["val_top1"] for row in run.metrics if _finite(row.get("val_top1")) is not None]
        rows.append(
            {
                "run": run,
                "network": run.config.get("model.name", ""),
                "bits": summary.get("bits"),
                "top1": top1,
                "best": max(best, default=None),
                "gap": None if run is runs[0] or top1 is None or first is None else top1 - first,
                "kib": summary["weight_bytes"] / 1024 if summary else None,
                "smaller": run.smaller,
                "bit_operations": summary.get("bit_operations"),
                "audit": summary.get("audit"),
            }
        )
    return rows


def _last_top1(run: Run) -> float | None:
    return _finite(run.metrics[-1].get("val_top1")) if run.metrics else None


def _fields(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each field of the configurations with its value in every run, and whether these differ."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    rows = []
    for name in names:
        values = [run.config.get(name, "") for run in runs]
        rows.append({"name": name, "values": values, "differs": len(set(values)) > 1})
    return rows


def _figure(title: str, names: int, **axes: Any) -> graph_objects.Figure:
    """An empty figure with room for a legend of `names` entries."""
    below = 56 + 22 * math.ceil(2 * names / 3)
    figure = graph_objects.Figure()
    axis = {"gridcolor": LINES, "zerolinecolor": LINES, "linecolor": LINES, "automargin": True}
    figure.update_layout(
        template="none", title={"text": title, "font": {"size": 15}, "x": 0, "xref": "paper"}, height=260 + below,
        margin={"l": 56, "r": 16, "t": 44, "b": below}, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        font={"color": GREY, "family": "system-ui, sans-serif", "size": 12}, hovermode="closest",
        legend={"orientation": "h", "yref": "container", "y": 0.02, "yanchor": "bottom", "x": 0},
        xaxis=axis | axes.get("xaxis", {}), yaxis=axis | axes.get("yaxis", {}),
    )  # fmt: skip
    return figure


def _curve(runs: Sequence[Run], title: str, training: str, validation: str) -> graph_objects.Figure:
    """A column of the metrics over the epochs; a run's training and validation are shown and hidden together."""
    ticks = {"dtick": 1} if max(run.done for run in runs) <= 12 else {}
    figure = _figure(title, len(runs), xaxis={"title": {"text": "epoch", "standoff": 4}, **ticks})
    if training in ("lr", "train_loss"):
        rows = [row for run in runs for row in run.metrics]
        figure.update_yaxes(
            **_logarithmic([row.get(name, 0.0) for row in rows for name in (training, validation)])
        )
    for i, run in enumerate(runs):
        epochs = [row["epoch"] for row in run.metrics]
        named = False
        for column, dash in ((validation, "solid"), (training, "dot" if validation else "solid")):
            values = [_finite(row.get(column)) for row in run.metrics]
            if not column or not any(value is not None for value in values):
                continue
            what = {"dot": " training", "solid": " validation"}[dash] if validation else ""
            figure.add_scatter(
                x=epochs, y=values, name=_plain(run.label), legendgroup=run.label, showlegend=not named,
                mode="lines+markers" if len(epochs) <= 30 else "lines", marker={"size": 5},
                line={"color": colour(i), "dash": dash},
                hovertemplate=f"{_plain(run.label)}{what}<br>epoch %{{x}}: %{{y:.5g}}<extra></extra>",
            )  # fmt: skip
            named = True
    return figure


def _logarithmic(values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis with labels 1, 2, 5, 10 ... where positive values reach far; else nothing."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if not positive or max(positive) < 20 * min(positive):
        return {}
    low, high = (math.floor(math.log10(bound(positive))) for bound in (min, max))
    steps = (1, 2, 5) if high - low <= 2 else (1,)
    ticks = [float(f"{step}e{power}") for power in range(low, high + 2) for step in steps]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _accuracy_over_size(runs: Sequence[Run]) -> graph_objects.Figure:
    figure = _figure(
        "Accuracy over size", len(runs),
        xaxis={"title": {"text": "weights, KiB", "standoff": 4}, "rangemode": "tozero"},
        yaxis={"title": {"text": "top-1, % (last epoch)"}},
    )  # fmt: skip
    for i, run in enumerate(runs):
        top1 = _last_top1(run)
        if run.summary and top1 is not None:
            figure.add_scatter(
                x=[run.summary["weight_bytes"] / 1024], y=[top1], mode="markers", name=_plain(run.label),
                marker={"size": 13, "color": colour(i)},
                hovertemplate=f"{_plain(run.label)}<br>%{{x:.1f}} KiB, %{{y:.2f}} %<extra></extra>",
            )  # fmt: skip
    return figure


def _operations(runs: Sequence[Run]) -> graph_objects.Figure:
    """Bit operations of each layer, a bar per run."""
    decades = {"type": "log", "dtick": 1, "tickformat": "~s"}
    figure = _figure(
        "Bit operations of each layer, one image", len(runs), xaxis={"tickangle": -60}, yaxis=decades
    )
    figure.update_layout(height=440, barmode="group", margin={"b": 180})
    for i, run in enumerate(runs):
        if run.layers:
            figure.add_bar(
                x=[_plain(layer["name"]) for layer in run.layers],
                y=[layer["bit_operations"] for layer in run.layers],
                name=_plain(run.label), marker={"color": colour(i)},
                hovertemplate=f"{_plain(run.label)}<br>%{{x}}: %{{y:,}}<extra></extra>",
            )  # fmt: skip
    return figure


def _confusion(confusion: Confusion) -> graph_objects.Figure:
    """The confusion matrix; the first class is on top."""
    names = [_plain(name) for name in confusion.classes]
    places = list(range(len(names)))
    shares = [[100 * cell / max(sum(row), 1) for cell in row] for row in confusion.matrix]
    axis = {"tickvals": places, "ticktext": names, "showgrid": False, "zeroline": False}
    figure = _figure(
        "Confusion matrix, images",
        0,
        xaxis={"title": {"text": "called", "standoff": 4}, **axis},
        yaxis={"title": {"text": "class"}, "autorange": "reversed", **axis},
    )
    figure.update_layout(height=160 + 24 * max(10, min(len(names), 40)))
    hover = [
        [f"{row} called {column}: {cell}" for column, cell in zip(names, cells, strict=True)]
        for row, cells in zip(names, confusion.matrix, strict=True)
    ]
    figure.add_heatmap(
        x=places, y=places, z=shares, text=confusion.matrix, customdata=hover, colorscale="Blues", zmin=0, zmax=100,
        texttemplate="%{text}" if len(names) <= 20 else None, hovertemplate="%{customdata}<extra></extra>",
        colorbar={"title": {"text": "% of row"}},
    )  # fmt: skip
    return figure


def _reliability(bins: Sequence[Bin]) -> graph_objects.Figure:
    """The accuracy of the images of each bin of probabilities, and the line where both are equal."""
    axis = {"range": [0, 100], "dtick": 20}
    figure = _figure(
        f"Calibration, expected error {100 * calibration_error(bins):.2f} %", 0,
        xaxis={"title": {"text": "probability of the predicted class, %", "standoff": 4}, **axis},
        yaxis={"title": {"text": "accuracy, %"}, **axis},
    )  # fmt: skip
    figure.add_bar(
        x=[50 * (one.low + one.high) for one in bins], y=[100 * one.accuracy for one in bins],
        width=[100 * (one.high - one.low) for one in bins], marker={"color": COLOURS[0]},
        customdata=[
            f"{one.images} images: accuracy {100 * one.accuracy:.2f} %, mean probability {100 * one.confidence:.2f} %"
            for one in bins
        ],
        hovertemplate="%{customdata}<extra></extra>", showlegend=False,
    )  # fmt: skip
    figure.add_scatter(
        x=[100 * one.confidence for one in bins], y=[100 * one.confidence for one in bins], mode="lines+markers",
        line={"color": COLOURS[1], "dash": "dot"}, hoverinfo="skip", showlegend=False,
    )  # fmt: skip
    return figure


def _explored(run: Run, colour: str) -> dict[str, Any]:
    """A run's quantizers over the epochs: figures of each epoch, histograms of some."""
    series: dict[str, dict[str, Any]] = {}
    for record in run.epochs:
        for row in record["quantizers"]:
            one = series.setdefault(row["name"], {"tag": row["tag"], "epochs": [], "basis": []})
            one["epochs"].append(record["epoch"])
            one.setdefault("dead", []).append(None if row["used"] is None else row["levels"] - row["used"])
            for name in ("range", "clipped", "changed", "update"):
                one.setdefault(name, []).append(row[name])
            one["basis"].append(row["basis"])
    shown = _some(run.epochs)
    return {
        "label": run.label,
        "colour": colour,
        "series": series,
        "shown": [record["epoch"] for record in shown],
        "histograms": [
            {
                row["name"]: {
                    "low": row["histogram"]["edges"][0],
                    "high": row["histogram"]["edges"][-1],
                    "counts": row["histogram"]["counts"],
                    "positions": row["positions"],
                    "levels": row["levels"],
                    "range": row["range"],
                }
                for row in record["quantizers"]
                if row["histogram"]["edges"]
            }
            for record in shown
        ],
    }


def _some(epochs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most `SHOWN_EPOCHS` of the records, evenly spaced, the first and the last among them."""
    count = min(len(epochs), SHOWN_EPOCHS)
    steps = max(count - 1, 1)
    return [epochs[round(i * (len(epochs) - 1) / steps)] for i in range(count)]
