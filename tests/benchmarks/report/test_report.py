"""The report: its numbers, its page in a browser, and the tables of the documents."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.report import __main__ as report
from benchmarks.report.ablation import switched, table
from benchmarks.report.data import (
    base_of,
    latest,
    load_runs,
    normalised,
    speed_ratio,
)
from benchmarks.report.figures import styles_of
from benchmarks.report.page import Grid, Heading, Paragraph, as_html, markdown_of
from benchmarks.report.readme import (
    README,
    RESULTS,
    blocks_of,
    in_four_rows,
    marked,
    overview,
    results_shown,
)
from benchmarks.report.tables import cold, headline, how_measured, in_short
from cast_sglang.costs.profiles import save_profile
from tests.support.builders import make_profile
from tests.support.reported import ARMS, ORIGIN, SPEEDS, rows_of

ROOT = Path(__file__).resolve().parents[3]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
WATCH = """<script>
const found = {errors: [], refused: []};
addEventListener("error", e => found.errors.push(String(e.message || e.target.tagName)), true);
addEventListener("securitypolicyviolation", e => found.refused.push(e.blockedURI));
addEventListener("load", () => {
  found.images = [...document.images].map(image => image.naturalWidth);
  found.requests = performance.getEntriesByType("resource").map(entry => entry.name)
    .filter(name => !name.startsWith("data:"));
  found.isWide = document.documentElement.scrollWidth > innerWidth;
  const output = document.createElement("pre");
  output.id = "found";
  output.textContent = JSON.stringify(found);
  document.body.append(output);
});
</script>"""


@pytest.fixture
def page(tmp_path, results):
    """Return the path of a page with everything on it."""
    save_profile(make_profile(), tmp_path / "profile.json")
    point = {"first_depth": 1, "num_nodes": 20.0, "drafted": 0.5, "calibrated": 0.4}
    points = [{**point, "accepted": 0.45}, {**point, "drafted": 0.9, "accepted": 0.8}]
    content = {"provenance": ORIGIN, "errors": {"drafted": 0.1}, "points": points}
    (tmp_path / "reliability.json").write_text(json.dumps(content))
    words = [results, "--profile", tmp_path / "profile.json"]
    words += ["--reliability", tmp_path / "reliability.json"]
    assert report.main([*map(str, words), "--out", str(tmp_path / "page")]) == 0
    return tmp_path / "page/report.html"


def test_the_page_needs_nothing_else_and_links_to_what_is_there(page):
    text = page.read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#|numbers/)""", text)
    assert "url(" not in text and "<script" not in text and "Device &lt;1&gt;" in text
    links = re.findall(r'href="(numbers/[^"]+)"', text)
    assert {Path(link).suffix for link in links} == {".json", ".csv"}
    assert all((page.parent / link).is_file() for link in links)
    markdown = (page.parent / "report.md").read_text()
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", markdown)
    # Of the complete run, for each of two workloads; of the other, settings; profile, reliability.
    assert text.count("<img") == len(pictures) == len(set(pictures)) == 2 * 3 + 1 + 2
    assert all((page.parent / name).read_bytes().count(b"</svg>") == 1 for name in pictures)
    for words in ("no success in itself", "This run was cut short", "have no spread"):
        assert words in text and words in markdown
    assert "To have them" not in text


def test_no_ratio_of_ideal_speeds_is_called_a_bound(page):
    """Both passes and plain steps by the table are ideal, so their ratio bounds nothing."""
    for path in (page, *page.parent.glob("pictures/*.svg")):
        text = re.sub(r"base64,[^\"]*", "", path.read_text())
        assert not re.search(r"\bbounds?\b", text), path


def test_what_was_not_given_is_left_out_with_the_command_that_makes_it(tmp_path):
    row = {"arm": "plain", "batch": 1, "temperature": 0.0, "task": "t", "tok_s": [1.0, 2.0]}
    row |= {"tok_s_median": 1.5, "tok_s_min": 1.0, "tok_s_max": 2.0, "vs_plain": 1.0}
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"provenance": ORIGIN, "rows": [row]}))
    assert report.main([str(old), "--out", str(tmp_path / "page")]) == 0
    text = (tmp_path / "page/report.html").read_text()
    for module in ("bench_serving", "studies.bench_calibration"):
        assert f"python -m benchmarks.{module} --" in text
    assert "cast-sglang profile" in text
    assert text.count("<img") == 0


def test_ratios_that_an_older_file_lacks_are_formed_from_its_repeats():
    rows = [
        {"arm": "plain", "tok_s": [10.0, 5.0], "tok_s_median": 7.5},
        {"arm": "static:5-4-8", "tok_s": [20.0, 11.0], "tok_s_median": 15.5},
        {"arm": "cast", "tok_s": [30.0, 20.0], "tok_s_median": 25.0},
    ]
    cell = {"batch": 1, "temperature": 0.0, "task": "t"}
    cast = normalised([{**row, **cell} for row in rows])[-1]
    assert (cast["vs_plain"], cast["vs_plain_min"], cast["vs_plain_max"]) == (3.5, 3.0, 4.0)
    assert cast["best_static"] == "static:5-4-8"
    assert (cast["vs_best_static_min"], cast["vs_best_static_max"]) == (1.5, 1.8182)
    assert cast["mean_layers"] is None


def test_groups_of_servers_give_the_same_tables_as_one(results):
    run = load_runs(results)[-1]
    warm = [row for row in rows_of(at_once=4) if row["phase"] == "warm"]
    parted = run._replace(rows=normalised(warm))
    assert {row["group"] for row in parted.rows} == {1, 2, 3}
    assert sum(row["arm"] == "plain" for row in parted.rows) == 4
    ours, theirs = (
        [sorted(block.rows) for block in headline(one) if isinstance(block, Grid)]
        for one in (run, parted)
    )
    assert ours == theirs
    assert sorted(table(switched(parted.rows[:16])).rows) == sorted(
        table(switched(run.rows[:16])).rows
    )


def test_headlines_have_means(results):
    run = latest(load_runs(results))
    assert run.is_complete and not load_runs(results)[0].is_complete
    title, table, *_ = headline(run)
    assert title == Paragraph("**code, greedy**")
    auto = [line for line in table.rows if line[1] == "CAST auto"]
    assert [line[0] for line in auto] == ["1", "8", "all"]
    assert auto[0][2:] == ("**72.0** (64.8 to 79.2)", "1.80x", "1.20x", "4.00")
    assert auto[2][2:] == ("", "1.80x", "1.20x", "")


def test_fresh_servers_are_shown_beside_warm_ones(results):
    run = latest(load_runs(results))
    assert {row["phase"] for row in run.rows} == {"warm"}
    [grid] = cold(run)
    lines = {(line[0], line[1]): line[2:] for line in grid.rows}
    assert len(lines) == 2 * len(ARMS)
    assert lines["8", "CAST auto"] == (
        *("288 (259 to 317)", "0.90x", "1.80x", "0.60x", "1.20x"),
        "3",
    )
    assert lines["1", "EAGLE-3 3-1-4 (best static)"][1:5] == ("1.50x", "1.50x", "1.00x", "1.00x")
    # Cold cells are in no other table, and a warm cell that is missing has no ratios.
    assert cold(run._replace(cold=())) == []
    [grid] = cold(run._replace(rows=[]))
    assert {line[4] for line in grid.rows} == {"-"}


def test_the_overview_has_a_column_for_each_batch_size_and_the_arms_that_matter(results):
    [title, table, *_] = overview(latest(load_runs(results)))
    assert title == Paragraph("**code, greedy**")
    assert table.headings[1:] == ["arm", "batch 1", "batch 8"]
    lines = {(line[0], line[1]): line[2:] for line in table.rows}
    names = {name for _, name in lines}
    assert names == {
        *("plain", "EAGLE-3 5-4-8", "EAGLE-3, best of the grid", "SGLang adaptive", "CAST auto"),
        "CAST fixed",
    }
    assert lines["tokens/s", "CAST auto"][0] == "72.0 (64.8 to 79.2)"
    assert lines["vs plain", "EAGLE-3, best of the grid"] == ["1.50x", "1.50x"]
    assert lines["vs best static", "CAST auto"] == ["1.20x", "1.20x"]
    assert ("vs plain", "plain") not in lines and ("accept length", "plain") not in lines


def test_arms_that_differ_by_settings_are_compared(results):
    arms = ["cast:auto", "cast:auto+a=1", "cast:auto+b=2+a=1", "cast", "static:5-4-8+--x"]
    bases = [base_of(arm, arms) for arm in arms]
    assert bases == [None, "cast:auto", "cast:auto+a=1", None, None]
    rows = {row["arm"]: row for row in load_runs(results)[-1].rows[:8]}
    ratio = speed_ratio(rows["cast:auto+calibration=off"], rows["cast:auto"])
    assert ratio.median == pytest.approx(17 / 18, abs=1e-4) and ratio.low == ratio.high


def test_a_run_is_told_in_short(results):
    texts = in_short(load_runs(results)[-1])
    assert len(texts) == 2 and texts[0].startswith("code, greedy, batch 1 to 8: ")
    assert "**CAST auto** 1.80x (1.20x)" in texts[0] and "calibration" not in texts[0]


def test_what_failed_and_what_was_resumed_is_said(results):
    run = load_runs(results)[0]
    lost = {"arm": "cast:auto", "batch": 8, "temperature": 0.0, "task": "code", "error": "gone"}
    part = {"date": "2026-01-03", "git_commit": "abc", "command": "python x --resume"}
    origin = {**run.provenance, "failures": [lost], "resumed": [part]}
    lines = dict(how_measured(run._replace(provenance=origin)).rows)
    assert lines["failed: `cast:auto`"] == "code, greedy, batch 8: gone"
    assert lines["resumed"] == "2026-01-03, commit abc: `python x --resume`"


def test_styles_tell_arms_apart():
    arms = [*SPEEDS, "cast:fixed", *(f"static:{n}-1-2" for n in range(3, 6))]
    styles = styles_of(arms)
    assert len(set(styles.values())) == len(set(arms))
    # More arms later leave the first ones as they were.
    assert styles_of(arms[:4]) == {arm: styles[arm] for arm in arms[:4]}


def test_blocks_escape_what_they_hold():
    blocks = [Heading("A & <b>"), Grid(["x"], [["`a|b` **c** [d](e.html)"]])]
    text = as_html("t", blocks)
    assert '<a href="#a-b">A &amp; &lt;b&gt;</a>' in text
    assert '<code>a|b</code> <strong>c</strong> <a href="e.html">d</a>' in text
    assert "`a\\|b`" in markdown_of(blocks)


def test_the_readme_has_four_rows(results):
    [grid, how] = in_four_rows(latest(load_runs(results)))
    assert grid.headings == ["tokens/s", "batch 1", "batch 8"]
    plain, default, best, auto = grid.rows
    assert plain == ["plain decoding", "40.0", "320"]
    assert default == ["EAGLE-3, 5-4-8", "56.0 (1.40x)", "448 (1.40x)"]
    assert best[0].startswith("EAGLE-3, best") and best[1:] == ["60.0 (1.50x)", "480 (1.50x)"]
    assert auto == ["**CAST, `auto`**", "72.0 (1.80x)", "576 (1.80x)"]
    assert how.text.startswith("Device <1>; code, greedy; medians of 3 repeats")


def test_the_documents_are_rewritten_between_their_markers(tmp_path, results):
    documents = [tmp_path / README, tmp_path / RESULTS]
    words = [str(results), "--update-docs", str(tmp_path)]
    (tmp_path / "docs").mkdir()
    old = "# Name\n\n<!-- results:begin -->\nold\n<!-- results:end -->\n\nrest\n"
    documents[0].write_text(old)
    documents[1].write_text("# Name\n")
    assert report.main(words) == 1 and documents[0].read_text() == old
    documents[1].write_text(old)
    assert report.main(words) == 0
    texts = [document.read_text() for document in documents]
    for document, text in zip(documents, texts, strict=True):
        assert text.startswith("# Name\n\n<!-- results:begin -->\n")
        assert text.endswith("\n\nrest\n") and "old" not in text
        assert "bench/results.json --update-docs . -->" in text
        assert results_shown(document, tmp_path) == [results]
    assert "CAST, `auto`" in texts[0] and "accept length" not in texts[0]
    assert "[All numbers and their command](../bench/results.json)" in texts[1]
    assert report.main(words) == 0
    assert texts == [document.read_text() for document in documents]


@pytest.mark.parametrize("name", [README, RESULTS], ids=str)
def test_the_documents_show_what_was_measured(name):
    results = results_shown(ROOT / name, ROOT)
    assert marked(ROOT / name) == blocks_of(ROOT, results)[name], (
        "python -m benchmarks.report RESULTS.json --update-docs ."
    )


def browse(page: Path) -> tuple[dict, list[str]]:
    """Return what a page's own watch found in a browser, and what its console said."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    flags += ["--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={page.parent}/user"]
    flags += ["--virtual-time-budget=20000", "--window-size=1280,1000", "--dump-dom"]
    command = [CHROMIUM, *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(found[1]), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium; Debian's package is `chromium`")
def test_a_browser_finds_nothing_missing(page, tmp_path):
    text = page.read_text().replace(
        "default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';"
    )
    watched = page.with_name("watched.html")
    watched.write_text(text.replace("<head>", f"<head>{WATCH}", 1))
    found, console = browse(watched)
    assert len(found["images"]) == text.count("<img") and min(found["images"]) > 0
    assert (found["errors"], found["refused"], found["requests"]) == ([], [], [])
    assert not console and not found["isWide"]
    # The same watch sees what is wrong with a page where everything is.
    wrong = '<img src="data:image/png;base64,AAAA"><img src="http://127.0.0.1:9/x.png">'
    watched.write_text(
        text.replace("<head>", f"<head>{WATCH}", 1).replace(
            "</body>", f"{wrong}<script>missing()</script></body>"
        )
    )
    found, console = browse(watched)
    assert found["images"][-2:] == [0, 0] and found["refused"] and console
    assert any("missing" in error for error in found["errors"])
