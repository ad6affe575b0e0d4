"""A run's folder as the numbers that the page shows."""
import os

import numpy as np

from viaduct_files import FileError, open_trace, setting, settings

# Rows of a part differ in `time - wall` by the microseconds between two readings of clocks; a new start takes longer.
LEAST_PAUSE = 0.1
MOST_FILES = 60


def load(name, directory):
    """The trace of a run, which has a row at least, with "name", "folder", "title", "values" (the deck's variables) and
    "restarts"."""
    if not os.path.isdir(directory):
        raise FileError(f"{directory}: there is no such directory")
    run = open_trace(directory)
    if len(run["update"]) == 0:
        raise FileError(f"{run['path']}: no rows yet; the first comes after trace%interval updates")
    if np.any(np.diff(run["update"]) <= 0):
        raise FileError(f"{run['path']}: /update does not increase")
    run["name"], run["folder"] = name, os.path.dirname(os.path.abspath(run["path"]))
    run["values"] = settings(run["deck"])
    run["title"] = str(setting(run["deck"], "run", "title") or "").strip() or os.path.basename(run["folder"])
    run["restarts"] = restarts(run)
    return run


def last_update(run):
    return max(int(run["update"][-1]), 1)


def restarts(run):
    """[{"update": of the last row before, "date": of the first row after, "pause": seconds}]. `wall` counts the seconds of
    the run's parts alone, `time` all of them: where a part ends the difference of the two grows."""
    if "wall" not in run or "time" not in run:
        return []
    known = np.isfinite(run["wall"]) & np.isfinite(run["time"])
    update, offset = run["update"][known], (run["time"] - run["wall"])[known]
    found = []
    for i in range(1, len(offset)):
        # Two rows on each side: a row that was written late stands alone.
        pause = offset[i:i + 2].min() - offset[max(0, i - 2):i].max()
        if pause > LEAST_PAUSE:
            found.append({"update": int(update[i - 1]), "date": float(run["time"][known][i]), "pause": float(pause)})
    return found


def best_validation(run):
    """(bpc, update) of the lowest validation; None where there is none."""
    valid = run["valid"]
    if valid is None or not np.isfinite(valid["bpc"]).any():
        return None
    best = int(np.nanargmin(np.where(np.isfinite(valid["bpc"]), valid["bpc"], np.nan)))
    return float(valid["bpc"][best]), int(valid["update"][best])


def bins(rows, most):
    """The first row of each of at most `most` bins, and the end of the last."""
    return np.unique(np.linspace(0, rows, min(rows, most) + 1).astype(int))


def binned(update, value, most):
    """At most `most` points of a column: {"update": of the bin's last row, "mean": over the updates that the rows stand
    for, "low", "high"}. NaN where no row of a bin is finite."""
    edges = bins(len(update), most)
    weight = np.diff(update, prepend=0).astype(float)
    good = np.isfinite(value)
    sums = np.add.reduceat(np.where(good, value, 0) * weight, edges[:-1])
    weights = np.add.reduceat(good * weight, edges[:-1])
    low = np.minimum.reduceat(np.where(good, value, np.inf), edges[:-1])
    high = np.maximum.reduceat(np.where(good, value, -np.inf), edges[:-1])
    some = weights > 0
    return {"update": update[edges[1:] - 1], "mean": np.where(some, sums / np.where(some, weights, 1), np.nan),
            "low": np.where(some, low, np.nan), "high": np.where(some, high, np.nan)}


def files(run, output):
    """[(path below the run's folder, link from the page `output`, bytes, seconds since 1970, where a link points)] of the run's
    files but that page, and how many more there are."""
    found, output = [], os.path.abspath(output)
    for folder in ("", "checkpoints"):
        path = os.path.join(run["folder"], folder)
        if not os.path.isdir(path):
            continue
        for name in sorted(os.listdir(path)):
            full = os.path.join(path, name)
            if name.startswith(".") or not os.path.isfile(full) or full == output:
                continue
            state = os.stat(full)
            target = os.readlink(full) if os.path.islink(full) else None
            found.append((os.path.join(folder, name), os.path.relpath(full, os.path.dirname(output)), state.st_size, state.st_mtime, target))
    return found[:MOST_FILES], max(0, len(found) - MOST_FILES)
