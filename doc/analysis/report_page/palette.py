"""Colours of the page, light and dark, and of the figures. Lightness alone tells the steps of a heat map apart, so that they
survive a black and white printer; curves differ in dashes and markers besides."""

LIGHT = {"background": "#fcfcfa", "raised": "#ffffff", "ink": "#1b2328", "muted": "#55626b", "rule": "#d8dde0", "grid": "#e6e9eb",
         "accent": "#1c5f9e", "focus": "#b4540a", "cursor": "#b4540a", "changed": "#fff3d9"}
DARK = {"background": "#14181b", "raised": "#1b2125", "ink": "#e3e8ea", "muted": "#9aa8b0", "rule": "#374249", "grid": "#283137",
        "accent": "#79b8ef", "focus": "#f0a757", "cursor": "#f0a757", "changed": "#3a3018"}
# Training and validation of the run, then the other runs.
LIGHT_SERIES = ("#1c5f9e", "#b3263c", "#2a7f5b", "#8a5a12", "#6d4a9c", "#0f7f8c", "#a3427f", "#5c6670")
DARK_SERIES = ("#79b8ef", "#ff8f98", "#74cfa3", "#e3b566", "#bda3ec", "#68ccd8", "#ef9fcd", "#aab6bf")
DASHES = ((), (), (7, 3), (2, 2.5), (9, 3, 2, 3), (4, 2), (12, 4), (1.5, 4))
LEVELS = 24
STOPS = ("#eef1e9", "#c3e0c9", "#71bdb5", "#2f86a8", "#1d4f87", "#0d2149")


def slot(style):
    """Place of a series' style in the lists above: those of the other runs come again after six."""
    return style if style < 2 else 2 + (style - 2) % 6


def rgb(colour):
    return tuple(int(colour[i:i + 2], 16) for i in (1, 3, 5))


def luminance(colour):
    """Relative luminance, 0 to 1, as WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb(colour))]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def ramp(stops, n):
    """n colours through the stops."""
    found = []
    for i in range(n):
        place = i / (n - 1) * (len(stops) - 1)
        k = min(int(place), len(stops) - 2)
        mixed = (round(a + (b - a) * (place - k)) for a, b in zip(rgb(stops[k]), rgb(stops[k + 1])))
        found.append("#%02x%02x%02x" % tuple(mixed))
    return found


LIGHT_LEVELS = ramp(STOPS, LEVELS)
DARK_LEVELS = ramp(("#1f272c", "#1d4468", "#2573a0", "#4aa6ae", "#9fd3b4", "#f3f7d8"), LEVELS)


def text_on(colour):
    return max(("#ffffff", "#10161a"), key=lambda ink: contrast(ink, colour))


def variables(named, series, levels):
    rules = [f"--{name}:{value}" for name, value in named.items()]
    rules += [f"--series-{i}:{value}" for i, value in enumerate(series)]
    rules += [f"--level-{i}:{value};--on-{i}:{text_on(value)}" for i, value in enumerate(levels)]
    return ";".join(rules)


def style_sheet():
    """The variables of both palettes, and the classes that use them."""
    light, dark = variables(LIGHT, LIGHT_SERIES, LIGHT_LEVELS), variables(DARK, DARK_SERIES, DARK_LEVELS)
    rules = [f":root{{{light};color-scheme:light}}",
             f"@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark};color-scheme:dark}}}}",
             f"@media screen{{:root[data-theme=dark]{{{dark};color-scheme:dark}}}}"]
    for i, dashes in enumerate(DASHES):
        rules.append(f".s{i}{{color:var(--series-{i});stroke-dasharray:{' '.join(map(str, dashes)) or 'none'}}}")
    rules += [f".l{i}{{fill:var(--level-{i})}}td.l{i},pre .l{i}{{background:var(--level-{i});color:var(--on-{i})}}" for i in range(LEVELS)]
    return "\n".join(rules)
