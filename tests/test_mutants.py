#!/usr/bin/python3
"""A short run of mutate.py: 40 damaged and hostile files for the program that the sanitizers watch."""
import os
import subprocess
import sys

from whole import BUILD, ENVIRONMENT, SOURCE

SANITIZED = os.path.join(BUILD, "clang", "viaduct")
if not os.path.exists(SANITIZED):
    print("ok no mutants without the sanitizers' build # SKIP")
    sys.exit(77)
command = [sys.executable, os.path.join(SOURCE, "tests", "mutate.py"), "40", "1"]
sys.exit(subprocess.run(command, env=dict(ENVIRONMENT, VIADUCT=SANITIZED), check=False).returncode)
