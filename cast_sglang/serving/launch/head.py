"""Whether a draft's checkpoint fits its target, by what the files say; no model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cast_sglang.serving.launch.diagnosis import FAIL, OK, SKIP, WARN, Check

__all__ = ["check_head"]

# Layers of the target that an EAGLE-3 head reads unless its config says otherwise, and the two
# inputs of an EAGLE head: the token's embedding and one hidden state.
EAGLE3_LAYERS, EAGLE_INPUTS = 3, 2
# Of a parallel head (`serving.heads.parallel`).
MASK_TENSORS = ("mask_embed", "mask_hidden")


def check_head(target: str, draft: str, context: int | None) -> list[Check]:
    """Check the parts of a draft's checkpoint that SGLang takes without a word if they are wrong.

    Args:
        target: path or hub id, of which the config is read.
        draft: directory of the draft; a hub id is looked up in the local cache.
        context: longest context that is served; None for the target's.
    """
    from transformers import PretrainedConfig

    directory = _directory(draft)
    if directory is None:
        return [Check("draft head", SKIP, f"not checked: the files of {draft} are not here")]
    try:
        of_target, _ = PretrainedConfig.get_config_dict(target)
        of_draft, _ = PretrainedConfig.get_config_dict(str(directory))
        tensors = _tensors(directory)
    except (OSError, ValueError) as error:
        return [Check("draft head", SKIP, f"not checked: {' '.join(str(error).split())}")]
    found = _problems(of_target, of_draft, tensors, context)
    if not found:
        return [
            Check("draft head", OK, f"{len(tensors)} tensors, and those that must be are there")
        ]
    return [Check("draft head", *problem) for problem in found]


class _Tensor(NamedTuple):
    """A tensor of a checkpoint, which is read when it is needed."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def _problems(
    of_target: Mapping[str, Any],
    of_draft: Mapping[str, Any],
    tensors: Mapping[str, _Tensor],
    context: int | None,
) -> list[tuple[str, str, str]]:
    """Return status, text and fix of what is wrong."""
    found = []
    vocab, own_vocab = of_target["vocab_size"], of_draft.get("draft_vocab_size")
    another = "take a draft that was trained for this target"
    is_eagle3 = "eagle3" in "".join(of_draft.get("architectures") or []).lower()
    if own_vocab is not None and not of_draft.get("tie_word_embeddings"):
        if "lm_head.weight" not in tensors:
            text = "lm_head.weight is missing, so the head starts with whatever is in memory"
            found.append((FAIL, text, "convert the checkpoint again, with its lm_head"))
        if own_vocab != vocab and "d2t" not in tensors:
            text = f"its {own_vocab} tokens are not mapped to the target's {vocab}: no d2t"
            found.append((FAIL, text, "convert the checkpoint again, with its d2t"))
    missing = [name for name in MASK_TENSORS if name not in tensors]
    if missing and "parallel" in "".join(of_draft.get("architectures") or []).lower():
        text = f"{missing[0]} is missing, which stands in for what masked slots lack"
        found.append((FAIL, text, "export the head again, with all of its tensors"))
    if "d2t" in tensors:
        found += _map_problems(tensors, vocab)
    if "fc.weight" in tensors:
        layers = (of_draft.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
        inputs = len(layers or range(EAGLE3_LAYERS)) if is_eagle3 else EAGLE_INPUTS
        wanted, width = inputs * of_target["hidden_size"], tensors["fc.weight"].shape[-1]
        if width != wanted:
            text = f"fc reads {width} values, and {inputs} states of the target have {wanted}"
            found.append((FAIL, text, another))
        deepest = of_target["num_hidden_layers"]
        if layers and (
            len(set(layers)) < len(layers) or not 0 <= min(layers) <= max(layers) <= deepest
        ):
            text = f"reads layers {layers} of a target that has {deepest}"
            found.append((FAIL, text, another))
    trained = of_draft.get("max_position_embeddings")
    served = context or of_target.get("max_position_embeddings")
    if trained and served and trained < served:
        text = f"was made for {trained} positions, and contexts of {served} are served"
        fix = "expect shorter acceptance beyond, or lower --context-length"
        found.append((WARN, text, fix))
    return found


def _map_problems(tensors: Mapping[str, _Tensor], vocab: int) -> list[tuple[str, str, str]]:
    """Return what is wrong with the map from the draft's tokens to the target's."""
    fix = "convert the checkpoint again: d2t + its own index is the target's token"
    offsets = tensors["d2t"].read().long()
    tokens = offsets + torch.arange(len(offsets))
    outside = int(((tokens < 0) | (tokens >= vocab)).sum())
    if outside:
        return [(FAIL, f"d2t maps {outside} tokens out of the target's {vocab}", fix)]
    twice = len(tokens) - len(tokens.unique())
    if twice:
        return [(FAIL, f"d2t maps {twice} tokens to one that another has", fix)]
    if "t2d" in tensors:
        mask = tensors["t2d"].read()
        if not torch.equal(mask.nonzero().flatten(), tokens.sort().values):
            return [(FAIL, "d2t and t2d name different tokens", fix)]
    if not bool((tokens.diff() > 0).all()):
        text = "d2t is not ascending, as training tools write it: it may have been permuted"
        return [(WARN, text, fix)]
    return []


def _directory(path: str) -> Path | None:
    """Return the directory of a checkpoint on this machine; None if it is not here."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, local_files_only=True))
    # What the hub raises for a name that is none, or that it has no files of.
    except (OSError, ValueError):
        return None


def _tensors(directory: Path) -> dict[str, _Tensor]:
    """Return the tensors of a checkpoint by name.

    Raises:
        OSError, ValueError: there are none, or a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, _Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():
                    found[name] = _Tensor(
                        tuple(opened.get_slice(name).get_shape()), _reader(file, name)
                    )
        except SafetensorError as error:
            raise ValueError(f"{file}: {error}") from error
    if not found:
        for file in sorted(directory.glob("*.bin")):
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            found |= {name: _of(tensor) for name, tensor in content.items()}
    if not found:
        raise ValueError(f"no weights in {directory}")
    return found


def _of(tensor: torch.Tensor) -> _Tensor:
    return _Tensor(tuple(tensor.shape), lambda: tensor)


def _reader(file: Path, name: str) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
            return tensor

    return read
