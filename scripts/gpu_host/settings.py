"""What a check runs with: on a GPU, or dry on any machine."""

import dataclasses
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

# flashinfer is not carried, so it is there in one stage alone; the Rust parts of SGLang are built
# for another torch.
ENVIRONMENT = {
    "SGLANG_IS_FLASHINFER_AVAILABLE": "false",
    "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python",
    # The release of sglang-kernel that fits torch 2.11 is older than SGLang asks for.
    "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
DRY_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": ""}
GPU_FLAGS = (
    "--attention-backend triton --sampling-backend pytorch "
    "--disable-prefill-cuda-graph --cuda-graph-max-bs-decode 64"
)


AUTO = "cast:auto"
DEFAULT_TREE = "static:5-4-8"  # SGLang's for Llama
COPYING = "cast:auto+copying=on"
CHAIN = "cast:fixed:2-2-1.5+--speculative-eagle-topk=1"
ON_FLASHINFER = "+profile=estimate+--decode-attention-backend=flashinfer"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The sizes of a check and where its files are.

    Attributes:
        work: the virtual environment, models and logs; kept, and not to be carried back.
        out: what is to be carried back.
        carried: what scripts/pack_gpu_host.sh made; None to run with the packages at hand.
    """

    is_dry: bool
    work: str
    out: str
    carried: str | None
    # 16 layers of width 4096 on a GPU: 3.2 billion parameters, 131 kB of KV cache a token.
    inflate: str = "--width-factor 16 --extra-layers 8 --target-params 3.2B"
    flags: str = GPU_FLAGS
    capacity: str = "--max-total-tokens 40960 --max-running-requests 64 --context-length 1024"
    start_at_once: int = 4
    num_prompts: int = 24
    num_tokens: int = 64
    equality_batches: tuple[int, ...] = (1, 8)
    # SGLang's own speculation shows how much of the flips is rounding; `auto` may decode plainly,
    # `fixed` always drafts.
    equality_arms: tuple[str, ...] = ("static", "cast:auto", "cast:fixed:2-2-1.5")
    # Of the tiny pair besides: copies in trees, and chains, which also run its plain steps.
    tiny_arms: tuple[str, ...] = (COPYING, CHAIN)
    # Where it is installed; it has no float32.
    flashinfer_arms: tuple[str, ...] = (CHAIN + ON_FLASHINFER, "cast:fixed:2-2-1.5" + ON_FLASHINFER)
    law_samples: int = 2400
    batches: tuple[int, ...] = (1, 4, 32, 64)
    arms: tuple[str, ...] = (
        "plain",
        DEFAULT_TREE,
        *("static:4-2-6", "static:3-1-4", "static:2-1-3"),
        AUTO,
    )
    profile_seconds: float = 40.0
    speed: str = "--tokens 96 --requests 3 --repeats 3 --prompt-tokens 128"
    trace_steps: int = 20

    @property
    def python(self) -> Path:
        """The interpreter of the environment that `install` makes."""
        return Path(self.work) / "venv" / "bin" / "python"

    def save(self, path: Path) -> None:
        """Write a file for `load`."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> "Settings":
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_text()))


def dry_settings(work: str, out: str, carried: str | None) -> Settings:
    """Return settings under which every stage runs on two CPU cores, in ten minutes together."""
    return Settings(
        is_dry=True,
        work=work,
        out=out,
        carried=carried,
        inflate="--width-factor 4 --target-params 60M",
        flags="",
        capacity="--max-total-tokens 4096 --max-running-requests 4 --context-length 512",
        start_at_once=2,
        num_prompts=4,
        num_tokens=24,
        equality_batches=(1, 4),
        equality_arms=("cast:fixed:2-2-1.5",),
        flashinfer_arms=(),
        law_samples=240,
        batches=(1, 4),
        arms=("plain", DEFAULT_TREE, AUTO),
        profile_seconds=10.0,
        speed="--tokens 32 --requests 1 --repeats 1 --warmup-tokens 4 --prompt-tokens 64",
        trace_steps=6,
    )
