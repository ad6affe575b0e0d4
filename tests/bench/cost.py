#!/usr/bin/env python3
"""How the time of a training update grows with attn_span, one head's span, streams, layers, d_model and ranks: Viaduct beside
the same model in PyTorch (bench_torch.py), eager and compiled, in one run.

    cost.py measure TABLE --programs FOLDER [--device cuda] [--panels NAME,...]   lines of JSON; python3 with torch
    cost.py draw TABLE -o PICTURE                                                 python3 with matplotlib

FOLDER has bench_train (make gpu-tests; for CPUs make build/gpu/bench_train). With --device cuda both sides run on a GPU in
bf16; else on one core with small sizes. Ranks have a GPU each, by NCCL, or one core each, by MPI, and PyTorch's are
DistributedDataParallel by NCCL or gloo; they share the streams of RANKS_BASE out. Each panel varies one size of BASE and
holds the others, spans included, so that attn_span changes at the same mean span. A peer that fails or would take too
long is printed with its reason and left out.
"""
import argparse
import concurrent.futures
import gc
import json
import os
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
BASE = {"cuda": dict(streams=16, block=512, layers=12, d_model=512, attn_span=8192, span=256),
        "cpu": dict(streams=4, block=128, layers=2, d_model=128, attn_span=1024, span=64)}
PANELS = {"cuda": dict(attn_span=[1024, 8192, 65536], head=[256, 1024, 2048, 4096, 8192], streams=[4, 16, 64],
                       layers=[6, 12, 24], d_model=[256, 512, 1024]),
          "cpu": dict(attn_span=[256, 1024, 4096, 16384], head=[64, 256, 512, 1024], streams=[1, 2, 4, 8],
                      layers=[1, 2, 4], d_model=[64, 128, 256])}
RANKS = dict(ranks=[1, 2, 4, 8])  # at most as many as there are GPUs, or cores
RANKS_BASE = {"cuda": BASE["cuda"] | dict(streams=64),
              "cpu": dict(streams=16, block=256, layers=4, d_model=256, attn_span=1024, span=64)}
D_HEAD, RAMP, DROPOUT = 64, 32, 0.3
SIDES = ["viaduct", "eager", "compiled"]
COMPILED = [0, -1]  # the ends of each panel: a compilation takes a minute


def sizes(device, panel, value):
    size = dict((RANKS_BASE if panel == "ranks" else BASE)[device])
    base = dict(head=size["span"], ranks=1).get(panel)
    if value != base:  # the base is one point of every panel
        size[panel] = value
    return size


def heads(size):
    return max(1, size["d_model"] // D_HEAD)


def viaduct(programs, device, size, windows, updates):
    """Milliseconds of an update."""
    words = ["layers={layers}", "d_model={d_model}", "attn_span={attn_span}", "block={block}", "span={span}"]
    words = [w.format(**size) for w in words] + [f"heads={heads(size)}", f"inner={4 * size['d_model']}"]
    if "head" in size:
        words.append(f"head={size['head']}")
    command = [os.path.join(programs, "bench_train"), str(size["streams"]), device, str(windows), str(updates), ",".join(words)]
    if "ranks" in size:
        root = ["--allow-run-as-root"] if os.getuid() == 0 else []
        command = ["mpirun", *root, "--bind-to", "core", "-n", str(size["ranks"])] + command
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if "ranks" in size and device != "cpu":
        environment |= dict(COMM="nccl", SHARD="on")
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])["ms_per_update"]


def torch_words(device, size, side, warmup, updates):
    words = dict(threads=1, updates=updates, warmup=warmup, vocab=205, n_layer=size["layers"], d_model=size["d_model"],
                 n_head=heads(size), d_inner=4 * size["d_model"], dropout=DROPOUT, emb_dropout=0.0,
                 attn_span=size["attn_span"], ramp=RAMP, span_init=size["span"] / size["attn_span"], aux_loss_scaler=5e-7,
                 streams=size["streams"], block=size["block"], lr=1e-9, lr_warmup=1, clip_step=0.03, device=device,
                 compile="no" if side == "eager" else "default")
    if "head" in size:
        words["head_span"] = size["head"]
    if "ranks" in size:
        words["ranks"] = size["ranks"]
    return [w for name, value in words.items() for w in (f"--{name}", str(value))]


def peer(device, size, side, updates):
    """Milliseconds of an update and, on a GPU, GiB."""
    sys.path.insert(0, HERE)
    import bench_torch
    a = bench_torch.parser().parse_args(torch_words(device, size, side, 3, updates))
    try:
        result = bench_torch.measure(a)
    finally:
        gc.collect()
        if device == "cuda":
            bench_torch.torch.cuda.empty_cache()
    return 1e3 * result["seconds_per_update"], result.get("gib")


def most_ranks(device):
    if device == "cpu":
        return len(os.sched_getaffinity(0))
    import torch
    return torch.cuda.device_count()


def points(device, panels):
    """(panel, value, whether the compiled peer runs)."""
    for panel in panels:
        values = (PANELS[device] | RANKS)[panel]
        if panel == "ranks":
            values = [v for v in values if v <= most_ranks(device)]
        for i, value in enumerate(values):
            yield panel, value, i in (c % len(values) for c in COMPILED)


def compile_ahead(device, panels, workers, limit):
    """Fills the compiler's cache with every compiled point, several at a time, before anything is timed."""
    def job(size):
        ranks = size.pop("ranks", 1)  # a rank compiles what a process with its share of the streams does
        return size | dict(layers=1, streams=size["streams"] // ranks)

    jobs = [job(sizes(device, p, v)) for p, v, compiled in points(device, panels) if compiled]
    unique = list({json.dumps(size, sort_keys=True): size for size in jobs}.values())
    script = os.path.join(HERE, "bench_torch.py")

    def one(size):
        words = torch_words(device, size, "compiled", 1, 1)
        try:
            subprocess.run([sys.executable, script, *words], capture_output=True, check=False, timeout=limit)
        except subprocess.TimeoutExpired:
            print(f"not compiled within {limit} s: {size}", flush=True)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, unique))


def run_side(a, side, size):
    if side == "viaduct":
        on = "cpu" if a.device == "cpu" else "bf16"
        return viaduct(a.programs, on, size, 3, 1 if on == "cpu" else 5), None
    return peer(a.device, size, side, 3 if a.device == "cpu" else 5)


def measure_point(a, panel, value, sides, left_out, known):
    """One row of the table a side; what a side cannot do, it is not asked for at larger values."""
    size = sizes(a.device, panel, value)
    for side in sides:
        row = dict(panel=panel, value=value, side=side)
        if (panel, side) in left_out:
            continue
        try:
            key = json.dumps([side, size], sort_keys=True)
            if key not in known:
                known[key] = run_side(a, side, size)
            row["ms"], gib = known[key]
            if gib:
                row["gib"] = round(gib, 2)
        except Exception as failure:  # out of memory, a time-out, an error of the compiler: the reason is the result
            lines = str(failure).strip().splitlines() or ["no message"]
            why = lines[-1] if "Traceback" in str(failure) else lines[0]  # a rank's whole traceback, or a message
            row["left_out"] = f"{type(failure).__name__}: {why[:160]}"
            left_out.add((panel, side))
        yield row


def measure(a):
    panels = a.panels.split(",") if a.panels else [*PANELS[a.device], *RANKS]
    start, left_out, known = time.time(), set(), {}
    if a.compile_ahead:
        compile_ahead(a.device, panels, a.compile_ahead, a.limit)
        print(f"compiled ahead in {time.time() - start:.0f} s", flush=True)
    head = dict(device=a.device, base=BASE[a.device], ranks_base=RANKS_BASE[a.device], date=time.strftime("%Y-%m-%d"), on=a.on)
    with open(a.table, "w", encoding="utf-8") as table:
        print(json.dumps(head), file=table, flush=True)
        for panel, value, compiled in points(a.device, panels):
            sides = [s for s in SIDES if (s != "compiled" or compiled) and s in a.sides.split(",")]
            if time.time() - start > a.total:
                print(f"not measured, {a.total} s have passed: {panel} {value}", flush=True)
                continue
            for row in measure_point(a, panel, value, sides, left_out, known):
                print(json.dumps(row), file=table, flush=True)
                print(json.dumps(row), flush=True)


INK, MUTED, GRID = "#1f2933", "#5b6770", "#e1e5e9"
LOOK = dict(viaduct=("Viaduct", "#2f6fb3", "o", "-"), eager=("PyTorch, eager", "#d1495b", "s", "--"),
            compiled=("PyTorch, torch.compile", "#8a6fb3", "^", ":"))
STYLE = {"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.labelcolor": INK,
         "axes.edgecolor": "#9aa5b1", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.7, "xtick.color": MUTED, "ytick.color": MUTED,
         "legend.frameon": False, "figure.dpi": 110, "savefig.dpi": 110, "svg.hashsalt": "viaduct"}
TITLES = dict(attn_span="attn_span, tokens, spans held", head="span of one head of each layer, tokens", streams="streams",
              layers="layers", d_model="d_model", ranks="ranks")


def short(value):
    return f"{value // 1024}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


def draw_panel(axes, ticker, title, rows):
    values = sorted({r["value"] for r in rows})
    for side in SIDES:
        line = [(r["value"], r["ms"]) for r in rows if r["side"] == side and "ms" in r]
        label, colour, marker, dashes = LOOK[side]
        axes.plot([x for x, _ in line], [y for _, y in line], color=colour, marker=marker, linestyle=dashes,
                  markersize=4.5, linewidth=1.5, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(ticker.FixedLocator(values))
    axes.xaxis.set_major_formatter(lambda x, _: short(round(x)))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    times = [r["ms"] for r in rows if "ms" in r]
    axes.set_ylim(min(times) / 1.8, max(times) * 1.8)
    axes.yaxis.set_major_locator(ticker.LogLocator(10, (1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.set_title(title, loc="left", fontsize=9.5)


def draw(a):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker
    with open(a.table, encoding="utf-8") as table:
        head, *rows = (json.loads(line) for line in table if line.strip())
    panels = [p for p in TITLES if any(r["panel"] == p and "ms" in r for r in rows)]
    plt.rcParams.update(STYLE)
    figure, grid = plt.subplots((len(panels) + 2) // 3, 3, figsize=(10.2, 2.75 * ((len(panels) + 2) // 3) + 0.7), squeeze=False,
                                layout="constrained")
    ranks = "GPUs, {streams} streams in all" if head["device"] == "cuda" else "CPU ranks: {layers} layers, d_model {d_model}, {streams} x {block}"
    titles = TITLES | dict(ranks=ranks.format(**head["ranks_base"]))
    for axes, panel in zip(grid.flat, panels):
        draw_panel(axes, ticker, titles[panel], [r for r in rows if r["panel"] == panel])
    for axes in grid.flat[len(panels):]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel("ms an update")
    base = head["base"]
    figure.suptitle("Time of a training update: {layers} layers, d_model {d_model}, {streams} streams of {block}, spans of {span} "
                    "tokens".format(**base) + (f", {head['on']}" if head["on"] else ""), x=0.01, ha="left", fontsize=10.5)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="lower center", ncol=3, fontsize=9)
    figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))
    # No date and no version in the file: the same table gives the same bytes.
    figure.savefig(a.output, metadata={"Software": None} if a.output.endswith(".png") else {"Date": None})


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    commands = p.add_subparsers(dest="command", required=True)
    m = commands.add_parser("measure", help="both sides, into a table")
    m.add_argument("table")
    m.add_argument("--programs", required=True, help="the folder of bench_train")
    m.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    m.add_argument("--panels", help="names with commas between them; all of them where it is missing")
    m.add_argument("--sides", default=",".join(SIDES), help="viaduct, eager, compiled; all of them where it is missing")
    m.add_argument("--on", default="", help="what it runs on, for the figure")
    m.add_argument("--compile-ahead", type=int, default=0, metavar="N", help="compile with N processes before measuring")
    m.add_argument("--limit", type=int, default=300, help="seconds that one compilation ahead may take")
    m.add_argument("--total", type=int, default=3600, help="seconds after which no further point begins")
    d = commands.add_parser("draw", help="the figure of a table")
    d.add_argument("table")
    d.add_argument("-o", dest="output", default="cost.png", metavar="PICTURE")
    a = p.parse_args()
    {"measure": measure, "draw": draw}[a.command](a)


if __name__ == "__main__":
    main()
