"""The fuzzing harness lies beside the tests, and is imported by them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
