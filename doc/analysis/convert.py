#!/usr/bin/python3
"""Converts checkpoints between Viaduct and other programs:

    convert.py --from KIND SOURCE --to KIND TARGET [--symbols FILE] [--words] [--set GROUP%NAME=VALUE]...

KIND is one of
    viaduct             a checkpoint of Viaduct (update-00001000.h5)
    safetensors         a safetensors file, with what a checkpoint holds besides tensors in its metadata
    fair-adaptive-span  a checkpoint of facebookresearch/adaptive-span (.pt)
    transformer-xl      model.pt of kimiyoung/transformer-xl, with optimizer.pt beside it
    fairseq             a checkpoint of fairseq's adaptive_span or truncated_bptt (.pt)

Parameters, spans, the symbols and, where both kinds have it, the optimiser's state are converted; every float32 stays
bitwise what it was. --symbols names the symbols that the source's ids stand for, where the source does not: a text of one
symbol a line in the order of ids, the corpus.pt (cache.pt) that the program keeps beside its data, or fairseq's dict.txt.
Numbers from 0 to 255 are bytes, and <eos> or </s> is a newline then; --words takes them for words. Where the target has no
place for the symbols they are written to TARGET.symbols, for fairseq to TARGET.dict.txt. --set gives a setting of Viaduct's
deck that the source does not hold, such as span%ramp.
A corpus of Viaduct (--from viaduct NAME.h5) becomes fairseq's binary data in a new folder (--to fairseq FOLDER); `viaduct
prepare` reads such data.
A deck for `viaduct eval` names the target as eval%checkpoint; one for `viaduct train` as run%start_from.

Exit status: 0 done, 1 a file cannot be read or written, 2 the command line is wrong. Needs numpy and h5py (Debian:
python3-h5py). Runs nothing that a source holds: pickles are read as data.
"""
import argparse
import sys

try:
    from exchange import fair, fairseq, fairseq_data, pickles, safetensors, viaduct, xl
    from exchange.model import ConvertError, check, deck_value, deck_write, names_of_symbols, symbols_from_names
    from exchange.torch_files import replace
except ImportError as missing:
    sys.exit(f"convert.py: {missing}; on Debian: apt-get install python3-h5py")

KINDS = {"viaduct": viaduct, "safetensors": safetensors, "fair-adaptive-span": fair, "transformer-xl": xl, "fairseq": fairseq}
HOLDS_SYMBOLS = ("viaduct", "safetensors")


def symbols_in(content):
    """The list of symbols in a pickled corpus of one of the programs."""
    for attribute in ("_dictionary", "vocab"):
        content = getattr(content, attribute, content)
    for attribute in ("idx2word", "idx2sym"):
        names = getattr(content, attribute, None)
        if isinstance(names, list) and all(isinstance(x, str) for x in names):
            return names
    raise ConvertError("no list of symbols in it")


def read_symbols(path, words, kind):
    """Symbols and, where the file says them, their counts."""
    try:
        with open(path, "rb") as file:
            head = file.read(4)
            content = head + file.read()
        if head == b"PK\x03\x04" or head[:1] == b"\x80":
            names = symbols_in(pickles.read(path))
            counts = None
        elif kind == "fairseq":
            names, counts = fairseq.dictionary(content.decode("utf-8", "surrogateescape"))
        else:
            counts = None
            lines = content.decode("utf-8", "surrogateescape").split("\n")
            names = lines[:-1] if lines[-1] == "" else lines
        return symbols_from_names(names, words), counts
    except OSError as error:
        raise ConvertError(f"{path}: {error.strerror}") from None
    except ConvertError as error:
        raise ConvertError(f"{path}: {error}") from None


def write_symbols(target, model):
    path = target + ".symbols"
    text = "".join(f"{name}\n" for name in names_of_symbols(model.symbols, "<eos>"))
    replace(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))
    print(f"wrote {path}: {len(model.symbols)} symbols")


def setting(text):
    name, equals, value = text.partition("=")
    if not equals or name.count("%") != 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not GROUP%NAME=VALUE")
    try:
        return name, deck_value(value)
    except ValueError:
        return name, value


def read_model(options):
    try:
        return KINDS[options.source_kind].read(options.source, options)
    except ConvertError as error:
        named = str(error).startswith(options.source)
        raise error if named else ConvertError(f"{options.source}: {error}") from None
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError) as error:
        raise ConvertError(f"{options.source}: not a checkpoint of kind {options.source_kind} "
                           f"({type(error).__name__}: {error})") from None


def convert_corpus(options):
    if options.target_kind != "fairseq" or options.symbols or options.set:
        raise ConvertError(f"{options.source}: a corpus, which becomes data of fairseq: --to fairseq FOLDER, and nothing else")
    fairseq_data.write(options.target, fairseq_data.Corpus(options.source))


def convert(options):
    if options.source_kind == "viaduct" and fairseq_data.is_corpus(options.source):
        convert_corpus(options)
        return
    model = read_model(options)
    if options.symbols:
        model.symbols, model.counts = read_symbols(options.symbols, options.words, options.source_kind)
    if options.set:
        model.settings.update(options.set)
        model.deck = deck_write(model.settings)
    check(model, options.source)
    KINDS[options.target_kind].write(options.target, model)
    for note in model.notes:
        print(f"note: {note}")
    print(f"wrote {options.target}: {len(model.tensors)} tensors, "
          f"{sum(x.size for x in model.tensors.values())} parameters"
          + (f", {' and '.join(model.states)}" if model.states else ", no optimiser state"))
    if model.symbols is not None and options.target_kind not in HOLDS_SYMBOLS:
        getattr(KINDS[options.target_kind], "write_symbols", write_symbols)(options.target, model)


def main():
    parser = argparse.ArgumentParser(usage="convert.py --from KIND SOURCE --to KIND TARGET [--symbols FILE] [--words] "
                                           "[--set GROUP%%NAME=VALUE]...",
                                     description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", nargs=2, required=True, metavar=("KIND", "SOURCE"), dest="source", help="what to read")
    parser.add_argument("--to", nargs=2, required=True, metavar=("KIND", "TARGET"), dest="target", help="what to write")
    parser.add_argument("--symbols", metavar="FILE", help="the symbols of the source, in the order of ids")
    parser.add_argument("--words", action="store_true", help="symbols that are numbers are words, not bytes")
    parser.add_argument("--set", action="append", default=[], type=setting, metavar="GROUP%NAME=VALUE",
                        help="a setting that the source does not hold")
    options = parser.parse_args()
    options.source_kind, options.source = options.source
    options.target_kind, options.target = options.target
    options.set = dict(options.set)
    for kind in (options.source_kind, options.target_kind):
        if kind not in KINDS:
            parser.error(f"'{kind}' is no kind of checkpoint; there are {', '.join(KINDS)}")
    try:
        convert(options)
    except (ConvertError, OSError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
