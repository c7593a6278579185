"""The draft trainer: decoding is the target's, rows survive a stop, steps are serving's."""

import json
import sys
import time
from collections import deque
from pathlib import Path

import pytest
import torch
from rich.progress import Progress

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from draft_trainer import answers, distill, evaluate, export, loop, optim, vocabulary  # noqa: E402
from draft_trainer.decoder import Decoder, Request  # noqa: E402
from draft_trainer.draft_model import Draft, init_from_target  # noqa: E402
from draft_trainer.layers import usual_aux_layers  # noqa: E402
from draft_trainer.loss import head_loss  # noqa: E402
from draft_trainer.rows import Row, RowStore  # noqa: E402
from draft_trainer.target_model import Target  # noqa: E402

from tests.support.small_models import ALL_TOKENS, SMALL, with_opinions  # noqa: E402

STOP = 5


class LetterTokenizer:
    """Stands in for a tokenizer: a letter a token, and a template as chat models have it."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 32 + 32 for letter in text]

    def apply_chat_template(self, conversation: list[dict], **settings: object) -> list[int]:
        tokens = [1, 2]  # a system message
        for message in conversation:
            role = 3 if message["role"] == "user" else 4
            tokens += [role, *self.encode(message["content"]), STOP, 6]
        return [*tokens, 4]


@pytest.fixture(scope="module")
def target() -> Target:
    """An untrained target with weights large enough to have opinions."""
    torch.manual_seed(0)
    return with_opinions(Target(SMALL))


@pytest.fixture
def store(target, tmp_path) -> RowStore:
    """Answers to five prompts of several lengths."""
    store = RowStore(tmp_path / "rows", SMALL.state_size)
    store.begin_writing()
    for request in _decode(target, _requests(), num_slots=2):
        store.append(request.name, request.tokens, request.num_prompt_tokens, request.states)
    return store


def _draft(tokens: torch.Tensor = ALL_TOKENS) -> Draft:
    torch.manual_seed(1)
    return with_opinions(Draft(SMALL, tokens))


def _requests(temperature: float = 0.0) -> deque[Request]:
    generator = torch.Generator().manual_seed(1)
    sizes = [(5, 7), (9, 1), (3, 12), (12, 9), (4, 2)]
    return deque(
        Request(f"p:{i}", torch.randint(64, (n,), generator=generator).tolist(), new, temperature)
        for i, (n, new) in enumerate(sizes)
    )


def _decode(target: Target, requests: deque[Request], num_slots: int) -> list[Request]:
    return list(Decoder(target, num_slots, 32, torch.Generator().manual_seed(0)).run(requests))


@pytest.mark.parametrize("num_slots", [1, 2, 5, 8])
def test_decoding_in_slots_equals_a_full_pass(target, num_slots):
    finished = _decode(target, _requests(), num_slots)
    assert sorted(request.name for request in finished) == [f"p:{i}" for i in range(5)]
    for request in finished:
        with torch.no_grad():
            output = target(torch.tensor([request.tokens]))
        expected = target.logits(output.states)[0].argmax(-1)[request.num_prompt_tokens - 1 : -1]
        assert request.tokens[request.num_prompt_tokens :] == expected.tolist()
        assert len(expected) == request.max_new_tokens
        torch.testing.assert_close(
            request.states.float(), output.states[0, :-1], rtol=2e-2, atol=2e-2
        )


def test_a_sampled_request_follows_the_temperature(target):
    prompt = [7, 8, 9]
    requests = deque(Request(f"p:{i}", prompt.copy(), 1, 1.5) for i in range(4000))
    counts = torch.zeros(64)
    for request in _decode(target, requests, num_slots=50):
        counts[request.tokens[-1]] += 1
    with torch.no_grad():
        states = target(torch.tensor([prompt])).states
    expected = (target.logits(states)[0, -1].double() / 1.5).softmax(-1) * 4000
    tested = expected > 5
    chi_square = ((counts - expected) ** 2 / expected)[tested].sum().item()
    degrees = int(tested.sum())
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_a_stop_token_ends_an_answer(target):
    free = _decode(target, deque([Request("p:0", [1, 2, 3], 20, 0.0)]), 1)[0].tokens
    stop = free[8]
    stopped = _decode(target, deque([Request("p:0", [1, 2, 3], 20, 0.0, frozenset({stop}))]), 1)
    assert stopped[0].tokens == free[: free.index(stop, 3) + 1]


def test_a_request_that_fits_no_slot_is_named(target):
    with pytest.raises(ValueError, match="request long is longer than a slot"):
        _decode(target, deque([Request("long", [1] * 30, 9, 0.0)]), 1)


def test_rows_are_read_as_they_were_written(store):
    again = RowStore(store._index.parent, SMALL.state_size)
    assert again.rows == store.rows
    for row in store.rows:
        assert torch.equal(again.states(row), store.states(row))
        assert store.states(row).shape == (len(row.tokens) - 1, SMALL.state_size)


def test_a_row_that_was_half_written_is_cut_off(store):
    before = {row.name: store.states(row) for row in store.rows}
    with store._states.open("ab") as file:
        file.write(b"123")
    with store._index.open("ab") as file:
        file.write(b'{"name": "p:9", "tok')
    again = RowStore(store._index.parent, SMALL.state_size)
    again.begin_writing()
    again.append("p:10", [1, 2, 3], 1, torch.ones(2, SMALL.state_size))
    assert [row.name for row in again.rows] == [*before, "p:10"]
    for row in again.rows[:-1]:
        assert torch.equal(again.states(row), before[row.name])
    assert again.states(again.rows[-1]).float().eq(1).all()


def test_states_of_another_length_are_refused(store):
    with pytest.raises(ValueError, match="row x: 3 tokens"):
        store.append("x", [1, 2, 3], 1, torch.ones(3, SMALL.state_size))


def _write_prompts(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _answer(target, store: RowStore, path: Path, **limits: object) -> None:
    sizes = {"max_prompt_tokens": 60, "max_new_tokens": 6, "num_slots": 2, "temperatures": (0.0,)}
    prompts = answers.read_prompts([path])
    with Progress(disable=True) as bar:
        answers.write_answers(
            target,
            LetterTokenizer(),
            prompts,
            [STOP],
            store,
            answers.Limits(**(sizes | limits)),
            bar,
        )


def test_prompts_of_each_kind_become_rows(target, tmp_path):
    path = _write_prompts(
        tmp_path / "p.jsonl", {"turns": ["ab", "cd"]}, {"prompt": "efg"}, {"text": "hijkl"}
    )
    store = RowStore(tmp_path / "rows", SMALL.state_size)
    _answer(target, store, path)
    rows = {row.name: row for row in store.rows}
    assert set(rows) == {"p:1", "p:1/2", "p:2", "p:3"}
    first, second = rows["p:1"], rows["p:1/2"]
    encode = LetterTokenizer().encode
    assert list(first.tokens[: first.answer_start]) == [1, 2, 3, *encode("ab"), STOP, 6, 4]
    # What comes between two turns: the end of the answer, once, and the next question.
    end = [] if first.tokens[-1] == STOP else [STOP]
    between = [*end, 6, 3, *encode("cd"), STOP, 6, 4]
    assert list(second.tokens[: second.answer_start]) == [*first.tokens, *between]
    assert len(rows["p:2"].tokens) == 3 + 6
    assert rows["p:3"].answer_start == 1
    assert list(rows["p:3"].tokens[:5]) == encode("hijkl")


def test_answers_go_on_where_they_were(target, tmp_path):
    records = [{"prompt": "abc"[: 2 + i % 2] + "x" * i} for i in range(6)]
    half, whole = (
        _write_prompts(tmp_path / name / "p.jsonl", *part)
        for name, part in (("half", records[:3]), ("whole", records))
        if not (tmp_path / name).mkdir()
    )
    store = RowStore(tmp_path / "rows", SMALL.state_size)
    _answer(target, store, half)
    before = list(store.rows)
    _answer(target, store, whole)
    assert store.rows[:3] == before
    assert {row.name for row in store.rows} == {f"p:{i}" for i in range(1, 7)}


def test_a_later_turn_that_was_not_begun_is_made_up_for(target, tmp_path):
    path = _write_prompts(tmp_path / "p.jsonl", {"turns": ["ab", "cd"]})
    whole = RowStore(tmp_path / "whole", SMALL.state_size)
    _answer(target, whole, path)
    stopped = RowStore(tmp_path / "stopped", SMALL.state_size)
    stopped.begin_writing()
    first = whole.rows[0]
    stopped.append(first.name, list(first.tokens), first.answer_start, whole.states(first))
    _answer(target, stopped, path)
    assert [(row.name, row.tokens) for row in stopped.rows] == [
        (row.name, row.tokens) for row in whole.rows
    ]


def test_two_files_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    paths = [_write_prompts(tmp_path / folder / "p.jsonl", {"text": "x"}) for folder in "ab"]
    with pytest.raises(ValueError, match="another file has this name"):
        answers.read_prompts(paths)


def test_a_prompt_longer_than_a_row_counts_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "ROW_TOKENS", 12)
    store = RowStore(tmp_path, SMALL.state_size)
    store.begin_writing()
    for name, start in (("p:1", 15), ("p:2", 4)):
        store.append(name, list(range(20)), start, torch.ones(19, SMALL.state_size))
    known = torch.ones(64, dtype=torch.bool)
    batch = distill.make_batch(store, store.rows, known, num_steps=3)
    assert not batch.counts[:, 0].any() and batch.counts[:, 1].any()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "p.jsonl:1: "),
        ("{}", "p.jsonl:1: needs one of"),
        ('{"prompt": "a", "text": "b"}', "needs one of"),
        ("[1]", "p.jsonl:1: "),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path, line, message):
    (tmp_path / "p.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        answers.read_prompts([tmp_path / "p.jsonl"])


def test_the_vocabulary_is_what_the_target_writes_most():
    rows = [Row("p:1", (9, 9, 3, 3, 3, 1, 1, 60), 2, 0), Row("p:2", (7, 1, 60, 60, 60), 1, 7)]
    chosen = vocabulary.choose_vocabulary(rows, 64, 3)
    assert chosen.tolist() == [1, 3, 60]
    assert vocabulary.choose_vocabulary(rows, 64, 5).tolist() == [0, 1, 2, 3, 60]
    assert vocabulary.choose_vocabulary(rows, 64, 100).tolist() == list(range(64))
    assert vocabulary.coverage(rows, torch.tensor([3, 60])) == pytest.approx(7 / 10)


def test_only_tokens_that_the_target_wrote_count(store):
    known = torch.ones(64, dtype=torch.bool)
    known[store.rows[0].tokens[-1]] = False
    batch = distill.make_batch(store, store.rows, known, num_steps=3)
    for index, row in enumerate(store.rows):
        first = row.answer_start - 1
        for step in range(3):
            proposed = {
                int(batch.bases[index, n]) + 2 + step
                for n in batch.counts[step, index].nonzero()[:, 0].tolist()
            }
            expected = {
                position
                for position in range(first + 2 + step, len(row.tokens))
                if known[row.tokens[position]]
            }
            assert proposed == expected, (row.name, step)


@torch.no_grad()
def test_self_fed_steps_see_what_serving_sees(target):
    """A chain from one base, with nothing behind it in memory, equals the batched pass there."""
    draft = _draft()
    tokens = torch.randint(64, (1, 20), generator=torch.Generator().manual_seed(2))
    embeds, states = target.model.embed_tokens(tokens), target(tokens).states
    features = states[..., : -SMALL.hidden_size]
    num_bases, base = 12, 7

    def run(first: int, last: int) -> list[torch.Tensor]:
        """Return logits of 3 steps from bases first..last."""
        output = draft.extend(embeds[:, 1 : 2 + last], features[:, : 1 + last])
        committed, chain = output.cache, []
        bases = torch.arange(first, last + 1)
        hidden = output.hidden[:, bases]
        logits = [draft.logits(hidden)]
        mask = torch.arange(last + 1) <= bases[:, None]
        for step in (1, 2):
            slots = embeds[:, bases + 1 + step]
            output = draft.step(slots, hidden, bases + step, committed, mask, chain)
            hidden = output.hidden
            chain.append(output.cache)
            logits.append(draft.logits(hidden))
        return logits

    for alone, batched in zip(run(base, base), run(0, num_bases - 1), strict=True):
        torch.testing.assert_close(alone[0, 0], batched[0, base], rtol=1e-4, atol=1e-4)


def test_training_losses_are_those_of_a_chain(target, store):
    """The padded batch of a few rows gives the mean of each row's own steps."""
    draft = _draft(ALL_TOKENS[::2])
    known = distill.mark_vocabulary(draft)
    rows = store.rows
    together = distill.make_batch(store, rows, known)
    counts = [distill.make_batch(store, [row], known).counts.sum(dim=(1, 2)) for row in rows]
    with torch.no_grad():
        losses = distill.self_fed_steps(draft, target, together).losses
        alone = [
            distill.self_fed_steps(draft, target, distill.make_batch(store, [row], known)).losses
            for row in rows
        ]
    weights = torch.stack(counts).float()
    mean = (torch.stack(alone) * weights).sum(0) / weights.sum(0)
    torch.testing.assert_close(losses, mean, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("num_rows", [1, 7, 64, 130])
def test_the_loss_of_the_head_and_its_gradient_are_those_of_autograd(num_rows):
    generator = torch.Generator().manual_seed(num_rows)
    hidden = torch.randn(num_rows, 12, generator=generator, requires_grad=True)
    head = torch.randn(50, 12, generator=generator, requires_grad=True)
    best = torch.randn(num_rows, 50, generator=generator).topk(5)
    indices, probs = best.indices, best.values.softmax(-1)
    weights = torch.rand(num_rows, generator=generator)

    logits = hidden @ head.T
    losses = logits.logsumexp(-1) - (probs * logits.gather(1, indices)).sum(-1)
    expected = torch.autograd.grad(3 * (weights * losses).sum(), (hidden, head))

    found = head_loss(hidden, head, indices, probs, weights)
    torch.testing.assert_close(found.losses, losses.detach())
    torch.testing.assert_close(found.total, (weights * losses).sum())
    assert torch.equal(found.is_same, logits.argmax(-1) == indices[:, 0])
    torch.testing.assert_close(torch.autograd.grad(3 * found.total, (hidden, head)), expected)


def test_training_reaches_every_draft_weight(target, store):
    draft = Draft(SMALL, ALL_TOKENS[::2])
    init_from_target(draft, target)
    batch = distill.make_batch(store, store.rows, distill.mark_vocabulary(draft), num_steps=3)
    results = distill.self_fed_steps(draft, target, batch)
    results.loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in draft.parameters())
    assert results.agreement.shape == (3,)


def test_training_brings_the_draft_nearer(target, store, tmp_path):
    torch.manual_seed(0)
    draft = Draft(SMALL, ALL_TOKENS)
    init_from_target(draft, target)
    task = distill.DraftTask(
        draft, target, store, lambda row: row.name == "p:3", 64, 8, save=lambda: None
    )
    before = task.evaluate()["heldout_loss"]
    trained = distill.heldout_steps(draft, target, store, store.rows[:2]).loss
    with Progress(disable=True) as bar:
        loop.train(task, tmp_path, minutes=0.05, progress_bar=bar, checkpoint_seconds=60)
    after = distill.heldout_steps(draft, target, store, store.rows[:2]).loss
    assert after < trained
    assert before != task.evaluate()["heldout_loss"]


def test_time_that_is_not_computed_is_no_training_time():
    clock = optim.Clock(minutes=1.0, used_seconds=30.0)
    time.sleep(0.5)
    assert 30.0 <= clock.used_seconds < 30.4 and clock.progress >= 0.5


def test_a_draft_is_read_as_it_was_saved(target, tmp_path):
    draft = _draft(torch.tensor([0, 2, 3, 10, 63]))
    export.save_draft(draft, tmp_path)
    again = export.load_draft(tmp_path, SMALL.num_layers)
    assert again.vocabulary.tolist() == [0, 2, 3, 10, 63]
    assert again.shape == SMALL
    state = export._load_weights(tmp_path)
    assert (state["d2t"] + torch.arange(5)).tolist() == [0, 2, 3, 10, 63]
    assert state["t2d"].nonzero()[:, 0].tolist() == [0, 2, 3, 10, 63]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["draft_vocab_size"] == 5
    assert config["vocab_size"] == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "only LlamaForCausalLM"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rotary embedding of type llama3"),
        ({"attention_bias": True}, "biases"),
    ],
)
def test_a_target_that_is_not_plain_llama_is_refused(tmp_path, change, message):
    config = export.llama_config(SMALL) | {"architectures": ["LlamaForCausalLM"]}
    config |= {"num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        export.load_target(tmp_path)


def test_the_usual_layers_are_sglangs():
    # SGLang names the inputs of layers 2, n / 2 and n - 3: outputs of the layers before them.
    assert usual_aux_layers(30) == (1, 14, 26)
    assert usual_aux_layers(32) == (1, 15, 28)


def test_tree_of_one_branch_is_the_greedy_chain(target):
    draft = _draft(ALL_TOKENS[::2])
    tree = evaluate.TreeShape(num_steps=3, topk=1, num_draft_tokens=4)
    tokens = torch.randint(64, (1, 20), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        states = target(tokens).states
        trees = evaluate.draft_trees(
            target, draft, tokens, states[0, :-1], torch.tensor([9, 12]), tree
        )
        embed = target.model.embed_tokens
        features = states[:, :10, : -SMALL.hidden_size]
        output = draft.extend(embed(tokens[:, 1:11]), features)
        hidden, chain, expected = output.hidden[:, -1:], [], []
        for step in (1, 2, 3):
            token = draft.vocabulary[draft.logits(hidden).argmax(-1)]
            expected.append(token.item())
            mask = torch.ones(1, 10, dtype=torch.bool)
            position = torch.tensor([9 + step])
            result = draft.step(embed(token), hidden, position, output.cache, mask, chain)
            chain.append(result.cache)
            hidden = result.hidden
    assert trees.tokens[0].tolist() == expected
    assert trees.parents[0].tolist() == [-1, 0, 1]


def test_accepted_path_is_walked_over_verified_nodes_only():
    tree = evaluate.TreeShape(num_steps=2, topk=2, num_draft_tokens=4)
    trees = evaluate.DraftTrees(
        tokens=torch.tensor([[1, 2, 3, 4, 5, 6]] * 3),
        # Verified: the first two candidates and the first child of candidate 0.
        scores=torch.tensor([[0.6, 0.3, 0.5, 0.1, 0.2, 0.05]] * 3),
        parents=torch.tensor([[-1, -1, 0, 0, 1, 1]] * 3),
    )
    follows = torch.tensor([[1, 3], [2, 5], [9, 3]])
    assert evaluate.count_correct_drafts(trees, follows, tree).tolist() == [2, 1, 0]


@torch.inference_mode()
def test_accept_lengths_add_up_to_the_answer(target, tmp_path):
    store = RowStore(tmp_path / "rows", SMALL.state_size)
    store.begin_writing()
    request = _decode(target, deque([Request("p:1", [3, 4, 5], 25, 0.0)]), 1)[0]
    store.append(request.name, request.tokens, 3, request.states)
    tree = evaluate.TreeShape(num_steps=3, topk=2, num_draft_tokens=6)
    lengths = evaluate.simulate_accept_lens(target, _draft(), store, store.rows[0], tree)
    # Trees hang behind the first token of the answer until 3 tokens and the bonus are left.
    num_bases = 25 - 1 - 3
    assert all(1 <= length <= 4 for length in lengths)
    assert sum(lengths[:-1]) < num_bases <= sum(lengths)


class CountingTask:
    """Fits one number, records the windows it was asked for, and can be stopped in a batch."""

    name = "counting"

    def __init__(self, stop_at: int | None = None) -> None:
        self.model = torch.nn.ModuleDict(
            {"matrix": torch.nn.Linear(2, 2, bias=False), "vector": torch.nn.LayerNorm(2)}
        )
        self.first_windows: list[int] = []
        self.stop_at = stop_at

    def batch(self, first_window: int, progress: float) -> loop.BatchResult:
        if len(self.first_windows) == self.stop_at:
            raise KeyboardInterrupt
        self.first_windows.append(first_window)
        loss = self.model["vector"](self.model["matrix"](torch.ones(2))).square().sum()
        return loop.BatchResult(loss, num_windows=3, num_tokens=6)

    def evaluate(self) -> dict[str, float]:
        return {}

    def on_checkpoint(self) -> None:
        pass


def test_training_resumes_after_interruption(tmp_path):
    first = CountingTask(stop_at=5)
    with pytest.raises(KeyboardInterrupt), Progress(disable=True) as bar:
        loop.train(first, tmp_path, minutes=60, progress_bar=bar, checkpoint_seconds=0)
    assert first.first_windows == [0, 3, 6, 9, 12]
    second = CountingTask(stop_at=2)
    with pytest.raises(KeyboardInterrupt), Progress(disable=True) as bar:
        loop.train(second, tmp_path, minutes=60, progress_bar=bar, checkpoint_seconds=0)
    assert second.first_windows == [15, 18]


def test_resume_forgets_losses_of_lost_steps(tmp_path):
    table = tmp_path / "counting_loss.csv"
    table.write_text("step,minutes,series,value\n1,0.10,train_loss,2.0000\n")
    with pytest.raises(KeyboardInterrupt), Progress(disable=True) as bar:
        loop.train(CountingTask(stop_at=0), tmp_path, minutes=60, progress_bar=bar)
    assert table.read_text() == "step,minutes,series,value\n"
