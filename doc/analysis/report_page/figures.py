"""The page's charts by matplotlib, as PNG and PDF for papers."""
import os
import warnings

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib import ticker  # noqa: E402

import plot_run  # noqa: E402
from pictures import end_ticks  # noqa: E402

from . import chart, palette  # noqa: E402
from .svg import MOST_MARKS, SHAPES, shape  # noqa: E402

WIDTH = 6.5  # inches: the text of a page
MARKERS = dict(zip(SHAPES, "os^DxP"))
# Text stays text in the PDF: fonts of type 42.
STYLE = {**plot_run.STYLE, "font.size": 9, "pdf.fonttype": 42, "savefig.dpi": 200, "figure.constrained_layout.use": True,
         "legend.frameon": True, "legend.edgecolor": "none", "legend.framealpha": 0.9}


def plain(text):
    """Text that matplotlib must not take for mathematics, in one line."""
    return " ".join(text.split()).replace("$", r"\$")


def draw_series(axes, s):
    style = palette.slot(s.style)
    colour, dashes = palette.LIGHT_SERIES[style], palette.DASHES[style]
    how = {"color": colour, "linewidth": 1.3, "label": plain(s.name)}
    if s.markers:
        how.update(marker=MARKERS[shape(s.style)], markersize=4, markeredgecolor="white", markeredgewidth=0.5,
                   markevery=[int(i) for i in s.marked()])
        if MARKERS[shape(s.style)] == "x":
            how.update(markeredgecolor=colour, markeredgewidth=1.2)
    if not s.joined:
        how["linestyle"] = "none"
    elif dashes:
        how["dashes"] = dashes
    if s.low is not None and s.joined:
        axes.fill_between(s.x, s.low, s.high, color=colour, alpha=0.2 if style < 2 else 0.1, linewidth=0)
    lone = s.joined and not s.markers and len(s.x) == 1
    axes.plot(s.x, s.y, zorder=3 if s.style < 2 else 2, **({**how, "marker": "o", "markersize": 3} if lone else how))


def draw(axes, c, inches, title=True):
    """A chart, with restarts and validations as in the page, on axes that are `inches` wide."""
    for s in c.series:
        draw_series(axes, s)
    if c.log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.set_ylim(c.low, c.high)
    ticks = c.y_ticks()
    axes.set_yticks([value for value, _ in ticks], [label for _, label in ticks])
    axes.set_xlim(0, c.last)
    end_ticks(axes, c.last, inches)
    axes.set_xlabel("updates")
    axes.set_ylabel(c.unit)
    if title:
        axes.set_title(c.title, loc="left", fontsize=9, fontweight="bold")
    for i, update in enumerate(c.restarts[:MOST_MARKS]):
        axes.axvline(update, color=palette.LIGHT["ink"], linewidth=0.9, linestyle=(0, (1.5, 2.5)), marker="v", markersize=4,
                     markevery=[1], clip_on=False, label="restart" if i == 0 else None)
    if 0 < len(c.validations) <= MOST_MARKS:
        axes.plot(c.validations, [0.015] * len(c.validations), "|", transform=axes.get_xaxis_transform(), markersize=4,
                  color=palette.LIGHT["muted"])


def bpc(run, others):
    c = chart.bpc(run, others)
    figure, axes = plt.subplots(figsize=(WIDTH, 3.6))
    draw(axes, c, WIDTH - 0.6, title=False)
    axes.legend(loc="upper right", fontsize=8)
    return figure


def training(run):
    charts = chart.small_charts(run)
    figure, grid = plt.subplots(2, 2, figsize=(WIDTH, 4.6), squeeze=False)
    for axes, c in zip(grid.flat, charts):
        draw(axes, c, WIDTH / 2 - 0.8)
        if len(c.series) > 1:
            axes.legend(fontsize=8)
    for axes in grid.flat[len(charts):]:
        axes.set_axis_off()
    return figure


def write(run, others, directory):
    """Writes bpc, training and final_spans, each as .png and .pdf; yields their paths."""
    os.makedirs(directory, exist_ok=True)
    plt.rcParams.update(STYLE)
    warnings.filterwarnings("ignore", message="Glyph .* missing from current font")
    pictures = [("bpc", lambda: bpc(run, others)), ("training", lambda: training(run))]
    if run["span"][-1].size:
        trace = {**run, "attn_span": plot_run.number(run["deck"], "span", "attn_span")}
        pictures.append(("final_spans", lambda: plot_run.plot_final_spans(trace)))
    for name, make in pictures:
        figure = make()
        for kind in ("png", "pdf"):
            path = os.path.join(directory, f"{name}.{kind}")
            figure.savefig(path)
            yield path
        plt.close(figure)
