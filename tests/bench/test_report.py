"""The report: every number from a file, every absence said, and README.md never behind the files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from bench_lines import GPU, caching, call, ceilings, check, launch, write

import bench
from bench import _figures as figures
from bench import _records as records
from bench import _tables, report
from bench.__main__ import COMMANDS, RESULTS_PAGE, listing
from bench.__main__ import main as entry
from bench.model import NAMED

ROW = "card: encode 256x256, batch 128"
README = f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nthe rest\n"


@pytest.fixture
def project(tmp_path):
    """A README with markers and a folder of results, as options of the command."""
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "results").mkdir()
    return tmp_path, ["--results", str(tmp_path / "results"), "--readme", str(tmp_path / "README.md")]


def lines():
    over = {"full_capacitor/eager": 1.9, "full_capacitor/torch.compile max-autotune": 1.45}
    return (
        ceilings(),
        call("model", "ours", 7.25, row=ROW, over=over),
        call("model", "eager", 13.8, row=ROW),
        call("model", "torch.compile max-autotune", 10.5, row=ROW),
        call("flux2", "ours", 7.3, row=ROW, over={"flux2/eager": 19.4, "flux2/eager, channels_last": 15.2}),
        call("flux2", "eager", 141.6, model="flux2", row=ROW, peak_bytes=2000 << 20),
        call("flux2", "eager, channels_last", 111.0, model="flux2", row=ROW, peak_bytes=2500 << 20),
        launch("expand", 400.0),
        caching(5000.0),
    )


def row_of(text: str, name: str) -> list[str]:
    return [part.strip() for part in next(x for x in text.splitlines() if x.startswith(f"| {name} |")).split("|")[1:-1]]


def test_committed_tables_are_those_of_the_committed_files():
    assert report.main(["--check"]) == 0, "run python -m bench report"


def test_nothing_measured_is_said_once(project):
    folder, options = project
    assert report.main(options) == 0
    text, page = (path.read_text() for path in (folder / "README.md", folder / "results" / "README.md"))
    for page_or_readme in (text, page):
        assert page_or_readme.count("Nothing has been measured on a GPU yet: `python -m bench gpu") == 1
        # figures can only come from the published tables then
        for *_, name in NAMED:
            values = [None if cell == "-" else float(cell) for cell in row_of(page_or_readme, name)[1:]]
            assert tuple(values) == _tables.PUBLISHED[name]
    assert _tables.NOTHING not in text
    assert page.split("## Reconstruction")[1].split("##")[0].count(_tables.NOTHING) == 1


def test_what_is_modelled_stands_beside_what_is_published_until_something_is_measured(project):
    folder, options = project
    (folder / "results" / "model.md").write_text(
        "| RTX 5090 | encode 128x256² | 18.367 | 18.323 | 0.044 | 16.470 | 90% | 18.361 | +0.0% |\n"
        "| RTX 5090 | encode 128x256² fp8 | 5.670 | 5.625 | 0.044 | 4.415 | 78% | - | - |\n"
        "| H200 | decode 1x512² | 0.359 | 0.303 | 0.056 | 0.142 | 40% | 0.488 | -26.5% |\n"
    )
    assert report.main(options) == 0
    text = (folder / "README.md").read_text()
    assert row_of(text, "encode 128x256²")[1:] == ["383.41", "42.56", "**18.4**", "5.67", "16.5"]
    assert row_of(text, "decode 1x512²")[1:] == ["-", "7.34", "**-**", "-", "-"]
    assert text.count("Nothing has been measured on a GPU yet") == 1
    write(folder / "results" / "model.jsonl", *lines())
    assert report.main(options) == 0
    assert "modelled" not in (folder / "README.md").read_text()


def test_numbers_are_those_of_the_files(project):
    folder, options = project
    write(folder / "results" / "nested" / "model.jsonl", *lines())
    assert report.main(options) == 0
    text = (folder / "README.md").read_text()
    assert GPU in text and "torch 2.11.0" in text and "ceilings 800 TFLOP/s and 4000 GB/s" in text
    row = row_of(text, ROW)
    # over the fastest form of FLUX.2, beside it over eager, whose memory is compared
    assert row[1:8] == ["7.25", "17655", "1.90x", "1.45x", "15.20x", "19.40x", "5.0"]
    # a row without a line is absent, not guessed
    assert set(row_of(text, "card: encode 512x512, batch 32")[1:8]) == {_tables.NOTHING}
    page = (folder / "results" / "README.md").read_text()
    assert row_of(page, "expand")[3:6] == ["400", "500", "750"]
    assert "JPEG 500x375 to 256x256, 4096 files | 5000 |" in page
    assert report.main([*options, "--check"]) == 0


def test_the_page_names_the_form_of_flux2(project):
    folder, options = project
    compiled = call("flux2", "torch.compile", 90.0, model="flux2", row=ROW)
    beside = call("flux2", "ours", 7.3, row=ROW, over={"flux2/eager": 19.4, "flux2/torch.compile": 12.3})
    no_memory = {k: v for k, v in compiled.items() if k != "ms"} | {"missing": "out of memory: 3 GiB"}
    for more, ms, form, ratio in (
        ((), "111", "eager, channels_last (without figures: eager, our attention, torch.compile)", "15.20x"),
        ((no_memory,), "111", "eager, channels_last (without figures: eager, our attention, torch.compile)", "15.20x"),
        (
            (compiled, beside | {"date": "2026-02-01T00:00:00Z"}),
            "90.0",
            "torch.compile (without figures: eager, our attention)",
            "12.30x",
        ),
    ):
        write(folder / "results" / "model.jsonl", *lines(), *more)
        report.main(options)
        page = (folder / "results" / "README.md").read_text()
        head, row = row_of(page, ""), row_of(page, ROW)
        found = dict(zip(head, row, strict=True))
        assert (found["FLUX.2, ms"], found["FLUX.2 as"], found["x FLUX.2"]) == (ms, form, ratio)
        assert (found["FLUX.2 eager, ms"], found["x FLUX.2 eager"]) == ("142", "19.40x")


def test_single_images_are_reported_with_and_without_low_latency(project):
    folder, options = project
    where = {"shape": ("decode", 1, 512), "row": "capacitor_decoder: decode 512x512, batch 1"}
    found = [call("model", "ours", 0.9, **where), call("model", "ours, low_latency", 0.6, **where)]
    write(folder / "results" / "model.jsonl", *found)
    report.main(options)
    for text in ((folder / "README.md").read_text(), (folder / "results" / "README.md").read_text()):
        assert row_of(text, where["row"])[1] == "0.900"
        assert row_of(text, f"{where['row']}, low_latency")[1] == "0.600"
        assert f"{ROW}, low_latency" not in text
    page = (folder / "results" / "README.md").read_text()
    assert row_of(page, "decode 1x512x512, low_latency")[1] == "0.600"


def test_the_self_check_is_reported_and_a_disagreement_reaches_the_readme(project):
    folder, options = project
    for rows, says, in_readme in (
        ((), "Self-check: not measured yet.", False),
        ((check("grn"), check("expand")), "Self-check: all 2 launches and calls agree with plain torch.", False),
        ((check("grn"), check("expand", ok=False, problem="too far")), "**Wrong: 1 of 2 checks", True),
    ):
        write(folder / "results" / "model.jsonl", *lines(), *rows)
        report.main(options)
        assert says in (folder / "results" / "README.md").read_text()
        assert (says in (folder / "README.md").read_text()) == in_readme


def test_text_around_the_markers_stays(project):
    folder, options = project
    report.main(options)
    text = (folder / "README.md").read_text()
    assert text.startswith("# Title\n\n<!--") and text.endswith("-->\n\nthe rest\n") and "\nold\n" not in text
    report.main(options)
    assert (folder / "README.md").read_text() == text


def test_stale_tables_are_found(project, capsys):
    folder, options = project
    report.main(options)
    write(folder / "results" / "model.jsonl", *lines())
    assert report.main([*options, "--check"]) == 1
    assert "README.md in" in capsys.readouterr().err
    assert "7.25" not in (folder / "README.md").read_text()


def test_a_readme_without_a_place_is_refused(project, capsys):
    folder, options = project
    (folder / "README.md").write_text("# Title\n")
    assert report.main([*options, "--check"]) == 1
    assert "add the lines <!-- results:begin -->" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ('{"bench": "sort"}', "of no known benchmark")])
def test_a_damaged_file_is_named(project, capsys, text, message):
    folder, options = project
    (folder / "results" / "x.jsonl").write_text(f"\n{text}\n")
    assert report.main(options) == 1
    err = capsys.readouterr().err
    assert "x.jsonl, line 2" in err and message in err


def test_cpu_runs_are_no_results(project):
    folder, options = project
    write(folder / "results" / "model.jsonl", call("model", "ours", 9.0, row=ROW, gpu=None, device="cpu"))
    report.main(options)
    text = (folder / "README.md").read_text()
    assert "Nothing has been measured" in text and "9.0" not in text


def test_the_newest_figure_wins_and_reasons_do_not_hide_figures():
    old, new = call("model", "ours", 9.0), call("model", "ours", 8.0, date="2026-02-01T00:00:00Z")
    late = {k: v for k, v in new.items() if k not in ("ms", "p20", "p80")}
    late |= {"missing": "out of memory: 1 GiB", "date": "2026-03-01T00:00:00Z"}
    (found,) = records.newest([old, new, late]).values()
    assert found["ms"] == 8.0
    (found,) = records.newest([late]).values()
    assert _tables.cell(found) == "none (out of memory)" and _tables.cell(old | {"noisy": True}) == "9.00 (noisy)"
    assert _tables.cell(late | {"refused": "differs"}) == "none (wrong result)"


def test_speedups_come_from_runs_in_which_both_were_timed():
    first = call("model", "ours", 8.0, over={"full_capacitor/torch.compile": 1.5})
    second = call("model", "ours", 8.1, over={"full_capacitor/eager": 1.8}, date="2026-02-01T00:00:00Z")
    results = _tables.Results([first, second])
    line = results.find(GPU, ("encode", 128, 256), "model", "full_capacitor", "ours")
    assert line["ms"] == 8.1
    assert results.speedup(line, "full_capacitor/torch.compile") == "1.50x"
    assert results.speedup(line, "full_capacitor/eager") == "1.80x"
    assert results.speedup(line, "flux2/eager") == _tables.NOTHING


@pytest.mark.parametrize(
    ("value", "text"), [(7.254, "7.25"), (0.01234, "0.0123"), (17655.2, "17655"), (99.95, "100.0"), (0.0, "0.00")]
)
def test_numbers_keep_three_digits(value, text):
    assert _tables.number(value) == text


def test_compiled_facts_are_those_of_the_table(tmp_path):
    head = "| 90 | k | bf16 | throughput | s | c | encode |"
    (tmp_path / "aot.md").write_text(f"{head} 100 | 0 | 4096 | 2 | - |\n{head} 168 | 8 | 1024 | 1 | - |\n")
    assert _tables.compiled_rows(tmp_path / "aot.md")[-1] == "| sm_90 | 2 | 168 | 8 | 4096 |"
    assert _tables.compiled_rows(tmp_path / "absent.md") == [_tables.NOTHING]


def test_every_committed_config_row_is_in_the_page():
    rows = _tables.compiled_rows(report.RESULTS / "aot.md")[2:]
    listed = len(re.findall(r"^\| \d+ \|", (report.RESULTS / "aot.md").read_text(), re.M))
    assert sum(int(row.split("|")[2]) for row in rows) == listed > 0


def test_psnr_files_become_rows(tmp_path):
    figures = {"mean": 36.6, "std": 4.6, "median": 36.5, "p5": 29.1, "p95": None, "count": 7}
    write(tmp_path / "psnr-photos.json", {"models": {"full_capacitor": figures}, "delta": None})
    rows = "\n".join(_tables.psnr_rows(tmp_path))
    assert row_of(rows, "full_capacitor (photos)")[1:] == ["36.60", "4.60", "36.50", "29.10", _tables.NOTHING, "7"]
    assert row_of(rows, "full_capacitor (card)")[1] == "36.62" and "released weights" not in rows


def test_every_command_feeds_a_page_that_exists_and_is_listed(project):
    folder, options = project
    write(folder / "results" / "model.jsonl", *lines())
    report.main(options)
    headings = re.findall(r"^#+ (.*)$", (folder / "results" / "README.md").read_text(), re.M)
    root = Path(bench.__file__).parents[1]
    public = [p for p in (root / "bench").glob("*.py") if not p.name.startswith(("_", "test_", "conftest"))]
    assert {root / command.file for command in COMMANDS} == set(public)
    for command in COMMANDS:
        assert f"{command.name} " in listing() and command.does in listing()
        _, _, tables = command.feeds.partition(f"{RESULTS_PAGE}: ")
        assert not tables or set(tables.split(", ")) <= set(headings), command


def test_the_package_runs_its_commands(capsys):
    with pytest.raises(SystemExit):
        entry(["compare", "--help"])
    assert "python -m bench compare" in capsys.readouterr().out
    assert entry([]) == 2 and "bench/compare.py" in capsys.readouterr().err
    assert entry(["compare", "no-such-file", "neither"]) == 2


def test_figures_show_what_there_is(tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install '.[bench]'")
    later = call("model", "ours", 6.5, row=ROW, commit="b" * 12, date="2026-02-01T00:00:00Z", over={"x/y": 2.0})
    drawn = figures.draw_all([*lines(), later], tmp_path)
    assert drawn == [f"{name}-nvidia-test.svg" for name in ("roofline", "speedup", "throughput", "history")]
    texts = {name: (tmp_path / name).read_text() for name in drawn}
    assert "expand" in texts["roofline-nvidia-test.svg"] and "aaaaaaa" in texts["history-nvidia-test.svg"]
    figures.draw_all([*lines(), later], tmp_path)
    assert texts == {name: (tmp_path / name).read_text() for name in drawn}
    # one commit is no history, and without launches there is no roofline
    assert figures.draw_all([call("model", "ours", 7.0, row=ROW)], tmp_path) == ["throughput-nvidia-test.svg"]
