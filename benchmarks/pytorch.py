"""PyTorch, beside which is measured: ``from pytorch import torch``, which says where to get it if it is not there."""

from __future__ import annotations

import importlib.util
import sys

if importlib.util.find_spec("torch") is None:
    sys.exit(
        f"this benchmark measures beside PyTorch, which {sys.executable} does not have. `make .peers/.installed` makes "
        "an environment with it, for .peers/bin/python; on a machine with a GPU, install torch there."
    )

import torch as torch
