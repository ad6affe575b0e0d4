#!/usr/bin/python3
"""A run of Viaduct, finished or in progress, as one page of HTML:

    report.py [NAME=]RUN_DIRECTORY [[NAME=]OTHER_RUN]... [-o PAGE] [--deck DECK] [--samples FILE]... [--attention FILE]...
              [--generate [--prompt TEXT]] [--figures DIRECTORY]

writes RUN_DIRECTORY/report.html, or PAGE, and prints its path. The page needs no other file and no network: curves of bits
per symbol (those of the other runs too), learning rate, gradient norm, throughput and spans, with restarts and validations;
the spans of each layer over updates; attention weights out of files that `viaduct eval` wrote; generated text; settings beside those of a shipped deck (the one with the run's title,
else the nearest, or DECK); environment; links to the run's files. Text is out of sample*.txt and generated*.txt in the
folder, generate%output of its deck, and each FILE. --generate asks `viaduct generate` for three samples that continue TEXT, by
default the prompt of the run's deck. --figures writes the charts for papers into DIRECTORY, each as PNG and PDF.

Exit status: 0 done; 1 a file cannot be written, or --generate failed; 2 the command line is wrong, or a run is missing, empty
or broken. Needs h5py and numpy, for figures matplotlib (Debian: python3-h5py python3-matplotlib).
"""
import argparse
import datetime
import os
import sys

try:
    import h5py  # noqa: F401 (viaduct_files reads with it)
    import numpy  # noqa: F401

    from report_page import attention, decks, samples, sections
    from report_page import run as runs
    from viaduct_files import FileError, named_runs, one_line
except ImportError as missing:
    print(f"report.py: {missing}; on Debian: apt-get install python3-h5py", file=sys.stderr)
    sys.exit(2)


def write(path, text):
    """The file whole or not at all."""
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.tmp-{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as failure:
        raise FileError(f"{path}: {failure.strerror}") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def arguments_of(words):
    parser = argparse.ArgumentParser(prog="report.py", description="A run of Viaduct's as one page of HTML.")
    parser.add_argument("runs", metavar="[NAME=]RUN_DIRECTORY", nargs="+", help="the run; then others to compare it with")
    parser.add_argument("-o", metavar="PAGE", dest="output", help="the page; default: report.html in the run's folder")
    parser.add_argument("--deck", metavar="DECK", help="the deck to compare the settings with")
    parser.add_argument("--samples", metavar="FILE", action="append", default=[], help="a file with generated text")
    parser.add_argument("--attention", metavar="FILE", action="append", default=[], help="what eval%%attention_file named")
    parser.add_argument("--generate", action="store_true", help="generate samples with the run's best checkpoint")
    parser.add_argument("--prompt", metavar="TEXT", help="what --generate continues; escapes as in generate%%prompt")
    parser.add_argument("--figures", metavar="DIRECTORY", help="where the charts go as PNG and PDF")
    found = parser.parse_args(words)
    if found.prompt and not found.generate:
        parser.error("--prompt goes with --generate")
    found.runs = named_runs(found.runs, parser)
    return found


def main(words):
    arguments = arguments_of(words)
    try:
        run, *others = (runs.load(name, directory) for name, directory in arguments.runs.items())
        deck = decks.shipped_deck(run["values"], arguments.deck)
        texts = [samples.read(path) for path in [*samples.in_folder(run), *arguments.samples]]
        attended = [attention.load(path) for path in [*attention.in_folder(run), *arguments.attention]]
    except FileError as failure:
        print(f"report.py: {failure}", file=sys.stderr)
        return 2
    output = arguments.output or os.path.join(list(arguments.runs.values())[0], "report.html")
    try:
        if arguments.generate:
            texts.append(samples.generate(run, arguments.prompt))
        now = datetime.datetime.now(datetime.timezone.utc).strftime("Written on %Y-%m-%d at %H:%M UTC.")
        write(output, sections.page(run, others, texts, deck, output, now, attended))
        print(output)
        if arguments.figures:
            from report_page import figures  # needs matplotlib
            for path in figures.write(run, others, arguments.figures):
                print(path)
    except (FileError, ImportError) as failure:
        print(f"report.py: {one_line(failure)}", file=sys.stderr)
        return 1
    except OSError as failure:
        print(f"report.py: {failure.filename or arguments.figures}: {failure.strerror or one_line(failure)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
