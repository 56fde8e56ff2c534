from pathlib import Path

from model.checkpoint import prune_models


def test_a_model_just_written_is_kept_though_the_clock_was_set_back(tmp_path: Path) -> None:
    for name in ("m1", "m4", "m5", "m6"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.txt").touch()
    prune_models(str(tmp_path), keep=2, newest="m1")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["m1", "m6"]
