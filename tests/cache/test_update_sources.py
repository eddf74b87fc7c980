"""Updates of sources other than a folder of images: tar, Parquet, lists; and their labels and captions."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
from cache_cases import Forbidden, write_images
from models import random_model
from update_cases import (
    SIZES,
    age,
    assert_as_fresh,
    cache,
    out,
    reads,
    src,
    update,
    write_tar,
)

from capacitor_rt.cache import LatentDataset
from capacitor_rt.cache.sources import ColumnsRequest

__all__ = ["out", "reads", "src"]


def test_labels_keep_their_numbers(tmp_path):
    src = tmp_path / "src"
    for label in ("cat", "dog"):
        write_images(src / label, 3)
    age(src)
    columns = ColumnsRequest(labels="folder")
    cache(src, tmp_path / "out", columns=columns)
    write_images(src / "cow", 2)
    update(src, tmp_path / "out", columns=columns)
    ds = LatentDataset(tmp_path / "out")
    assert ds.label_names == ["cat", "dog", "cow"]
    assert [ds[i]["label"] for i in range(len(ds))] == [0, 0, 0, 2, 2, 1, 1, 1]
    assert cache(src, tmp_path / "out", Forbidden(random_model()), columns=columns).exit_code == 0


def test_captions_are_added_without_encoding(src, out, reads):
    for path in src.glob("*.png"):
        path.with_suffix(".txt").write_text(f"a picture of {path.stem}")
    report = update(src, out, Forbidden(random_model()), columns=ColumnsRequest(captions="txt"))
    assert report.reused == 11 and reads["read"] == []
    ds = LatentDataset(out)
    assert ds[0]["caption"] == "a picture of 000"


def test_tar_files_that_are_added_and_appended_to(tmp_path, reads):
    src, out = tmp_path / "wds", tmp_path / "out"
    files = write_images(tmp_path / "one", 7, sizes=SIZES)
    data = [path.read_bytes() for path in files]
    src.mkdir()
    for shard in (0, 1):
        write_tar(src / f"{shard}.tar", [(f"{i}.png", data[i]) for i in (2 * shard, 2 * shard + 1)])
    age(src)
    cache(src, out)
    reads["read"].clear(), reads["decoded"].clear()
    # one is as it was, one is longer, and one is new
    write_tar(src / "1.tar", [(f"{i}.png", data[i]) for i in (2, 4, 3)])
    write_tar(src / "2.tar", [(f"{i}.png", data[i]) for i in (5, 6)])
    report = update(src, out)
    assert len(reads["read"]) == 5 and sorted(reads["decoded"]) == ["1.tar/4.png", "2.tar/5.png", "2.tar/6.png"]
    assert report.reused == 4
    assert_as_fresh(src, out, tmp_path)


def test_parquet_files_that_are_added_and_replaced(tmp_path, reads):
    src, out = tmp_path / "hf", tmp_path / "out"
    data = [path.read_bytes() for path in write_images(tmp_path / "one", 8, sizes=SIZES)]
    src.mkdir()

    def write(name, numbers):
        pq.write_table(pa.table({"image": [data[i] for i in numbers]}), src / name, row_group_size=2)

    write("a.parquet", [0, 1, 2])
    write("b.parquet", [3, 4])
    age(src)
    cache(src, out)
    reads["read"].clear(), reads["decoded"].clear()
    write("b.parquet", [4, 3, 5])
    write("c.parquet", [6, 0])
    report = update(src, out)
    assert len(reads["read"]) == 5 and len(reads["decoded"]) == 2 and report.reused == 6
    assert_as_fresh(src, out, tmp_path)


def test_a_list_in_another_order(src, tmp_path, reads):
    out, names = tmp_path / "out", sorted(path.name for path in src.iterdir())
    (src / "list.txt").write_text("\n".join(names))
    cache(src / "list.txt", out)
    reads["read"].clear(), reads["decoded"].clear()
    (src / "list.txt").write_text("\n".join(reversed(names[2:])))
    update(src / "list.txt", out, Forbidden(random_model()))
    assert reads["read"] == []
    assert_as_fresh(src / "list.txt", out, tmp_path)
