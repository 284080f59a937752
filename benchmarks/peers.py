"""Make the environments in which peers are measured: `.peers`, with PyTorch (CPU) beside this package, and
with ``--kernel-tuner`` instead `.kernel-tuner`, with Kernel Tuner alone.

Peers are never dependencies of the package; they live in environments of their own.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("torch==2.13.0",)
KERNEL_TUNER = "kernel_tuner==1.5.0"
TESTS = ("pytest>=8.3",)  # tests/peers run in there


def environment(name: str, *packages: str) -> Path:
    """The Python of an environment with these packages; made if it is not there."""
    folder = ROOT / name
    if not folder.exists():
        venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--upgrade", "pip"], check=True)
    subprocess.run([*pip, *packages], check=True)
    return python


def main() -> None:
    """Create an environment if it is not there, and install what is missing."""
    if sys.argv[1:] == ["--kernel-tuner"]:
        print(f"Kernel Tuner is in {environment('.kernel-tuner', KERNEL_TUNER)}")
        return
    python = environment(".peers", *PEERS, *TESTS)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-e", str(ROOT)], check=True)
    print(f"peers are in {python}: {', '.join(PEERS)} ({sys.version.split()[0]})")


if __name__ == "__main__":
    main()
