"""Damaged and hostile tar files, Parquet files, lists and tables: refused or quarantined; `tests.fuzz` makes more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz.archives import Member, archive, long_name, pax

from capacitor_rt.cache.sources import ColumnsRequest
from capacitor_rt.cache.sources.columns import numbered, typed
from capacitor_rt.cache.sources.open import open_source
from capacitor_rt.cache.sources.tables import MAX_CAPTION
from capacitor_rt.errors import CacheError, ImageError

ROOT = Path(__file__).parents[2]
PICTURE = b"\x89PNG\r\n\x1a\n"


def fuzz(*args):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.fuzz", "--surface", "sources", *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_what_once_was_a_finding():
    done = fuzz("--replay")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_few_mutants():
    done = fuzz("--mutants", "80", "--seed", "14")
    assert done.returncode == 0 and "80 mutants" in done.stdout, done.stdout + done.stderr


def opened(path, **columns):
    return open_source(path, path.parent / "out", columns=ColumnsRequest(**columns))


def refused(path, match, **columns):
    with pytest.raises(CacheError, match=match):
        opened(path, **columns)


@pytest.mark.parametrize(
    "before",
    [
        pytest.param([long_name(b"a.png")] * 3000, id="headers about headers"),
        pytest.param([Member(b"x", b"1" * 60_000, b"x")], id="records of digits"),
        pytest.param([Member(b"x", b"9 " * 60_000, b"x")], id="records without end"),
        pytest.param([pax(("GNU.sparse.size", b"9"))], id="a file with holes"),
        pytest.param([Member(b"x", b"", b"x", size=-512)], id="length below 0"),
    ],
)
def test_headers_of_tar_files_that_the_library_is_slow_at_or_believes(tmp_path, before):
    path = tmp_path / "a.tar"
    path.write_bytes(archive([Member(b"a.png", PICTURE, before=before)]))
    refused(path, "cannot be read as an uncompressed tar file")


def test_a_sparse_member_is_no_picture_of_other_bytes(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(archive([Member(b"a.png", PICTURE, kind=b"S", magic=b"ustar  \0"), Member(b"b.png", PICTURE)]))
    refused(path, "has holes")


def test_names_and_records_that_archives_have_are_taken(tmp_path):
    path = tmp_path / "a.tar"
    name = "n\u00e9" * 100 + "/" + "1" * 250 + ".png"
    members = [
        Member(b"short", PICTURE, before=[pax(("path", name.encode()), ("mtime", b"1700000000.123456789"))]),
        Member(b"short", PICTURE, before=[long_name(b"d/" * 90 + b"b.png")]),
    ]
    path.write_bytes(archive(members))
    assert opened(path).listing.locators == [b"a.tar/" + name.encode(), b"a.tar/" + b"d/" * 90 + b"b.png"]


def test_pipes_are_not_waited_for(tmp_path):
    for name in ("a.tar", "a.parquet", "a.txt", "labels.csv"):
        os.mkfifo(tmp_path / name)
    for name in ("a.tar", "a.parquet", "a.txt"):
        refused(tmp_path / name, "no regular file")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0.png").write_bytes(PICTURE)
    refused(tmp_path / "pictures", "no regular file", labels=str(tmp_path / "labels.csv"))
    os.mkfifo(tmp_path / "pictures" / "0.txt")
    with pytest.raises(CacheError, match=r"caption .*no regular file"):
        opened(tmp_path / "pictures", captions="txt").columns.read(0, 1)


def test_a_parquet_file_that_promises_more_rows_than_it_has_bytes(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [b"x", b"y"], "label": [0, 1]}), path)
    whole = path.read_bytes()
    # numbers of rows are zigzag varints in the footer: 2 is 4; a longer one moves what is behind it
    ends = int.from_bytes(whole[-8:-4], "little")
    reasons = []
    for at in range(len(whole) - 8 - ends, len(whole) - 8):
        if whole[at] == 4:
            body = whole[:at] + b"\xfc\xff\xff\xff\x7f" + whole[at + 1 : -8]
            path.write_bytes(body + (ends + 4).to_bytes(4, "little") + b"PAR1")
            try:
                source = opened(path)
                assert len(source.listing) == 2
                source.open().read(0)
            except (CacheError, ImageError) as error:
                reasons.append(str(error))
    assert any("is damaged: it has" in reason for reason in reasons), reasons


def test_columns_of_other_files_and_of_no_images(tmp_path):
    pq.write_table(pa.table({"image": [b"x"], "label": [0]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [b"x"], "label": ["cat"]}), tmp_path / "b.parquet")
    refused(tmp_path, "not the one of the files before it", labels="label")
    pq.write_table(pa.table({"image": [5], "label": [0]}), tmp_path / "b.parquet")
    refused(tmp_path, "holds no images: it is of type int64")


def test_tables_that_no_column_can_hold(tmp_path):
    (tmp_path / "0.png").write_bytes(PICTURE)
    table = tmp_path / "t.csv"
    table.write_text("file_name,label\n0.png," + "x" * 140_000)
    refused(tmp_path, "cannot be read as a table: field larger than", labels=str(table))
    table.write_text("file_name,label\n0.png," + "x" * 5000)
    refused(tmp_path, "has 5000 characters, and 4096 are the most", labels=str(table))
    table = tmp_path / "t.json"
    table.write_text(json.dumps({"0.png": "x" * (MAX_CAPTION + 1)}))
    refused(tmp_path, "are the most: shorten it", captions=str(table))
    table.write_text(json.dumps({"0.png": 7}))
    assert opened(tmp_path, captions=str(table)).columns.read(0, 1) == {"caption": ["7"]}


def test_numbers_beyond_64_bits_are_names_and_texts():
    assert numbered(["1", " 2", 3]) == ([1, 2, 3], None)
    assert numbered([2**63, 1]) == ([1, 0], ["1", str(2**63)])
    assert numbered(["1_0", "\u0661"]) == ([0, 1], ["1_0", "\u0661"])
    assert typed([10**400, 1.5]) == ("string", [str(10**400), "1.5"])
