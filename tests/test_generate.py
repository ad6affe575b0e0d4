#!/usr/bin/python3
"""viaduct generate: prompts from files and with escapes, samples, seeds, stop texts, outputs, the terminal."""
import os
import pty
import subprocess

from whole import ENVIRONMENT, Place, command, finish, report, settings, viaduct


def generate(**variables):
    """(status, bytes of standard output, standard error)"""
    words = settings(**{"generate__tokens": 60, **variables})
    done = subprocess.run(command("generate", place.deck, *words), capture_output=True, env=ENVIRONMENT, timeout=120)
    return done.returncode, done.stdout, done.stderr.decode(errors="replace")


def on_terminal(**variables):
    """What a terminal gets."""
    main, other = pty.openpty()
    run = subprocess.Popen(command("generate", place.deck, *settings(**variables)), stdout=other,
                           stderr=subprocess.DEVNULL, env=dict(ENVIRONMENT, TERM="xterm"))
    os.close(other)
    seen = b""
    try:
        while piece := os.read(main, 65536):
            seen += piece
    except OSError:  # the other side is closed
        pass
    os.close(main)
    run.wait()
    return seen.replace(b"\r\n", b"\n")


def write(name, data):
    with open(place.path(name), "wb") as f:
        f.write(data)
    return place.path(name)


def read(path):
    with open(path, "rb") as f:
        return f.read()


place = Place(tokens=60000)
try:
    every = bytes(range(256)) + "é".encode() * 20
    with open(place.path("text"), "ab") as source:
        source.write(every)
    with open(place.path("text"), "rb") as source:
        write("text", every * 2 + source.read())  # all bytes are in the vocabulary and in the training split
    place.corpus = place.path("all.h5")
    place.write_deck(place.deck, run=place.path("run"))
    made = viaduct("prepare", place.path("prepare.nml"), *settings(data__path=place.corpus))
    trained = place.train("run", run__max_updates=20)
    report("train", made.returncode == 0 and trained.returncode == 0, made.stderr + trained.stderr)

    plain = generate()
    prompt = b"int \tx\n"
    from_file, from_deck = generate(generate__prompt="", generate__prompt_file=write("p", prompt)), generate(
        generate__prompt="int \\tx\\n")
    report("a prompt with tab and line end, from the deck and from a file", from_file[:2] == from_deck[:2]
           and from_deck[0] == 0 and from_deck[1].startswith(prompt) and len(from_deck[1]) == len(prompt) + 60,
           str((from_file, from_deck)))
    long_prompt = read(place.path("text"))[-700:]
    done = generate(generate__prompt="", generate__prompt_file=write("long", long_prompt))
    report("a prompt of several blocks", done[0] == 0 and done[1].startswith(long_prompt), done[2])
    for name, wanted, variables in (
            ("a wrong escape", "generate%prompt: '\\q' is no escape", {"generate__prompt": "a\\q"}),
            ("a wrong escape of the stop text", "generate%stop: ", {"generate__stop": "\\x4"}),
            ("both prompts", "exclude each other", {"generate__prompt_file": place.path("p")}),
            ("an empty file", "generate%prompt_file is empty",
             {"generate__prompt": "", "generate__prompt_file": write("empty", b"")}),
            ("a top_p of 0", "generate%top_p", {"generate__top_p": 0})):
        done = generate(**variables)
        report(f"{name} is refused", done[0] == 2 and wanted in done[2] and not done[1], str(done))
    done = generate(generate__prompt="", generate__prompt_file=place.path("absent"))
    report("a missing file is named", done[0] == 1 and "generate%prompt_file: cannot open" in done[2], str(done))
    done = generate(generate__prompt="", generate__prompt_file=place.path("p"), generate__output=place.path("p"))
    report("the prompt's file is no output", done[0] == 2 and read(place.path("p")) == prompt, str(done))

    report("the seed of the run, unless generate%seed is set", generate(run__seed=5)[1] == generate(generate__seed=5)[1]
           != plain[1] == generate(generate__seed=1, run__seed=5)[1])
    greedy = generate(generate__temperature=0)
    report("temperature 0, top_k 1 and a tiny top_p: the likeliest symbols", greedy[0] == 0 and greedy[1] != plain[1]
           and greedy[1] == generate(generate__top_k=1)[1] == generate(generate__top_p=1e-9, generate__seed=9)[1])

    target = place.path("samples.txt")
    done = generate(generate__samples=3, generate__output=target)
    whole = read(target)
    parts = whole.split(b"--- sample ")
    report("three samples in a file, each behind a line that numbers it", done[:2] == (0, b"") and whole.startswith(
        b"--- sample 1 of 3 ---\nint ") and len(parts) == 4 and len(set(p[11:] for p in parts)) == 4, str(whole))
    report("standard output gets the same bytes", generate(generate__samples=3)[1] == whole)
    report("the first is that of a run with one sample", parts[1].removeprefix(b"1 of 3 ---\n").rstrip(b"\n")
           == plain[1].rstrip(b"\n"), str((parts, plain)))
    together = [generate(generate__samples=3, generate__micro_samples=2, generate__temperature=0) for _ in range(2)]
    apart = generate(generate__samples=3, generate__temperature=0)
    report("samples that are computed together are those computed one by one", together[0] == together[1] == apart,
           str(together[0][2]))
    five = generate(generate__samples=5)[1].replace(b" of 5 ", b" of 3 ").split(b"--- sample ")
    report("and all are those of a run with five", five[1:3] == parts[1:3] and five[3].rstrip(b"\n") ==
           parts[3].rstrip(b"\n"), str((five, parts)))
    report("one sample in a file: the text alone", generate(generate__output=target)[0] == 0 and read(target) == plain[1])

    text = plain[1][4:]
    stop = text[20:23]
    done = generate(generate__stop="".join(f"\\x{b:02x}" for b in stop))
    report("the text ends before the stop text", done[0] == 0 and done[1] == b"int " + text[:text.index(stop)], str(done))
    done = generate(generate__stop="\\x01\\x02\\x03\\x04")
    report("a stop text that never comes changes nothing", done[1] == plain[1], str(done))
    ended = generate(generate__stop="e", generate__samples=4)[1].split(b"--- sample ")[1:]
    report("each sample stops for itself", len(ended) == 4 and all(b"e" not in p[11:] for p in ended)
           and len({len(p) for p in ended}) > 1, str(ended))

    raw = b"\x1b[31m\r\x07 caf\xc3\xa9 \xff"
    variables = {"generate__prompt": "", "generate__prompt_file": write("raw", raw), "generate__tokens": 1,
                 "generate__stop": "\\n"}
    seen = on_terminal(**variables)
    report("a terminal gets no control characters, whole UTF-8 and a last line end",
           seen.startswith(b"\\x1B[31m\\x0D\\x07 caf\xc3\xa9 \\xFF") and seen.endswith(b"\n") and b"\x1b" not in seen,
           str(seen))
    report("a pipe gets the bytes", generate(**variables)[1].startswith(raw))
finally:
    place.remove()
finish()
