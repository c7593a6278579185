"""The simulated time line, on cases computed by hand."""

import json

import pytest

from benchmarks import timeline
from benchmarks.step_designs import (
    DESIGNS,
    HostCosts,
    PassTimes,
    Setting,
    Tree,
    program,
    useful_us,
)
from benchmarks.step_simulation import DEVICE, HOST, Launch, Read, Wait, Work, simulate

# Nothing but passes: a launch is free, a value is on the host at once.
FREE = HostCosts(**dict.fromkeys(HostCosts.__dataclass_fields__, 0.0))
TIMES = PassTimes(lambda width: 100.0, lambda rows: 5000.0, lambda rows: 130.0)


def setting(host=FREE, passes=3, has_overlap=True):
    return Setting(TIMES, host, Tree(passes, 4, 8), Tree(7, 8, 32), Tree(4, 4, 8), has_overlap)


def step_us(setting, design, num_steps=6):
    """Return the time from the end of one step's extend pass to the next one's."""
    run = simulate(
        program(setting, design, num_steps), setting.host.read_us, setting.host.latency_us
    )
    ends = [span.end_us for span in run.spans if (span.track, span.name) == (DEVICE, "extend")]
    assert len(ends) == num_steps
    return ends[-1] - ends[-2]


def spans(run, track):
    return [(s.name, s.begin_us, s.end_us) for s in run.spans if s.track == track]


def test_launches_queue_up_behind_a_busy_device():
    run = simulate([Launch("a", 10, 100), Launch("b", 10, 50)], read_us=5, launch_latency_us=4)
    assert spans(run, HOST) == [("a", 0, 10), ("b", 10, 20)]
    assert spans(run, DEVICE) == [("a", 14, 114), ("b", 114, 164)]


def test_a_read_arrives_after_the_device_and_only_a_wait_costs():
    ops = [
        Launch("a", 10, 100),
        Read("gain", 6),
        Work("other", 20),
        Wait("gain"),
        Work("policy", 1),
    ]
    run = simulate(ops, read_us=5)
    assert spans(run, HOST)[-3:] == [("other", 16, 36), ("gain", 36, 115), ("policy", 115, 116)]
    # It was there long ago.
    late = simulate([*ops[:2], Work("other", 500), Wait("gain")], read_us=5)
    assert late.total_us(HOST, "wait") == 0
    # Of an idle device, after its own submission.
    idle = simulate([Read("gain", 6), Wait("gain")], read_us=5)
    assert spans(idle, HOST)[-1] == ("gain", 6, 11)


def test_single_kernels_are_bound_by_launches_or_by_the_device():
    slow_launches = simulate([Launch("k", 40, 12, count=4)], read_us=0)
    assert spans(slow_launches, DEVICE)[0] == ("k", 10, 13)
    assert spans(slow_launches, DEVICE)[-1] == ("k", 40, 43)
    slow_device = simulate([Launch("k", 4, 40, count=4)], read_us=0)
    assert spans(slow_device, DEVICE)[-1] == ("k", 31, 41)


def test_a_cut_shortens_what_crosses_it():
    run = simulate([Launch("a", 10, 100), Launch("b", 10, 50)], read_us=0).cut(50, 120)
    assert spans(run, DEVICE) == [("a", 50, 110), ("b", 110, 120)]
    assert run.total_us(HOST) == 0


@pytest.mark.parametrize("ops", [[Wait("never read")], [Work("w", -1.0)], [Launch("k", 0, -1.0)]])
def test_impossible_programs_are_refused(ops):
    with pytest.raises(ValueError):
        simulate(ops, read_us=0)


@pytest.mark.parametrize("design", DESIGNS)
def test_without_host_costs_only_surplus_passes_are_lost(design):
    surplus = {"async": 100, "device": 400, "blind": 400}.get(design, 0)
    assert step_us(setting(), design) == pytest.approx(useful_us(setting(), design) + surplus)


def test_at_the_greatest_depth_nothing_is_surplus():
    for design in DESIGNS:
        full = setting(passes=7)
        assert step_us(full, design) == pytest.approx(useful_us(full, design))


def test_a_decision_costs_its_read_its_python_and_its_launch():
    host = HostCosts(**{**vars(FREE), "read_us": 10.0, "layer_us": 20.0, "graph_us": 12.0})
    # Layers 0 to 3 and the number of rows are read; after the last layer nothing is launched, so
    # that the next wait begins later by the Python alone. Then rows: read, Python, verify's launch.
    lost = 4 * (10 + 20) + 3 * 12 + (10 + 20 + 12)
    assert step_us(setting(host), "sync") == pytest.approx(useful_us(setting(host), "sync") + lost)
    # One pass more; the first one waits for nothing, each read hides behind a pass.
    assert step_us(setting(host), "async") == pytest.approx(
        useful_us(setting(host), "async") + 100 + (10 + 20 + 12)
    )
    assert step_us(setting(host), "blind") == pytest.approx(useful_us(setting(host), "blind") + 400)


def test_overlap_hides_the_scheduler():
    host = HostCosts(**{**vars(FREE), "scheduler_us": 500.0})
    for design in DESIGNS:
        hidden, shown = (step_us(setting(host, has_overlap=o), design) for o in (True, False))
        assert shown - hidden == pytest.approx(500)


def test_an_unknown_design_is_refused():
    with pytest.raises(ValueError, match="none of static"):
        program(setting(), "perfect", 1)


def test_command_writes_numbers_and_pictures(tmp_path, capsys):
    argv = ["--example", "draft=100,verify=5000,extend=130", "--batch", "1,64"]
    assert timeline.main([*argv, "--host-layer-us", "33", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "timeline.json").read_text())
    assert result["inputs"]["is_measured"] is False
    assert result["inputs"]["host"]["layer_us"] == 33
    assert [batch["batch"] for batch in result["batches"]] == [1, 64]
    for batch in result["batches"]:
        assert [row["design"] for row in batch["designs"]] == list(DESIGNS)
        for row in batch["designs"]:
            assert row["lost_us"] == pytest.approx(row["step_us"] - row["useful_us"], abs=0.2)
            host = sum(row[f"host_{part}_us"] for part in ("launch", "work", "wait"))
            assert host == pytest.approx(row["step_us"], abs=0.5)
        assert (tmp_path / f"batch-{batch['batch']}.svg").stat().st_size > 1000
    assert (
        "made-up" in (tmp_path / "batch-1.svg").read_text()
        or "simulated" in capsys.readouterr().out
    )


def test_device_times_of_a_profile(tmp_path):
    from benchmarks.pairs import ROOT
    from cast_sglang.profiles import load_profile

    path = ROOT / "profiles" / "amd-epyc-2-cores__tiny-170m__tp1__bfloat16.json"
    table = load_profile(path).target
    argv = ["--profile", str(path), "--batch", "4", "--trees", "2-4-8", "--context", "512"]
    args = timeline.parse_args([*argv, "--out", str(tmp_path)])
    axes = [table.batch_sizes.index(4), table.contexts.index(512), table.token_counts.index(8)]
    expected = table.time_us[axes[0]][axes[1]][axes[2]]
    assert timeline.pass_times(args, 4).verify(8) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--example", "draft=1"], "draft=100,verify=5000"),
        (["--example", "draft=1,verify=2,extend=3", "--trees", "1-1"], "PASSES-WIDTH-ROWS"),
        (["--example", "draft=1,verify=2,extend=3", "--trees", "1-1-2"], "1 trees for 4"),
        (["--example", "draft=1,verify=2,extend=3", "--batch", "0"], "--batch"),
        ([], "--profile"),
    ],
)
def test_a_wrong_command_line_says_what_is_allowed(argv, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        timeline.main([*argv, "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_a_missing_profile_is_one_line(tmp_path, capsys):
    argv = ["--profile", str(tmp_path / "none.json"), "--out", str(tmp_path)]
    assert timeline.main(argv) == 2
    assert "none.json" in capsys.readouterr().err
