"""A chart as a figure of the page. It is as wide as there is space: curves lie in a view that stretches, and text, markers and
strokes keep their sizes."""
import numpy as np

from . import palette
from .markup import el, join, table

VIEW = 1000
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "plus")
MOST_MARKS = 120      # restarts or validations; more would be a grey area
FEW_MARKERS = 20      # of a series in a narrow chart
TABLE_ROWS = 12


def definitions():
    """The shapes of markers, once for the page."""
    paths = {"circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z", "square": "M-3.5-3.5h7v7h-7z", "triangle": "M0-4.5 4.3 3.2H-4.3z",
             "diamond": "M0-5 5 0 0 5-5 0z", "cross": "M-3.5-3.5 3.5 3.5M-3.5 3.5 3.5-3.5", "plus": "M0-4.5V4.5M-4.5 0H4.5",
             "restart": "M-4.5 0h9L0 7z"}
    symbols = (el("g", el("path", d=d), id=f"mark-{name}") for name, d in paths.items())
    return el("svg", el("defs", *symbols), class_="definitions", aria_hidden="true", width="0", height="0")


def shape(style):
    return SHAPES[max(0, style - 1) % len(SHAPES)]


def colours(style):
    """The class that gives colour and dashes."""
    return f"s{palette.slot(style)}"


def percent(fraction):
    return f"{100 * fraction:.2f}%"


def points(chart, x, y):
    """'x,y' of each point in the stretched view, None where the value is not finite."""
    for update, value in zip(x, y):
        if not np.isfinite(value):
            yield None
            continue
        yield f"{VIEW * chart.along(update):.1f} {VIEW * (1 - min(1.2, max(-0.2, chart.up(value)))):.1f}"


def line_paths(chart, s):
    """The line of a series, with a gap where a value is not finite, and the values that stand alone between gaps."""
    lines, dots, part = [], [], []
    for point in [*points(chart, s.x, s.y), None]:
        if point:
            part.append(point)
            continue
        if len(part) > 1:
            lines.append(f"M{'L'.join(part)}")
        elif part:
            dots.append(f"M{part[0]}h0.01")
        part = []
    return "".join(lines), "".join(dots)


def band_path(chart, s):
    """From the least to the greatest of each point, a closed area for each part without a gap."""
    path, upper, lower = [], [], []
    for top, foot in [*zip(points(chart, s.x, s.high), points(chart, s.x, s.low)), (None, None)]:
        if top and foot:
            upper.append(top)
            lower.append(foot)
        elif upper:
            path.append(f"M{'L'.join(upper)}L{'L'.join(reversed(lower))}z")
            upper, lower = [], []
    return "".join(path)


def curves(chart):
    """Bands below lines, the run itself above the others."""
    inside = []
    for s in chart.series:
        if s.low is not None and s.joined:
            inside.append(el("path", class_=f"band {colours(s.style)}", d=band_path(chart, s)))
    for s in reversed(chart.series):
        for kind, path in zip(("line", "line dot"), line_paths(chart, s) if s.joined else ()):
            if path:
                inside.append(el("path", class_=f"{kind} {colours(s.style)}", d=path))
    return el("svg", *inside, class_="curves", viewBox=f"0 0 {VIEW} {VIEW}", preserveAspectRatio="none", width="100%",
              height="100%")


def frame(chart):
    """Grid lines and the labels of both axes, outside of the plot."""
    parts = []
    for value, label in chart.y_ticks():
        y = percent(1 - chart.up(value))
        parts += [el("line", class_="grid", x1="0", x2="100%", y1=y, y2=y),
                  el("text", label, class_="tick", x="-8", y=y, dy=".32em", text_anchor="end")]
    for update, label, wide in chart.x_ticks():
        x, ends = percent(chart.along(update)), {0: "start", chart.last: "end"}
        parts.append(el("text", label, class_="tick wide" if wide else "tick", x=x, y="100%", dy="1.5em",
                        text_anchor=ends.get(update, "middle")))
    parts.append(el("line", class_="axis", x1="0", x2="100%", y1="100%", y2="100%"))
    return join(parts)


def marks(chart):
    """Restarts as dotted lines with a triangle, validations as short ticks at the foot, markers of series."""
    parts = []
    for update in chart.restarts[:MOST_MARKS]:
        x = percent(chart.along(update))
        parts += [el("line", class_="restart", x1=x, x2=x, y1="0", y2="100%"),
                  el("use", href="#mark-restart", class_="restart-top", x=x, y="0")]
    for update in chart.validations if len(chart.validations) <= MOST_MARKS else ():
        x = percent(chart.along(update))
        parts.append(el("line", class_="validation", x1=x, x2=x, y1="97%", y2="100%"))
    for s in chart.series:
        marked = s.marked()
        few = marked if len(marked) <= FEW_MARKERS else marked[::-3]
        for i in marked:
            wide = "" if i in few else " wide"
            parts.append(el("use", href=f"#mark-{shape(s.style)}", class_=f"marker {colours(s.style)}{wide}",
                            x=percent(chart.along(s.x[i])), y=percent(1 - chart.up(s.y[i]))))
    return join(parts)


def sample(s):
    """The line and marker of a series, for the legend."""
    return el("svg", el("line", class_=f"line {colours(s.style)}", x1="1", x2="35", y1="7", y2="7") if s.joined else None,
              el("use", href=f"#mark-{shape(s.style)}", class_=f"marker {colours(s.style)}", x="18", y="7") if s.markers
              else None, width="36", height="14", aria_hidden="true")


def legend(chart):
    """A sample, the name and the value of each series; the page's script changes the value with the chosen update. Small charts
    have the restarts of the large one, which says what they are."""
    items = [el("li", sample(s), el("span", s.name, class_="name"), " ",
                el("span", s.words(s.at(chart.last)), class_="value", data_series=str(i)))
             for i, s in enumerate(chart.series)]
    if chart.restarts and chart.key == "bpc":
        picture = el("svg", el("line", class_="restart", x1="18", x2="18", y1="0", y2="14"),
                     el("use", href="#mark-restart", class_="restart-top", x="18", y="0"), width="36", height="14",
                     aria_hidden="true")
        items.append(el("li", picture, el("span", "restart", class_="name")))
    return el("ul", *items, class_="legend")


def rows_of(chart):
    """Values of all series at some updates, for the table behind the chart."""
    x = chart.series[0].x
    some = np.unique(np.linspace(0, len(x) - 1, min(len(x), TABLE_ROWS)).astype(int))
    return [(f"{int(x[i]):,}", *(s.words(s.at(x[i])) if x[i] <= s.x[-1] else "–" for s in chart.series)) for i in some]


def figure(chart):
    """The whole figure, with the table of its values."""
    description = "; ".join(f"{s.name}: from {s.words(0)} at update {int(s.x[0]):,} to {s.words(len(s.x) - 1)} at update "
                            f"{int(s.x[-1]):,}" for s in chart.series)
    name, words = f"chart-{chart.key}", ", ".join(filter(None, (chart.unit, "logarithmic" if chart.log else "")))
    plot = el("svg", el("title", chart.title, id=f"{name}-title"), el("desc", description, id=f"{name}-text"), frame(chart),
              curves(chart), marks(chart), el("line", class_="cursor", x1="0", x2="0", y1="0", y2="100%", visibility="hidden"),
              class_="plot", role="img", aria_labelledby=f"{name}-title", aria_describedby=f"{name}-text", width="100%",
              height="100%")
    restarts = f" {len(chart.restarts) - MOST_MARKS} more restarts are not marked." if len(chart.restarts) > MOST_MARKS else ""
    return el("figure",
              el("figcaption", el("h3", chart.title), el("p", words, class_="unit") if words else None),
              legend(chart), el("div", plot, class_="space"), el("p", "updates", class_="x-unit"),
              el("p", chart.note + restarts, class_="note") if chart.note + restarts else None,
              el("details", el("summary", "Values as a table"),
                 table(["update", *(s.name for s in chart.series)], rows_of(chart), f"{chart.title} ({chart.unit})" if chart.unit else chart.title)),
              class_="chart", id=name, data_chart=chart.key)


def values(chart):
    """What the page's script needs to show the values at an update: [[x..], [text..]] of each series."""
    return {"last": chart.last, "series": [{"x": [int(x) for x in s.x], "text": [s.words(i) for i in range(len(s.x))]}
                                           for s in chart.series]}
