"""Bundles that others than the server's user can have written: refused without a pin, before anything of them is used."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aot_cache.cli.facts import bundle as bundle_facts
from aot_cache.errors import Untrusted
from aot_cache.runtime import bundle_lookup
from aot_cache.store import read_bundle, trust, write_bundle

OTHER = 54_321  # a user and group that no system has

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")


def refused(path: Path) -> str:
    """Why the file is refused; empty if it is not."""
    with path.open("rb") as file:
        try:
            trust.require_own(path, os.fstat(file.fileno()))
        except Untrusted as error:
            return error.message
    return ""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "models" / "b.safetensors"
    path.parent.mkdir(mode=0o755)
    path.write_bytes(b"bytes")
    path.chmod(0o644)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o444, 0o755, 0o4644])
def test_a_file_of_ones_own_is_accepted(bundle: Path, mode: int) -> None:
    bundle.chmod(mode)
    assert refused(bundle) == ""


@pytest.mark.parametrize("what", ["the file", "its folder", "a folder above"])
@pytest.mark.parametrize("mode", [0o777, 0o666, 0o646])
def test_what_everybody_can_write_is_refused(tmp_path: Path, bundle: Path, what: str, mode: int) -> None:
    path = {"the file": bundle, "its folder": bundle.parent, "a folder above": tmp_path}[what]
    path.chmod(mode | (0o111 if path.is_dir() else 0))
    assert refused(bundle) == f"{bundle} can have been written by others: everybody can write {path}"


def test_a_folder_in_which_others_can_only_add_is_accepted(bundle: Path) -> None:
    bundle.parent.chmod(0o1777)
    assert refused(bundle) == ""


@needs_root
@pytest.mark.parametrize("what", ["file", "folder", "sticky folder"])
def test_what_belongs_to_another_user_is_refused(bundle: Path, what: str) -> None:
    path = bundle if what == "file" else bundle.parent
    if what == "sticky folder":
        path.chmod(0o1777)
    os.chown(path, OTHER, 0)
    assert f"{path} belongs to user {OTHER}" in refused(bundle)


@needs_root
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_group_that_can_write_is_refused(bundle: Path, what: str) -> None:
    path = bundle if what == "file" else bundle.parent
    os.chown(path, 0, OTHER)
    path.chmod(0o775)
    assert f"group {OTHER} can write {path}" in refused(bundle)


def test_a_users_own_group_may_write(bundle: Path) -> None:
    import grp
    import pwd

    name = pwd.getpwuid(os.geteuid()).pw_name
    try:
        own = grp.getgrnam(name)
    except KeyError:
        pytest.skip("this user has no group of its own")
    os.chown(bundle, -1, own.gr_gid)
    bundle.chmod(0o664)
    assert (refused(bundle) == "") == (set(own.gr_mem) <= {name})


@pytest.mark.parametrize("where", ["the file", "a folder", "a link to a link"])
def test_links_are_judged_by_every_folder_on_the_way(tmp_path: Path, bundle: Path, where: str) -> None:
    """Who can change a link, or the folder that it is in, decides which file is opened."""
    open_to_all, sound = tmp_path / "open", tmp_path / "sound"
    open_to_all.mkdir()
    sound.mkdir()
    link = open_to_all / "link"
    link.symlink_to(bundle.parent if where == "a folder" else bundle)
    path = link / bundle.name if where == "a folder" else link
    if where == "a link to a link":
        (sound / "first").symlink_to(link)
        path = sound / "first"
    assert refused(path) == ""
    open_to_all.chmod(0o777)
    assert f"everybody can write {open_to_all}" in refused(path)


def test_the_hint_says_what_can_be_done(bundle: Path) -> None:
    bundle.chmod(0o666)
    with bundle.open("rb") as file, pytest.raises(Untrusted) as caught:
        trust.require_own(bundle, os.fstat(file.fileno()))
    assert trust.FOLDERS in caught.value.hint and "AOT_CACHE_DIGEST" in caught.value.hint


def test_a_trusted_folder_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle.chmod(0o666)
    for named, accepted in {
        str(bundle.parent): True,
        str(bundle.parent.parent): True,
        f"/elsewhere{os.pathsep}{bundle.parent}/": True,
        str(bundle.parent.with_name("model")): False,  # the beginning of its name
        str(bundle): False,  # not a folder
        "": False,
    }.items():
        monkeypatch.setenv(trust.FOLDERS, named)
        assert (refused(bundle) == "") == accepted, named


@pytest.mark.parametrize("named", [False, True])
def test_a_folder_to_which_others_can_add_is_theirs_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """A store: a file that is added to it is read, so that the sticky bit is no help."""
    folder = tmp_path / "store"
    folder.mkdir()
    if named:
        monkeypatch.setenv(trust.FOLDERS, str(folder))
    for mode, open_to_all in {0o755: False, 0o777: True, 0o1777: True}.items():
        folder.chmod(mode)
        assert bool(trust.why_others(folder, folder.stat())) == (open_to_all and not named)


def test_a_relative_path_is_judged_from_where_it_starts(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle.parent)
    assert refused(Path(bundle.name)) == ""
    bundle.parent.parent.chmod(0o777)
    assert "everybody can write" in refused(Path(bundle.name))


@given(st.integers(0, 0o7777), st.integers(0, 0o7777))
@settings(max_examples=200, deadline=None)
def test_only_modes_without_other_writers_pass(
    tmp_path_factory: pytest.TempPathFactory, of_file: int, of_folder: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    path = folder / "b"
    path.write_bytes(b"")
    with path.open("rb") as file:
        path.chmod(of_file)
        folder.chmod(of_folder | 0o700)
        try:
            trust.require_own(path, os.fstat(file.fileno()))
            passed = True
        except Untrusted:
            passed = False
        finally:
            folder.chmod(0o700)
    can_replace = of_folder & stat.S_IWOTH and not of_folder & stat.S_ISVTX
    assert not (passed and (of_file & stat.S_IWOTH or can_replace))


# --- commands ---------------------------------------------------------------------------------------------------------


def test_verify_says_what_load_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle of nothing, in a folder that everybody can write: refused unless it is pinned."""
    path = tmp_path / "open" / "b.safetensors"
    digest = write_bundle(path, {"kind": "units", "target": {"backend": "cpu"}}, {})
    found = read_bundle(path)
    assert bundle_facts.place(found) == []
    path.parent.chmod(0o777)
    (finding,) = bundle_facts.place(found)
    assert finding["kind"] == "not trusted" and finding["code"] == 8
    with pytest.raises(Untrusted, match="can have been written by others"):
        bundle_lookup.find(path, None)
    assert bundle_lookup.find(path, digest).proven
    with pytest.raises(
        Untrusted, match="can have been written by others"
    ):  # ranks agree on a digest that nobody has pinned
        bundle_lookup.find(path, digest, pinned=False)
    monkeypatch.setenv(trust.FOLDERS, str(path.parent))
    assert not bundle_lookup.find(path, digest, pinned=False).proven
    monkeypatch.delenv(trust.FOLDERS)
    with pytest.raises(
        Untrusted,
        match=r"no bundle for this host in .* is from this user alone; others can have written: b\.safetensors",
    ):
        bundle_lookup.find(path.parent, None)
