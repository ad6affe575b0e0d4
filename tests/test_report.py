#!/usr/bin/python3
"""doc/analysis/report.py: what its page holds of a run that was stopped and resumed and of made-up ones, and that it is HTML
which loads nothing and in which every string is escaped. One 'ok' or 'not ok' line for each."""
import base64
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
from report_runs import NASTY, Page, make_attention, make_report, make_trace, page_of  # noqa: E402
from whole import SOURCE, Place, finish, report, settings, viaduct  # noqa: E402

from report_page import chart, decks, palette  # noqa: E402 (report_runs says where it is)
from report_page import run as runs  # noqa: E402


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


def check_evaluated(place):
    """What viaduct eval records is shown, with the bytes before a position as they are in the corpus. (Short spans
    look back at least the ramp of 8 tokens.)"""
    done = viaduct("eval", place.deck, *settings(run__directory=place.path("run"), eval__attention_positions=3,
                                                 eval__attention_file=place.path("run", "attention.h5")))
    page = page_of(place.path("run"))
    found = page.data()["attention"]
    with h5py.File(place.corpus) as f:
        test, symbols = f["test"][()], [chr(s[0]) for s in f["vocabulary/symbol"][()]]
    at = found[0]["positions"][1] if found else {"at": 0, "context": []}
    before = "".join(symbols[t] for t in test[at["at"] - 8:at["at"]])
    report("attention of the run's model", done.returncode == 0 and not page.problems and len(found) == 1 and
           "".join(at["context"][-8:]).replace("↵", "") == before and len(before) == 8, f"{done.stderr} {at} {before}")


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
    for name in (b"javascript:alert(1)", b"not utf-8 \xff"):
        with open(os.path.join(os.fsencode(folder), name), "wb"):
            pass
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
    files = [urllib.parse.unquote(a["href"], errors="surrogateescape") for a in page.named("a") if not a["href"].startswith("#")]
    schemes = [a["href"] for a in page.named("a") if ":" in a["href"]]
    report("links to files with odd names", files and not schemes and {"generated <i>.txt", "javascript:alert(1)", "not utf-8 \udcff"} <=
           set(files) and all(os.path.exists(os.path.join(folder, f)) for f in files), f"{files} {schemes}")


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
    context, short = data["positions"][0]["context"], data["positions"][1]
    report("attention: the text before tokens, oldest first", text[0, 0, 1].argmax() == 38 and text[0, 1, 2].argmax() == 19 and
           0 < text[1, 1, 2].max() < text[0, 1, 2].max() == 23 and text[0, 1, 0, 19] == text[0, 1, 0, 38] and
           context[-6:] == ["⇥", "\\xe9", "<", "↵\n", "a", ""] and
           short == {"at": 90, "context": [""] * 35 + context[-5:], "token": "<", "bits": "3.03"} and
           page.named("input", id="attention-position-0")[0]["value"] == "0", f"{context[-6:]} {short}")
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

    def absurd(columns):
        columns["time"][5:] = 1e300
        columns["grad_norm"][:2] = -1e308, 1e308
    for name, options in (("one row", {"rows": 1, "valid": 0}), ("not finite", {"change": not_finite}), ("no heads", {"heads": 0}),
                          ("many layers", {"layers": 256, "heads": 4}), ("without time", {"change": old}), ("absurd values", {"change": absurd})):
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


def main():
    place = Place(20000)
    try:
        check_run(place)
        check_evaluated(place)
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
    finally:
        place.remove()
    finish()


if __name__ == "__main__":
    main()
