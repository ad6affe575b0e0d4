"""What a chart shows: series over updates, axes and their ticks. svg.py and figures.py draw it."""
import math
from dataclasses import dataclass, field

import numpy as np

from . import run as runs

BINS = 300            # points of a curve; of more rows each point shows several
MARKERS = 60          # more points than these have a marker at some of them only
LOG_STEPS = (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 8)


@dataclass
class Series:
    """A curve. style 0 and 1: training and validation of the run itself; 2...: those of the other runs."""
    name: str
    x: np.ndarray
    y: np.ndarray
    style: int = 0
    low: np.ndarray = None      # where a point stands for several rows: the least and the greatest of them
    high: np.ndarray = None
    joined: bool = True         # by a line
    markers: bool = False
    digits: int = 4             # significant ones, of values as text
    exact: bool = False         # values are round: no zeros at their ends

    def marked(self):
        """Indices of the points that get a marker."""
        good = np.flatnonzero(np.isfinite(self.y))
        return good[::-(-len(good) // MARKERS) or 1] if self.markers else good[:0]

    def at(self, update):
        """Index of the last point that is not after the update; None before the first."""
        i = int(np.searchsorted(self.x, update, side="right")) - 1
        return i if i >= 0 else None

    def words(self, i):
        """The value at a point, with the range of the rows that it stands for."""
        if i is None or not math.isfinite(self.y[i]):
            return "–"
        value, *ends = (f"{v:.{self.digits}g}".replace("e-0", "e-") if self.exact else number(v, self.digits)
                        for v in (self.y[i], *([] if self.low is None else [self.low[i], self.high[i]])))
        return value if len(set(ends)) < 2 else f"{value} ({ends[0]} to {ends[1]})"


@dataclass
class Chart:
    key: str                    # its name in the page and of its file
    title: str
    unit: str                   # the y axis
    series: list
    last: int                   # update at which the x axis ends
    log: bool = False
    from_zero: bool = False
    note: str = ""
    restarts: list = field(default_factory=list)       # updates
    validations: list = field(default_factory=list)    # updates; empty where they have a curve
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        parts = [part for s in self.series for part in (s.y, s.low, s.high) if part is not None]
        values = np.concatenate(parts) if parts else np.zeros(0)
        values = values[np.isfinite(values) & (np.abs(values) < 1e30)]
        if self.log and (np.any(values <= 0) or len(values) == 0 or values.max() < 2 * values.min()):
            self.log = False
        self.low, self.high = limits(values, self.log, self.from_zero)

    def up(self, value):
        """Where a value is on the y axis: 0 at its foot, 1 at its top."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def along(self, update):
        return update / self.last

    def y_ticks(self):
        """[(value, label)] within the axis."""
        found = log_ticks(self.low, self.high) if self.log else []
        if len(found) < 2:
            found = linear_ticks(self.low, self.high, 5)
        return [(value, tick_label(value, found)) for value in found]

    def x_ticks(self):
        """[(update, label, is it for wide charts only?)]: 0, the last update, and round ones between them."""
        many = [t for t in linear_ticks(0, self.last, 8, whole=True) if 0.07 * self.last < t < 0.91 * self.last]
        every = -(-len(many) // 3) or 1
        narrow = [t for t in many[every - 1::every] if 0.12 * self.last < t < 0.8 * self.last]
        return [(0, "0", False)] + [(t, f"{t:,.0f}", t not in narrow) for t in many] + [(self.last, f"{self.last:,.0f}", False)]


def limits(values, log, from_zero):
    """The ends of a y axis that shows these values."""
    if len(values) == 0:
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    if log:
        return low / 1.06, high * 1.06
    if from_zero:
        low = min(0.0, low)
    if low == high:
        return (0.0, 2 * high) if high > 0 else (low - 1.0, high + 1.0)
    return low - (0.06 * (high - low) if low and not from_zero else 0), high + 0.06 * (high - low)


def linear_ticks(low, high, most, whole=False):
    """Multiples of 1, 2 or 5 times a power of ten from low to high, at most about `most`."""
    step = (high - low) / most
    size = 10.0 ** math.floor(math.log10(step))
    step = next(size * k for k in (1, 2, 5, 10) if size * k >= step * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low, high):
    """Round values within an axis that is logarithmic, fewer where it spans more."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in (LOG_STEPS, (1, 1.2, 1.5, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        found = [s * 10.0 ** d for d in decades for s in steps if low <= s * 10.0 ** d <= high]
        if len(found) <= 7:
            return found
    return found[::-(-len(found) // 7)]


def tick_label(value, ticks):
    """All of an axis with as many decimals as the finest needs."""
    largest = max(abs(t) for t in ticks)
    if 1e6 <= largest < 1e12:
        return f"{value / 1e6:g}M" if value else "0"
    if largest >= 1e12 or 0 < largest < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e") if value else "0"
    decimals = next((d for d in range(7) if all(abs(round(t, d) - t) <= 1e-6 * largest for t in ticks)), 6)
    return f"{value:,.{decimals}f}"


def number(value, digits=4):
    """A value as people write it, with about `digits` significant digits."""
    value = float(value)
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 10 ** (digits - 1) or value == 0:
        return f"{value:,.0f}"
    if size < 1e-3:
        return f"{value:.{min(digits, 3) - 1}e}".replace("e-0", "e-")
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"


def tokens(value):
    """A span as people write it: three digits below ten tokens are noise."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.1f}" if 0.05 <= value < 9.95 else f"{value:,.0f}"


# ---- the charts of a run ----

def curve(run, column, name, style=0, digits=4, exact=False):
    """A column of the trace, or an array with a value for each row."""
    points = runs.binned(run["update"], run[column] if isinstance(column, str) else column, BINS)
    several = len(run["update"]) > BINS
    return Series(name, points["update"], points["mean"], style, points["low"] if several else None,
                  points["high"] if several else None, digits=digits, exact=exact)


def validations(run, name, style):
    """The validations of a run; of the other runs as markers alone."""
    valid = run["valid"]
    if valid is None or len(valid["update"]) == 0:
        return []
    points = runs.binned(valid["update"], valid["bpc"], BINS)
    several = len(valid["update"]) > BINS
    return [Series(name, points["update"], points["mean"], style, points["low"] if several else None,
                   points["high"] if several else None, joined=style < 2, markers=True)]


def bpc(run, others):
    series = [curve(run, "train_bpc", "training")] + validations(run, "validation", 1)
    for i, other in enumerate(others):
        name = other["name"]
        series += [curve(other, "train_bpc", f"{name}, training", 2 + i)] + validations(other, f"{name}, validation", 2 + i)
    return Chart("bpc", "Bits per symbol", "bits per symbol", series, max(map(runs.last_update, [run, *others])), log=True,
                 restarts=[r["update"] for r in run["restarts"]], note=density(run))


def density(run):
    rows = len(run["update"])
    if rows <= BINS:
        return ""
    return (f"A point stands for about {last_per_point(run):,.0f} updates: the line is their mean, the band reaches from the "
            "least to the greatest row of the trace.")


def last_per_point(run):
    return runs.last_update(run) / min(len(run["update"]), BINS)


def small_charts(run):
    """Learning rate, gradient norm, speed, spans."""
    common = {"last": runs.last_update(run), "restarts": [r["update"] for r in run["restarts"]],
              "validations": [] if run["valid"] is None else [int(u) for u in run["valid"]["update"]]}
    spans = run["span"].reshape(len(run["update"]), -1)
    charts = [
        Chart("learning_rate", "Learning rate", "", [curve(run, "learning_rate", "learning rate", exact=True)],
              from_zero=True, **common),
        Chart("gradient_norm", "Gradient norm", "norm, before clipping", [curve(run, "grad_norm", "gradient norm")],
              log=True, **common),
        Chart("speed", "Throughput", "tokens per second", [curve(run, "tokens_per_second", "tokens per second", digits=5)],
              from_zero=True, **common)]
    if spans.shape[1]:
        charts.append(Chart("spans", "Spans", "tokens",
                            [curve(run, spans.mean(axis=1), "mean of all heads", digits=3),
                             curve(run, spans.max(axis=1), "longest", 2, digits=3)], from_zero=True, **common))
    return charts
