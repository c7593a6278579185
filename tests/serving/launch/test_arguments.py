"""What a launch refuses: flags, trees that cannot be, and pages that trees cannot have."""

import argparse
from types import SimpleNamespace

import pytest

from cast_sglang.config import CastConfig
from cast_sglang.errors import HostError
from cast_sglang.serving.launch import arguments


@pytest.fixture(autouse=True)
def readable_draft(monkeypatch):
    monkeypatch.setattr(arguments, "read_draft_config", lambda *draft: None)


def flags(**given):
    """Return the flags of a launch; those that are not given have SGLang's defaults."""
    values = {flag: unset for flag, (unset, _) in arguments.UNSUPPORTED.items()}
    names = {flag.removeprefix("--").replace("-", "_"): value for flag, value in values.items()}
    names |= {"speculative_draft_model_path": "d", "speculative_draft_model_revision": None}
    names |= {"trust_remote_code": False, "page_size": None, "speculative_eagle_topk": None}
    names |= {"model_path": "t", "revision": "r"}
    return argparse.Namespace(**{**names, **given})


OTHER_VALUES = {"--pp-size": 2, "--disaggregation-mode": "decode"}


@pytest.mark.parametrize("flag", arguments.UNSUPPORTED)
def test_what_cast_cannot_run_with_is_refused(flag):
    name, unset = flag.removeprefix("--").replace("-", "_"), arguments.UNSUPPORTED[flag][0]
    arguments.check_flags(flags(**{name: unset}))
    arguments.check_flags(flags(**{name: None}))
    with pytest.raises(HostError, match=f"^{flag} cannot be combined with"):
        arguments.check_flags(flags(**{name: OTHER_VALUES.get(flag, True)}))


@pytest.mark.parametrize("topk", [None, 2, 8])
def test_trees_need_pages_of_one_token(topk):
    arguments.check_flags(flags(page_size=1, speculative_eagle_topk=topk))
    with pytest.raises(HostError, match="^--page-size 64: .*--speculative-eagle-topk 1"):
        arguments.check_flags(flags(page_size=64, speculative_eagle_topk=topk))


@pytest.mark.parametrize("page_size", [None, 1, 16, 64])
def test_chains_run_on_pages_of_any_size(page_size):
    arguments.check_flags(flags(page_size=page_size, speculative_eagle_topk=1))


@pytest.mark.parametrize("num_layers", [0, 1, None])
def test_a_target_with_an_mtp_layer_needs_no_draft(num_layers, monkeypatch):
    read = []
    config = SimpleNamespace()
    if num_layers is not None:
        config.num_nextn_predict_layers = num_layers
    monkeypatch.setattr(arguments, "read_config", lambda *target: config)
    monkeypatch.setattr(arguments, "read_draft_config", lambda *draft: read.append(draft))
    args = flags(speculative_draft_model_path=None)
    if not num_layers:
        with pytest.raises(HostError, match="needs --speculative-draft-model-path.*no MTP layer"):
            arguments.check_flags(args)
        return
    arguments.check_flags(args)
    arguments.set_draft(args)
    draft = args.speculative_draft_model_path, args.speculative_draft_model_revision
    assert draft == ("t", "r") and read == [("t", "r", False)]


def test_a_draft_that_is_given_stays():
    args = flags()
    arguments.set_draft(args)
    assert args.speculative_draft_model_path == "d"


def envelope(steps, topk, tokens):
    args = SimpleNamespace(
        speculative_num_steps=steps,
        speculative_eagle_topk=topk,
        speculative_num_draft_tokens=tokens,
    )
    arguments.set_envelope(args)
    return tuple(vars(args).values())


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ((None, None, None), (8, 8, 32)),
        ((None, 1, None), (8, 1, 9)),
        ((3, 1, None), (3, 1, 4)),
        ((3, 1, 2), (3, 1, 2)),
        ((1, 1, None), (1, 1, 2)),
        ((2, 2, None), (2, 2, 7)),
    ],
)
def test_what_is_left_open_fits_what_is_given(given, found):
    assert envelope(*given) == found


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((3, 1, 5), "--speculative-num-draft-tokens 5: a chain of 3 steps .* has 2..4 nodes"),
        ((2, 2, 8), "--speculative-num-draft-tokens 8: a tree of 2 steps .* has 2..7 nodes"),
        ((0, 1, None), "--speculative-num-steps 0"),
        ((3, 0, None), "--speculative-eagle-topk 0: use 1 for chains"),
    ],
)
def test_trees_and_chains_that_cannot_be(given, says):
    with pytest.raises(HostError, match=says):
        envelope(*given)


def test_chains_are_not_copied_into():
    for copying, topk in (("on", 2), ("off", 1)):
        arguments.check_copying(CastConfig(copying=copying), topk)
    with pytest.raises(HostError, match="--cast-copying on.*--speculative-eagle-topk 2"):
        arguments.check_copying(CastConfig(copying="on"), 1)
