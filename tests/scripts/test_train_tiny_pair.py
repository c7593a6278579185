"""The tiny pair: smoke training ends in a loadable pair, and its parts mean what they say."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress
from transformers import AutoTokenizer, LlamaForCausalLM

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import train_tiny_pair  # noqa: E402
from tiny_pair import corpus, evaluate, export, generate, loop, prompts  # noqa: E402
from tiny_pair.draft_model import Draft, init_from_target  # noqa: E402
from tiny_pair.layers import Shape  # noqa: E402
from tiny_pair.target_model import Target  # noqa: E402
from tiny_pair.train_draft import self_fed_steps  # noqa: E402
from tiny_pair.windows import WindowSampler  # noqa: E402

pytestmark = pytest.mark.slow

SMALL = Shape(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    aux_layer_ids=(0, 1, 2),
)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    """The folder of a finished smoke run: `pair` and `work` below it."""
    folder = tmp_path_factory.mktemp("smoke")
    command = [sys.executable, str(SCRIPTS / "train_tiny_pair.py"), *smoke_arguments(folder)]
    subprocess.run(command, check=True, timeout=300)
    return folder


def smoke_arguments(folder: Path) -> list[str]:
    # On a busy machine two threads mostly wait for each other: four times as long as one.
    arguments = ["--smoke", "--num-threads", "1"]
    return [*arguments, "--work-dir", str(folder / "work"), "--output-dir", str(folder / "pair")]


@pytest.fixture(scope="module")
def small_pair() -> tuple[Target, Draft]:
    """An untrained pair with weights large enough to have opinions."""
    torch.manual_seed(0)
    target, draft = Target(SMALL), Draft(SMALL)
    for parameter in (*target.parameters(), *draft.parameters()):
        if parameter.ndim == 2:
            parameter.data.mul_(8)
    return target.eval(), draft.eval()


def test_smoke_writes_everything(smoke):
    pair = smoke / "pair"
    for name in ("README.md", "loss_curves.csv", "loss_curves.png", "evaluation.json"):
        assert (pair / name).stat().st_size > 0
    evaluation = json.loads((pair / "evaluation.json").read_text())
    assert 1.0 <= evaluation["accept_length"] <= 6.0
    assert "{" not in (pair / "README.md").read_text()


def test_target_loads_in_transformers(smoke):
    folder = smoke / "pair" / "target"
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(2048, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(tokens, output_hidden_states=True)
        actual = export.load_target(folder)(tokens)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-4)
    features = torch.cat([expected.hidden_states[i + 1] for i in (1, 3, 6)], dim=-1)
    torch.testing.assert_close(actual.features, features, rtol=1e-4, atol=1e-4)


def test_tokenizer_loads_in_transformers(smoke):
    tokenizer = AutoTokenizer.from_pretrained(smoke / "pair" / "target")
    text = "def f(x):\n    return x + 1  # \u00e9\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token == corpus.END_OF_TEXT
    messages = [{"role": "user", "content": "Write f."}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert corpus.format_turn("Write f.", "pass") == f"{chat}pass{corpus.END}\n"
    end = tokenizer.convert_tokens_to_ids(corpus.END)
    generation = json.loads((smoke / "pair/target/generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.eos_token_id, end]


def test_draft_loads(smoke):
    draft = export.load_draft(smoke / "pair" / "draft", num_target_layers=8)
    assert draft.shape == Shape()
    config = json.loads((smoke / "pair" / "draft" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["draft_vocab_size"] == config["vocab_size"] == 2048


def test_prompts_come_from_held_out_modules(smoke):
    records = prompts.read_prompts(smoke / "pair" / "heldout_prompts.jsonl")
    assert [record["id"] for record in records] == ["heldout-000", "heldout-001"]
    assert {record["module"] for record in records} == {corpus.SMOKE_HELD_OUT}


def test_stages_resume_from_files(smoke):
    """A finished stage that is asked for again changes nothing but its evaluation."""
    weights = smoke / "pair" / "target" / "model.safetensors"
    before = weights.read_bytes()
    num_threads = torch.get_num_threads()
    train_tiny_pair.main([*smoke_arguments(smoke), "--stage", "target"])
    torch.set_num_threads(num_threads)
    assert weights.read_bytes() == before


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


def test_windows_repeat_only_after_an_epoch():
    tokens = np.arange(256 * 12, dtype=np.uint16)
    sampler = WindowSampler(tokens, seed=0)
    epoch = sampler.draw(0, 10, 8)
    assert len(set(epoch[:, 0].tolist())) == 10
    again = WindowSampler(tokens, seed=0)
    assert torch.equal(again.draw(4, 6, 8), epoch[4:])


def test_held_out_split_is_fixed():
    modules = [f"package/module_{i}.py" for i in range(2000)]
    part = sum(map(corpus.is_held_out, modules)) / len(modules)
    assert part == pytest.approx(corpus.HELD_OUT_PERCENT / 100, abs=0.01)
    assert corpus.is_held_out("textwrap.py") == corpus.is_held_out("textwrap.py")


def test_cached_decoding_equals_a_full_pass(small_pair):
    target, _ = small_pair
    prompts_ = torch.randint(64, (2, 6), generator=torch.Generator().manual_seed(1))
    rows = generate.continue_prompts(target, prompts_, 16, torch.zeros(2), torch.Generator())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = target(rows).logits
    top = logits.topk(2).values[:, 5:-1]
    is_clear = (top[..., 0] - top[..., 1]) > 0.1  # bfloat16 may turn a near tie either way
    same = logits.argmax(-1)[:, 5:-1] == rows[:, 6:]
    assert is_clear.sum() > 10
    assert same[is_clear].all()


@torch.no_grad()
def test_self_fed_steps_see_what_serving_sees(small_pair):
    """A chain from one base, with nothing behind it in memory, equals the batched pass there."""
    target, draft = small_pair
    tokens = torch.randint(64, (1, 20), generator=torch.Generator().manual_seed(2))
    embeds, features = target.model.embed_tokens(tokens), target(tokens).features
    num_bases, base = 12, 7

    def run(first: int, last: int) -> list[torch.Tensor]:
        """Return logits of 3 steps from bases first..last."""
        output = draft.extend(embeds[:, 1 : 2 + last], features[:, : 1 + last])
        committed, chain = output.cache, []
        bases = torch.arange(first, last + 1)
        hidden, logits = output.hidden[:, bases], [output.logits[:, bases]]
        mask = torch.arange(last + 1) <= bases[:, None]
        for step in (1, 2):
            slots = embeds[:, bases + 1 + step]
            output = draft.step(slots, hidden, bases + step, committed, mask, chain)
            hidden = output.hidden
            chain.append(output.cache)
            logits.append(output.logits)
        return logits

    for alone, batched in zip(run(base, base), run(0, num_bases - 1), strict=True):
        torch.testing.assert_close(alone[0, 0], batched[0, base], rtol=1e-4, atol=1e-4)


def test_training_reaches_every_draft_weight(small_pair):
    target, _ = small_pair
    draft = Draft(SMALL)
    init_from_target(draft, target)
    tokens = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(3))
    results = self_fed_steps(draft, target.requires_grad_(False), tokens, num_steps=3)
    results.losses.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in draft.parameters())
    assert results.agreement.shape == (3,)


def test_tree_of_one_branch_is_the_greedy_chain(small_pair):
    target, draft = small_pair
    tree = evaluate.TreeShape(num_steps=3, topk=1, num_draft_tokens=4)
    tokens = torch.randint(64, (1, 20), generator=torch.Generator().manual_seed(4))
    trees = evaluate.draft_trees(target, draft, tokens, torch.tensor([9, 12]), tree)
    with torch.no_grad():
        embed = target.model.embed_tokens
        output = draft.extend(embed(tokens[:, 1:11]), target(tokens).features[:, :10])
        hidden, logits, chain = output.hidden[:, -1:], output.logits[:, -1:], []
        expected = []
        for step in (1, 2, 3):
            token = logits.argmax(-1)
            expected.append(token.item())
            mask = torch.ones(1, 10, dtype=torch.bool)
            position = torch.tensor([9 + step])
            result = draft.step(embed(token), hidden, position, output.cache, mask, chain)
            chain.append(result.cache)
            hidden, logits = result.hidden, result.logits
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


def test_first_steps_begin_early_enough():
    # Tokens decoded before each step: 1 (from prefill), 4, 6, 10.
    assert evaluate.first_steps([3, 2, 4, 1], num_tokens=6) == [3, 2]
    assert evaluate.first_steps([3, 2, 4, 1], num_tokens=7) == [3, 2, 4]
