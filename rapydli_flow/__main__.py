"""``python -m rapydli_flow`` is the command ``rapydli``."""

from .cli import main

main()
