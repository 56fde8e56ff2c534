"""Where fetched files lie: a checkout's `.cache`, or the user's cache (XDG) where Upwell is installed as a package."""

import os
from pathlib import Path

_CODE = Path(__file__).resolve().parents[1]
_USERS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "upwell"

DOWNLOADS = _CODE / ".cache" if (_CODE / "pyproject.toml").exists() else _USERS
