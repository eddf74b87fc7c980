"""Where images come from: lists, tar and Parquet files; and what is kept beside them."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cache_cases import index_rows, pixels, snapshot, write_images
from models import random_model
from PIL import Image

from capacitor_rt.cache import CacheRequest, ColumnsRequest, LatentDataset, RunOptions, cache_images
from capacitor_rt.cache.sources.open import open_source
from capacitor_rt.cache.verify import verify
from capacitor_rt.errors import CacheError, InputError

REQUEST = CacheRequest(32, dtype="fp32", task_inputs=4)


def run(src, out, *, kind="auto", workers=0, request=REQUEST, **columns):
    wanted = ColumnsRequest(**columns)
    options = RunOptions(workers=workers, progress=False, backoff=(0.0,), source=kind, columns=wanted)
    return cache_images(src, out, random_model(), request, options=options)


def png(seed: int, size=(40, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(*size, seed=seed)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def tars(tmp_path):
    """Two tar files of WebDataset: 5 and 3 images with labels, captions and more beside them."""
    folder = tmp_path / "wds"
    folder.mkdir()
    number = 0
    for shard, count in ((0, 5), (1, 3)):
        members = []
        for _ in range(count):
            key = f"x/{number:04d}"
            members.append((f"{key}.png", png(number)))
            members.append((f"{key}.cls", b"%d" % (number % 3)))
            members.append((f"{key}.txt", f"picture {number} \u00e9\n".encode()))
            members.append((f"{key}.json", json.dumps({"url": f"u{number}", "n": number, "p": 0.5}).encode()))
            members.append((f"{key}.seg.png", b"a mask"))
            members.append((f"x/._{number:04d}.png", b"of a Mac"))
            number += 1
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


@pytest.fixture
def plain(tmp_path):
    """A folder of the same images, and its rows."""
    folder = tmp_path / "plain"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i:04d}.png").write_bytes(png(i))
    run(folder, tmp_path / "plain-out")
    return LatentDataset(tmp_path / "plain-out", verify=True)


def same_rows(dataset, plain):
    assert len(dataset) == len(plain)
    return all(torch.equal(dataset[i]["latents"], plain[i]["latents"]) for i in range(len(plain)))


@pytest.mark.parametrize("workers", [0, 2])
def test_tar_files_give_the_rows_of_their_images(tars, plain, tmp_path, workers):
    out = tmp_path / "out"
    options = {"labels": "cls", "captions": "txt", "keep": ("url", "n", "p")}
    report = run(tars, out, workers=workers, **options)
    assert (report.cached, report.exit_code) == (8, 0)
    dataset = LatentDataset(out, verify=True)
    assert list(dataset.ids) == [f"{i // 5:05d}.tar/x/{i:04d}.png" for i in range(8)]
    assert same_rows(dataset, plain)
    # a task never spans two tar files
    assert [len(part) for part in (range(0, 4), range(4, 5), range(5, 8))] == [
        sum(row["input"] in part for row in index_rows(out)) for part in (range(0, 4), range(4, 5), range(5, 8))
    ]
    assert len(list((out / "tasks").iterdir())) == 3
    row = dataset[6]
    assert (row["label"], row["caption"], row["url"], row["n"], row["p"]) == (0, "picture 6 \u00e9", "u6", 6, 0.5)
    assert dataset.column("n").to_pylist() == list(range(8))
    assert dataset.label_names is None
    assert run(tars, out, **options).new_images == 0
    assert verify(out).problems == []


def test_a_pattern_and_one_tar_file_are_sources_too(tars, tmp_path):
    assert run(tars / "*.tar", tmp_path / "a").cached == 8
    assert run(tars / "00001.tar", tmp_path / "b").cached == 3
    with pytest.raises(CacheError, match=r"no \.tar files in"):
        run(tars / "9*.tar", tmp_path / "c")


def test_tar_files_that_are_damaged_are_refused_when_they_are_listed(tars, tmp_path):
    path = tars / "00001.tar"
    data = path.read_bytes()
    for bad in (
        data[: len(data) // 2],
        data[:700],
        data[:512] + b"x" * 512 + data[1024:],
        b"",
        b"\x1f\x8b" + bytes(600),
    ):
        path.write_bytes(bad)
        try:
            source = open_source(tars, tmp_path / "out")
        except CacheError as error:
            assert "00001.tar" in str(error)
        else:
            # damage within the bytes of a member is the decoder's to find
            assert len(source.listing) == 8
    write_tar(path, [("a.png", png(1)), ("a.png", png(2))])
    with pytest.raises(CacheError, match=r"'00001\.tar/a\.png' is there twice"):
        open_source(tars, tmp_path / "out")


def test_a_tar_file_that_was_cut_anywhere_is_refused(tmp_path):
    """Between members, in a header, in the bytes of an image: fewer rows would be cached, and nobody told."""
    path = tmp_path / "x.tar"
    write_tar(path, [(f"{i}.png", png(i)) for i in range(3)])
    data = path.read_bytes()
    end = len(data.rstrip(b"\0"))
    end += -end % 512
    assert len(open_source(path, tmp_path / "out").listing) == 3
    for cut in sorted({*range(0, end + 512, 512), *range(1, end + 512, 173), end - 1, end + 511}):
        path.write_bytes(data[:cut])
        with pytest.raises(CacheError, match=r"x\.tar"):
            open_source(path, tmp_path / "out")
    # one block of zeros says that this is all
    path.write_bytes(data[: end + 512])
    assert len(open_source(path, tmp_path / "out").listing) == 3


def test_names_in_tar_files_are_names_and_no_places(tmp_path):
    write_tar(tmp_path / "x.tar", [("../../evil.png", png(0)), ("/etc/passwd.png", png(1)), ("\x1b[31m.png", png(2))])
    before = sorted(os.listdir(tmp_path.parent))
    assert run(tmp_path / "x.tar", tmp_path / "out").cached == 3
    assert list(LatentDataset(tmp_path / "out").ids)[:2] == ["x.tar/../../evil.png", "x.tar//etc/passwd.png"]
    assert sorted(os.listdir(tmp_path.parent)) == before


def test_a_tar_file_that_is_replaced_keeps_its_task_from_being_finished(tars, tmp_path, monkeypatch):
    from capacitor_rt.cache import pipeline

    original = pipeline.Pipeline.run

    def changed(self, tasks):
        write_tar(tars / "00001.tar", [("a.png", png(9))])
        original(self, tasks)

    monkeypatch.setattr(pipeline.Pipeline, "run", changed)
    report = run(tars, tmp_path / "out")
    assert (report.cached, report.unfinished, report.failed) == (5, 1, {"changed": 3})
    monkeypatch.undo()
    with pytest.raises(CacheError, match=r"3 removed|removed"):
        run(tars, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "folder"}, "is for folders"),
        ({"labels": "nope"}, r"inputs have no \.nope beside them"),
        ({"labels": "txt"}, "no whole number"),
        ({"keep": ("nope",)}, "no .json beside the first images has it"),
    ],
)
def test_columns_that_tar_files_do_not_have_are_refused(tars, tmp_path, options, message):
    with pytest.raises((CacheError, InputError), match=message):
        run(tars, tmp_path / "out", **options)


def write_parquet(path, first, count, *, struct=True, group=3, **columns):
    data = [png(i) for i in range(first, first + count)]
    images = pa.array([{"bytes": d, "path": None} for d in data]) if struct else pa.array(data, pa.binary())
    table = pa.table({"image": images, **{k: v[first : first + count] for k, v in columns.items()}})
    names = {"info": {"features": {"label": {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
    pq.write_table(table, path, row_group_size=group)


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_parquet_files_give_the_rows_of_their_images(tmp_path, plain, struct, workers):
    folder = tmp_path / "hf"
    folder.mkdir()
    more = {"label": [i % 3 for i in range(8)], "text": [f"t{i}" for i in range(8)], "score": [i / 2 for i in range(8)]}
    write_parquet(folder / "train-0.parquet", 0, 5, struct=struct, **more)
    write_parquet(folder / "train-1.parquet", 5, 3, struct=struct, **more)
    options = {"labels": "label", "captions": "text", "keep": ("score",)}
    out = tmp_path / "out"
    assert run(folder, out, workers=workers, **options).exit_code == 0
    dataset = LatentDataset(out, verify=True)
    assert list(dataset.ids)[4:6] == ["train-0.parquet/0000004", "train-1.parquet/0000000"]
    assert same_rows(dataset, plain)
    # row groups of 3, 2 and 3 rows
    assert len(list((out / "tasks").iterdir())) == 3
    assert [dataset[i]["label"] for i in range(8)] == more["label"] and dataset.label_names == ["ant", "bee", "cat"]
    assert (dataset[6]["caption"], dataset[6]["score"]) == ("t6", 3.0)
    assert run(folder, out, **options).new_images == 0


def test_a_parquet_row_without_an_image_is_quarantined(tmp_path):
    rows = [{"bytes": png(0), "path": None}, None, {"bytes": None, "path": "x.png"}, {"bytes": b"", "path": None}]
    pq.write_table(pa.table({"image": rows}), tmp_path / "x.parquet")
    report = run(tmp_path / "x.parquet", tmp_path / "out")
    assert (report.cached, report.quarantined) == (1, {"empty": 2, "unreadable": 1})


def test_parquet_files_without_images_or_cut_short_are_refused(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"name": ["a"], "n": [1]}), path)
    with pytest.raises(CacheError, match="no column of images that is named so: its columns are name, n"):
        run(path, tmp_path / "out")
    write_parquet(path, 0, 3)
    with pytest.raises(InputError, match="no column 'nope' for label: they have image"):
        run(path, tmp_path / "out", labels="nope")
    data = path.read_bytes()
    for bad in (data[:-30], b"", b"PAR1", data[: len(data) // 2]):
        path.write_bytes(bad)
        with pytest.raises(CacheError, match=r"x\.parquet cannot be read as Parquet"):
            run(path, tmp_path / "out")


def test_another_parquet_file_of_that_name_is_another_source(tmp_path):
    path = tmp_path / "x.parquet"
    write_parquet(path, 0, 3)
    run(path, tmp_path / "out")
    write_parquet(path, 1, 3)
    with pytest.raises(CacheError, match="planned for other inputs"):
        run(path, tmp_path / "out")


def test_a_list_is_in_its_own_order(tmp_path, plain):
    names = [f"plain/{i:04d}.png" for i in (3, 1, 2)]
    (tmp_path / "list.txt").write_text("# a comment\n" + "\n".join([*names, "plain/gone.png", ""]))
    report = run(tmp_path / "list.txt", tmp_path / "out")
    assert report.quarantined == {"unreadable": 1}
    dataset = LatentDataset(tmp_path / "out")
    assert list(dataset.ids) == names
    assert torch.equal(dataset[0]["latents"], plain[3]["latents"])
    (tmp_path / "list.txt").write_text("plain/0001.png\nplain/0001.png\n")
    with pytest.raises(CacheError, match=r"names 'plain/0001\.png' twice"):
        run(tmp_path / "list.txt", tmp_path / "out2")


@pytest.fixture
def classes(tmp_path):
    src = tmp_path / "src"
    for name in ("bee", "ant"):
        write_images(src / name, 2, sizes=((40, 40),))
    (src / "ant" / "000.txt").write_text("  an ant \n")
    (src / "bee" / "001.json").write_text('{"text": "a bee"}')
    return src


def test_labels_by_folder_and_captions_beside(classes, tmp_path):
    run(classes, tmp_path / "out", labels="folder", captions="txt")
    dataset = LatentDataset(tmp_path / "out")
    assert dataset.label_names == ["ant", "bee"] and dataset.column("label").to_pylist() == [0, 0, 1, 1]
    assert dataset.column("caption").to_pylist() == ["an ant", None, None, None]
    assert [dataset[i]["caption"] for i in range(2)] == ["an ant", ""]
    batch = torch.utils.data.default_collate([dataset[i] for i in range(4)])
    assert batch["label"].tolist() == [0, 0, 1, 1] and batch["caption"][0] == "an ant"
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[0]["caption"] == "an ant"
    run(classes, tmp_path / "json", captions="json")
    assert LatentDataset(tmp_path / "json").column("caption").to_pylist() == [None, None, None, "a bee"]


TABLE = [("bee/000.png", 7, "b"), ("ant/001.png", 5, "a"), ("ant/000.png", 5, None), ("bee/001", 1, "d")]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_labels_captions_and_columns_of_a_table(classes, tmp_path, kind):
    rows = [{"file_name": name, "label": label, "text": text or "", "w": label / 2} for name, label, text in TABLE]
    path = tmp_path / f"table.{kind}"
    if kind == "csv":
        lines = ["file_name,label,text,w", *(f"{r['file_name']},{r['label']},{r['text']},{r['w']}" for r in rows)]
        path.write_text("\n".join(lines))
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "json":
        path.write_text(json.dumps({r["file_name"]: {k: r[k] for k in ("label", "text", "w")} for r in rows}))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    run(classes, tmp_path / "out", labels=str(path), captions=str(path), keep=("w",))
    dataset = LatentDataset(tmp_path / "out")
    assert dataset.column("label").to_pylist() == [5, 5, 7, 1] and dataset.label_names is None
    assert dataset.column("caption").to_pylist() == ["", "a", "b", "d"]
    kept = dataset.column("w").to_pylist()
    assert kept == (["2.5", "2.5", "3.5", "0.5"] if kind == "csv" else [2.5, 2.5, 3.5, 0.5])


def test_columns_may_have_any_name_but_those_of_the_index(classes, tmp_path):
    path, names = tmp_path / "table.json", ("number", "rows", "n\u00e9")
    path.write_text(
        json.dumps({name: {"label": at, **dict.fromkeys(names, at)} for at, (name, *_) in enumerate(TABLE)})
    )
    run(classes, tmp_path / "out", labels=str(path), keep=names)
    dataset = LatentDataset(tmp_path / "out")
    assert [dataset.column(name).to_pylist() for name in names] == [[2, 1, 0, 3]] * 3 and dataset[0]["number"] == 2
    for name in ("row", "latents_flip", "logsnr_scale", "label"):
        with pytest.raises(InputError, match=f"column '{name}' cannot be kept under that name"):
            ColumnsRequest(keep=(name,))


def test_labels_that_are_names_are_numbered_in_their_order(classes, tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({name: text for name, _, text in TABLE} | {"ant/000.png": "c"}))
    run(classes, tmp_path / "out", labels=str(path))
    dataset = LatentDataset(tmp_path / "out")
    assert dataset.label_names == ["a", "b", "c", "d"] and dataset.column("label").to_pylist() == [2, 0, 1, 3]


@pytest.mark.parametrize(
    ("write", "options", "message"),
    [
        ('{"ant/000.png": 1}', {"labels": "t.json"}, r"3 inputs have no label: 'ant/001\.png'"),
        ('{"labels": [["ant/000.png", 1], ["ant/000.png", 2]]}', {"labels": "t.json"}, r"two labels of 'ant/000\.png'"),
        ("[1, 2]", {"labels": "t.json"}, "its rows are no JSON objects"),
        ("[" * 90_000, {"labels": "t.json"}, "cannot be read as a table"),
        ('{"ant/000.png": 1}', {"labels": "t.nope"}, "cannot read .*t.nope"),
        ("a,b\n1,2\n", {"labels": "t.csv"}, "no column that names the images"),
        ("id,b\n1,2\n", {"labels": "t.csv"}, "no column 'label' or 'class'"),
        ("id,label\n1,2\n", {"captions": "t.csv", "keep": ("x",)}, "no column 'caption' or 'text'"),
        ("id,text\n1,2\n", {"captions": "t.csv", "keep": ("x",)}, "'x' cannot be kept: it is not in"),
        ("", {"keep": ("row_hash",)}, "cannot be kept under that name"),
        ("", {"captions": "folder"}, "'folder' is for labels"),
    ],
)
def test_tables_that_do_not_fit_are_refused(classes, tmp_path, monkeypatch, write, options, message):
    monkeypatch.chdir(tmp_path)
    for kind in ("json", "csv"):
        (tmp_path / f"t.{kind}").write_text(write)
    with pytest.raises((CacheError, InputError), match=message):
        run(classes, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_caption_that_is_no_text_stops_the_run_and_can_be_mended(classes, tmp_path):
    (classes / "bee" / "000.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CacheError, match=r"caption .*bee/000\.txt is not UTF-8"):
        run(classes, tmp_path / "out", captions="txt")
    (classes / "bee" / "000.txt").write_text("mended")
    assert run(classes, tmp_path / "out", captions="txt").cached == 4
    assert LatentDataset(tmp_path / "out").column("caption").to_pylist()[2] == "mended"


def test_other_columns_are_another_plan(classes, tmp_path):
    run(classes, tmp_path / "out", labels="folder")
    before = snapshot(tmp_path / "out")
    with pytest.raises(CacheError, match=r"planned with other labels, captions or columns: label from folder -> none"):
        run(classes, tmp_path / "out")
    shutil.copytree(classes / "ant", classes / "cat")
    with pytest.raises(CacheError, match=r"other labels|other inputs"):
        run(classes, tmp_path / "out", labels="folder")
    assert snapshot(tmp_path / "out") == before


def test_what_lies_in_a_folder_says_what_it_is(tars, classes, tmp_path):
    assert open_source(tars, tmp_path / "out").fields()["kind"] == "tar"
    assert open_source(classes, tmp_path / "out").fields()["kind"] == "folder"
    write_images(tars, 1)
    assert open_source(tars, tmp_path / "out").fields()["kind"] == "folder"
    assert open_source(tars, tmp_path / "out", "tar").fields()["kind"] == "tar"
    with pytest.raises(InputError, match="source 'zip' is unknown"):
        open_source(tars, tmp_path / "out", "zip")


def test_a_source_goes_to_another_process(tars, tmp_path):
    source = pickle.loads(pickle.dumps(open_source(tars, tmp_path / "out", columns=ColumnsRequest("cls"))))
    reader = source.open()
    assert np.array_equal(np.array(Image.open(io.BytesIO(reader.read(7)))), pixels(40, 40, seed=7))
    assert reader.name(7) == "00001.tar/x/0007.png"
