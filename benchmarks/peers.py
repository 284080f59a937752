"""Make the environment in which peers are measured: `.peers`, with PyTorch (CPU) beside this package.

Peers are never dependencies of the package; they live in an environment of their own.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("torch==2.13.0",)
TESTS = ("pytest>=8.3",)  # tests/peers run in there


def main() -> None:
    """Create `.peers` if it is not there, and install what is missing."""
    folder = ROOT / ".peers"
    if not folder.exists():
        venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--upgrade", "pip"], check=True)
    subprocess.run([*pip, *PEERS, *TESTS], check=True)
    subprocess.run([*pip, "-e", str(ROOT)], check=True)
    print(f"peers are in {folder}: {', '.join(PEERS)} ({sys.version.split()[0]})")


if __name__ == "__main__":
    main()
