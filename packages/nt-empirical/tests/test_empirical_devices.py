"""Kernels over several devices, in a process of its own that has them."""

import pathlib
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).parent / "devices_process.py"


def test_devices():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
