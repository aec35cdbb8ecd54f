"""Makes `families` (tiny models and tokenizers, in tests/lm) importable by the tests of this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lm"))
