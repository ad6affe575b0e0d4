#!/usr/bin/env python3
"""Whole runs of the program on a GPU, of both models: the same curve as on the CPU, on two ranks of one GPU, and across a
resume from one to the other; evaluation; 16-bit training; what happens without a GPU. Lines 'ok NAME' and 'not ok NAME:
WHY'. Words on the command line: only these checks (the names in main).

Environment: VIADUCT, the program; PROGRAMS, the folder of the programs of tests/gpu/; MPIRUN (default: mpirun, also for root
and with more ranks than cores).
"""
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
VIADUCT = os.environ.get("VIADUCT") or os.path.join(ROOT, "build", "viaduct")
PROGRAMS = os.environ.get("PROGRAMS")  # the folder of silent_peer; none: it is left out
MPIRUN = shlex.split(os.environ.get("MPIRUN") or "mpirun --oversubscribe --bind-to none")
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="2", OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
                   OMPI_MCA_btl_vader_single_copy_mechanism="none")
UPDATES = 20
# A slow warmup: the large first steps of a fast one amplify a ReLU that rounding switches on one backend only by 400
# within 20 updates. Where 16-bit runs are to learn something, SWIFT is used.
SWIFT = 20
DECK = """&run title='gpu', directory='{folder}/run', max_updates={updates}, log_interval=1 /
&data path='{folder}/corpus.h5', tokens_per_sample=64, batch_streams=4 /
&model n_layer=3, d_model=128, n_head=2, d_inner=256, dropout=0.3, emb_dropout=0.1 /
&span attn_span=256, ramp=16, init=0.1, aux_loss_scaler=1d-6 /
&optimizer lr=0.07, warmup_updates=200, clip_step=0.03 /
&valid interval=10, streams=2, max_blocks=4 /
&checkpoint interval=10, keep=3 /
&device precision='fp32', comm='mpi' /
&eval streams=3, tokens_per_sample=64 /
"""
# Transformer-XL, whose memories grow during the first updates, with heads that do not make up d_model. Adam's first steps
# take the sign of a gradient for its size: a slow warmup here too.
DECK_XL = """&run title='gpu', directory='{folder}/run', max_updates={updates}, log_interval=1 /
&data path='{folder}/corpus.h5', tokens_per_sample=64, batch_streams=4 /
&model arch='transformer_xl', n_layer=3, d_model=128, n_head=2, d_head=32, d_inner=256, dropout=0.1, dropatt=0.1 /
&memory mem_len=96 /
&optimizer method='adam', lr=0.002, beta2=0.999, schedule='constant', warmup_updates=200, clip_norm=0.25 /
&valid interval=10, streams=2, max_blocks=4 /
&checkpoint interval=10, keep=3 /
&device precision='fp32', comm='mpi' /
&eval streams=3, tokens_per_sample=64 /
&generate tokens=40, prompt='a' /
"""
failures = 0
folder = tempfile.mkdtemp(prefix="viaduct-gpu-")


def report(name, good, why=""):
    global failures
    failures += not good
    print(f"ok {name}" if good else f"not ok {name}: {why}", flush=True)


def viaduct(*words, ranks=0, environment=None, program=VIADUCT, **variables):
    """group__name=value become --set words."""
    for name, value in variables.items():
        words += ("--set", f"{name.replace('__', '%')}={value}")
    # `timeout` ends mpirun so that it ends its ranks; the check then fails with status 124, and the next one begins.
    launch = ["timeout", "-k", "10", "100"] + (MPIRUN + ["-n", str(ranks)] if ranks else [])
    return subprocess.run(launch + [program, *words], capture_output=True, text=True, errors="replace", check=False,
                          env=dict(ENVIRONMENT, **(environment or {})))


def train(run, backend, deck="deck", **more):
    result = viaduct("train", os.path.join(folder, f"{deck}.nml"), run__directory=os.path.join(folder, run),
                     device__backend=backend, **more)
    if result.returncode:
        report(f"{run} trains", False, (result.stderr + result.stdout)[-1500:])
    return result


def rows(run):
    try:
        with open(os.path.join(folder, run, "log.jsonl"), encoding="utf-8") as f:
            return [json.loads(line) for line in f]
    except OSError:
        return []


def losses(run, key="loss"):
    return [x[key] for x in rows(run) if key in x]


def same(name, run, other, key="loss", bound=1e-4):
    a, b = losses(run, key), losses(other, key)
    worst = max((abs(x / y - 1) for x, y in zip(a, b)), default=float("nan"))
    report(f"{name} ({worst:.1e}, bound {bound:.0e})", len(a) == len(b) > 0 and worst <= bound, f"{a} {b}")


def make_corpus():
    """Words of a made-up language, the frequent ones short, with some grammar to learn."""
    r = random.Random(1)
    words = ["".join(r.choice("abcdefghijklmnop") for _ in range(1 + i // 12)) for i in range(80)]
    follows = {w: [words[int(len(words) * r.random() ** 2)] for _ in range(4)] for w in words}
    text, word = [], words[0]
    while len(text) < 60000:
        word = r.choice(follows[word])
        text.append(word)
    with open(os.path.join(folder, "text"), "w", encoding="utf-8") as f:
        f.write(" ".join(text)[:160000])
    for name, deck in (("deck", DECK), ("xl", DECK_XL)):
        with open(os.path.join(folder, f"{name}.nml"), "w", encoding="utf-8") as f:
            f.write(deck.format(folder=folder, updates=UPDATES))
    made = viaduct("prepare", os.path.join(folder, "deck.nml"), prepare__source=os.path.join(folder, "text"),
                   prepare__train=0.9, prepare__valid=0.05, prepare__test=0.05)
    if made.returncode:
        sys.exit(f"not ok prepare: {made.stderr}")


def check_curves():
    train("cpu", "cpu")
    train("gpu", "cuda")
    same(f"{UPDATES} updates in fp32: losses as on the CPU", "gpu", "cpu")
    same("validations as on the CPU", "gpu", "cpu", key="valid_bpc")
    train("two", "cuda", ranks=2)
    same("2 ranks on one GPU: losses as on one rank", "two", "gpu")
    train("micro", "cuda", data__micro_streams=1)
    same("streams one by one: losses as all at once", "micro", "gpu")
    # A warmup slower still: from fairseq's start rounding grows from 1e-8 to 2e-4 within 20 updates of the other.
    for backend in ("cpu", "cuda"):
        train(f"trimmed-{backend}", backend, span__softmax="trimmed", model__init="fairseq", optimizer__warmup_updates=2000)
    same("trimmed: losses as on the CPU", "trimmed-cuda", "trimmed-cpu")


def check_moving():
    """Spans that are driven down by a whole window every few updates: the GPU chooses windows that the host
    learns an update later. The log has few lines, so that the host does not wait for the GPU between them."""
    for softmax in ("masked", "trimmed"):
        for backend in ("cpu", "cuda"):
            train(f"moving-{softmax}-{backend}", backend, span__softmax=softmax, span__attn_span=8192, span__init=0.05, optimizer__clip_step=0.0,
                  span__aux_loss_scaler=1.0, run__log_interval=7, trace__interval=7, valid__interval=14, run__max_updates=28,
                  checkpoint__interval=1000)
        ours, theirs = f"moving-{softmax}-cuda", f"moving-{softmax}-cpu"
        same(f"{softmax}, spans that move: bpc as on the CPU", ours, theirs, key="bpc")  # the penalty outweighs losses
        same(f"{softmax}, spans that move: spans as on the CPU", ours, theirs, key="avg_span")
        same(f"{softmax}, spans that move: validations as on the CPU", ours, theirs, key="valid_bpc")
    spans = losses("moving-masked-cpu", "avg_span")
    report("spans that move do move by more than a window", spans[:1] and spans[0] - spans[-1] > 64, str(spans))


def check_curves_xl():
    train("xl-cpu", "cpu", deck="xl")
    train("xl-gpu", "cuda", deck="xl")
    same(f"Transformer-XL: {UPDATES} updates in fp32: losses as on the CPU", "xl-gpu", "xl-cpu")
    same("Transformer-XL: validations as on the CPU", "xl-gpu", "xl-cpu", key="valid_bpc")
    train("xl-two", "cuda", deck="xl", ranks=2)
    same("Transformer-XL: 2 ranks on one GPU: losses as on one rank", "xl-two", "xl-gpu")
    train("xl-micro", "cuda", deck="xl", data__micro_streams=1)
    same("Transformer-XL: streams one by one: losses as all at once", "xl-micro", "xl-gpu")
    for backend in ("cpu", "cuda"):
        train(f"xl-same-{backend}", backend, deck="xl", memory__same_length=".true.", memory__clamp_len=80,
              model__untie_r=".false.", memory__mem_len=50)
    same("Transformer-XL with other memories, tied biases: losses as on the CPU", "xl-same-cuda", "xl-same-cpu")


def check_resume(deck="deck", prefix="", name=""):
    for first, second in (("cpu", "cuda"), ("cuda", "cpu")):
        run = f"{prefix}{first}-then-{second}"
        train(run, first, deck=deck, run__max_updates=UPDATES // 2)
        train(run, second, deck=deck)
        same(f"{name}{first} to update {UPDATES // 2}, then {second}: losses as in one go", run, f"{prefix}cpu")


def bpc_of(text):
    lines = [line for line in text.splitlines() if line.startswith("{")]
    return json.loads(lines[-1])["bpc"] if lines else float("nan")


def distances_of(path):
    """The mean distance that each head attends to, as `viaduct info` prints it."""
    lines = viaduct("info", path).stdout.partition("mean distance")[2].splitlines()[1:]
    return [float(word) for line in lines for word in line.split()[2:]]


def check_eval(name="evaluation", deck="deck", run="cpu", **more):
    checkpoint = os.path.join(folder, run, "checkpoints", "last.h5")
    files = [os.path.join(folder, f"attention-{b}.h5") for b in ("cpu", "cuda")]
    results = [viaduct("eval", os.path.join(folder, f"{deck}.nml"), eval__checkpoint=checkpoint, device__backend=b,
                       eval__attention_file=path, **more) for b, path in zip(("cpu", "cuda"), files)]
    heads, ours = map(distances_of, files)
    report(f"{name}: heads attend as far as on the CPU", len(heads) == len(ours) > 0
           and all(abs(a - b) <= 0.11 for a, b in zip(heads, ours)), f"{heads} {ours} {results[1].stderr}")
    cpu, gpu = (bpc_of(r.stdout) for r in results)
    report(f"{name} as on the CPU", results[1].returncode == 0 and abs(gpu / cpu - 1) <= 1e-4,
           f"{cpu} {gpu}: {results[0].stdout} {results[1].stdout} {results[1].stderr}")


def check_tokens(deck, run, name=""):
    """Steps of one token, which project the memory once: evaluation of several streams, samples one by one and at once."""
    check_eval(f"{name}evaluation token by token", deck=deck, run=run, eval__tokens_per_sample=1, eval__max_blocks=600)
    results = [viaduct("generate", os.path.join(folder, f"{deck}.nml"), device__backend=backend, generate__temperature=0.01,
                       generate__checkpoint=os.path.join(folder, run, "checkpoints", "last.h5"), generate__prompt="a",
                       generate__tokens=400, generate__samples=3, generate__micro_samples=micro)
               for backend, micro in (("cpu", 1), ("cuda", 1), ("cuda", 3))]
    report(f"{name}generates what the CPU does, one sample at a time and three at once", len(results[0].stdout) > 1200
           and not any(r.returncode for r in results) and len({r.stdout for r in results}) == 1, str([r.stdout + r.stderr for r in results]))


def check_eval_xl():
    check_eval("Transformer-XL: evaluation", deck="xl", run="xl-cpu")
    check_tokens("xl", "xl-cpu", "Transformer-XL: ")
    check_eval("Transformer-XL: evaluation with another memory", deck="xl", run="xl-cpu", memory__mem_len=300,
               memory__clamp_len=100, memory__same_length=".true.", eval__tokens_per_sample=20)


def check_half(deck="deck", prefix="", name=""):
    for precision in ("bf16", "fp16"):
        train(prefix + precision, "cuda", deck=deck, device__precision=precision, run__max_updates=100,
              optimizer__warmup_updates=SWIFT)
        x = losses(prefix + precision)
        good = len(x) == 100 and sum(x[-10:]) / 10 < sum(x[:3]) / 3 - 1
        report(f"{name}{precision}: 100 updates whose losses fall by more than a bit", good, str(x))
    train(f"{prefix}fp32", "cuda", deck=deck, run__max_updates=100, optimizer__warmup_updates=SWIFT)
    for precision in ("bf16", "fp16"):
        a, b = (losses(prefix + run)[-10:] for run in (precision, "fp32"))
        # A swift warmup amplifies rounding, so that another precision is another run: means of ten updates came apart by
        # 0.06 bits, both 16-bit ones lower. What this finds is a precision that does not learn.
        report(f"{name}{precision}: ends where fp32 ends, to 0.1",
               len(a) == len(b) == 10 and abs(sum(a) - sum(b)) / 10 < 0.1, f"{a} {b}")
    train(f"{prefix}overflow", "cuda", deck=deck, device__precision="fp16", device__loss_scale=1e9, run__max_updates=40,
          optimizer__warmup_updates=SWIFT)
    x = losses(f"{prefix}overflow")
    last = [row for row in rows(f"{prefix}overflow") if "loss" in row][-1:] or [{}]
    report(f"{name}fp16 with a loss scale far too large: updates are skipped and counted, the scale falls, and it trains",
           len(x) == 40 and last[0].get("skipped", 0) > 0 and last[0].get("loss_scale", 1e9) < 1e9 and x[-1] < x[0] - 0.5,
           f"{last[0]} {x}")


def check_widths():
    """Rows that a warp cannot hold in its registers, and rows that are no multiple of 16 bytes; an inner width after whose
    partial sums no vector of the next ones would be aligned."""
    for deck, widths in (("deck", {"model__d_model": 2304, "model__n_head": 24, "model__d_inner": 1021}), ("xl", {"model__d_model": 250})):
        for run, backend, precision in (("cpu", "cpu", "fp32"), ("gpu", "cuda", "fp32"), ("bf16", "cuda", "bf16")):
            train(f"wide-{deck}-{run}", backend, deck=deck, device__precision=precision, run__max_updates=8, model__n_layer=2, **widths)
        name = f"d_model = {widths['model__d_model']}"
        same(f"{name}: losses as on the CPU", f"wide-{deck}-gpu", f"wide-{deck}-cpu")
        same(f"{name}: losses in bf16 as in fp32", f"wide-{deck}-bf16", f"wide-{deck}-gpu", bound=2e-2)


def check_nccl():
    """NCCL on one GPU: a communicator of one rank, refused settings, a rank that never arrives."""
    result = viaduct("train", os.path.join(folder, "deck.nml"), "--check", device__backend="cuda", device__comm="nccl")
    if "cannot be loaded" in result.stderr:
        print(f"# {result.stderr.strip()}")
        return
    report("--check names NCCL's version", re.search(r"gradients all-reduced by NCCL \d+\.\d+\.\d+", result.stdout) is not None,
           result.stdout + result.stderr)
    timeline = os.path.join(folder, "timeline")
    train("one-mpi", "cuda")
    train("one-nccl", "cuda", device__comm="nccl", device__bucket_bytes=100000, device__timeline=timeline)
    # Not held to the same bits: atomics of the key table's gradient let two runs differ in any case.
    same("one rank: losses by NCCL as without", "one-nccl", "one-mpi", bound=1e-6)
    with open(timeline, encoding="utf-8") as f:
        times = [json.loads(line) for line in f]
    report("a timeline with several sums in each of the updates 11 to 20, most begun before backward ended",
           sorted({x["update"] for x in times}) == list(range(11, 21)) and len(times) >= 30
           and sum(x["start_ms"] < x["backward_end_ms"] for x in times) > len(times) / 2, str(times[:6]))
    result = viaduct("train", os.path.join(folder, "deck.nml"), ranks=2, device__backend="cuda", device__comm="nccl",
                     run__directory=os.path.join(folder, "refused"))
    report("2 ranks on one GPU by NCCL are refused, ranks and GPU named",
           result.returncode == 1 and "ranks 0, 1 have GPU 0 of host" in result.stderr and "GPU-" in result.stderr
           and result.stderr.count("viaduct: error") == 1
           and not os.path.exists(os.path.join(folder, "refused", "log.jsonl")), result.stderr)
    result = train("auto-comm", "cuda", ranks=2, device__comm="auto", run__max_updates=3)
    report("'auto' with 2 ranks on one GPU takes MPI and says once why",
           (result.stdout + result.stderr).count("summed by MPI through host memory: NCCL wants a GPU for every rank") == 1,
           result.stdout + result.stderr)
    if PROGRAMS:
        start = time.monotonic()
        result = subprocess.run([os.path.join(PROGRAMS, "silent_peer"), "4"], capture_output=True, text=True, check=False,
                                env=ENVIRONMENT, timeout=60)
        seconds = time.monotonic() - start
        report(f"a rank that never comes ends the run after 4 s ({seconds:.1f} s with the start)",
               result.returncode != 0 and 4 <= seconds < 25 and "for the start of NCCL on 2 ranks" in result.stderr
               and not result.stdout, result.stdout + result.stderr)


def check_without():
    none = {"CUDA_VISIBLE_DEVICES": ""}
    result = train("auto", "auto", environment=none, run__max_updates=3)
    report("'auto' without a GPU computes on the CPU and says so",
           result.returncode == 0 and "CPU" in result.stdout + result.stderr, result.stdout + result.stderr)
    result = viaduct("train", os.path.join(folder, "deck.nml"), device__backend="cuda", environment=none,
                     run__directory=os.path.join(folder, "none"))
    report("'cuda' without a GPU is an error that says why",
           result.returncode == 1 and "cuda" in result.stderr and not os.path.exists(os.path.join(folder, "none", "log.jsonl")),
           result.stderr)
    compiler = shutil.which(os.environ.get("CC", "gcc").split()[0])
    with open(VIADUCT, "rb") as f:
        begins_as_script = f.read(2) == b"#!"  # a bundle's, which works at its own place alone
    if compiler and not begins_as_script:
        check_foreign_library(compiler)


def check_foreign_library(compiler):
    """A CUDA part that was built from other headers than the program."""
    place = os.path.join(folder, "foreign")
    os.mkdir(place)
    shutil.copy(VIADUCT, place)
    subprocess.run([compiler, "-shared", "-fPIC", "-xc", "-o", os.path.join(place, "libviaduct_cuda.so"), "-"],
                   input="const unsigned vd_cuda[16] = {7};", text=True, check=True)
    result = viaduct("train", os.path.join(folder, "deck.nml"), device__backend="cuda", run__directory=place + "/run",
                     program=os.path.join(place, os.path.basename(VIADUCT)))
    report("a CUDA part of another build is refused",
           result.returncode == 1 and "libviaduct_cuda.so is of another build than this program" in result.stderr,
           result.stderr)


def check_xl():
    check_curves_xl()
    check_resume(deck="xl", prefix="xl-", name="Transformer-XL: ")
    check_eval_xl()
    check_half(deck="xl", prefix="xl-", name="Transformer-XL: ")


def main():
    """All checks, or those named. On a node with several GPUs ranks would take one each."""
    ENVIRONMENT["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    make_corpus()
    checks = {"curves": check_curves, "moving": check_moving, "resume": check_resume, "eval": check_eval,
              "tokens": lambda: check_tokens("deck", "cpu"), "half": check_half, "widths": check_widths, "nccl": check_nccl,
              "transformer_xl": check_xl, "without": check_without}
    for name in sys.argv[1:] or checks:
        checks[name]()
    shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
