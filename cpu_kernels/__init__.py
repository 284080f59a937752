"""CPU kernel templates in Numba, on register tiles; files mirror `rapydli_flow/ops`.

May import `rapydli_flow` floors 0 and 1 (errors, spec, index, random, config, template) and Numba only.
A template is registered under a family name and meets the op of that name in the registry.
"""
