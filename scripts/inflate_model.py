#!/usr/bin/env python
"""Pad a Llama target and its draft head to a larger size without changing what they compute.

    python scripts/inflate_model.py --model-path models/tiny/target \\
        --draft-path models/tiny/draft --output-dir out/tiny-170m --target-params 170M

The result costs what a model of its size costs (no kernel skips a zero) and behaves as the trained
one: same tokens, same acceptance. That is what a study of step costs wants of a small machine.

How the function survives, with hidden size H widened to w * H:
- every matrix is padded with zeros, so the residual stream is the old one and then zeros;
- a mean square over the wider vector is 1/w of the old one. With `rms_norm_eps / w`, RMSNorm comes
  out sqrt(w) times too large, so its weight is divided by sqrt(w); for w = 1, 4 or 16 that is a
  power of two and exact in every float format;
- added heads and MLP columns have zero weights; head size, and with it the attention scale, stays;
- an added layer has zero `o_proj` and `down_proj`, so it adds nothing to the stream. Added layers
  come last, and the draft's configuration names the layers whose features it reads.
"""

import argparse
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

WIDTH_FACTORS = (1, 4, 16)
MLP_MULTIPLE = 64
DTYPES = ("bfloat16", "float16", "float32")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
README = """\
Costs what a larger model costs, behaves as the trained one.

Made by scripts/inflate_model.py from a trained target and EAGLE-3 draft by zero padding:
width factor {width_factor}, {num_layers} layers ({extra_layers} of them added),
MLP width {intermediate_size}, {num_params:,} parameters in the target.
Outputs equal the trained pair's up to rounding.
"""


@dataclass(frozen=True)
class Sizes:
    """The sizes that padding changes, of one model."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int

    @classmethod
    def from_config(cls, config: dict) -> "Sizes":
        """Read the sizes of a Llama configuration."""
        num_heads = config["num_attention_heads"]
        return cls(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads", num_heads),
            head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
            num_layers=config["num_hidden_layers"],
        )

    def widened(self, width_factor: int, intermediate_size: int, extra_layers: int) -> "Sizes":
        """Return the sizes after padding."""
        return Sizes(
            hidden_size=self.hidden_size * width_factor,
            intermediate_size=intermediate_size,
            num_heads=self.num_heads * width_factor,
            num_kv_heads=self.num_kv_heads * width_factor,
            head_dim=self.head_dim,
            num_layers=self.num_layers + extra_layers,
        )

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors of one target layer by name."""
        hidden, mlp = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (mlp, hidden),
            "mlp.up_proj.weight": (mlp, hidden),
            "mlp.down_proj.weight": (hidden, mlp),
        }


def count_params(sizes: Sizes, vocab_size: int, is_tied: bool) -> int:
    """Return the parameters of a Llama model, embedding and output head included."""
    layer = sum(math.prod(shape) for shape in sizes.layer_shapes().values())
    embeddings = vocab_size * sizes.hidden_size * (1 if is_tied else 2)
    return embeddings + sizes.num_layers * layer + sizes.hidden_size


def inflate_tensor(name: str, tensor: torch.Tensor, old: Sizes, new: Sizes) -> torch.Tensor:
    """Pad one tensor of a target or draft checkpoint.

    Args:
        name: its checkpoint name; the last two parts decide how it is padded.
        tensor: the trained values.
        old: sizes of the checkpoint.
        new: sizes to reach.

    Returns:
        The padded tensor in the same dtype.

    Raises:
        ValueError: a tensor this script does not know, such as a bias.
    """
    hidden = (old.hidden_size, new.hidden_size)
    queries = (old.num_heads * old.head_dim, new.num_heads * new.head_dim)
    keys = (old.num_kv_heads * old.head_dim, new.num_kv_heads * new.head_dim)
    mlp = (old.intermediate_size, new.intermediate_size)
    vocab = (tensor.shape[0], tensor.shape[0])
    rows_and_columns = {
        "embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "fc.weight": (hidden, hidden),
        "q_proj.weight": (queries, hidden),
        "k_proj.weight": (keys, hidden),
        "v_proj.weight": (keys, hidden),
        "o_proj.weight": (hidden, queries),
        "gate_proj.weight": (mlp, hidden),
        "up_proj.weight": (mlp, hidden),
        "down_proj.weight": (hidden, mlp),
    }
    kind = ".".join(name.split(".")[-2:])
    if kind in ("d2t", "t2d"):
        return tensor
    if kind in ("mask_embed", "mask_hidden"):  # of a parallel head
        return _pad_columns(tensor[None], *hidden)[0]
    # A norm, or one of the norms of a head's inputs.
    if kind.endswith("norm.weight") or name.startswith("fc_norm."):
        scale = math.isqrt(new.hidden_size // old.hidden_size)
        return _pad_columns(tensor[None] / scale, *hidden)[0]
    if kind not in rows_and_columns:
        raise ValueError(f"cannot pad the tensor {name}: it is of no plain Llama and no known head")
    (old_rows, new_rows), columns = rows_and_columns[kind]
    wide = _pad_columns(tensor, *columns)
    return torch.cat([wide, wide.new_zeros(new_rows - old_rows, wide.shape[1])])


def inflate_pair(
    model_path: Path,
    draft_path: Path | None,
    output_dir: Path,
    width_factor: int = 4,
    extra_layers: int = 0,
    intermediate_size: int | None = None,
    target_params: int | None = None,
    draft_intermediate_size: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Write `output_dir`/target and `output_dir`/draft, one layer in memory at a time.

    Args:
        model_path: a Llama checkpoint.
        draft_path: its draft, a head that `train_draft.py` wrote or another EAGLE-3 head; None to
            inflate the target alone.
        width_factor: factor on hidden size and head counts: 1, 4 or 16.
        extra_layers: layers added that change nothing.
        intermediate_size: MLP width of the target; default: the trained one times `width_factor`.
        target_params: choose the MLP width that comes closest to this many parameters instead.
        draft_intermediate_size: MLP width of the draft; default as for the target.
        dtype: of the written weights.

    Returns:
        Parameters of the written target.

    Raises:
        ValueError: an impossible size; the message names the flag.
    """
    config = _read_json(model_path / "config.json")
    old = Sizes.from_config(config)
    _check_choice(old, width_factor, extra_layers, intermediate_size, target_params)
    vocab_size, is_tied = config["vocab_size"], config.get("tie_word_embeddings", False)
    if target_params is not None:
        intermediate_size = _mlp_width_for(
            target_params,
            lambda width: count_params(
                old.widened(width_factor, width, extra_layers), vocab_size, is_tied
            ),
            old.intermediate_size,
        )
    new = old.widened(
        width_factor, intermediate_size or old.intermediate_size * width_factor, extra_layers
    )
    target_dir, draft_dir = output_dir / "target", output_dir / "draft"
    sources = {path.resolve() for path in (model_path, draft_path) if path is not None}
    if sources & {target_dir.resolve(), draft_dir.resolve()}:
        raise ValueError(f"--output-dir {output_dir} would overwrite the trained pair")
    target_dir.mkdir(parents=True, exist_ok=True)
    shards = _padded_shards(model_path, old, new)
    _write_shards(shards, old.num_layers + extra_layers + 1, target_dir, dtype)
    _write_config(target_dir, config, new, width_factor, dtype)
    for name in TOKENIZER_FILES:
        if (model_path / name).exists():
            shutil.copyfile(model_path / name, target_dir / name)
    if draft_path is not None:
        _inflate_draft(draft_path, draft_dir, old, width_factor, draft_intermediate_size, dtype)
    num_params = count_params(new, vocab_size, is_tied)
    text = README.format(
        width_factor=width_factor,
        num_layers=new.num_layers,
        extra_layers=extra_layers,
        intermediate_size=new.intermediate_size,
        num_params=num_params,
    )
    (output_dir / "README.txt").write_text(text)
    return num_params


def parse_count(text: str) -> int:
    """Read a parameter count such as 170M, 1.2B or 500000."""
    units = {"K": 10**3, "M": 10**6, "B": 10**9}
    unit = units.get(text[-1:].upper(), 1)
    digits = text[:-1] if unit > 1 else text
    try:
        return int(float(digits) * unit)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no count such as 170M or 1.2B") from None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; without a size asked for, the target gets 170M parameters."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", type=Path, required=True, help="trained Llama target")
    parser.add_argument("--draft-path", type=Path, help="its draft head")
    parser.add_argument("--output-dir", type=Path, required=True, help="gets target/ and draft/")
    parser.add_argument("--width-factor", type=int, default=4, help="1, 4 or 16 (default: 4)")
    parser.add_argument("--extra-layers", type=int, default=0, help="layers added (default: 0)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--target-params", type=parse_count, help="size to reach (default: 170M)")
    size.add_argument("--intermediate-size", type=int, help="MLP width of the target")
    parser.add_argument(
        "--draft-intermediate-size",
        type=int,
        help="MLP width of the draft (default: the trained one times the width factor)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    args = parser.parse_args(argv)
    if args.target_params is None and args.intermediate_size is None:
        args.target_params = 170_000_000
    return args


def main(argv: list[str] | None = None) -> None:
    """Inflate the pair that the command line names."""
    args = parse_args(argv)
    try:
        num_params = inflate_pair(
            args.model_path,
            args.draft_path,
            args.output_dir,
            width_factor=args.width_factor,
            extra_layers=args.extra_layers,
            intermediate_size=args.intermediate_size,
            target_params=args.target_params,
            draft_intermediate_size=args.draft_intermediate_size,
            dtype=getattr(torch, args.dtype),
        )
    except ValueError as error:
        raise SystemExit(f"inflate_model.py: {error}") from error
    print(f"{args.output_dir / 'target'}: {num_params:,} parameters")


def _check_choice(
    old: Sizes,
    width_factor: int,
    extra_layers: int,
    intermediate_size: int | None,
    target_params: int | None,
) -> None:
    if width_factor not in WIDTH_FACTORS:
        raise ValueError(
            f"--width-factor must be one of {WIDTH_FACTORS} (its square root scales the norms and "
            f"must be a power of two), got {width_factor}"
        )
    if extra_layers < 0:
        raise ValueError(f"--extra-layers must be 0 or more, got {extra_layers}")
    if intermediate_size is not None and target_params is not None:
        raise ValueError("--intermediate-size and --target-params exclude each other")
    if intermediate_size is not None and intermediate_size < old.intermediate_size:
        raise ValueError(
            f"--intermediate-size must be at least the trained {old.intermediate_size}, "
            f"got {intermediate_size}"
        )


def _mlp_width_for(target_params: int, params_at: Callable[[int], int], trained_width: int) -> int:
    """Return the multiple of 64 with the nearest parameter count, which is linear in the width."""
    per_column = params_at(1) - params_at(0)
    width = round((target_params - params_at(0)) / per_column / MLP_MULTIPLE) * MLP_MULTIPLE
    if width < trained_width:
        raise ValueError(
            f"--target-params {target_params:,} is too small: this width and depth have at least "
            f"{params_at(trained_width):,}"
        )
    return width


def _inflate_draft(
    draft_path: Path,
    draft_dir: Path,
    old_target: Sizes,
    width_factor: int,
    intermediate_size: int | None,
    dtype: torch.dtype,
) -> None:
    config = _read_json(draft_path / "config.json")
    old = Sizes.from_config(config)
    if old.hidden_size != old_target.hidden_size:
        raise ValueError(
            f"--draft-path has hidden size {old.hidden_size}, the target {old_target.hidden_size}"
        )
    if intermediate_size is not None and intermediate_size < old.intermediate_size:
        raise ValueError(
            f"--draft-intermediate-size must be at least the trained {old.intermediate_size}, "
            f"got {intermediate_size}"
        )
    new = old.widened(width_factor, intermediate_size or old.intermediate_size * width_factor, 0)
    draft_dir.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: inflate_tensor(name, tensor, old, new)
        for name, tensor in _read_tensors(draft_path, lambda name: True)
    }
    _save(tensors, draft_dir / "model.safetensors", dtype)
    eagle_config = dict(config.get("eagle_config") or {})
    if not eagle_config.get("eagle_aux_hidden_state_layer_ids"):
        # SGLang's default depends on the number of layers, which may have grown; it captures the
        # *inputs* of layers 2, n / 2 and n - 3, and an id names the layer before.
        num_layers = old_target.num_layers
        eagle_config["use_aux_hidden_state"] = True
        eagle_config["eagle_aux_hidden_state_layer_ids"] = [1, num_layers // 2 - 1, num_layers - 4]
    config["eagle_config"] = eagle_config
    if "target_hidden_size" in config:
        config["target_hidden_size"] *= width_factor
    _write_config(draft_dir, config, new, width_factor, dtype)


def _pad_columns(tensor: torch.Tensor, old_size: int, new_size: int) -> torch.Tensor:
    """Pad each run of `old_size` columns to `new_size`; EAGLE-3 puts several runs side by side."""
    rows, columns = tensor.shape
    segments = tensor.view(rows, columns // old_size, old_size)
    zeros = segments.new_zeros(rows, columns // old_size, new_size - old_size)
    return torch.cat([segments, zeros], dim=-1).flatten(1)


def _padded_shards(model_path: Path, old: Sizes, new: Sizes) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the target's padded tensors: all that is outside the layers, then layer by layer."""

    def padded(wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
        tensors = _read_tensors(model_path, wanted)
        return {name: inflate_tensor(name, tensor, old, new) for name, tensor in tensors}

    yield padded(lambda name: not name.startswith("model.layers."))
    for layer in range(old.num_layers):
        prefix = f"model.layers.{layer}."
        yield padded(lambda name, prefix=prefix: name.startswith(prefix))
    for layer in range(old.num_layers, new.num_layers):
        yield {
            f"model.layers.{layer}.{name}": torch.full(shape, 1.0 if len(shape) == 1 else 0.0)
            for name, shape in new.layer_shapes().items()
        }


def _read_tensors(
    folder: Path, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if wanted(name):
                    yield name, file.get_tensor(name)


def _write_shards(
    shards: Iterator[dict[str, torch.Tensor]], num_shards: int, folder: Path, dtype: torch.dtype
) -> None:
    for stale in folder.glob("*.safetensors"):
        stale.unlink()  # of an earlier run with another number of layers
    weight_map, total_bytes = {}, 0
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{num_shards:05d}.safetensors"
        total_bytes += _save(tensors, folder / name, dtype)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _save(tensors: dict[str, torch.Tensor], path: Path, dtype: torch.dtype) -> int:
    """Write one file and return its tensor bytes; integer tensors keep their type."""
    cast = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(cast, path, metadata={"format": "pt"})
    path.chmod(0o644)
    return sum(tensor.nbytes for tensor in cast.values())


def _write_config(
    folder: Path, config: dict, new: Sizes, width_factor: int, dtype: torch.dtype
) -> None:
    dtype_name = str(dtype).removeprefix("torch.")
    changed = config | {
        "hidden_size": new.hidden_size,
        "intermediate_size": new.intermediate_size,
        "num_attention_heads": new.num_heads,
        "num_key_value_heads": new.num_kv_heads,
        "head_dim": new.head_dim,
        "num_hidden_layers": new.num_layers,
        "rms_norm_eps": config["rms_norm_eps"] / width_factor,
        "torch_dtype": dtype_name,
    }
    if "dtype" in changed:
        changed["dtype"] = dtype_name
    _write_json(folder / "config.json", changed)


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
