#!/usr/bin/python3
"""doc/analysis/viaduct_files.py on the files of a run, whole and damaged; and what doc/FILES.md shows in
other languages. One 'ok' or 'not ok' line for each."""
import math
import os
import re
import shutil
import subprocess
import sys

import h5py
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from whole import SOURCE, Place, finish, report, viaduct  # noqa: E402

sys.path.insert(0, os.path.join(SOURCE, "doc", "analysis"))
import viaduct_files as files  # noqa: E402


def refused(read, path, said, **options):
    """Whether reading ends with a FileError that says this, in one line that names the path."""
    try:
        read(path, **options)
    except files.FileError as failure:
        message = str(failure)
        return said in message and "\n" not in message and path in message
    return False


def check_trace(place):
    trace = files.open_trace(place.path("run"), verify=True)
    with h5py.File(place.path("run", "trace.h5")) as f:
        same = all(np.array_equal(trace[name], f[name][()], equal_nan=True) for name in files.COLUMNS + ("wall", "time"))
        same = same and np.array_equal(trace["valid"]["bpc"], f["valid/bpc"][()])
        same = same and trace["attributes"]["ranks"] == 1 and trace["attributes"]["settings"] == trace["deck"]
    report("open_trace: every column and the attributes", same and list(trace["update"]) == [5, 10, 15, 20], str(trace["update"]))
    table = files.open_trace(place.path("run"), xarray=True)
    report("open_trace: an xarray.Dataset", table["span"].dims == ("update", "layer", "head") and
           np.array_equal(table["valid_bpc"], trace["valid"]["bpc"]), str(table))
    found = files.settings(trace["deck"])
    report("settings: a resolved deck with its types", found["run%title"] == "it's" and found["model%dropout"] == 0.3 and
           found["span%per_layer"] is False and found["data%batch_streams"] == 4 and len(found) > 60, str(found))


def check_checkpoint(place):
    trace = files.open_trace(place.path("run"))
    with files.open_checkpoint(place.path("run"), verify=True) as f:
        good = f["/position/update"][()] == 20 and np.allclose(files.spans(f), files.spans(trace)[-1], rtol=1e-6)
    report("spans: those of the last checkpoint are those of the last row", good and files.spans(trace)[-1].max() > 0)


def check_log(place):
    rows, (train, valid) = files.log(place.path("run")), place.log("run")
    report("log: every row", [r["bpc"] for r in rows if "bpc" in r] == [r["bpc"] for r in train] and
           [r["valid_bpc"] for r in rows if "valid_bpc" in r] == [r["valid_bpc"] for r in valid] and len(rows) == 21)
    with open(place.path("torn.jsonl"), "w", encoding="ascii") as f:
        f.write('{"num_updates": 3, "bpc": null}\n7\n{"num_updates": 4, "b')
    rows = files.log(place.path("torn.jsonl"))
    report("log: null is NaN, and a torn line is skipped", len(rows) == 1 and math.isnan(rows[0]["bpc"]), str(rows))


def check_nll(place):
    path = place.path("nll.h5")
    done = viaduct("eval", place.deck, "--set", f"eval%nll_file={path}", "--set", f"run%directory={place.path('run')}")
    values, attributes = files.nll(path)
    said = [line for line in done.stdout.splitlines() if line.startswith("bpc: ")]
    bpc = float(np.nanmean(values.astype(float))) / math.log(2)
    report("nll: its mean is the bpc of eval", bool(said) and abs(float(said[0].split()[1]) - bpc) < 1e-5 and
           attributes["viaduct_kind"] == "nll" and attributes["checkpoint_update"] == 20, f"{bpc} {said} {done.stderr}")


def check_attention(place):
    path, pictures = place.path("attention.h5"), place.path("pictures")
    done = viaduct("eval", place.deck, "--set", f"eval%attention_file={path}", "--set", f"run%directory={place.path('run')}",
                   "--set", "eval%attention_positions=3")
    found, labelled = files.open_attention(path), files.open_attention(path, xarray=True)
    sums = found["distance_weight"].sum(-1)
    with open(place.path("text"), "rb") as f:
        text = f.read()[-2000:]  # the test split
    position = int(found["position"][1])
    context = b"".join(found["symbols"][token] for token in found["context"][1][::-1])
    report("attention: weights, and the text before a position", done.returncode == 0 and abs(sums - 1).max() < 1e-5 and
           found["position_weight"].shape == (3, *found["distance_weight"].shape) and
           len(context) > 5 and context == text[position - len(context):position] and found["symbols"][found["token"][1]] == text[position:position + 1],
           f"{done.stderr} {sums} {context}")
    report("attention: the same as an xarray.Dataset", np.array_equal(labelled.distance_weight, found["distance_weight"]) and
           labelled.position_weight.dims == ("position", "layer", "head", "distance"), str(labelled))
    report("attention: the settings of the model", files.setting(found["deck"], "model", "n_layer") == 2)
    script = [sys.executable, os.path.join(SOURCE, "doc", "analysis", "plot_attention.py")]

    def plot(*words):
        return subprocess.run([*script, *words], capture_output=True, text=True, timeout=100, check=False)

    done = plot(path, "-o", pictures, "--position", "0", "--position", "2", "--tokens", "500")
    names = ["attention_distance.png", "attention_position_0.png", "attention_position_2.png"]
    report("plot_attention.py draws", done.returncode == 0 and not done.stderr and sorted(os.listdir(pictures)) == names and
           all(os.path.getsize(os.path.join(pictures, name)) > 10000 for name in names), done.stderr)
    report("and refuses positions that the file lacks, and other files", plot(path, "--position", "3").returncode == 2 and
           "no attention file of Viaduct's, but a nll" in plot(place.path("nll.h5")).stderr and plot(path + "x").returncode == 1)
    wrong = place.path("wrong.h5")
    for name, value, says in (("token", np.full(3, 1 << 20, "<i4"), "/token has ids that are no symbols"),
                              ("context", found["context"][:, :-1], "/context has not the shape"),
                              ("distance_weight", np.zeros((2, 2, 0)), "/distance_weight is not [layer, head, distance]")):
        shutil.copy(path, wrong)
        with h5py.File(wrong, "r+") as f:
            del f[name]
            f[name] = value
        done = plot(wrong)
        report(f"and one with a wrong {name}", done.returncode == 1 and says in done.stderr, done.stderr)
    done = viaduct("info", wrong)
    report("info: weights at no distance are an error", done.returncode == 1 and "/distance_weight has no values" in done.stderr,
           done.stdout + done.stderr)


def check_damage(place):
    last, copy = place.checkpoint("run"), place.path("copy.h5")
    shutil.copy(last, copy)
    with open(copy, "r+b") as f:
        f.seek(-2000, os.SEEK_END)
        byte = f.read(1)
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte[0] ^ 1]))
    report("a flipped bit fails the digest", files.digest_is_right(last) is True and files.digest_is_right(copy) is False and
           refused(files.open_checkpoint, copy, "digest", verify=True))
    os.truncate(copy, os.path.getsize(copy) // 2)
    report("a truncated file is damaged", refused(files.open_checkpoint, copy, "damaged"))
    report("a file of another kind is named", refused(files.open_trace, last, "no trace of Viaduct's, but a checkpoint") and
           refused(files.nll, last, "no nll file of Viaduct's, but a checkpoint"))
    report("a missing file is named", refused(files.nll, place.path("no.h5"), "there is no nll file") and
           refused(files.open_trace, place.path("no"), "there is no trace") and refused(files.log, place.path("no"), "No such"))


def snippet(language):
    """The first code that doc/FILES.md shows behind the line which begins with the language."""
    with open(os.path.join(SOURCE, "doc", "FILES.md"), encoding="utf-8") as f:
        behind = re.split(rf"^{language}\b.*:\n\n", f.read(), maxsplit=1, flags=re.M)[1]
    return "".join(line[4:] + "\n" for line in re.match(r"(?:(?:    .*)?\n)+", behind)[0].splitlines())


def check_languages(place):
    """What doc/FILES.md shows prints the last spans, where the language is there."""
    wanted = sorted(files.open_trace(place.path("run"))["span"][-1].ravel().tolist())
    for language, name, tools in (("Fortran", "spans.f90", ("h5pfc", "h5fc")), ("Octave", "spans.m", ("octave",)),
                                  ("R", "spans.R", ("Rscript",))):
        tool = next(filter(shutil.which, tools), None)
        if not tool or language == "R" and subprocess.run([tool, "-e", "library(hdf5r)"], capture_output=True).returncode:
            print(f"ok {language} reads spans # SKIP no {' or '.join(tools)}, or no library")
            continue
        with open(place.path(name), "w", encoding="ascii") as f:
            f.write(snippet(language))
        words = [tool, name, "-o", "spans"] if language == "Fortran" else [tool, "--no-gui", "-q", name] if language == "Octave" \
            else [tool, name]
        done = subprocess.run(words, cwd=place.folder, capture_output=True, text=True, timeout=100)
        if language == "Fortran" and done.returncode == 0:
            done = subprocess.run(["./spans"], cwd=place.folder, capture_output=True, text=True, timeout=30)
        found = sorted(float(x) for x in re.sub(r"\[\d*,\d*\]", " ", done.stdout).split())
        report(f"{language} reads spans", len(found) == len(wanted) and np.allclose(found, wanted, atol=1e-3),
               f"{done.stdout} {done.stderr} {wanted}")


def main():
    place = Place(40000)
    try:
        done = place.train("run", run__max_updates=20, run__title="it's", valid__interval=20)
        report("a run", done.returncode == 0, done.stderr)
        for check in (check_trace, check_checkpoint, check_log, check_nll, check_attention, check_damage,
                      check_languages):
            check(place)
    finally:
        place.remove()
    finish()


if __name__ == "__main__":
    main()
