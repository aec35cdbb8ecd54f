"""Makes `families` (tiny models of every architecture) and `made` (streams of made-up activations) importable by these tests."""

import sys
from pathlib import Path

for folder in ("lm", "sae", "tracing"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / folder))
