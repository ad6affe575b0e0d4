"""Texts that the model generated: out of files, or by `viaduct generate`."""
import glob
import os
import re
import shutil
import subprocess

from viaduct_files import FileError, setting

from .decks import HERE

MOST_BYTES = 16384  # of a file
SAMPLES, TOKENS, PROMPT = 3, 400, "the "
SEPARATOR = re.compile(r"^--- sample (\d+) of \d+ ---\n", flags=re.M)


def split(text):
    """[(heading, text)] of an output of `viaduct generate`."""
    parts = SEPARATOR.split(text)
    if len(parts) == 1:
        return [("", text)]
    return [(f"sample {number}", body) for number, body in zip(parts[1::2], parts[2::2])]


def read(path):
    """{"source": the file's name, "texts": [(heading, text)], "left": bytes that are not shown}"""
    try:
        with open(path, "rb") as file:
            found = file.read(MOST_BYTES)
            left = os.fstat(file.fileno()).st_size - len(found)
    except OSError as failure:
        raise FileError(f"{path}: {failure.strerror}") from None
    return {"source": os.path.basename(path), "texts": split(found.decode("utf-8", "replace")), "left": max(0, left)}


def in_folder(run):
    """Files of the run's folder that hold samples by their names, and the one that its deck names."""
    found = [path for pattern in ("sample*.txt", "generated*.txt") for path in sorted(glob.glob(os.path.join(
        glob.escape(run["folder"]), pattern))) if os.path.isfile(path)]
    named = setting(run["deck"], "generate", "output")
    if named and os.path.isfile(named) and not any(os.path.samefile(named, path) for path in found):
        found.append(named)
    return found


def program():
    """The program: VIADUCT, that of the source tree, that of the installation, that in PATH."""
    places = (os.environ.get("VIADUCT"), os.path.join(HERE, "..", "..", "build", "viaduct"),
              os.path.join(HERE, "..", "..", "..", "bin", "viaduct"), shutil.which("viaduct"))
    found = next((place for place in places if place and os.access(place, os.X_OK)), None)
    if not found:
        raise FileError("--generate: there is no program viaduct: build it, or name it by the variable VIADUCT")
    return os.path.abspath(found)


def folder_of_training(run):
    """The folder that the deck's paths are relative to, as far as it shows; else the present one."""
    directory = os.path.normpath(str(setting(run["deck"], "run", "directory") or "."))
    before = run["folder"].removesuffix(os.sep + directory)
    return before if before != run["folder"] and os.path.isdir(before) else os.curdir


def generate(run, prompt=None):
    """Samples by the best checkpoint of the run, on this machine. Without a prompt they continue that of its deck, or PROMPT."""
    def quoted(value):
        return "'" + value.replace("'", "''") + "'"
    words = {"run%directory": quoted(run["folder"]), "generate%output": "''", "generate%samples": SAMPLES,
             "generate%tokens": TOKENS}
    if prompt or not (setting(run["deck"], "generate", "prompt") or setting(run["deck"], "generate", "prompt_file")):
        prompt = prompt or PROMPT
        words.update({"generate%prompt": quoted(prompt), "generate%prompt_file": "''"})
    command = [program(), "generate", os.path.join(run["folder"], "deck.nml")]
    for name, value in words.items():
        command += ["--set", f"{name}={value}"]
    done = subprocess.run(command, cwd=folder_of_training(run), capture_output=True, check=False)
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit status {done.returncode}"]
        raise FileError(f"--generate: {lines[-1]}")
    source = f"viaduct generate: {SAMPLES} samples of {TOKENS} symbols"
    return {"source": f"{source} behind the prompt '{prompt}'" if prompt else f"{source} behind the deck's prompt", "texts": split(done.stdout.decode("utf-8", "replace")), "left": 0}
