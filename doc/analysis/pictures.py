"""What the pictures of the scripts here have in common. Needs matplotlib (Debian: python3-matplotlib)."""
from matplotlib import ticker


def end_ticks(axes, last, inches):
    """Ticks at round values, at 0 and at `last`, on an axis `inches` long. The outer labels end with the axis, so that they
    do not meet those of the next panel; round values whose labels would meet another's are left out."""
    wide = 0.08 * len(f"{last:,.0f}") + 0.08
    bins = max(1, int(inches / (1.5 * wide)))
    round_values = [t for t in ticker.MaxNLocator(bins, integer=True).tick_values(0, last) if 0 < t < last]
    ticks = [0, *(t for t in round_values if t / last * inches > 1.5 * wide / 2 + 0.1
                  and (last - t) / last * inches > 1.5 * wide), last]
    axes.set_xticks(ticks, [f"{t:,.0f}" for t in ticks])
    marks = axes.xaxis.get_major_ticks(len(ticks))
    marks[0].label1.set_ha("left")
    marks[-1].label1.set_ha("right")
