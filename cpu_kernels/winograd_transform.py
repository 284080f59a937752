"""The transforms of Winograd convolution along rows of a matrix, as kernel functions; sums: `rapydli_flow.winograd`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .text import written


def along(lines: Sequence[str], reads: int, writes: int, dtype: str) -> Callable[..., None]:
    """A kernel function that transforms ``reads`` rows of a matrix into ``writes`` rows of another:

    f(source, at, step, target, into, into_step, length)     rows begin at ``at + i * step``, and have ``length`` values
    """
    text = [
        "def transform(source, at, step, target, into, into_step, length):",
        *(f"    a{i} = at + {i} * step" for i in range(reads)),
        *(f"    b{i} = into + {i} * into_step" for i in range(writes)),
        "    for c in range(length):",
        *(f"        d{i} = source[a{i} + c]" for i in range(reads)),
        *(f"        {line}" for line in lines),
        *(f"        target[b{i} + c] = r{i}" for i in range(writes)),
    ]
    return written("\n".join(text) + "\n", T=np.dtype(dtype).type)
