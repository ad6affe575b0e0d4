#!/usr/bin/python3
"""The page of doc/analysis/report.py in a browser without a window: keyboard, colours, layout, console. One 'ok' or 'not ok'
line for each; skipped where Chromium is not installed."""
import os
import shutil
import sys
import tempfile

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import browser  # noqa: E402
from report_runs import NASTY, make_attention, make_trace, page_of  # noqa: E402
from whole import finish, report  # noqa: E402


def in_browser(b, page):
    b.width(1000)
    b.dark(False)
    b.load(page)
    cells, first = "document.getElementById('map-cells').innerHTML", "document.querySelector('#chart-bpc .value').textContent"
    before = b.evaluate(cells)
    b.evaluate("document.getElementById('layer').focus()")
    b.press("ArrowRight", 39)
    after, now = b.evaluate(cells), b.evaluate("document.getElementById('layer-now').textContent")
    report("the slider of layers moves by the keyboard and draws another map", before != after and "<path" in before and
           "<path" in after and now.startswith("1: mean"), f"{now} {before[:100]} {after[:100]}")
    values, spans = b.evaluate(first), b.evaluate("document.getElementById('span-table').textContent")
    b.evaluate("document.getElementById('at-update').focus()")
    b.press("Home", 36)
    report("the slider of updates changes values, spans and the line in the charts", b.evaluate(first) != values and
           b.evaluate("document.getElementById('span-table').textContent") != spans and
           b.evaluate("document.querySelector('#chart-bpc .cursor').getAttribute('visibility')") == "visible")
    focus = b.evaluate("getComputedStyle(document.activeElement).outlineStyle + getComputedStyle(document.activeElement).outlineWidth")
    report("the focus is visible", focus == "solid3px", focus)
    light = b.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    b.dark(True)
    dark = b.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    b.evaluate("document.getElementById('theme').focus()")
    b.press("Enter", 13)
    report("colours follow the system and the button", light != dark and
           b.evaluate("getComputedStyle(document.documentElement).backgroundColor") == light, f"{light} {dark}")
    b.evaluate("document.getElementById('theme').blur()")


def attention_in_browser(b, page):
    """Another layer, position and head by the keyboard."""
    b.load(page)
    cells, text = "document.getElementById('attention-cells-0').innerHTML", "document.getElementById('attention-text-0').innerHTML"
    words = "document.getElementById('attention-words-0').textContent"
    seen = [(b.evaluate(cells), b.evaluate(text), b.evaluate(words))]
    for name, key, code in (("layer", "ArrowRight", 39), ("head", "ArrowDown", 40), ("position", "ArrowRight", 39)):
        b.evaluate(f"document.getElementById('attention-{name}-0').focus()")
        b.press(key, code)
        seen.append((b.evaluate(cells), b.evaluate(text), b.evaluate(words)))
    report("attention follows the sliders of layer and position and the choice of a head", seen[0][0] != seen[1][0] and
           all(one[1:] != other[1:] for one, other in zip(seen, seen[1:])) and
           seen[3][2].startswith("Layer 1, head 0, before token 90 ") and seen[0][2].startswith("Layer 0, mean of all heads, before token 7 "),
           str([s[2] for s in seen]))


# What overlaps: labels of an axis with each other, and anything that leaves the window sideways.
OVERLAPS = """[...document.querySelectorAll('svg.plot')].flatMap((plot) => {
  const boxes = [...plot.querySelectorAll('text')].map((t) => [t.textContent, t.getBoundingClientRect()])
    .filter(([, r]) => r.width > 0);
  return boxes.flatMap(([a, r], i) => boxes.slice(i + 1).filter(([, q]) => r.left < q.right && q.left < r.right &&
    r.top < q.bottom - 2 && q.top < r.bottom - 2).map(([b]) => a + ' meets ' + b));
}).concat(document.documentElement.scrollWidth > innerWidth ? ['wider than the window'] : [])"""


def check_pages(b, path):
    complaints = b.complaints()
    attention_in_browser(b, path("seen", "report.html"))
    complaints += b.complaints()
    problems = []
    for width in (1000, 400):
        b.width(width)
        for name in ("long", "seen", "hostile", "one row", "not finite"):
            b.load(path(name, "report.html"))
            problems += [f"{name} at {width}: {p}" for p in b.evaluate(OVERLAPS)]
            complaints += b.complaints()
    report("no labels meet, and no page is wider than its window", not problems, str(problems[:6]))
    report("no complaints in the console, and no requests", not complaints, str(complaints[:3]))
    b.load(path("hostile", "report.html"))
    b.evaluate("document.body.appendChild(document.createElement('script')).textContent = 'document.title = 1'")
    report("the policy lets no other script run", b.evaluate("document.title").startswith("<img") and len(b.complaints()) == 1,
           str(b.complaints()))


def make_pages(path):
    def not_finite(columns):
        columns["train_bpc"][3:] = np.nan
        columns["grad_norm"][:] = np.inf

    def different(columns):
        columns["span"] *= np.linspace(0.1, 1, 96, dtype="f4").reshape(12, 8)
    page_of(make_trace(path("long"), rows=24000, layers=12, heads=8, valid=600, pauses=((9000, 60),), change=different),
            f"other={make_trace(path('other'), rows=20)}")
    make_attention(make_trace(path("seen")))
    page_of(path("seen"))
    page_of(make_trace(path("hostile"), title=NASTY.replace("'", "''"), pauses=((10, 60),)))
    page_of(make_trace(path("one row"), rows=1, valid=0))
    page_of(make_trace(path("not finite"), change=not_finite))


def main():
    if not browser.PROGRAM:
        print("ok the page in a browser # SKIP no chromium (Debian's package of that name)")
        sys.exit(77)
    folder = tempfile.mkdtemp(prefix="viaduct-report-")

    def path(*parts):
        return os.path.join(folder, *parts)
    try:
        make_pages(path)
        with browser.Browser() as b:
            in_browser(b, path("long", "report.html"))
            check_pages(b, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    finish()


if __name__ == "__main__":
    main()
