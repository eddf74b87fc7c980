"""Two runs side by side: a regression shows, noise does not."""

from __future__ import annotations

import pytest
from bench_lines import caching, call, ceilings, check, launch, write

from bench import compare


@pytest.fixture
def sides(tmp_path):
    before = [
        ceilings(),
        check("expand"),
        call("model", "ours", 10.0),
        launch("expand", 100.0),
        launch("grn", 5.0),
        caching(1000.0),
    ]
    after = [
        ceilings(tflops=1.0),
        call("model", "ours", 11.0, commit="b" * 12),
        launch("expand", 101.0),
        launch("project", 90.0),
        caching(2000.0),
    ]
    return str(write(tmp_path / "a.jsonl", *before)), str(write(tmp_path / "b.jsonl", *after))


def test_a_regression_shows_first(sides, capsys):
    assert compare.main([*sides]) == 0
    _, _, *rows, _, mean = capsys.readouterr().out.splitlines()
    assert "model" in rows[0] and "| 10 | 11 | 1.100 | 10.0 % slower |" in rows[0]
    assert "expand" in rows[1] and "same within noise" in rows[1]
    assert "cache" in rows[2] and "50.0 % faster" in rows[2]
    assert "not measured after" in "".join(r for r in rows if "grn" in r)
    assert "not measured before" in "".join(r for r in rows if "project" in r)
    # ceilings and checks are no figures of ours
    assert len(rows) == 5
    assert mean == f"geometric mean of 3 ratios: {(1.1 * 1.01 * 0.5) ** (1 / 3):.3f}"


def test_failing_on_a_regression(sides):
    assert compare.main([*sides, "--fail-above", "5"]) == 1
    assert compare.main([*sides, "--fail-above", "15"]) == 0
    assert compare.main([*reversed(sides), "--fail-above", "5"]) == 1


def test_a_noisy_figure_is_no_regression(tmp_path):
    quiet, loud = call("model", "ours", 10.0), call("model", "ours", 11.0, p20=9.0, p80=13.0)
    paths = [str(write(tmp_path / f"{i}.jsonl", line)) for i, line in enumerate((quiet, loud))]
    assert compare.main([*paths, "--fail-above", "1"]) == 0


def test_commits_of_a_folder(tmp_path, capsys):
    write(tmp_path / "r" / "m.jsonl", call("model", "ours", 10.0), call("model", "ours", 5.0, commit="bbbb"))
    assert compare.main(["aaaa", "bbbb", "--results", str(tmp_path)]) == 0
    assert "| 10 | 5 | 0.500 | 50.0 % faster |" in capsys.readouterr().out
    assert compare.main(["aaaa", "cccc", "--results", str(tmp_path)]) == 2
    assert "cccc is neither a file nor a commit" in capsys.readouterr().err


def test_a_missing_figure_says_why(tmp_path, capsys):
    line = call("model", "ours", 1.0)
    gone = {k: v for k, v in line.items() if k != "ms"} | {"missing": "out of memory: 3 GiB"}
    a, b = write(tmp_path / "a.jsonl", line), write(tmp_path / "b.jsonl", gone)
    assert compare.main([str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "after: out of memory: 3 GiB" in out and "nothing in common" in out
