"""The CUDA driver through ctypes, with its error codes as exceptions that say what they mean."""

from __future__ import annotations

import ctypes
from typing import Any

from rapydli_flow.errors import DeviceFault, MissingDependency, TooLittleMemory

_NOT_READY = 600  # CUDA_ERROR_NOT_READY
_STICKY = {"ILLEGAL_ADDRESS", "MISALIGNED_ADDRESS", "INVALID_ADDRESS_SPACE", "INVALID_PC", "ILLEGAL_INSTRUCTION"}
_STICKY |= {"HARDWARE_STACK_ERROR", "LAUNCH_FAILED", "LAUNCH_TIMEOUT", "ECC_UNCORRECTABLE", "ASSERT"}


class Driver:
    """libcuda, with its error codes as exceptions."""

    def __init__(self, library: Any = None) -> None:
        if library is None:
            try:
                library = ctypes.CDLL("libcuda.so.1")
            except OSError:
                raise MissingDependency(
                    "no CUDA driver: libcuda.so.1 is not there. GPU kernels run on a machine with an NVIDIA card and "
                    "its driver; everything else of rapydli_flow runs without."
                ) from None
        self._library = library
        self("cuInit", ctypes.c_uint(0))

    def count(self) -> int:
        """GPUs that are visible."""
        number = ctypes.c_int()
        self("cuDeviceGetCount", ctypes.byref(number))
        return number.value

    def version(self) -> str:
        """The newest CUDA that it runs."""
        number = ctypes.c_int()
        self("cuDriverGetVersion", ctypes.byref(number))
        return f"{number.value // 1000}.{number.value % 1000 // 10}"

    def __call__(self, name: str, *args: Any) -> None:
        self._checked(name, self._asked(name, *args))

    def ready(self, name: str, *args: Any) -> bool:
        """Is what is asked about over?"""
        code = self._asked(name, *args)
        if code != _NOT_READY:
            self._checked(name, code)
        return code != _NOT_READY

    def _asked(self, name: str, *args: Any) -> int:
        """The error code of a function."""
        function = getattr(self._library, name, None)
        if function is None:
            raise MissingDependency(f"the CUDA driver is too old: it has no {name}. Install one of CUDA 12 or newer.")
        return int(function(*args))

    def _checked(self, name: str, code: int) -> None:
        """Raise what an error code means."""
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(ctypes.c_int(code), ctypes.byref(text))
            known = text.value.decode() if text.value else "unknown error"
            raise _error(name, known, code)


def _error(name: str, known: str, code: int) -> Exception:
    """What a refusal of the driver means, and what can be done about it."""
    if known in ("CUDA_ERROR_NO_DEVICE", "CUDA_ERROR_INVALID_DEVICE"):
        return MissingDependency(
            f"the CUDA driver is there but no such device ({name}: {known}). `rapydli devices` lists those that are "
            "visible; CUDA_VISIBLE_DEVICES may hide some."
        )
    said = f"{name}: {known} ({code})."
    if known == "CUDA_ERROR_OUT_OF_MEMORY":
        return TooLittleMemory(f"the card has too little memory free: {said} Other programs may hold some of it.")
    if known == "CUDA_ERROR_NO_BINARY_FOR_GPU":
        return DeviceFault(f"{said} This machine code is for another card than this one: compile it for this one.")
    if known.removeprefix("CUDA_ERROR_") in _STICKY:
        return DeviceFault(
            f"{said} A kernel failed on the card. Nothing works on it from now on in this process: start another one.",
            sticky=True,
        )
    return DeviceFault(said)
