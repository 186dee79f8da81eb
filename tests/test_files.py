"""An atomic write replaces the whole file or nothing, and leaves nothing else behind."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from perfusion.files import atomic_path, atomic_write_bytes, atomic_write_text, remove_unfinished

ROOT = Path(__file__).resolve().parents[1]


def test_writes_and_replaces(tmp_path: Path):
    target = tmp_path / "scores.json"
    atomic_write_text(target, "first, longer")
    atomic_write_text(target, "β\r\n")
    assert target.read_bytes() == "β\r\n".encode()
    atomic_write_bytes(str(target), memoryview(b"\x00\xff"))
    assert target.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["scores.json"]


def test_the_old_file_stands_until_the_block_ends(tmp_path: Path):
    target = tmp_path / "concept.safetensors"
    target.write_text("old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
        assert temporary.parent == target.parent
        assert temporary.suffix == ".safetensors"
        assert temporary.name.startswith(".")  # no glob of *.safetensors picks up a half-written file
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["concept.safetensors"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_keeps_the_old_file(tmp_path: Path, error: type[BaseException]):
    target = tmp_path / "samples.png"
    target.write_text("old")
    with pytest.raises(error), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["samples.png"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path):
    target = tmp_path / "config.yaml"
    target.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_path(target):
        pass
    assert target.read_text() == "old"


def test_content_reaches_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """fsync of the file, then replace, then fsync of the folder: any other order can lose both files in a crash."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor: int) -> None:
        calls.append("fsync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync file")
        fsync(descriptor)

    def spy_replace(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    atomic_write_bytes(tmp_path / "file", b"content")
    assert calls == ["fsync file", "replace", "fsync folder"]
    with atomic_path(tmp_path / "again", flush=False) as temporary:
        temporary.write_bytes(b"content")
    assert calls[3:] == ["replace"] and (tmp_path / "again").read_bytes() == b"content"


def test_permissions_follow_the_umask(tmp_path: Path):
    """As with `open`: others can read what the umask lets them, unlike with the files of `tempfile`."""
    script = (
        "import os, sys; os.umask(0o027)\n"
        "from perfusion.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as there: os.close(os.open(there, os.O_CREAT, 0o600))"  # as safetensors does
    )
    target = tmp_path / "file"
    subprocess.run([sys.executable, "-c", script, str(target)], check=True, cwd=Path(__file__).parents[1])
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_what_a_killed_process_left_can_be_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    others = [tmp_path / name for name in (".notes.tmp", "a.tmp", ".b.0123.tmp.png", ".c.0123456789abcdef.png")]
    for other in others:
        other.touch()
    for target in (tmp_path / "marker", tmp_path / "checkpoints" / "step-000001.safetensors"):
        code = (
            f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\nfrom perfusion.files import atomic_path\n"
            f"with atomic_path({str(target)!r}) as path:\n    path.touch()\n    os._exit(9)"
        )
        assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert len([*tmp_path.rglob("*.tmp*")]) == 5
    remove_unfinished(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(others)
