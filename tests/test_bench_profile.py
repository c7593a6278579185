"""The study of imperfect cost tables: its variants, its groups and the arithmetic of its rows."""

import contextlib
import itertools
import json
import math

import msgspec
import numpy as np
import pytest

from benchmarks import bench_profile, cells
from benchmarks.arms import Arm
from benchmarks.bench_profile import (
    Contender,
    choose_contenders,
    joined,
    parse_args,
    study_rows,
)
from benchmarks.cells import Cell, Result
from benchmarks.counters import TREE_MEANS, tree_means
from benchmarks.pairs import Pair
from benchmarks.streams import Answer
from benchmarks.variant_figure import error_points
from benchmarks.variants import (
    DEFAULT_VARIANTS,
    PASSES,
    Variant,
    ends_only,
    groups,
    one_context,
    parse_variant,
    table_error,
    with_errors,
    with_wrong_rows,
)
from cast_sglang.profiles import load_profile, save_profile
from tests.builders import make_profile, make_table

COUNTS = (1, 2, 4, 8, 16, 32)
WIDE = {"batch_sizes": (1, 4, 8), "contexts": (128, 512, 1024)}


@pytest.fixture
def right():
    return make_profile(
        target=make_table(token_counts=COUNTS, **WIDE),
        draft=make_table(base_us=100.0, **WIDE),
        draft_extend=make_table(base_us=150.0, token_counts=COUNTS, **WIDE),
        plain=make_table(base_us=900.0, token_counts=(1,), **WIDE),
        step_overhead_us=[50.0, 80.0, 90.0],
    )


def times(table) -> np.ndarray:
    return np.asarray(table.time_us)


@pytest.mark.parametrize("name", DEFAULT_VARIANTS)
def test_every_variant_is_a_valid_profile_of_the_same_host(right, tmp_path, name):
    variant = parse_variant(name)
    profile = right if variant.change is None else variant.change(right)
    save_profile(profile, tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json").provenance == right.provenance


def test_errors_have_the_size_they_claim_and_their_seed():
    flat = make_table(
        batch_sizes=tuple(range(1, 11)), contexts=tuple(range(1, 21)), token_counts=COUNTS
    )
    right = make_profile(target=flat, draft=flat, draft_extend=flat, step_overhead_us=None)
    wrong = with_errors(right, 0.5, seed=3)
    logs = [np.log(times(getattr(wrong, name)) / times(getattr(right, name))) for name in PASSES]
    assert np.std(logs) == pytest.approx(math.log(1.5), rel=0.05)
    assert np.mean(logs) == pytest.approx(0.0, abs=0.03)
    # Each entry has a draw of its own, and each table other draws than the next.
    assert len(np.unique(np.round(logs, 12))) == np.size(logs)
    assert wrong.plain == right.plain
    assert with_errors(right, 0.5, seed=3) == wrong
    assert with_errors(right, 0.5, seed=4) != wrong
    # The same draws, closer to 1.
    small = np.log(times(with_errors(right, 0.05, seed=3).target) / times(right.target))
    np.testing.assert_allclose(small / math.log(1.05), logs[0] / math.log(1.5))


def test_one_context_keeps_the_shortest(right):
    thin = one_context(right)
    for name in (*PASSES, "plain"):
        ours, theirs = getattr(thin, name), getattr(right, name)
        assert (ours.batch_sizes, ours.contexts) == (theirs.batch_sizes, [128])
        np.testing.assert_array_equal(times(ours), times(theirs)[:, :1])
    assert thin.step_overhead_us == right.step_overhead_us


def test_ends_only_keeps_the_corners(right):
    thin = ends_only(right)
    assert thin.target.batch_sizes == [1, 8]
    assert thin.target.contexts == [128, 1024]
    assert thin.target.token_counts == [1, 32]
    np.testing.assert_array_equal(times(thin.target), times(right.target)[::2, ::2, ::5])
    assert (thin.plain.token_counts, times(thin.plain).shape) == ([1], (2, 2, 1))
    assert thin.step_overhead_us == [50.0, 90.0]
    assert ends_only(thin) == thin


def test_wrong_rows_doubles_the_target_there_and_nothing_else(right):
    wrong = with_wrong_rows(right, (5, 16))
    factors = times(wrong.target) / times(right.target)
    np.testing.assert_array_equal(factors, np.broadcast_to([1, 1, 1, 2, 2, 1], factors.shape))
    assert msgspec.structs.replace(wrong, target=right.target) == right
    for rows in ((5, 7), (1, 32)):
        with pytest.raises(ValueError, match="some, not all"):
            with_wrong_rows(right, rows)


def test_names_say_how_the_server_reads_the_table():
    assert parse_variant("error-20").env == {"CAST_LOOKUP": "linear", "CAST_RESIDUALS": "off"}
    assert parse_variant("nearest").env == {"CAST_LOOKUP": "nearest", "CAST_RESIDUALS": "off"}
    corrected = parse_variant("wrong-rows+residuals")
    assert (corrected.env["CAST_RESIDUALS"], corrected.table) == ("on", "wrong-rows")
    assert parse_variant("right+residuals").change is None
    assert parse_variant("error-7.5@2").nominal_error == 0.075
    for wrong in ("", "right", "error-", "error-x", "wrong", "same+", "+residuals", "one"):
        with pytest.raises(ValueError, match="no variant"):
            parse_variant(wrong)


def test_table_error_is_measured_where_the_table_was_used(right):
    def error(profile, batch=4, contexts=(100, 300), **options):
        return table_error(profile, right, batch=batch, contexts=contexts, **options)

    double = make_table(base_us=2000.0, token_counts=COUNTS, **WIDE)
    doubled = msgspec.structs.replace(
        right,
        target=double,
        draft=make_table(base_us=200.0, **WIDE),
        draft_extend=make_table(base_us=300.0, token_counts=COUNTS, **WIDE),
    )
    assert error(right) == 0.0
    assert error(doubled) == pytest.approx(1.0, rel=1e-5)
    # At the context that was kept the table is right; far from it, it is not.
    assert error(one_context(right), contexts=(100, 128)) == pytest.approx(0.0, abs=1e-6)
    assert error(one_context(right), contexts=(900, 1000)) > 0.1
    # On the grid the lookup makes no difference.
    assert error(right, lookup="nearest", contexts=(512, 512)) == pytest.approx(0.0, abs=1e-6)
    assert error(right, lookup="nearest", contexts=(192, 192)) > 0.01


def test_groups_leave_room_for_the_right_table():
    assert groups(list("abcdefg"), at_once=4) == [list("abc"), list("def"), ["g"]]
    assert groups([], at_once=6) == []
    with pytest.raises(ValueError, match="--at-once"):
        groups(["a"], at_once=1)


def test_contenders_get_their_tables_flags_and_settings(right, tmp_path):
    save_profile(right, tmp_path / "right.json")
    quick = msgspec.structs.replace(
        right, provenance=msgspec.structs.replace(right.provenance, seconds=3.0)
    )
    save_profile(quick, tmp_path / "quick.json")
    words = ["--profile", str(tmp_path / "right.json"), "--out", str(tmp_path / "out")]
    words += ["--variants", "one-context,nearest,wrong-rows+residuals", "--thresholds", "2-2-1.5"]
    args = parse_args([*words, "--more", f"quick={tmp_path / 'quick.json'}"])
    made = choose_contenders(args, right, "DRAFT")
    names = ["right", "one-context", "nearest", "wrong-rows+residuals", "quick"]
    assert [contender.arm.name for contender in made] == names
    assert [contender.profile_seconds for contender in made] == [12.5, None, None, None, 3.0]
    assert [contender.arm.env["CAST_RESIDUALS"] for contender in made] == [
        "off", "off", "off", "on", "off",
    ]  # fmt: skip
    for contender in made:
        flags = dict(zip(contender.arm.flags[::2], contender.arm.flags[1::2], strict=True))
        assert flags["--cast-policy"] == "fixed"
        assert (flags["--cast-c1"], flags["--cast-c3"]) == ("2", "1.5")
        assert load_profile(flags["--cast-profile"]) == contender.profile


@pytest.mark.parametrize(
    "words",
    [
        ["--variants", "same,same"],
        ["--variants", "same", "--more", "same=x.json"],
        ["--more", "right=x.json"],
        ["--more", "../x=x.json"],
        ["--more", "x"],
        ["--wrong-rows", "5"],
        ["--at-once", "1"],
    ],
)
def test_wrong_command_lines_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--profile", "p.json", *words])
    assert "error:" in capsys.readouterr().err


def test_prompts_are_joined_round_the_end():
    assert joined(["a", "b", "c"], 2) == ["a\nb", "b\nc", "c\na"]
    assert joined(["a", "b"], 1) == ["a", "b"]


def test_tree_means_are_those_of_the_steps_between():
    fields = "steps requests layers_grown nodes_drafted nodes_verified predicted_us measured_us"
    before = dict.fromkeys(fields.split(), 100)
    gained = dict(zip(fields.split(), (10, 80, 45, 800, 480, 90.0, 120.0), strict=True))
    after = {name: before[name] + gained[name] for name in before}
    assert tree_means(before, after) == {
        "mean_layers": 4.5,
        "mean_nodes_drafted": 10.0,
        "mean_verify_rows": 6.0,
        "predicted_to_measured": 0.75,
    }
    assert set(tree_means(before, before).values()) == {None}


def contender(name: str, profile, **fields) -> Contender:
    return Contender(Variant(name, **fields), profile, Arm(name, "cast"), None)


def result(speeds: list[float], output: int = 1) -> Result:
    answer = Answer(
        counts=[1, 30], output_ids=[output], verify_passes=10, num_prompt_tokens=100 + output
    )
    return Result(tok_s=speeds, answers=[answer] * 2)


def test_rows_compare_with_the_right_table_within_a_repeat(right):
    group = [contender("right", right), contender("one-context", one_context(right))]
    # The machine halves its speed in the second repeat.
    results = {
        "right": result([20.0, 10.0, 20.0]),
        "one-context": result([18.0, 8.0, 19.0], output=2),
    }
    trees = {name: {"mean_layers": 2.0} for name in results}
    rows = study_rows(Cell(4, 0.0, "task"), 2, group, results, trees)
    reference, row = rows
    assert (reference["vs_right"], reference["vs_right_min"], reference["table_error"]) == (1, 1, 0)
    assert (row["vs_right"], row["vs_right_min"], row["vs_right_max"]) == (0.9, 0.8, 0.95)
    assert (row["tok_s_median"], row["tok_s_min"], row["tok_s_max"]) == (18.0, 8.0, 19.0)
    assert (row["variant"], row["group"], row["batch"]) == ("one-context", 2, 4)
    assert (row["accept_length"], row["mean_layers"]) == (3.0, 2.0)
    assert (row["contexts"], row["num_identical_to_right"]) == ([102, 132], 0)
    assert json.loads(json.dumps(rows)) == rows


def test_draws_of_one_error_become_one_point_and_the_figure_is_written(right, tmp_path):
    group = [contender("right", right)]
    group += [contender(f"error-20@{seed}", right, nominal_error=0.2) for seed in range(3)]
    group += [contender("same", right, nominal_error=0.0), contender("nearest", right)]
    group += [contender("error-20+residuals", right, nominal_error=0.2, residuals=True)]
    speeds = [[10.0] * 2, [9.0, 9.5], [8.0] * 2, [9.2] * 2, [10.0] * 2, [9.9] * 2, [10.0] * 2]
    results = {c.arm.name: result(values) for c, values in zip(group, speeds, strict=True)}
    trees = {c.arm.name: dict.fromkeys(TREE_MEANS) for c in group}
    rows = [
        row
        for batch in (1, 4)
        for row in study_rows(Cell(batch, 0.0, "t"), 1, group, results, trees)
    ]
    points = error_points(rows)
    assert list(points) == [0.0, 0.2]
    assert points[0.2] == (0.92, 0.8, 0.95)
    bench_profile.write(tmp_path, {"provenance": {"device": "d", "target": "m"}, "rows": rows})
    assert all((tmp_path / name).stat().st_size for name in ("speed.png", "speed.svg"))
    assert bench_profile.as_table(rows).row_count == len(rows)


def test_a_whole_study_without_servers(right, tmp_path, monkeypatch):
    runs: list[tuple[str, int, int]] = []  # arm, requests, tokens
    counters = dict.fromkeys(itertools.chain(*TREE_MEANS.values()), 0)

    class FakeServer:
        def __init__(self, name: str) -> None:
            self.name = name
            self.counters = dict(counters)

        def get(self, path: str) -> dict:
            assert path == "/server_info"
            return {"internal_states": [{"cast": dict(self.counters)}]}

    started: list[list[str]] = []

    @contextlib.contextmanager
    def serving(arms, model, log_dir, flags):
        log_dir.mkdir(parents=True)
        started.append([arm.name for arm in arms])
        yield {arm.name: FakeServer(arm.name) for arm in arms}

    def run(server, prompts, cell, num_tokens):
        runs.append((server.name, len(prompts), num_tokens))
        for name in counters:
            server.counters[name] += 2 if name == "layers_grown" else 1
        answers = [Answer(counts=[num_tokens], verify_passes=8, num_prompt_tokens=100)]
        return 10.0, answers * len(prompts)

    monkeypatch.setattr(bench_profile, "serving", serving)
    monkeypatch.setattr(bench_profile, "choose_pair", lambda args: (Pair("a/t", "a/d"), "note"))
    for module in (bench_profile, cells):
        monkeypatch.setattr(module, "run", run)

    def play(server, prompts, cell, lengths):
        return run(server, prompts, cell, max(lengths))[::-1]

    monkeypatch.setattr(cells, "play", play)
    save_profile(right, tmp_path / "right.json")
    (tmp_path / "task.jsonl").write_text('{"prompt": "x"}\n' * 3)
    words = f"--profile {tmp_path}/right.json --out {tmp_path}/out --prompts {tmp_path}/task.jsonl"
    words += " --variants error-20,ends-only,right+residuals --at-once 3 --batches 1,4"
    words += " --repeats 2 --tokens 40 --requests 4 --settle-tokens 90"
    assert bench_profile.main(words.split()) == 0

    assert started == [["right", "error-20", "ends-only"], ["right", "right+residuals"]]
    content = json.loads((tmp_path / "out/results.json").read_text())
    assert content["provenance"]["profile"]["seconds"] == 12.5
    assert len(content["rows"]) == 2 * 5
    # Three waves of 40 tokens are the first that hold 90; then 16 to warm up, then the repeats.
    corrected = [(count, tokens) for name, count, tokens in runs if name == "right+residuals"]
    turns = [(4, 40)] * 2, [(12, 40)] * 2
    assert corrected == [(3, 40), (1, 16), *turns[0], (12, 40), (4, 16), *turns[1]]
    for row in content["rows"]:
        assert (row["vs_right"], row["mean_layers"], row["accept_length"]) == (1.0, 2.0, 5.0)
