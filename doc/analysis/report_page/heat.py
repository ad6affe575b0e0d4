"""Tables and maps whose colours are the steps of a scale."""
import math

from . import chart, palette, svg
from .markup import el


def level(span, top):
    """Step of a span: 0 below one token, then logarithmic up to `top`. page.js has the same."""
    if not span >= 1:
        return 0
    return min(palette.LEVELS - 1, 1 + int((palette.LEVELS - 1) * math.log(span) / math.log(top)))


def scale(title, labels):
    """All steps in a row; labels: (place from 0 to 1, text)."""
    n = palette.LEVELS
    steps = [el("rect", class_=f"l{i}", x=svg.percent(i / n), y="0", width=svg.percent(1 / n + 0.0005), height="12")
             for i in range(n)]
    texts = [el("text", label, class_="tick", x=svg.percent(place), y="26", text_anchor="end" if place > 0.95 else "middle")
             for place, label in labels]
    return el("div", el("span", title), el("svg", *steps, *texts, role="img", aria_label=f"Scale: {title}", width="100%",
                                           height="30"), class_="scale")


def span_scale(title, top):
    places = [10.0 ** k for k in range(7) if 10.0 ** k <= top]
    return scale(title, [((1 + (palette.LEVELS - 1) * math.log(value) / math.log(top)) / palette.LEVELS, f"{value:,.0f}")
                         for value in places])


def matrix(values, top, label, identifier=None):
    """Layers by heads, with the mean and the greatest of each layer."""
    head = el("tr", el("th", "layer", scope="col"), *(el("th", f"head {h}" if h == 0 else str(h), scope="col")
                                                      for h in range(values.shape[1])),
              el("th", "mean", scope="col"), el("th", "longest", scope="col"))
    rows = [el("tr", el("th", str(i), scope="row"),
               *(el("td", chart.tokens(value), class_=f"l{level(value, top)}") for value in layer),
               el("td", chart.tokens(layer.mean()), class_="total"), el("td", chart.tokens(layer.max()), class_="total"))
            for i, layer in enumerate(values)]
    return el("div", el("table", el("thead", head), el("tbody", *rows), id=identifier,
                        class_="spans dense" if values.shape[1] > 12 else "spans"), class_="scroll", tabindex="0", role="region",
              aria_label=label)


def plot(cells, title, labels, heads, kind="", extra=()):
    """The frame of a map of heads, whose cells page.js draws into the element `cells` and whose title it writes."""
    step = -(-heads // 16)
    names = [el("text", str(h), class_="tick", x="-8", y=svg.percent((h + 0.5) / heads), dy=".32em", text_anchor="end")
             for h in range(0, heads, step)]
    inside = el("svg", id=cells, class_="cells", preserveAspectRatio="none", width="100%", height="100%")
    return [el("p", "head (0 at the top)", class_="unit"),
            el("div", el("svg", el("title", "", id=title), inside, *labels, *names, *extra, class_="plot", role="img",
                         aria_labelledby=title, width="100%", height="100%"), class_=f"space map {kind}rows-{min(heads, 16)}")]
