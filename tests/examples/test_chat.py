"""The chat against a made-up server: what is asked, what is shown, and how it fails."""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console

from examples import chat


class Handler(BaseHTTPRequestHandler):
    """Streams an answer of three steps, or refuses."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if self.server.refusal:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(self.server.refusal.encode())
            return
        self.send_response(200)
        self.end_headers()
        for line in self.server.lines:
            self.wfile.write(f"data: {line}\n\n".encode())

    def log_message(self, *args):
        pass


def chunk(text: str, num_tokens: int | None) -> str:
    usage = None if num_tokens is None else {"completion_tokens": num_tokens}
    return json.dumps({"choices": [{"delta": {"content": text}}], "usage": usage})


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.bodies, server.refusal = [], ""
    role = json.dumps({"choices": [{"delta": {"role": "assistant"}}], "usage": None})
    last = json.dumps({"choices": [], "usage": {"completion_tokens": 6}})
    server.lines = [role, chunk("Pa", 1), chunk("ris [b]", 4), chunk(".", 6), last, "[DONE]"]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def talk(server, monkeypatch, text: str, *arguments: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    return chat.main(["--url", url, *arguments])


def test_pieces_are_the_steps_of_the_server(server):
    url = f"http://127.0.0.1:{server.server_address[1]}"
    pieces = list(chat.ask(url, [{"role": "user", "content": "x"}], 9, 0.0))
    assert pieces == [("Pa", 1), ("ris [b]", 3), (".", 2)]


def test_a_talk_is_remembered_until_an_empty_line(server, monkeypatch, capsys):
    assert talk(server, monkeypatch, "one\ntwo\n\nthree\n", "--max-tokens", "9") == 0
    answer = {"role": "assistant", "content": "Paris [b]."}
    asked = [{"role": "user", "content": word} for word in ("one", "two", "three")]
    assert [body["messages"] for body in server.bodies] == [
        [asked[0]],
        [asked[0], answer, asked[1]],
        [asked[2]],
    ]
    assert {body["max_tokens"] for body in server.bodies} == {9}
    shown = capsys.readouterr().out
    assert "> one" in shown and "Paris [b]." in shown
    assert "6 tokens in" in shown
    assert "3 steps of 2.00 tokens in the mean (steps x tokens: 1 x 1, 1 x 2, 1 x 3)" in shown


def test_a_refusal_is_told(server, monkeypatch, capsys):
    server.refusal = "the talk is too long"
    assert talk(server, monkeypatch, "one\n") == 1
    assert "chat: error: the server answered 400: the talk is too long" in capsys.readouterr().err


def test_no_server_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    assert chat.main(["--url", "http://127.0.0.1:9"]) == 1
    assert "chat: error:" in capsys.readouterr().err


def test_an_answer_of_nothing_is_told():
    console = Console(file=io.StringIO())
    assert chat.show(iter([]), console) == ""
    assert "no tokens" in console.file.getvalue()
