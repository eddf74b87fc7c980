"""Labels, captions and columns of an export: by folder, by file, beside the images, and from the cache."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pytest
from export_cases import CLASSES, export, make_cache, rows_by_id
from safetensors.torch import load_file

from capacitor_rt.cache.export import ExportRequest, export_cache
from capacitor_rt.cache.export.columns import MOST_CAPTION_BYTES, read_captions, read_labels
from capacitor_rt.cache.export.mds_format import read_shard
from capacitor_rt.cache.sources import ColumnsRequest
from capacitor_rt.errors import InputError


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("bare"), area=True)


def test_labels_of_folders_count_the_folders_of_what_could_not_be_cached():
    labels = read_labels("folder", ["b/x.png", "b/y.png", "d/z.png"], others=["a/1.png", "c/2.png", "loose.png"])
    assert labels.classes == ("a", "b", "c", "d") and labels.numbers.tolist() == [1, 1, 3]
    with pytest.raises(InputError, match=r"1 of 2 rows lie in no folder \('x.png'\)"):
        read_labels("folder", ["x.png", "a/y.png"])


IDS = ["ant/1.png", "bee/2.png"]


@pytest.mark.parametrize(
    ("name", "text", "numbers", "classes"),
    [
        ("l.json", '{"ant/1.png": 7, "bee/2.png": 0, "more": 3}', [7, 0], None),
        ("l.json", '{"labels": [["ant/1.png", 1], ["bee/2.png", 1]]}', [1, 1], None),
        ("l.json", '[{"file_name": "bee/2.png", "label": "wasp"}, {"id": "ant/1.png", "label": "ant"}]', None, None),
        ("l.jsonl", '{"id": "ant/1.png", "class": 2}\n\n{"id": "bee/2.png", "class": 1}\n', [2, 1], None),
        ("l.csv", "id,label\nant/1.png,10\nbee/2.png,9\n", [10, 9], None),
        ("l.tsv", "label\tfile_name\nzoo\tant/1.png\nair\tbee/2.png\n", [1, 0], ("air", "zoo")),
    ],
)
def test_labels_of_a_file_are_joined_by_id(tmp_path, name, text, numbers, classes):
    (tmp_path / name).write_text(text)
    if numbers is None:
        # each object has its own names of the columns
        numbers, classes = [0, 1], ("ant", "wasp")
    labels = read_labels(str(tmp_path / name), IDS)
    assert labels.numbers.dtype == np.int64 and labels.numbers.tolist() == numbers and labels.classes == classes


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("l.json", '{"ant/1.png": 7}', r"no label of 1 of 2 rows \('bee/2.png'\)"),
        ("l.json", '{"1.png": 7, "2.png": 3}', r"no label of 2 of 2 rows .*; it names '1.png', '2.png'"),
        ("l.json", '{"ant/1.png": -1, "bee/2.png": 1}', r"holds the label -1: labels are numbers from 0"),
        ("l.json", '{"ant/1.png": 1.5, "bee/2.png": 1}', r"holds the label 1.5"),
        ("l.json", '{"ant/1.png": true, "bee/2.png": 1}', r"holds the label True"),
        ("l.json", '{"ant/1.png": "a", "bee/2.png": 1}', r"holds numbers and names"),
        ("l.json", '{"labels": [["ant/1.png", 1], ["ant/1.png", 2]]}', r"two labels of 'ant/1.png', 1 and 2"),
        ("l.json", "[1, 2]", r"expected an object"),
        ("l.json", "nonsense", r"cannot be read"),
        ("l.csv", "id,colour\nx,red\n", r"it lacks one of label"),
        ("l.txt", "1\n2\n", r"not of a known kind"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=match):
        read_labels(str(tmp_path / name), IDS)


def test_captions_lie_beside_the_images_or_in_a_file(tmp_path):
    for id, text in zip(IDS, ("an ant\n", "\ufeffeine Biene \u2013 Größe"), strict=True):
        path = (tmp_path / id).with_suffix(".txt")
        path.parent.mkdir()
        path.write_text(text, encoding="utf-8")
        path.with_suffix(".json").write_text(json.dumps({"score": 1, "prompt": text.upper()}))
    assert read_captions("txt", IDS, tmp_path) == ["an ant", "eine Biene \u2013 Größe"]
    assert read_captions("json", IDS, tmp_path)[0] == "AN ANT\n"
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["two", "one"], "id": IDS[::-1]}), tmp_path / "c.parquet")
    assert read_captions(str(tmp_path / "c.parquet"), IDS, None) == ["one", "two"]


@pytest.mark.parametrize(
    ("caption", "match"),
    [
        ("a\0b", "holds a NUL character"),
        ("x" * 100_000, f"has 100000 bytes, above {MOST_CAPTION_BYTES}: shorten it"),
        (7, "is int, not text"),
        (None, "is NoneType, not text"),
        ("\ud800", "is no valid Unicode"),
    ],
)
def test_captions_that_no_reader_takes_are_refused(bare, tmp_path, caption, match):
    captions = {row["id"]: "fine" for row in rows_by_id(bare)} | {"bee/001.png": caption}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    with pytest.raises(InputError, match=f"'bee/001.png' {match}"):
        export(bare, tmp_path / "out", "mds", captions=str(tmp_path / "captions.json"))
    assert not (tmp_path / "out").exists()


def test_caption_files_that_are_missing_or_no_text_are_named(tmp_path):
    for id in IDS:
        (tmp_path / id).parent.mkdir()
    (tmp_path / "ant" / "1.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"1 of 2 rows have no .txt file beside them .* \('bee/2.png'\)"):
        read_captions("txt", IDS, tmp_path)
    (tmp_path / "bee" / "2.txt").write_text("x" * 10 * MOST_CAPTION_BYTES)
    with pytest.raises(InputError, match=r"1.txt is not UTF-8: 'utf-8' codec"):
        read_captions("txt", IDS, tmp_path)
    (tmp_path / "ant" / "1.txt").write_text("ant")
    with pytest.raises(InputError, match=r"caption of 'bee/2.png' has \d+ bytes"):
        read_captions("txt", IDS, tmp_path)


def test_labels_captions_and_columns_of_the_cache_need_no_option(tmp_path):
    (tmp_path / "src" / "ant").mkdir(parents=True)
    for name in ("000", "001"):
        (tmp_path / "src" / "ant" / f"{name}.txt").write_text(f"ant {name} \u2013 klein")
    names = [f"{c}/{i:03d}.{'png' if n else 'webp'}" for n, c in enumerate(CLASSES) for i in range(2)]
    table = [{"file_name": n, "label": n[0], "score": i / 3, "source": f"s{i}"} for i, n in enumerate(names)]
    table[5]["score"] = None
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    columns = ColumnsRequest(str(tmp_path / "table.jsonl"), "txt", ("score", "source"))
    cache = make_cache(tmp_path, each=2, flip=True, columns=columns)
    notes: list[str] = []
    request = ExportRequest("wds")
    export_cache(cache, tmp_path / "wds", request, progress=False, note=notes.append)
    assert notes == ["4 rows have no caption in the cache, and an empty one in the export"]
    (tar,) = (tmp_path / "wds").glob("*.tar")
    with tarfile.open(tar) as file:
        members = {m.name: file.extractfile(m).read() for m in file}
    for i, name in enumerate(names):
        assert members[f"{i:08d}.cls"] == str(i // 2).encode()
        assert members[f"{i:08d}.txt"].decode() == (f"ant {name[4:7]} \u2013 klein" if i < 2 else "")
        info = json.loads(members[f"{i:08d}.json"])
        assert info["source"] == f"s{i}" and info["score"] == (i / 3 if i < 5 else None)
    export(cache, tmp_path / "lit", "lightningdit")
    labels = load_file(tmp_path / "lit" / "latents_rank00_shard000.safetensors")["labels"]
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert json.loads((tmp_path / "lit" / "capacitor.json").read_bytes())["classes"] == ["a", "b", "c"]
    export(cache, tmp_path / "mds", "mds")
    index = json.loads((tmp_path / "mds" / "index.json").read_bytes())["shards"][0]
    encodings = dict(zip(index["column_names"], index["column_encodings"], strict=True))
    assert encodings["score"] == "float64" and encodings["source"] == "str"
    samples = list(read_shard(tmp_path / "mds" / "shard.00000.mds", encodings))
    assert [s["caption"] for s in samples] == [members[f"{i:08d}.txt"].decode() for i in range(6)]
    assert [s["source"] for s in samples] == [f"s{i}" for i in range(6)] and np.isnan(samples[5]["score"])
    with pytest.raises(InputError, match="DDT takes labels from the folders of its images"):
        export(cache, tmp_path / "ddt", "ddt")
    # an option counts before what the cache has
    (tmp_path / "other.json").write_text(json.dumps(dict.fromkeys(names, 5)))
    export(cache, tmp_path / "five", "lightningdit", labels=str(tmp_path / "other.json"))
    labels = load_file(tmp_path / "five" / "latents_rank00_shard000.safetensors")["labels"]
    assert labels.tolist() == [5] * 6


def test_folders_that_the_cache_took_for_labels_stay_folders(tmp_path):
    cache = make_cache(tmp_path, each=1, columns=ColumnsRequest("folder"))
    export(cache, tmp_path / "ddt", "ddt")
    assert sorted(p.relative_to(tmp_path / "ddt").as_posix() for p in (tmp_path / "ddt").rglob("*.pt")) == [
        "ant/000.webp.pt",
        "bee/000.png.pt",
        "cat/000.png.pt",
    ]
    assert json.loads((tmp_path / "ddt" / "capacitor.json").read_bytes())["classes"] == list(CLASSES)
