from __future__ import annotations

import errno
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from edkm_export import claims
from edkm_export.atomic import MARKER, atomic_file, atomic_folder, check_output
from edkm_export.errors import InputError, OutputExistsError
from tests.helpers.snapshots import snapshot

FAILURES = [
    OSError(errno.ENOSPC, "No space left on device"),
    KeyboardInterrupt(),
    MemoryError(),
    ValueError("x"),
]


def make_bundle(path: Path, content: str = "old") -> Path:
    """A folder as `edkm-export coreml` leaves it."""
    path.mkdir()
    (path / MARKER).write_text('{"generator": "edkm-export 0.1.0"}')
    (path / "weights").write_text(content)
    return path


# Files


def test_file_appears_with_the_mode_of_an_ordinary_file(tmp_path):
    (tmp_path / "ordinary").write_text("")
    with atomic_file(tmp_path / "model.pt") as temporary:
        # A rename is atomic within one file system only; torch.save writes the file's name into the archive.
        assert temporary.parent.parent == tmp_path and temporary.name == "model.pt"
        temporary.write_text("new")
        assert not (tmp_path / "model.pt").exists()
    assert (tmp_path / "model.pt").read_text() == "new"
    assert (tmp_path / "model.pt").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "ordinary"]


def test_umask_is_left_as_it_was(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "a") as temporary:
            temporary.write_text("")
        with atomic_folder(tmp_path / "b") as temporary:
            (temporary / MARKER).write_text("")
        assert os.umask(0o027) == 0o027
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
        assert (tmp_path / "b").stat().st_mode & 0o777 == 0o750
    finally:
        os.umask(before)


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("existing", [False, True])
def test_file_that_fails_leaves_nothing(tmp_path, failure, existing):
    path = tmp_path / "model.pt"
    if existing:
        path.write_text("old")
    before = snapshot(tmp_path)
    with pytest.raises(type(failure)), atomic_file(path, overwrite=existing) as temporary:
        temporary.write_text("half")
        raise failure
    assert snapshot(tmp_path) == before


def test_file_is_replaced_when_asked(tmp_path):
    path = tmp_path / "model.pt"
    path.write_text("old")
    with atomic_file(path, overwrite=True) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert snapshot(tmp_path).keys() == {"model.pt"} and path.read_text() == "new"


def test_file_is_never_a_folder(tmp_path):
    make_bundle(tmp_path / "model.pt")
    before = snapshot(tmp_path)
    with (
        pytest.raises(OutputExistsError, match="is a folder, not a file"),
        atomic_file(tmp_path / "model.pt", overwrite=True),
    ):
        pytest.fail("the body must not run")
    assert snapshot(tmp_path) == before


# Folders


def test_folder_appears_whole(tmp_path):
    with atomic_folder(tmp_path / "bundle") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "weights").write_text("new")
        assert not (tmp_path / "bundle").exists()
    (tmp_path / "ordinary").mkdir()
    assert snapshot(tmp_path).keys() == {"bundle", "bundle/inner", "bundle/inner/weights", "ordinary"}
    assert (tmp_path / "bundle").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("existing", [False, True])
def test_folder_that_fails_leaves_nothing(tmp_path, failure, existing):
    if existing:
        make_bundle(tmp_path / "bundle")
    before = snapshot(tmp_path)
    with pytest.raises(type(failure)), atomic_folder(tmp_path / "bundle", overwrite=existing) as temporary:
        (temporary / "weights").write_text("half")
        raise failure
    assert snapshot(tmp_path) == before


def test_folder_of_ours_is_replaced_when_asked(tmp_path):
    path = make_bundle(tmp_path / "bundle")
    with atomic_folder(path, overwrite=True) as temporary:
        (temporary / MARKER).write_text("new")
        assert (path / "weights").read_text() == "old"
    assert snapshot(tmp_path).keys() == {"bundle", f"bundle/{MARKER}"}


def test_empty_folder_is_filled_when_asked(tmp_path):
    (tmp_path / "bundle").mkdir()
    with atomic_folder(tmp_path / "bundle", overwrite=True) as temporary:
        (temporary / MARKER).write_text("new")
    assert snapshot(tmp_path).keys() == {"bundle", f"bundle/{MARKER}"}


def test_folder_is_never_a_file(tmp_path):
    (tmp_path / "bundle").write_text("old")
    before = snapshot(tmp_path)
    with (
        pytest.raises(OutputExistsError, match="is a file, not a folder"),
        atomic_folder(tmp_path / "bundle", overwrite=True),
    ):
        pytest.fail("the body must not run")
    assert snapshot(tmp_path) == before


FAILING = pytest.mark.parametrize(
    ("failure", "renamed"),
    [
        (OSError(errno.EIO, "Input/output error"), False),
        (KeyboardInterrupt(), False),
        (KeyboardInterrupt(), True),
    ],
    ids=["error", "signal before", "signal after"],
)


def fail_to_replace(path: Path, failure: BaseException) -> str:
    """Replace a folder, which fails; what lies in its place then."""
    with pytest.raises(type(failure)), atomic_folder(path, overwrite=True) as temporary:
        (temporary / MARKER).write_text("new")
        (temporary / "weights").write_text("new")
    assert snapshot(path.parent).keys() == {"bundle", f"bundle/{MARKER}", "bundle/weights"}
    return (path / "weights").read_text()


@FAILING
def test_old_or_new_folder_survives_a_failing_exchange(tmp_path, monkeypatch, failure, renamed):
    path = make_bundle(tmp_path / "bundle")
    real = claims.exchange

    def exchange(first: Path, second: Path) -> bool:
        if renamed:
            real(first, second)
        raise failure

    monkeypatch.setattr(claims, "exchange", exchange)
    assert fail_to_replace(path, failure) == ("new" if renamed else "old")


@pytest.mark.parametrize("failing_rename", [1, 2])
@FAILING
def test_old_or_new_folder_survives_a_failing_rename(tmp_path, monkeypatch, failing_rename, failure, renamed):
    """Where names cannot be exchanged, the old folder makes room in two renames; a signal can arrive around each."""
    path = make_bundle(tmp_path / "bundle")
    real, calls = Path.replace, []

    def replace(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) != failing_rename:
            return real(self, target)
        if renamed:
            real(self, target)
        raise failure

    monkeypatch.setattr(claims, "exchange", lambda *_: False)
    monkeypatch.setattr(Path, "replace", replace)
    assert fail_to_replace(path, failure) == ("new" if renamed and failing_rename == 2 else "old")


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="other systems exchange no names")
def test_names_are_exchanged_in_one_step(tmp_path, monkeypatch):
    """A folder that is replaced has its name at every moment: nothing else is renamed."""
    path = make_bundle(tmp_path / "bundle")
    if not claims.exchange(make_bundle(tmp_path / "other", "other"), path):
        pytest.skip("this file system exchanges no names")
    assert (path / "weights").read_text() == "other"
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("renamed"))
    with atomic_folder(path, overwrite=True) as temporary:
        (temporary / MARKER).write_text("new")
    assert (path / MARKER).read_text() == "new" and not (path / "weights").exists()


@pytest.mark.parametrize("check", [check_output, atomic_folder])
def test_folder_that_a_killed_process_was_replacing_comes_back(tmp_path, monkeypatch, check):
    """Killed between two renames, on a file system that exchanges no names."""
    path = make_bundle(tmp_path / "bundle")
    monkeypatch.setattr(claims, "exchange", lambda *_: False)
    child = os.fork()
    if not child:
        real, calls = Path.replace, []

        def replace(self: Path, target: Path) -> Path:
            calls.append(self)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, target)

        Path.replace = replace
        with atomic_folder(path, overwrite=True) as temporary:
            (temporary / MARKER).write_text("new")
    os.waitpid(child, 0)
    assert not path.exists()
    with pytest.raises(OutputExistsError, match="already exists"):
        if check is check_output:
            check_output(path, overwrite=False, folder=True)
        else:
            with atomic_folder(path):
                pytest.fail("the body must not run")
    assert (path / "weights").read_text() == "old"
    with atomic_folder(path, overwrite=True) as temporary:
        (temporary / MARKER).write_text("new")
    assert snapshot(tmp_path).keys() == {"bundle", f"bundle/{MARKER}"}


def test_link_in_the_place_of_the_temporary_folder_is_not_followed(tmp_path):
    precious = make_bundle(tmp_path / "precious")
    (tmp_path / ".model.pt.partial").symlink_to(precious, target_is_directory=True)
    before = snapshot(tmp_path)
    with pytest.raises(OutputExistsError, match="is in the way"), atomic_file(tmp_path / "model.pt"):
        pytest.fail("the body must not run")
    assert snapshot(tmp_path) == before


def test_folder_with_nothing_but_leftovers_can_be_replaced(tmp_path):
    (tmp_path / "run" / f".{MARKER}.partial").mkdir(parents=True)
    check_output(tmp_path / "run", overwrite=True, folder=True)
    with atomic_folder(tmp_path / "run", overwrite=True) as temporary:
        (temporary / MARKER).write_text("new")
    assert snapshot(tmp_path).keys() == {"run", f"run/{MARKER}"}


def test_link_to_a_folder_is_not_followed_into_losing_it(tmp_path):
    target = make_bundle(tmp_path / "target")
    (tmp_path / "bundle").symlink_to(target, target_is_directory=True)
    before = snapshot(tmp_path)
    with (
        pytest.raises((OSError, OutputExistsError)),
        atomic_folder(tmp_path / "bundle", overwrite=True) as temporary,
    ):
        (temporary / MARKER).write_text("new")
    assert snapshot(tmp_path) == before


# The check before the long work


def test_existing_output_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "model.pt"
    path.write_text("old")
    message = f"{path} already exists; choose another -o, or replace it with --overwrite."
    for call in (check_output, lambda *args, **kwargs: atomic_file(*args, **kwargs).__enter__()):
        with pytest.raises(OutputExistsError, match=re.escape(message)):
            call(path, overwrite=False)
    check_output(path, overwrite=True)


def test_dangling_link_counts_as_existing(tmp_path):
    (tmp_path / "model.pt").symlink_to(tmp_path / "gone")
    with pytest.raises(OutputExistsError, match="already exists"):
        check_output(tmp_path / "model.pt", overwrite=False)


@pytest.mark.parametrize(
    "files",
    [["letter.txt"], [".hidden"], ["sub/metadata.json"]],
    ids=["file", "hidden file", "marker elsewhere"],
)
def test_folder_that_is_not_ours_is_never_replaced(tmp_path, files):
    for name in files:
        (tmp_path / "home" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "home" / name).write_text("precious")
    before = snapshot(tmp_path)
    with pytest.raises(OutputExistsError, match="a folder that edkm-export did not make.*choose another -o"):
        check_output(tmp_path / "home", overwrite=True, folder=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("content", ['{"title": "my data set"}', "[]", "", "\x00\xff"])
def test_folder_with_somebody_elses_metadata_is_never_replaced(tmp_path, content):
    """`metadata.json` is a name that many programs use."""
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / MARKER).write_text(content)
    (tmp_path / "dataset" / "pictures").write_text("precious")
    with pytest.raises(OutputExistsError, match="a folder that edkm-export did not make"):
        check_output(tmp_path / "dataset", overwrite=True, folder=True)


def test_missing_parent_is_named(tmp_path):
    with pytest.raises(
        InputError, match=f"its folder {re.escape(str(tmp_path / 'no'))} does not exist; make it first"
    ):
        check_output(tmp_path / "no" / "model.pt", overwrite=False)


def test_parent_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file does not exist; make it first"):
        check_output(tmp_path / "file" / "model.pt", overwrite=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind the superuser")
def test_parent_without_permission_is_named(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(InputError, match="no permission to write to"):
        check_output(tmp_path / "closed" / "model.pt", overwrite=False)
