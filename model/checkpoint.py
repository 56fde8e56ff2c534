"""A trained model on its way from the trainer to the indexer: Model.save's files in the artifact store."""

import tempfile
from pathlib import Path

import fsspec

from model.manifest import DamagedGeneration, MissingGeneration, file_entry, file_names, model_sha256
from model.model import Model
from model.store import reaching

KEEP_VERDICTS = 1000  # a line each, where a model is megabytes


def _digest(folder: Path) -> str:
    return model_sha256({f"model/{name}": file_entry(folder / name) for name in file_names(folder)})


def publish_model(model: Model, url: str, verdict: str) -> str:
    """Write the model's files under `url` (a folder or any fsspec URL), the gate's verdict beside them.

    Returns the files' digest, which the announcement carries.
    """
    store, root = fsspec.core.url_to_fs(url)
    with tempfile.TemporaryDirectory(prefix="upwell-model-") as scratch:
        model.save(Path(scratch))
        with reaching():
            store.makedirs(root, exist_ok=True)
            for name in sorted(file_names(Path(scratch))):
                store.put_file(f"{scratch}/{name}", f"{root}/{name}")
            store.pipe_file(f"{root}.txt", verdict.encode())
        return _digest(Path(scratch))


def fetch_model(url: str, digest: str) -> Model:
    """Raises DamagedGeneration when the files are not those announced, ValueError when they are no model, OSError
    where the store is out of reach, or not even the folder around it is there: a store that is not mounted says nothing
    about the model."""
    with tempfile.TemporaryDirectory(prefix="upwell-model-") as scratch:
        _download(url, scratch)
        if (found := _digest(Path(scratch))) != digest:
            raise DamagedGeneration(f"{url}: digest {found[:12]} instead of {digest[:12]}")
        return Model.load(Path(scratch))


@reaching()
def _download(url: str, folder: str) -> None:
    store, root = fsspec.core.url_to_fs(url)
    if not (paths := store.find(root)):
        kind = MissingGeneration if store.isdir(root.rpartition("/")[0]) else FileNotFoundError
        raise kind(f"{url}: nothing there")
    try:
        for path in paths:
            store.get_file(path, f"{folder}/{Path(path).name}")
    except FileNotFoundError as error:
        raise DamagedGeneration(f"{url}: {error}") from error


@reaching()
def verdicts(url: str) -> dict[str, str]:
    """What the gate said of each checkpoint under `url`, oldest first, as far as it is kept."""
    store, root = fsspec.core.url_to_fs(url)
    if not store.exists(root):
        return {}
    texts = sorted(path for path in store.ls(root, detail=False) if path.endswith(".txt"))
    return {Path(path).stem: store.cat_file(path).decode() for path in texts}


@reaching()
def prune_models(url: str, keep: int, newest: str = "") -> None:
    """Delete all but the newest `keep` checkpoints under `url`, and all but KEEP_VERDICTS of what the gate said of
    them; their names sort by time, but for `newest`: the clock may have been set back since the others."""
    store, root = fsspec.core.url_to_fs(url)
    paths = sorted(store.ls(root, detail=False), key=lambda path: (Path(path).stem == newest, path))
    texts = [path for path in paths if path.endswith(".txt")]
    models = [path for path in paths if path not in texts]
    for path in [*models[:-keep], *texts[:-KEEP_VERDICTS]]:
        store.rm(path, recursive=True)
