"""What the tests of this folder share (lockstep.py, ../networks.py) can be imported, whatever pytest's import mode."""

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parents[1]):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
