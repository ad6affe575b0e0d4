"""The parts of the page."""
import base64
import datetime
import hashlib
import os
import urllib.parse

import numpy as np

from . import attention, chart, decks, heat, palette, svg
from . import run as runs
from .markup import Markup, data, el, join, table

HERE = os.path.dirname(os.path.abspath(__file__))
MOST_SPANS = 250000  # in the heat maps of all layers together


def date(seconds):
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return "–"


def duration(seconds):
    seconds = int(round(seconds))
    for size, big, small in ((86400, "d", "h"), (3600, "h", "min"), (60, "min", "s")):
        if seconds >= size:
            return f"{seconds // size} {big} {seconds % size * (24 if big == 'd' else 60) // size} {small}"
    return f"{seconds} s"


def size(n):
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:,.0f} {unit}" if unit == "bytes" else f"{n:,.1f} {unit}"
        n /= 1024
    return ""


def section(identifier, title, *children):
    return el("section", el("h2", title), *children, id=identifier, class_="part")


def facts(pairs):
    return el("dl", *(el("div", el("dt", name), el("dd", value)) for name, value in pairs if value is not None), class_="facts")


def describe(run):
    """What was trained, in a line."""
    value, (_, layers, heads) = run["values"], run["span"].shape
    arch = {"adaptive_span": "adaptive span", "transformer_xl": "Transformer-XL"}.get(value.get("model%arch"), value.get("model%arch"))
    parts = [arch, f"{layers} layer{'s' * (layers != 1)} of {heads} head{'s' * (heads != 1)}"]
    for name, words in (("model%d_model", "width {}"), ("data%batch_streams", "{} streams"),
                        ("data%tokens_per_sample", "blocks of {} tokens")):
        if name in value:
            parts.append(words.format(value[name]))
    if value.get("model%arch") == "adaptive_span" and "span%attn_span" in value:
        parts.append(f"spans up to {value['span%attn_span']} tokens")
    return " · ".join(str(part) for part in parts if part)


# ---- the parts ----

def summary(run):
    done, wanted = int(run["update"][-1]), run["values"].get("run%max_updates")
    best, speed = runs.best_validation(run), run["tokens_per_second"][np.isfinite(run["tokens_per_second"])]
    wall = run["wall"][np.isfinite(run["wall"])] if "wall" in run else ()
    last = run["train_bpc"][np.isfinite(run["train_bpc"])]
    spans = run["span"][-1]
    return section("summary", "Summary", facts([
        ("Updates", f"{done:,}" + (f" of {wanted:,}" if isinstance(wanted, int) and wanted > 0 else "")),
        ("Best validation", f"{best[0]:.4f} bpc at update {best[1]:,}" if best else "none yet"),
        ("Training, last row", f"{last[-1]:.4f} bpc" if len(last) else "–"),
        ("Throughput, median", f"{np.median(speed):,.0f} tokens per second" if len(speed) else "–"),
        ("Time", duration(wall[-1]) if len(wall) else "not recorded"),
        ("Restarts", str(len(run["restarts"])) if "wall" in run else "not recorded"),
        ("Spans now", f"mean {chart.tokens(spans.mean())}, longest {chart.tokens(spans.max())} tokens" if spans.size else None)]))


def update_slider(points):
    """The one slider that charts and spans follow."""
    last = len(points) - 1
    return el("div", el("label", "Update", for_="at-update"),
              el("input", type="range", id="at-update", min="0", max=str(last), value=str(last), step="1"),
              el("span", f"{int(points[-1]):,}", id="update-now", class_="now"), class_="reader needs-script")


def restart_table(run):
    if not run["restarts"]:
        return None
    return el("div", el("h3", "Restarts"), table(
        ["after update", "first row afterwards", "not in the run's time"],
        [(f"{r['update']:,}", date(r["date"]), duration(r["pause"]) if r["pause"] >= 1 else f"{r['pause']:.1f} s")
         for r in run["restarts"][:svg.MOST_MARKS]]),
        el("p", "A restart is where the date moves on by more than the time that the run counts. The clock of a machine that is "
                "set forward looks the same.", class_="note"))


def curves(run, charts):
    several = [c for c in charts if c.key != "bpc"]
    words = ["The values in the legends are those at the chosen update."]
    if any(0 < len(c.validations) <= svg.MOST_MARKS for c in several):
        words.append("Short ticks at the foot mark validations.")
    if run["restarts"]:
        words.append("Dotted lines with a triangle mark restarts.")
    return section("curves", "Curves", el("p", " ".join(words), class_="note"), svg.figure(charts[0]),
                   el("div", *(svg.figure(c) for c in several), class_="pairs"), restart_table(run))


def top_span(run):
    """Where the scale of the heat maps ends: the longest span that there is."""
    span = run["span"][np.isfinite(run["span"])]
    return max(10.0, float(span.max())) if span.size else 10.0


def heat_map(run):
    """The heat map of a layer over updates."""
    (_, layers, heads), last = run["span"].shape, runs.last_update(run)
    labels = [el("text", label, class_="tick wide" if wide else "tick", x=svg.percent(update / last), y="100%", dy="1.5em",
                 text_anchor={0: "start", last: "end"}.get(update, "middle"))
              for update, label, wide in chart.Chart("map", "", "", [], last).x_ticks()]
    places = [svg.percent(r["update"] / last) for r in run["restarts"][:svg.MOST_MARKS]]
    lines = [el("line", class_="restart", x1=x, x2=x, y1="0", y2="100%") for x in places]
    lines.append(el("line", class_="cursor", x1="0", x2="0", y1="0", y2="100%", visibility="hidden"))
    slider = el("div", el("label", "Layer", for_="layer"),
                el("input", type="range", id="layer", min="0", max=str(layers - 1), value="0", step="1", disabled=layers == 1),
                el("span", "0", id="layer-now"), class_="reader-of-layer")
    return el("figure", el("figcaption", el("h3", "A layer's heads over updates")), slider,
              *heat.plot("map-cells", "map-title", labels, heads, extra=lines), el("p", "updates", class_="x-unit"),
              class_="chart needs-script", id="map")


def spans(run):
    if run["span"][-1].size == 0:
        return None
    rows = len(run["update"])
    note = "Layer 0 is at the input. Colours follow the logarithm of a span."
    if rows > span_columns(run):
        note += f" The map shows {span_columns(run)} of {rows:,} rows of the trace, each as it is."
    if run["values"].get("model%arch") == "transformer_xl":
        note += " In Transformer-XL a span is the greatest distance that a block's last token could see."
    return section("spans", "Attention spans", el("p", note, class_="note"), heat.span_scale("span in tokens", top_span(run)), heat_map(run),
                   el("h3", "Spans of all heads at update ", el("span", f"{int(run['update'][-1]):,}", class_="now")),
                   heat.matrix(run["span"][-1], top_span(run), "Spans of every layer and head", "span-table"),
                   el("noscript", el("p", "The map of a layer's heads over updates needs JavaScript.", class_="note")))


def span_columns(run):
    _, layers, heads = run["span"].shape
    return max(2, min(len(run["update"]), chart.BINS, MOST_SPANS // max(1, layers * heads)))


def comparison(run, others):
    """The runs side by side, and where their decks differ."""
    if not others:
        return None
    everyone = [run, *others]
    rows = []
    for r in everyone:
        best, speed = runs.best_validation(r), r["tokens_per_second"][np.isfinite(r["tokens_per_second"])]
        rows.append((r["name"], f"{runs.last_update(r):,}", f"{best[0]:.4f}" if best else "–", f"{best[1]:,}" if best else "–",
                     chart.number(r["train_bpc"][-1], 5), f"{np.median(speed):,.0f}" if len(speed) else "–",
                     chart.tokens(r["span"][-1].mean()) if r["span"][-1].size else "–"))
    all_values = [decks.plain(r["values"]) for r in everyone]
    names = [name for name in all_values[0] if name not in decks.OWN and
             any(values.get(name) != all_values[0][name] for values in all_values[1:])]
    head = ["run", "updates", "best validation, bpc", "at update", "training, last row, bpc", "tokens per second, median",
            "mean span, tokens"]
    differ = table(["variable", *(r["name"] for r in everyone)],
                   [(name, *(decks.show(values.get(name)) for values in all_values)) for name in names]) if names else \
        el("p", "Their decks differ in title and paths at most.", class_="note")
    return section("runs", "Other runs", table(head, rows), el("h3", "Where their decks differ"), differ)


def texts(samples):
    if not samples:
        return None
    parts = []
    for found in samples:
        parts.append(el("h3", found["source"]))
        for heading, text in found["texts"]:
            parts += [el("h4", heading) if heading else None, el("pre", text, class_="sample", tabindex="0",
                                                                 aria_label=f"{heading or 'text'} of {found['source']}", role="region")]
        if found["left"]:
            parts.append(el("p", f"{found['left']:,} more bytes are in the file.", class_="note"))
    return section("samples", "Generated text", *parts)


def setting_rows(values, other):
    """Rows of the settings, those that differ marked by a word besides the colour."""
    mine = decks.plain(values)
    for name, value in values.items():
        theirs = other.get(name)
        differs = name in mine and name in other and mine[name] != theirs
        yield el("tr", el("th", name, scope="row"), el("td", decks.show(value)), el("td", decks.show(theirs)),
                 el("td", "differs" if differs else ""), class_="changed" if differs else None)


def settings(run, deck):
    """Where the deck differs from the shipped one, and all of it."""
    values = run["values"]
    if not deck:
        return section("settings", "Settings", el("p", "There is no shipped deck to compare with.", class_="note"),
                       el("details", el("summary", "The resolved deck"), el("pre", run["deck"], tabindex="0")))
    path, whole, given = deck
    name = os.path.join(os.path.basename(os.path.dirname(os.path.abspath(path))), os.path.basename(path))
    differ, mine = decks.differences(values, whole), decks.plain(values)
    words = f"The run's deck differs from {name} in {len(differ)} of {sum(n in whole for n in mine)} variables of training."
    if not set(mine) <= set(whole):
        words += " Variables without a value in either that deck or INPUT.md are not compared."
    rows = [(n, decks.show(values[n]), decks.show(whole[n]), "the deck" if n in given else "the default") for n in differ]
    everything = el("table", el("thead", el("tr", *(el("th", t, scope="col") for t in ("variable", "this run", name, "")))),
                    el("tbody", *setting_rows(values, whole)))
    return section("settings", "Settings", el("p", words),
                   table(["variable", "this run", name, "from"], rows) if rows else None,
                   el("details", el("summary", "All variables"), el("div", everything, class_="scroll", tabindex="0", role="region",
                                                                    aria_label="All variables")),
                   el("details", el("summary", "The resolved deck, to train with again"), el("pre", run["deck"], tabindex="0",
                                                                                             role="region", aria_label="The resolved deck")))


def environment(run):
    found = run["attributes"]
    pair = f"{found['ranks']} × {found['threads']}" if "ranks" in found and "threads" in found else "not recorded"
    pairs = [("Viaduct", found.get("viaduct_version", "not recorded")), ("Commit", found.get("git_version", "not recorded")),
             ("Hosts", found.get("hosts", "not recorded")), ("Ranks × threads", pair),
             ("Devices", found.get("devices", "not recorded")), ("Precision", found.get("precision", "not recorded")),
             ("Trace written", str(found.get("created", "not recorded")).replace("T", " ").replace("Z", " UTC")),
             ("Folder", run["folder"])]
    return section("environment", "Environment", facts([(name, str(value)) for name, value in pairs]),
                   el("p", "Of the program that wrote the trace last; a resumed run may have computed earlier rows elsewhere.",
                      class_="note"))


def file_links(run, output):
    found, more = runs.files(run, output)
    rows = [(el("a", name, href=urllib.parse.quote(os.fsencode(link))), (f"link to {target}" if target else size(n)), date(changed))
            for name, link, n, changed, target in found]
    return section("files", "Files", table(["file", "size", "changed"], rows),
                   el("p", f"{more} more files are in the folder.", class_="note") if more else None)


# ---- the page ----

def script_data(run, charts):
    """What the page's script reads: the values at each update, and spans as float32."""
    columns = runs.bins(len(run["update"]), span_columns(run))[1:] - 1  # the last rows of the bins that curves have
    span = np.ascontiguousarray(run["span"][columns], dtype="<f4")
    found = {"updates": charts[0].series[0].x.tolist(), "charts": {c.key: svg.values(c) for c in charts}}
    if span.size:
        found["spans"] = {"updates": run["update"][columns].tolist(), "layers": span.shape[1], "heads": span.shape[2],
                          "last": runs.last_update(run), "top": top_span(run), "levels": palette.LEVELS,
                          "data": base64.b64encode(span.tobytes()).decode()}
    return found


def asset(name):
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


def digest(text):
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def head(title, script):
    """No request leaves the page: the policy allows its own style and script, by their digests, and nothing else."""
    style = f"{palette.style_sheet()}\n{asset('page.css')}"
    policy = f"default-src 'none'; style-src {digest(style)}; script-src {digest(script)}; base-uri 'none'; form-action 'none'"
    return el("head", el("meta", charset="utf-8"), el("meta", http_equiv="Content-Security-Policy", content=policy),
              el("meta", name="viewport", content="width=device-width, initial-scale=1"),
              el("meta", name="color-scheme", content="light dark"), el("title", f"{title} – Viaduct"),
              Markup(f"<style>{style}</style>"))


def attended(files):
    """What is in the attention files."""
    if not files:
        return None
    note = "Attention weights that viaduct eval recorded: of each head the mean over all predicted tokens, and the weights before " \
        "some of them. Distances count from the token before the predicted one. Colours follow the logarithm of a weight."
    return section("attention", "Attention", el("p", note, class_="note"), *(attention.part(f, i) for i, f in enumerate(files)))


def page(run, others=(), samples=(), deck=None, output="report.html", written="", files=()):
    """The whole page as text. output: where it is written to; files: what attention files hold."""
    script = asset("page.js")
    charts = [chart.bpc(run, others), *chart.small_charts(run)]
    over_updates = [curves(run, charts), spans(run)]
    rest = [attended(files), comparison(run, others), texts(samples), settings(run, deck), environment(run), file_links(run, output)]
    names = (("summary", "Summary"), ("curves", "Curves"), ("spans", "Spans"), ("attention", "Attention"), ("runs", "Other runs"), ("samples", "Text"),
             ("settings", "Settings"), ("environment", "Environment"), ("files", "Files"))
    parts = join([summary(run), el("div", update_slider(charts[0].series[0].x), *over_updates, class_="over-updates"), *rest])
    there = [el("li", el("a", words, href=f"#{name}")) for name, words in names if f'<section id="{name}"' in parts]
    body = el("body", svg.definitions(), el("a", "Skip to the content", href="#main", class_="skip"),
              el("header", el("div", el("h1", run["title"]), el("p", describe(run), class_="subtitle")),
                 el("button", "Dark", type="button", id="theme", class_="needs-script", aria_label="Switch to dark colours")),
              el("nav", el("ul", *there), aria_label="Parts of the page"), el("main", parts, id="main"),
              el("footer", el("p", f"{run['name']}: a run of Viaduct. {written}")), data("data", {**script_data(run, charts), "attention": [attention.script_data(f) for f in files]}),
              Markup(f"<script>{script}</script>"))
    return f"<!DOCTYPE html>\n{el('html', head(run['title'], script), body, lang='en')}\n"
