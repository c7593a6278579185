"""What is counted of a cache, on a server that is made up."""

from types import SimpleNamespace

import pytest

from benchmarks.harness.talks import Reply
from benchmarks.studies import bench_capacity
from benchmarks.studies.bench_capacity import converse, parse_args, table


class FakeServer:
    """A server that finds all but the last three tokens of what it has heard."""

    url = "http://nowhere"

    def __init__(self, log_path):
        self.log_path, self.heard = log_path, []
        self.log_path.write_text("#retracted_reqs: 5, of before\n")

    def flush_cache(self):
        self.heard.clear()

    def get(self, path):
        return {"max_total_num_tokens": 4096}

    def take_turn(self, url, prompts, num_tokens, at_once):
        replies = []
        for prompt in prompts:
            known = max((len(h) for h in self.heard if prompt[: len(h)] == h), default=0)
            answer = [prompt[0]] * num_tokens
            replies.append(Reply(answer, num_tokens, max(0, known - 3)))
            self.heard.append(prompt + answer)
        with open(self.log_path, "a") as log:
            log.write("Prefill batch, #new-seq: 1, #new-token: 8, #running-req: 2, #queue-req: 0\n")
            log.write("KV cache pool is full. #retracted_reqs: 1, #new_token_ratio\n")
        return replies


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = FakeServer(tmp_path / "log")
    monkeypatch.setattr(bench_capacity, "take_turn", server.take_turn)
    return server


def test_tokens_that_are_found_again_are_counted(server):
    server.heard.append([9])
    said = [[[1, 2], [3], [4]], [[5, 6], [7], [8]]]
    found = converse(server, said, num_tokens=4, at_once=2)
    # Two conversations had said 6 tokens before the second turn, and 11 before the third.
    assert found.said_before == 2 * (6 + 11) and found.cached_tokens == 2 * (3 + 8)
    assert found.max_total_num_tokens == 4096 and found.retracted == 3
    assert found.most_running == 3
    assert found.answers[0] == [1, 2, 1, 1, 1, 1, 3, 1, 1, 1, 1, 4, 1, 1, 1, 1]
    row = found.report("cast")
    assert "answers" not in row and row["share"] == round(22 / 34, 4)
    assert "| cast | 4096 | 22 | 0.6471 |" in table([row])


def test_a_bad_command_line_ends_with_2(capsys):
    with pytest.raises(SystemExit) as error:
        parse_args(["--turns", "0"])
    assert error.value.code == 2 and "--turns must be above 0" in capsys.readouterr().err


def test_answers_that_differ_end_with_1(server, monkeypatch, tmp_path):
    found = iter([[[1]], [[2]]])

    def fake(server, said, num_tokens, at_once):
        return bench_capacity.Capacity(4096, 0, 0, 0, 0, next(found))

    class Serving:
        def __init__(self, arms, *args):
            self.arms = arms

        def __enter__(self):
            return {arm.name: SimpleNamespace() for arm in self.arms}

        def __exit__(self, *exception):
            pass

    monkeypatch.setattr(bench_capacity, "converse", fake)
    monkeypatch.setattr(bench_capacity, "serving", Serving)
    options = ["--arms", "plain", "cast", "--out", str(tmp_path / "out.json")]
    assert bench_capacity.main(options) == 1
