"""Listing inputs: names of any bytes, links, loops, things that are no files."""

from __future__ import annotations

import os

import pytest
from cache_cases import write_images
from hypothesis import given
from hypothesis import strategies as st

from capacitor_rt.errors import CacheError
from capacitor_rt.images.scan import MISSING, id_to_path, path_to_id, scan


@given(st.binary(min_size=1, max_size=40).filter(lambda b: b"\0" not in b))
def test_ids_are_valid_text_and_reversible(path):
    text = path_to_id(path)
    text.encode("utf-8")
    assert id_to_path(text) == path


def test_names_with_spaces_newlines_and_bytes_that_are_not_utf8(tmp_path):
    names = [b"a b.png", b"line\nbreak.png", b"back\\slash.png", b"latin1-\xe9.png", "utf8-é.png".encode(), b"%41.png"]
    data = write_images(tmp_path / "one", 1)[0].read_bytes()
    src = os.fsencode(tmp_path / "src")
    os.mkdir(src)
    for name in names:
        with open(os.path.join(src, name), "wb") as f:
            f.write(data)
    found = scan(tmp_path / "src")
    assert found.paths == sorted(names)
    assert (found.sizes == len(data)).all()
    assert len({path_to_id(p) for p in found.paths}) == len(names)


def test_order_is_that_of_the_path_bytes_and_only_images_are_listed(tmp_path):
    write_images(tmp_path / "b", 2)
    write_images(tmp_path / "a" / "deep", 1, suffix=".jpg")
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "README").write_text("x")
    (tmp_path / "a" / "UPPER.JPG").write_bytes(b"x")
    found = scan(tmp_path)
    assert found.paths == [b"a/UPPER.JPG", b"a/deep/000.jpg", b"b/000.png", b"b/001.png"]
    assert found.ignored == {".txt": 1, "": 1}


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path):
    write_images(tmp_path / "other", 1)
    write_images(tmp_path / "src" / "in", 1)
    (tmp_path / "src" / "linked").symlink_to(tmp_path / "other")
    (tmp_path / "src" / "in" / "up").symlink_to(tmp_path / "src")
    (tmp_path / "src" / "self").symlink_to("self")
    found = scan(tmp_path / "src")
    assert found.paths == [b"in/000.png", b"linked/000.png"]
    assert found.loops == [b"in/up"]


def test_what_is_no_readable_file_is_listed_with_its_reason(tmp_path):
    write_images(tmp_path, 1)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle.jpg").symlink_to("circle.jpg")
    found = scan(tmp_path)
    assert found.paths == [b"000.png", b"circle.jpg", b"dangling.jpg", b"pipe.png"]
    assert found.sizes.tolist()[1:] == [MISSING] * 3
    assert found.errors[b"pipe.png"] == "not a regular file"
    assert found.errors[b"dangling.jpg"] == "No such file or directory"


def test_a_folder_that_cannot_be_listed_is_an_input_that_failed(tmp_path, as_nobody):
    write_images(tmp_path / "open", 1)
    write_images(tmp_path / "closed", 1)
    (tmp_path / "closed").chmod(0)
    with as_nobody(tmp_path):
        found = scan(tmp_path)
    (tmp_path / "closed").chmod(0o755)
    assert found.paths == [b"closed", b"open/000.png"]
    assert found.errors == {b"closed": "folder cannot be listed: Permission denied"}


def test_the_cache_itself_is_left_out(tmp_path):
    write_images(tmp_path / "photos", 1)
    write_images(tmp_path / "cache" / "sheet", 1)
    assert scan(tmp_path, skip=tmp_path / "cache").paths == [b"photos/000.png"]
    # by what it is, not by what it is called
    (tmp_path / "alias").symlink_to(tmp_path / "cache")
    assert scan(tmp_path, skip=tmp_path / "cache").paths == [b"photos/000.png"]


def test_a_single_file_of_any_name(tmp_path, monkeypatch):
    path = write_images(tmp_path, 1)[0].rename(tmp_path / "picture.data")
    assert scan(path).paths == [b"picture.data"]
    monkeypatch.chdir(tmp_path)
    found = scan("picture.data")
    assert os.path.exists(found.locate(found.paths[0]))


def test_missing_and_empty_sources_are_refused(tmp_path):
    with pytest.raises(CacheError, match=r"nowhere.*No such file"):
        scan(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(CacheError, match=r"no images in .*1 \.txt.*known extensions are .*\.jpg"):
        scan(tmp_path)
