#!/usr/bin/python3
"""doc/analysis/report.py: what its page holds of a run that was stopped and resumed and of made-up ones, that it is HTML which
loads nothing and in which every string is escaped, and what a browser without a window shows of it. One 'ok' or 'not ok'
line for each."""
import base64
import contextlib
import html.parser
import importlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import urllib.parse

import h5py
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import browser  # noqa: E402
from whole import SOURCE, VIADUCT, Place, finish, report  # noqa: E402

sys.path.insert(0, os.path.join(SOURCE, "doc", "analysis"))
from report_page import chart, decks, palette  # noqa: E402
from report_page import run as runs  # noqa: E402

SCRIPT = importlib.import_module("report")
os.environ["VIADUCT"] = VIADUCT
NASTY = "<img src=x onerror=alert(1)>\"'&amp;</title></script>"
VOID = ("meta", "link", "br", "input", "img")


class Page(html.parser.HTMLParser):
    """Elements of a page, with what is wrong with how they nest."""

    def __init__(self, text):
        super().__init__()
        self.text, self.stack, self.problems, self.elements = text, [], [], []
        self.feed(text)
        self.close()
        self.problems += [f"<{name}> is not closed" for name in self.stack]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if len(dict(attrs)) < len(attrs):
            self.problems.append(f"<{tag}> has an attribute twice")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()} closes nothing")

    def named(self, tag, **wanted):
        return [a for name, a in self.elements if name == tag and all(a.get(k.rstrip("_")) == v for k, v in wanted.items())]

    def data(self):
        return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', self.text, flags=re.S)[1])

    def words(self):
        """The text of the page without its elements, scripts and style."""
        text = re.sub(r"<(script|style)\b.*?</\1>", " ", self.text, flags=re.S)
        return " ".join(html.unescape(re.sub("<[^>]*>", " ", text)).split())


def make_report(*words):
    """report.py within this program, which has read its libraries already."""
    output, errors, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            status = SCRIPT.main(words)
        except SystemExit as end:
            status = end.code
    return subprocess.CompletedProcess(words, status, output.getvalue(), errors.getvalue())


def page_of(folder, *words):
    done = make_report(folder, *words)
    path = os.path.join(folder.partition("=")[2] or folder, "report.html")
    if done.returncode or done.stdout.splitlines()[:1] != [path]:
        report(f"report.py {folder}", False, f"status {done.returncode}: {done.stdout}{done.stderr}")
        return Page("")
    with open(path, encoding="utf-8") as f:
        return Page(f.read())


def make_trace(folder, rows=40, step=25, layers=3, heads=2, valid=4, pauses=(), change=None, attributes=None, title="made up"):
    """A trace and a deck as a run leaves them, whose columns `change` may change."""
    os.makedirs(folder, exist_ok=True)
    update, every = np.arange(1, rows + 1, dtype="i8") * step, max(1, rows // (valid or 1))
    wall = np.arange(1, rows + 1) * 2.0
    time = wall + 1.7e9
    for row, seconds in pauses:
        time[row:] += seconds
    columns = {"update": update, "span": (update / 10)[:, None, None] * np.ones((1, layers, heads), "f4"), "wall": wall,
               "train_bpc": 2 + 5 * np.exp(-update / (rows * step / 5 + 1)), "learning_rate": np.full(rows, 0.07), "time": time,
               "grad_norm": np.full(rows, 0.5), "tokens_per_second": np.full(rows, 5000.0),
               "valid/update": update[every - 1::every][:valid]}
    columns["valid/bpc"] = 2.5 - np.arange(len(columns["valid/update"])) / 100
    if change:
        change(columns)
    deck = f"&run\n  title = '{title}'\n  max_updates = {rows * step}\n/\n&model\n  arch = 'adaptive_span'\n  n_layer = {layers}\n" \
        "/\n&optimizer\n  method = 'adagrad'\n  lr = 0.035\n/\n&trace\n  interval = 25\n/\n"
    with h5py.File(os.path.join(folder, "trace.h5"), "w") as f:
        for name, value in {"viaduct_kind": "trace", "settings": deck, **(attributes or {})}.items():
            f.attrs[name] = value
        for name, column in columns.items():
            f[name] = column
    with open(os.path.join(folder, "deck.nml"), "w", encoding="utf-8") as f:
        f.write(deck)
    return folder


# ---- what the page holds ----

def check_run(place):
    """A run that was stopped after 20 of 40 updates."""
    for updates in (20, 40):
        done = place.train("run", run__max_updates=updates, model__dropout=0.2)
        if done.returncode:
            report("a run to report on", False, done.stderr)
            return
    text = f"--- sample 1 of 2 ---\nint {NASTY}\n--- sample 2 of 2 ---\nlong \x01 text\n"
    with open(place.path("run", "samples.txt"), "w", encoding="utf-8") as f:
        f.write(text)
    page = page_of(place.path("run"), "--deck", place.deck)
    words, data = page.words(), page.data()
    rows = place.log("run")
    best = min(row["valid_bpc"] for row in rows[1])
    last = data["charts"]["bpc"]["series"][0]["text"][-1]
    with h5py.File(place.path("run", "trace.h5")) as f:
        spans, bpc = f["span"][()], f["train_bpc"][()]
    report("figures of a real run", f"{best:.4f} bpc" in words and "40 of 40" in words and float(last) == float(f"{bpc[-1]:.4g}")
           and data["charts"]["bpc"]["series"][1]["x"] == [r["num_updates"] for r in rows[1]], f"{last} {words[:600]}")
    held = np.frombuffer(base64.b64decode(data["spans"]["data"]), "<f4").reshape(spans.shape)
    report("spans of all rows, layers and heads", np.array_equal(held, spans) and data["spans"]["updates"][-1] == 40)
    marked = page.named("line", class_="restart", x1="50.00%")
    report("the restart is marked and listed", len(marked) >= 5 and "Restarts 1 " in words and
           len(re.findall(r"Restarts after update first row afterwards not in the run's time 20 \d{4}-", words)) == 1,
           f"{len(marked)} {words[:300]}")
    report("validations are marked", len(page.named("line", class_="validation")) == 4 * len(rows[1]) and
           len(page.named("use", class_="marker s1")) == len(rows[1]) + 1)
    report("environment", all(word in words for word in ("Ranks × threads 1 × 1", "Precision fp32", "Viaduct 0.", "Commit ")), words)
    differ = re.search(r"differs from \S+/tiny.nml in (\d+) of (\d+)", words)
    report("what differs from the deck", differ and differ[1] == "2" and "run%max_updates 40 50 the deck model%dropout 0.2 0.3 the deck All variables" in
           words, words[words.find("The run's deck"):][:700])
    report("samples of text", "sample 1" in words and f"int {NASTY}" in words and "long \ufffd text" in words)
    check_links(place.path("run"), page)


def check_links(folder, page):
    """Every link leads to a file of the run or to a part of the page."""
    ids = [a["id"] for _, a in page.elements if "id" in a]
    links = [a["href"] for a in page.named("a")]
    files = [urllib.parse.unquote(link) for link in links if not link.startswith("#")]
    missing = [f for f in files if not os.path.exists(os.path.join(folder, f))]
    missing += [link for link in links if link.startswith("#") and link[1:] not in ids]
    missing += [a["aria-labelledby"] for _, a in page.elements if a.get("aria-labelledby", ids[0]) not in ids]
    missing += [a["for"] for tag, a in page.elements if tag == "label" and a["for"] not in ids]
    report("links lead to files and to parts", not missing and len(ids) == len(set(ids)) and
           {"trace.h5", "checkpoints/last.h5", "log.jsonl"} <= set(files), f"{missing} {files}")


def check_generate(place):
    done = make_report(place.path("run"), "--generate", "--prompt", "the", "-o", place.path("generated.html"))
    with open(place.path("generated.html"), encoding="utf-8") as f:
        page = Page(f.read())
    report("--generate asks the program for samples", done.returncode == 0 and "sample 3" in page.words() and
           len(page.named("pre", class_="sample")) == 5, done.stderr)
    shutil.copytree(place.path("run"), place.path("no model"), ignore=shutil.ignore_patterns("checkpoints", "report.html"))
    done = make_report(place.path("no model"), "--generate")
    report("--generate passes on what the program says", done.returncode == 1 and "--generate: viaduct: error" in done.stderr and
           done.stderr.count("\n") == 1 and not os.path.exists(place.path("no model", "report.html")), done.stderr)


def check_html(place):
    """A page with everything on it, all its strings hostile."""
    attributes = {name: NASTY for name in ("viaduct_version", "git_version", "hosts", "devices", "precision", "created", "ranks",
                                           "threads")}
    title = NASTY.replace("'", "''")
    folder = make_trace(place.path("a <b> & c"), title=title, attributes=attributes, pauses=((10, 60), (20, 0.5), (30, 0.01)))
    other = make_trace(place.path("other"), rows=20, title=title, layers=4)
    with open(os.path.join(folder, "generated <i>.txt"), "w", encoding="utf-8") as f:
        f.write(NASTY)
    page = page_of(folder, f"{NASTY.replace('/', '').replace('=', '')}={other}", f"second={other}")
    report("the page is well formed", page.text.startswith("<!DOCTYPE html>\n<html lang=\"en\">") and not page.problems,
           str(page.problems[:5]))
    tags = {tag for tag, _ in page.elements}
    handlers = [a for _, a in page.elements if any(name.startswith("on") for name in a)]
    report("no string becomes markup", not tags & {"img", "b", "i", "iframe", "object"} and not handlers and
           [a.get("type") for a in page.named("script")] == ["application/json", None] and page.words().count(NASTY) > 8,
           f"{sorted(tags)} {handlers}")
    loads = [(tag, a) for tag, a in page.elements for name in a if name in ("src", "srcset", "data", "background", "poster")]
    loads += [(tag, a) for tag, a in page.elements if tag in ("link", "base", "iframe") or tag == "use" and a["href"][0] != "#"]
    asks = re.findall(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|WebSocket|import\(|sendBeacon", page.text)
    report("the page loads nothing", not loads and not asks and "default-src 'none'" in
           page.named("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"], f"{loads} {asks}")
    places = {a["x1"] for a in page.named("line", class_="restart")}
    report("restarts: pauses of 60 and 0.5 s, none of 0.01 s", places == {"25.00%", "50.00%", "18"}, str(places))
    check_others(page)
    check_links_of(folder, page)


def check_links_of(folder, page):
    files = [urllib.parse.unquote(a["href"]) for a in page.named("a") if not a["href"].startswith("#")]
    report("links to files with odd names", files and all(os.path.exists(os.path.join(folder, f)) for f in files) and
           "generated <i>.txt" in files, str(files))


def check_others(page):
    """Each of the runs has dashes and markers of its own, and what differs between their decks is listed."""
    series = page.data()["charts"]["bpc"]["series"]
    lines = [a["class"] for a in page.named("path") if a.get("class", "").startswith("line s")][:4]
    shapes = {a["href"] for a in page.named("use") if a.get("class", "").startswith("marker")}
    dashes = [palette.DASHES[int(name[-1])] for name in ("line s2", "line s3", "line s0")]
    report("other runs are in the chart", len(series) == 6 and {"line s0", "line s1", "line s2", "line s3"} <= set(lines) and
           len(set(dashes)) == 3 and shapes == {"#mark-circle", "#mark-square", "#mark-triangle"}, f"{lines} {shapes}")
    words = page.words()
    report("where decks of runs differ", "model%n_layer 3 4 4" in words and "run%max_updates 1000 500 500" in words and
           "optimizer%lr 0.035 0.035" not in words[words.find("Where their decks differ"):words.find("Settings The")], words[-3000:])


def make_attention(folder, change=None):
    """2 layers of 2 heads over 40 distances, two positions; head 1 of layer 1 looks 20 tokens back."""
    weight = np.zeros((2, 2, 40))
    weight[:, :, 1] = 1
    weight[1, 1] = np.eye(40)[20]
    symbols = [b"a", b"\n", b"<", b"\xe9", b"\t"]
    sets = {"distance_weight": weight, "span": np.full((2, 2), 39, "f4"), "position": np.array([7, 90]), "token": np.array([0, 2], "i4"),
            "nll": np.array([0.7, 2.1], "f4"), "context": np.tile(np.arange(40, dtype="i4") % 6 - 1, (2, 1)),
            "position_weight": np.stack([weight, weight * 0.01]).astype("f4"),
            "vocabulary/symbol": np.array([[ord(s)] for s in symbols], "u1"), "vocabulary/length": np.ones(5, "i4")}
    if change:
        change(sets)
    path = os.path.join(folder, "seen.h5")
    with h5py.File(path, "w") as f:
        for name, value in {"viaduct_kind": "attention", "split": NASTY, "checkpoint_update": 40, "settings": ""}.items():
            f.attrs[name] = value
        for name, value in sets.items():
            f[name] = value
    return path


def check_attention(place):
    folder = make_trace(place.path("seen"))
    path = make_attention(folder)
    page = page_of(folder)
    data, words = page.data()["attention"][0], page.words()
    steps = np.frombuffer(base64.b64decode(data["map"]), "u1").reshape(2, 2, -1)
    at = [int(np.searchsorted(np.array(data["edges"]), 1000 * np.log(d + 1) / np.log(41) + 0.02)) - 1 for d in (0, 1, 20)]
    report("attention: the maps of weights by distance", not page.problems and steps[0, 0, at[1]] == steps[1, 0, at[1]] == 23 and
           np.count_nonzero(steps[0, 0]) == 1 and np.count_nonzero(steps[1, 1]) == 1 and steps[1, 1, at[2]] > 15, str(steps))
    text = np.frombuffer(base64.b64decode(data["text"]), "u1").reshape(2, 2, 3, 40)
    context = data["positions"][0]["context"]
    report("attention: the text before tokens, oldest first", text[0, 0, 1].argmax() == 38 and text[0, 1, 2].argmax() == 19 and
           0 < text[1, 1, 2].max() < text[0, 1, 2].max() == 23 and text[0, 1, 0, 19] == text[0, 1, 0, 38] and
           context[-6:] == ["⇥", "\\xe9", "<", "↵\n", "a", ""] and
           data["positions"][1] == {"at": 90, "context": context, "token": "<", "bits": "3.03"}, f"{context[-6:]} {data['positions'][1]['bits']}")
    report("attention: mean distances", "Mean distance of the attention, in tokens layer head 0 1 mean longest 0 1.0 1.0 1.0 1.0 "
           "1 1.0 20 10 20" in words and f"split {NASTY}, checkpoint of update 40" in words, words[words.find("Attention Att"):][:900])

    def alone(sets):
        for name in ("position", "token", "nll", "context", "position_weight"):
            del sets[name]

    def flat(sets):
        sets["distance_weight"] = sets["distance_weight"][0]
    os.rename(path, place.path("seen.h5"))
    bare = make_attention(place.folder, alone)
    done = make_report(folder, "--attention", bare, "-o", place.path("bare.html"))
    with open(place.path("bare.html"), encoding="utf-8") as f:
        other = Page(f.read())
    report("attention: a file without positions", done.returncode == 0 and "text" not in other.data()["attention"][0] and
           not other.problems and not other.named("select"), done.stderr)
    os.remove(place.path("bare.html"))
    done = make_report(folder, "--attention", make_attention(place.folder, flat))
    trace = make_report(folder, "--attention", os.path.join(folder, "trace.h5"))
    report("attention: other files are refused", done.returncode == trace.returncode == 2 and "not [layer, head, distance]" in done.stderr
           and "but a trace" in trace.stderr, done.stderr + trace.stderr)
    make_attention(folder)


def check_long(place):
    """600,000 updates of 12 layers; one row of 24,000 is far off."""
    def spike(columns):
        columns["train_bpc"][12345] = 9.75
        columns["grad_norm"][500:600] = np.nan
        columns["span"] *= np.linspace(0.1, 1, 96, dtype="f4").reshape(12, 8)
    folder = make_trace(place.path("long"), rows=24000, layers=12, heads=8, valid=600, change=spike)
    page = page_of(folder)
    curve = page.data()["charts"]["bpc"]["series"][0]
    shown = [text for text in curve["text"] if text.endswith("to 9.750)")]
    report("a long run is small, with the least and the greatest of each bin", 200e3 < len(page.text) < 3e6 and
           len(curve["x"]) == chart.BINS and len(shown) == 1 and page.data()["spans"]["updates"][-1] == 600000,
           f"{len(page.text)} bytes {shown}")
    points = runs.binned(np.arange(1, 11), np.array([1, 3, np.nan, np.nan, 5, 7, 2, 2, 4, 8.0]), 5)
    report("bins", points["update"].tolist() == [2, 4, 6, 8, 10] and np.array_equal(points["mean"], [2, np.nan, 6, 2, 6], True)
           and np.array_equal(points["low"], [1, np.nan, 5, 2, 4], True) and np.array_equal(points["high"], [3, np.nan, 7, 2, 8], True),
           str(points))


def check_odd_runs(place):
    """A row, no validations, values that are not finite, no heads, files of version 1."""
    def not_finite(columns):
        columns["train_bpc"][3:] = np.nan
        columns["grad_norm"][:] = np.inf
        columns["valid/bpc"][:] = np.nan

    def old(columns):
        del columns["wall"], columns["time"]
    for name, options in (("one row", {"rows": 1, "valid": 0}), ("not finite", {"change": not_finite}), ("no heads", {"heads": 0}),
                          ("many layers", {"layers": 256, "heads": 4}), ("without time", {"change": old})):
        page = page_of(make_trace(place.path(name), **options))
        report(f"page of a run: {name}", page.text and not page.problems and "NaN" not in page.text and " nan" not in page.words(),
               str(page.problems[:3]))


def check_errors(place):
    rows = make_trace(place.path("no rows"), rows=0, valid=0)
    cut = make_trace(place.path("cut"))
    os.truncate(os.path.join(cut, "trace.h5"), 2000)
    os.makedirs(place.path("empty"))
    os.makedirs(place.path("no trace"))
    with open(place.path("no trace", "trace.h5"), "w", encoding="ascii") as f:
        f.write("not HDF5\n")

    def backwards(columns):
        columns["update"][5] = 1
    back = make_trace(place.path("back"), change=backwards)
    good = make_trace(place.path("good"))
    for words, status, said in (((place.path("nowhere"),), 2, "no such directory"), ((place.path("empty"),), 2, "there is no trace"),
                                ((place.path("no trace"),), 2, "no HDF5 file"), ((cut,), 2, "damaged"), ((rows,), 2, "no rows yet"),
                                ((back,), 2, "does not increase"), ((good, place.path("empty")), 2, "there is no trace"),
                                ((good, "--deck", place.path("no.nml")), 2, "no.nml: No such file"),
                                ((good, "--samples", place.path("no.txt")), 2, "no.txt: No such file"),
                                ((good, good), 2, "two runs are called 'good'"), ((good, "--prompt", "x"), 2, "goes with --generate"),
                                ((), 2, "usage"), ((good, "-o", place.path("no", "x.html")), 1, "x.html: No such file"),
                                ((good, "-o", place.path("empty")), 1, "empty: Is a directory"),
                                ((good, "-o", place.path("x.html"), "--figures", place.path("text")), 1, "text: File exists")):
        done = make_report(*words)
        line = done.stderr.splitlines()
        report(f"report.py: {said}", done.returncode == status and said in done.stderr and line[-1].startswith("report.py: ") | (not words)
               and "Traceback" not in done.stderr, f"status {done.returncode}: {done.stderr}")
    left = [f for f in os.listdir(place.folder) + os.listdir(place.path("empty")) + os.listdir(good) if ".tmp" in f or "html" in f]
    report("nothing is left of what failed", not set(left) - {"generated.html", "x.html"}, str(left))


def check_decks():
    """The reader of decks, the values that the program assumes, and the shipped deck that is chosen."""
    found = decks.read_deck("! &run x=1 /\n&Run title='a/b''s ! c', seed = 3 , /\n$optimizer LR=7d-2 method=\"adam\" $end &data a=, b=.T. /")
    report("reading a deck", found == {"run%title": "a/b's ! c", "run%seed": 3.0, "optimizer%lr": 0.07, "optimizer%method": "adam",
                                       "data%b": True}, str(found))
    assumed = decks.defaults()
    report("defaults out of INPUT.md", assumed.get("optimizer%lr") is not None and assumed.get("trace%interval") == 25.0 and
           assumed.get("span%per_layer") is False and len(assumed) > 60, str(len(assumed)))
    problems = []
    for name in ("quickstart", "enwik8_adaptive_span_small", "enwik8_transformer_xl", "text8_adaptive_span"):
        with open(os.path.join(SOURCE, "input", f"{name}.nml"), encoding="utf-8") as f:
            values = {**assumed, **decks.read_deck(f.read()), "run%title": "another", "optimizer%lr": 0.5}
        path, whole, _ = decks.shipped_deck(values)
        if os.path.basename(path) != f"{name}.nml" or decks.differences(values, whole) != ["run%title", "optimizer%lr"]:
            problems.append(f"{name}: {path} {decks.differences(values, whole)}")
    report("the shipped deck that differs least is chosen", not problems, str(problems))


def check_colours():
    """Text can be read in both palettes; the steps of heat maps get darker, or lighter, all the way."""
    problems = []
    for named, series, levels in ((palette.LIGHT, palette.LIGHT_SERIES, palette.LIGHT_LEVELS),
                                  (palette.DARK, palette.DARK_SERIES, palette.DARK_LEVELS)):
        for colour in (named["ink"], named["muted"], named["accent"], *series):
            problems += [colour] if palette.contrast(colour, named["background"]) < 4.5 else []
        problems += [level for level in levels if palette.contrast(level, palette.text_on(level)) < 4.3]
        steps = np.diff([palette.luminance(level) for level in levels])
        problems += ["steps of a heat map"] * (not (np.all(steps > 0) or np.all(steps < 0)))
    report("colours", not problems, str(problems))


def check_ticks():
    """Ticks lie within the axis, ascend, begin with 0 and end with the last update."""
    problems = []
    for last in (1, 2, 7, 45, 100, 1500, 9999, 600000, 10**12):
        c = chart.Chart("x", "", "", [], last)
        x = c.x_ticks()
        apart = [b - a for a, b in zip([t for t, _, wide in x if not wide], [t for t, _, wide in x if not wide][1:])]
        if x[0][0] != 0 or x[-1][0] != last or [t for t, _, _ in x] != sorted({t for t, _, _ in x}) or min(apart) < 0.1 * last:
            problems.append(f"x {last}: {x}")
    for low, high, log in ((0.9, 8, True), (1, 1e6, True), (0.02, 3, True), (0, 0.07, False), (2.4, 2.41, False), (0, 2e6, False)):
        c = chart.Chart("x", "", "", [chart.Series("s", np.arange(1, 3), np.array([low, high]))], 2, log=log, from_zero=not low)
        y = c.y_ticks()
        labels = [label for _, label in y]
        if not 2 <= len(y) <= 8 or len(set(labels)) < len(labels) or not all(0 <= c.up(value) <= 1 for value, _ in y):
            problems.append(f"y {low} {high}: {y}")
    report("ticks", not problems, str(problems))


def check_figures(place):
    done = make_report(place.path("good"), place.path("other"), "--figures", place.path("figures"))
    problems = [done.stderr] if done.returncode else []
    for name in ("bpc", "training", "final_spans"):
        with open(place.path("figures", f"{name}.png"), "rb") as f:
            head = f.read(24)
        wide, high = struct.unpack(">II", head[16:24])
        with open(place.path("figures", f"{name}.pdf"), "rb") as f:
            pdf = f.read()
        if head[:8] != b"\x89PNG\r\n\x1a\n" or wide < 1200 or high < 400 or not pdf.startswith(b"%PDF-") or b"/Type3" in pdf:
            problems.append(f"{name}: {wide} x {high} {pdf[:8]}")
    report("figures as PNG and PDF, text as text", not problems and len(done.stdout.splitlines()) == 7, f"{problems} {done.stdout}")


def check_make(place):
    make = os.environ.get("MAKE", "make")
    folder = place.path("a <b> & c")
    words = [make, "--no-print-directory", "report", f"PYTHON={sys.executable}"]
    done = subprocess.run([*words, f"RUN={folder}", f"RUNS={place.path('good')} {place.path('other')}"], cwd=SOURCE,
                          capture_output=True, text=True, timeout=60)
    report("make report prints where the page is", done.returncode == 0 and
           done.stdout.splitlines() == [os.path.join(folder, "report.html")], done.stdout + done.stderr)
    done = subprocess.run(words, cwd=SOURCE, capture_output=True, text=True, timeout=60)
    report("make report without RUN is an error", done.returncode == 2 and "needs RUN=" in done.stderr, done.stderr)


# ---- in a browser ----

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
    for name, key, code in (("layer", "ArrowRight", 39), ("head", "ArrowDown", 40), ("position", "ArrowLeft", 37)):
        b.evaluate(f"document.getElementById('attention-{name}-0').focus()")
        b.press(key, code)
        seen.append((b.evaluate(cells), b.evaluate(text), b.evaluate(words)))
    report("attention follows the sliders of layer and position and the choice of a head", seen[0][0] != seen[1][0] and
           all(one[1:] != other[1:] for one, other in zip(seen, seen[1:])) and
           seen[3][2].startswith("Layer 1, head 0, before token 7 ") and seen[0][2].startswith("Layer 0, mean of all heads, before token 90"),
           str([s[2] for s in seen]))


# What overlaps: labels of an axis with each other, and anything that leaves the window sideways.
OVERLAPS = """[...document.querySelectorAll('svg.plot')].flatMap((plot) => {
  const boxes = [...plot.querySelectorAll('text')].map((t) => [t.textContent, t.getBoundingClientRect()])
    .filter(([, r]) => r.width > 0);
  return boxes.flatMap(([a, r], i) => boxes.slice(i + 1).filter(([, q]) => r.left < q.right && q.left < r.right &&
    r.top < q.bottom - 2 && q.top < r.bottom - 2).map(([b]) => a + ' meets ' + b));
}).concat(document.documentElement.scrollWidth > innerWidth ? ['wider than the window'] : [])"""


def check_browser(place):
    if not browser.PROGRAM:
        print("ok the page in a browser # SKIP no chromium (Debian's package of that name)")
        return
    with browser.Browser() as b:
        in_browser(b, place.path("long", "report.html"))
        complaints = b.complaints()
        attention_in_browser(b, place.path("seen", "report.html"))
        complaints += b.complaints()
        problems = []
        for width in (1000, 400):
            b.width(width)
            for name in ("long", "seen", "a <b> & c", "one row", "not finite"):
                b.load(place.path(urllib.parse.quote(name), "report.html"))
                problems += [f"{name} at {width}: {p}" for p in b.evaluate(OVERLAPS)]
                complaints += b.complaints()
        report("no labels meet, and no page is wider than its window", not problems, str(problems[:6]))
        report("no complaints in the console, and no requests", not complaints, str(complaints[:3]))
        b.load(place.path(urllib.parse.quote("a <b> & c"), "report.html"))
        b.evaluate("document.body.appendChild(document.createElement('script')).textContent = 'document.title = 1'")
        report("the policy lets no other script run", b.evaluate("document.title").startswith("<img") and len(b.complaints()) == 1,
               str(b.complaints()))


def main():
    place = Place(20000)
    try:
        check_run(place)
        check_generate(place)
        check_html(place)
        check_attention(place)
        check_long(place)
        check_odd_runs(place)
        check_errors(place)
        check_decks()
        check_colours()
        check_ticks()
        check_figures(place)
        check_make(place)
        check_browser(place)
    finally:
        place.remove()
    finish()


if __name__ == "__main__":
    main()
