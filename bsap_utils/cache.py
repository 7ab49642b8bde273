"""The feature cache: where it lies. (The rest follows.)"""

from __future__ import annotations

import os
from pathlib import Path

from . import ROOT


def folder() -> Path:
    """Return where features are kept: `BSAP_CACHE` where that is set, else data/cache of the clone."""
    return Path(os.environ.get("BSAP_CACHE") or ROOT / "data/cache")
