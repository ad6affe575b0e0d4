#!/usr/bin/python3
"""Without a GPU the program computes on the CPU where it may choose, and says why it cannot where it may not."""
import os
import subprocess
import sys

source = os.environ.get("SOURCE") or os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
build = os.environ.get("BUILD") or os.path.join(source, "build")
sys.exit(subprocess.call([sys.executable, os.path.join(source, "tests", "gpu", "run_gpu.py"), "without"],
                         env=dict(os.environ, VIADUCT=os.path.join(build, "viaduct"))))
