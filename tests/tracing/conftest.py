"""Makes `tiny_tracing` (tiny models and facts that they know) and `families` (tiny models of every architecture, from the tests
of `lm`) importable by the tests of this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "lm"))
