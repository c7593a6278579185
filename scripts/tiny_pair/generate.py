"""The target's own continuations of corpus text: what the draft will meet when it serves."""

from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress

from .target_model import Target
from .windows import WindowSampler

ROW_TOKENS = 320
PROMPT_TOKENS = (64, 112, 160)
BATCH_ROWS = 64
TEMPERATURES = (0.0, 0.0, 0.6, 1.0)  # of the rows in turn; 0 is greedy
SEED = 2


def write_continuations(
    target: Target,
    train_tokens: np.ndarray,
    work_dir: Path,
    num_rows: int,
    progress_bar: Progress,
    row_tokens: int = ROW_TOKENS,
) -> None:
    """Extend `generated.bin` to `num_rows` rows of prompt and continuation."""
    path = work_dir / "generated.bin"
    sampler = WindowSampler(train_tokens, SEED)
    done = len(read_continuations(work_dir, row_tokens)) if path.exists() else 0
    bar = progress_bar.add_task("generate", total=num_rows, completed=done)
    while done < num_rows:
        count = min(BATCH_ROWS, num_rows - done)
        prompt_tokens = PROMPT_TOKENS[done // BATCH_ROWS % len(PROMPT_TOKENS)]
        prompts = sampler.draw(done, count, prompt_tokens)
        generator = torch.Generator().manual_seed(SEED + done)
        temperatures = torch.tensor([TEMPERATURES[i % len(TEMPERATURES)] for i in range(count)])
        rows = continue_prompts(target, prompts, row_tokens, temperatures, generator)
        with path.open("ab") as file:
            file.write(rows.numpy().astype(np.uint16).tobytes())
        done += count
        progress_bar.update(bar, completed=done)


def read_continuations(work_dir: Path, row_tokens: int = ROW_TOKENS) -> np.ndarray:
    """Return the rows written so far: [rows, row_tokens] uint16."""
    tokens = np.fromfile(work_dir / "generated.bin", dtype=np.uint16)
    num_rows = len(tokens) // row_tokens
    return tokens[: num_rows * row_tokens].reshape(num_rows, row_tokens)


@torch.inference_mode()
def continue_prompts(
    target: Target,
    prompts: torch.Tensor,
    total_tokens: int,
    temperatures: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Decode a batch of prompts of one length; an end token does not stop a row.

    Args:
        prompts: [B, P] int64.
        total_tokens: T, prompt included.
        temperatures: [B]; 0 decodes greedily.

    Returns:
        [B, T] int64.
    """
    is_greedy = temperatures == 0
    rows = [prompts]
    tokens, cache = prompts, None
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(total_tokens - prompts.shape[1]):
            output = target(tokens, cache)
            cache = output.cache
            logits = output.logits[:, -1].float()
            scaled = logits / temperatures.masked_fill(is_greedy, 1.0)[:, None]
            sampled = torch.multinomial(scaled.softmax(-1), 1, generator=generator)[:, 0]
            tokens = torch.where(is_greedy, logits.argmax(-1), sampled)[:, None]
            rows.append(tokens)
    return torch.cat(rows, dim=1)
