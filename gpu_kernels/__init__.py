"""GPU kernel templates in Numba-CUDA; files mirror `rapydli_flow/ops`.

May import `rapydli_flow` floors 0 and 1 and NumPy; CUDA packages only in `compile` and `launch`, so
that every kernel runs on the NumPy emulator where no CUDA package is installed.
"""
