"""Where fetched files lie: a checkout's `.cache`, or the user's cache (XDG) where Upwell is installed as a package."""

import os
from pathlib import Path


def downloads(package: Path) -> Path:
    """The folder, which need not exist. package: the folder of our code; a checkout has pyproject.toml beside it."""
    if (package.parent / "pyproject.toml").exists():
        return package.parent / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "upwell"


DOWNLOADS = downloads(Path(__file__).resolve().parent)
