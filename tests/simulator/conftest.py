"""The simulator is a package for developers at the top of the repository, in no wheel and on no path."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
