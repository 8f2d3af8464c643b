"""The protocol for work that is done once: its six states, and what `inspect` leaves alone."""

import pytest

from prefdistill.core.artifact import DirectoryArtifact, State
from prefdistill.core.errors import UserError
from prefdistill.core.file_artifact import FileArtifact, RecordArtifact, sidecar
from prefdistill.core.files import read_json, write_json

REQUEST = {"alpha": 0.1, "model": {"name": "here", "key": "a"}}
CHANGED = {"alpha": 0.2, "model": {"name": "here", "key": "a"}}


class Directory(DirectoryArtifact):
    """A directory with one part."""

    def damage(self, seal):
        return None if (self.place / "part").is_file() else "part"

    def finish(self):
        self.seal({"key": self.key})


def directory(tmp_path, request=REQUEST, **options):
    return Directory("work", tmp_path / "out", request, **options)


def work(artifact, error=None):
    with artifact.session() as seal:
        if seal is None:
            (artifact.place / "part").write_text(str(artifact.request["alpha"]))
            if error:
                raise error
            artifact.finish()


def test_each_state_is_told_apart(tmp_path):
    artifact, changed = directory(tmp_path), directory(tmp_path, CHANGED)
    assert artifact.inspect().state is State.MISSING
    with pytest.raises(KeyboardInterrupt):
        work(artifact, KeyboardInterrupt())
    assert artifact.inspect().state is State.UNFINISHED
    assert (changed.inspect().state, changed.inspect().reason) == (State.STALE, "alpha is 0.2, was 0.1")
    work(artifact)
    assert artifact.inspect().state is State.FINISHED
    assert (changed.inspect().state, changed.inspect().reason) == (State.STALE, "alpha is 0.2, was 0.1")
    (artifact.place / "part").unlink()
    assert (artifact.inspect().state, artifact.inspect().reason) == (State.DAMAGED, "part")
    (artifact.place / "thesis").write_text("mine")
    for name in (artifact.NOTE, artifact.SEAL):
        (artifact.place / name).unlink()
    assert artifact.inspect().state is State.FOREIGN
    with pytest.raises(UserError, match="not empty and was not made by prefdistill"):
        work(artifact)


def test_the_same_work_elsewhere_under_another_name_is_the_same(tmp_path):
    """Names say where inputs lie."""
    out, moved = tmp_path / "out.txt", {"alpha": 0.1, "model": {"name": "there", "key": "a"}}
    with FileArtifact("work", out, REQUEST, "sample").session() as seal:
        assert seal is None
    artifact = FileArtifact("work", out, moved, "sample")
    with artifact.session() as seal:
        assert seal is None
        artifact.seal(lambda path: path.write_text("text"), {"count": 1})
    with FileArtifact("work", out, REQUEST, "sample").session() as seal:
        assert seal["count"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.txt", "out.txt.meta.json"]


def test_resumed_work_keeps_the_names_it_was_begun_with(tmp_path):
    out = tmp_path / "out.txt"
    with pytest.raises(KeyboardInterrupt), FileArtifact("work", out, REQUEST, "sample").session():
        raise KeyboardInterrupt
    moved = FileArtifact("work", out, {"alpha": 0.1, "model": {"name": "there", "key": "a"}}, "sample")
    with moved.session():
        moved.seal(lambda path: path.write_text("text"), {})
    assert read_json(sidecar(out))["request"]["model"]["name"] == "here"


@pytest.mark.parametrize("replace", [True, False])
def test_an_interrupted_cleanup_is_never_resumed(tmp_path, monkeypatch, replace):
    """Its tombstone is of no request."""
    work(directory(tmp_path))
    changed = directory(tmp_path, CHANGED, replace=True)
    with monkeypatch.context() as patched:
        patched.setattr(Directory, "remove", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            work(changed)
    for request in (REQUEST, CHANGED):
        assert directory(tmp_path, request).inspect().state is State.STALE
    if replace:
        work(changed)
        assert (tmp_path / "out" / "part").read_text() == "0.2"
    else:
        with pytest.raises(UserError, match=r"out holds work of another request; delete it or give another --out"):
            work(directory(tmp_path, CHANGED))


def test_refused_work_leaves_nothing(tmp_path):
    for artifact in (directory(tmp_path), FileArtifact("work", tmp_path / "out.txt", REQUEST, "sample")):
        with pytest.raises(UserError, match="wrong data"), artifact.session():
            raise UserError("wrong data")
        assert list(tmp_path.iterdir()) == []


def test_the_seal_comes_after_the_parts_and_only_then(tmp_path, monkeypatch):
    """A failure while syncing the parts leaves the work unfinished."""

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("prefdistill.core.artifact.sync", full)
        with pytest.raises(OSError, match="No space"):
            work(directory(tmp_path))
    assert directory(tmp_path).inspect().state is State.UNFINISHED
    work(directory(tmp_path))
    assert directory(tmp_path).inspect().state is State.FINISHED


def test_the_pool_shares_any_directory(tmp_path):
    first = Directory("work", tmp_path / "a", REQUEST, pool=tmp_path / "pool")
    work(first)
    first.share()
    second = Directory("work", tmp_path / "b", REQUEST, pool=tmp_path / "pool")
    with second.session() as seal:
        assert seal is not None
    assert (first.place / "part").samefile(second.place / "part")


# -- records -----------------------------------------------------------------------------------------------------------


def record(tmp_path, request=REQUEST):
    return RecordArtifact("cell", tmp_path / "cell.json", request, "study")


def test_a_stale_record_stays_until_the_new_one_is_whole(tmp_path, capsys):
    with record(tmp_path).session():
        record(tmp_path).seal({"result": 1})
    with pytest.raises(KeyboardInterrupt), record(tmp_path, CHANGED).session():
        raise KeyboardInterrupt
    assert "cell: rebuilding: its inputs changed (alpha is 0.2, was 0.1)" in capsys.readouterr().err
    with record(tmp_path).session() as seal:
        assert seal["result"] == 1


def test_a_torn_record_is_damaged_and_another_file_foreign(tmp_path):
    (tmp_path / "cell.json").write_text('{"key": ')
    assert record(tmp_path).inspect().state is State.DAMAGED
    write_json(tmp_path / "cell.json", {"mine": 1})
    assert record(tmp_path).inspect().state is State.FOREIGN
