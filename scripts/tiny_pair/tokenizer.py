"""The byte-level BPE tokenizer and the token files that training reads."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .corpus import ASSISTANT, END, END_OF_TEXT, SPECIAL_TOKENS, USER, Document

VOCAB_SIZE = 2048
MAX_CONTEXT = 4096

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def train_tokenizer(documents: list[Document]) -> Tokenizer:
    """Fit the 2048-entry vocabulary on the training documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (d.text for d in documents if not d.is_held_out and not d.is_chat)
    tokenizer.train_from_iterator(texts, trainer)
    _pad_vocabulary(tokenizer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the three files that make the tokenizer a transformers fast tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "bos_token": None,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [USER, ASSISTANT, END],
        "model_max_length": MAX_CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    special = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer that `save_tokenizer` wrote."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def write_tokens(tokenizer: Tokenizer, documents: list[Document], work_dir: Path) -> dict[str, int]:
    """Encode the corpus into `train.bin` and `heldout.bin`, an end token behind each document.

    Documents are shuffled once, so that a part of an epoch is still a sample of the whole.

    Returns:
        Token counts: `train`, `heldout`, and `chat`, the part of `train` that is chat turns.
    """
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    order = np.random.default_rng(0).permutation(len(documents))
    encoded = tokenizer.encode_batch([documents[i].text for i in order])
    splits: dict[str, list[np.ndarray]] = {"train": [], "heldout": []}
    counts = {"train": 0, "heldout": 0, "chat": 0}
    for index, encoding in zip(order, encoded, strict=True):
        document = documents[index]
        tokens = np.array([*encoding.ids, end_of_text], dtype=np.uint16)
        split = "heldout" if document.is_held_out else "train"
        splits[split].append(tokens)
        counts[split] += len(tokens)
        if document.is_chat and not document.is_held_out:
            counts["chat"] += len(tokens)
    for split, parts in splits.items():
        np.concatenate(parts).tofile(work_dir / f"{split}.bin")
    return counts


def read_tokens(work_dir: Path, split: str) -> np.ndarray:
    """Map the tokens of `train` or `heldout`: uint16, one dimension."""
    return np.memmap(work_dir / f"{split}.bin", dtype=np.uint16, mode="r")


def _pad_vocabulary(tokenizer: Tokenizer) -> None:
    """Fill a vocabulary that a small corpus left short: shapes do not depend on the corpus."""
    missing = VOCAB_SIZE - tokenizer.get_vocab_size()
    if missing > 0:
        tokenizer.add_special_tokens([f"<|unused{i}|>" for i in range(missing)])
