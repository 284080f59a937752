"""How functions are compiled that only ever become part of a kernel.

Numba optimises every function by itself and makes machine code of it, then once more in each function that it is
inlined into: the innermost loops of a kernel went through LLVM three or four times. These go through it once, as
part of the kernel; compiling a convolution by Winograd's algorithm takes a third of the time.
"""

from __future__ import annotations

from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler


class _Part(JITCodeLibrary):  # type: ignore[misc]
    """LLVM code as Numba wrote it. Steps that a later Numba calls otherwise are taken, which costs time alone."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_specific(self) -> None:
        pass


class Inlined(Compiler):  # type: ignore[misc]
    """The ``pipeline_class`` of a function with ``forceinline`` and without wrappers."""

    def __init__(self, typingctx: Any, targetctx: Any, library: Any, *rest: Any) -> None:
        super().__init__(typingctx, targetctx, library or _Part(targetctx.codegen(), "part"), *rest)
