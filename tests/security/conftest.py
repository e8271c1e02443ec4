"""Scripts and the fuzzing harness, which are tested here, lie outside of the package."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]
