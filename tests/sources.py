"""What the tests that read the sources share: which files there are, and how a result is printed."""
import os
import subprocess

failures = []


def report(name, problems):
    """One line 'ok NAME', or 'not ok NAME' and the problems below it."""
    if problems:
        failures.append(name)
    print(f"not ok {name}" if problems else f"ok {name}")
    for problem in problems:
        print(f"  {problem}")


def tracked():
    """All the project's files: what git knows, or without git everything outside the folders that are built."""
    git = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True)
    if git.returncode == 0 and git.stdout:
        return [p for p in git.stdout.split("\n") if p and os.path.isfile(p)]
    top = ("src", "io", "cuda", "jobs", "input", "tests", "doc", ".ci")
    return [os.path.join(d, f) for t in top for d, _, fs in os.walk(t) for f in fs] + ["Makefile", "README.md", "CHANGELOG.md"]
