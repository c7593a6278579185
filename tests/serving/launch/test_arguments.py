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
    names |= {"model_path": "t", "revision": "r", "enable_return_hidden_states": False}
    return argparse.Namespace(**{**names, **given})


OTHER_VALUES = {"--pp-size": 2, "--disaggregation-mode": "decode"}


@pytest.mark.parametrize("flag", arguments.UNSUPPORTED)
def test_what_cast_cannot_run_with_is_refused(flag):
    name, unset = flag.removeprefix("--").replace("-", "_"), arguments.UNSUPPORTED[flag][0]
    arguments.check_flags(flags(**{name: unset}))
    arguments.check_flags(flags(**{name: None}))
    with pytest.raises(HostError, match=f"^{flag} cannot be combined with"):
        arguments.check_flags(flags(**{name: OTHER_VALUES.get(flag, True)}))


def test_hidden_states_need_a_draft(monkeypatch):
    monkeypatch.setattr(arguments, "read_config", lambda *target: SimpleNamespace())
    arguments.check_flags(flags(enable_return_hidden_states=True))
    with pytest.raises(HostError, match="^--enable-return-hidden-states needs"):
        arguments.check_flags(
            flags(enable_return_hidden_states=True, speculative_draft_model_path=None)
        )


@pytest.mark.parametrize(
    ("config", "has_layer"),
    [
        (SimpleNamespace(), False),
        (SimpleNamespace(num_nextn_predict_layers=0), False),
        (SimpleNamespace(num_nextn_predict_layers=1), True),
        (SimpleNamespace(text_config=SimpleNamespace(mtp_num_hidden_layers=1)), True),
        (SimpleNamespace(model_type="qwen3_next"), True),
    ],
)
def test_a_target_with_an_mtp_layer_needs_no_draft(config, has_layer, monkeypatch):
    read = []
    monkeypatch.setattr(arguments, "read_config", lambda *target: config)
    monkeypatch.setattr(arguments, "read_draft_config", lambda *draft: read.append(draft))
    args = flags(speculative_draft_model_path=None)
    arguments.check_flags(args)
    arguments.set_draft(args)
    if not has_layer:
        assert args.speculative_draft_model_path is None and not read
        return
    draft = args.speculative_draft_model_path, args.speculative_draft_model_revision
    assert draft == ("t", "r") and read == [("t", "r", False)]


def test_a_draft_that_is_given_stays():
    args = flags()
    arguments.set_draft(args)
    assert args.speculative_draft_model_path == "d"


def envelope(steps, topk, tokens, draft="d", page_size=None, target=None):
    args = SimpleNamespace(
        speculative_draft_model_path=draft,
        speculative_num_steps=steps,
        speculative_eagle_topk=topk,
        speculative_num_draft_tokens=tokens,
        page_size=page_size,
    )
    arguments.set_envelope(args, target=target)
    return tuple(vars(args).values())[1:4]


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


TREES, LATENT, STATES = "trees", "latent", "states"


@pytest.fixture
def targets(monkeypatch):
    """Stand in for what SGLang says of a target."""
    monkeypatch.setattr(arguments, "keeps_states", lambda target: target == STATES)
    reasons = {LATENT: "of latent attention", STATES: "of the states"}
    monkeypatch.setattr(arguments, "why_chains", reasons.get)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, (8, 8, 32)),
        ({"page_size": 1}, (8, 8, 32)),
        ({"page_size": 64}, (8, 1, 9)),
        ({"target": LATENT}, (8, 1, 9)),
        ({"target": LATENT, "page_size": 64}, (8, 1, 9)),
        # Each row that may be verified has a state: SGLang's own default.
        ({"target": STATES}, (3, 1, 4)),
        ({"target": STATES, "steps": 5}, (5, 1, 6)),
        ({"target": STATES, "draft": None}, (3, 1, 4)),
        ({"target": STATES, "draft": None, "tokens": 6}, (5, 1, 6)),
        ({"target": LATENT, "draft": None}, (31, 1, 32)),
    ],
)
def test_drafts_are_chains_where_trees_cannot_be(given, found, targets):
    shape = dict.fromkeys(("steps", "topk", "tokens"))
    assert envelope(**{**shape, "target": TREES, **given}) == found
    if found[1] == 1:
        assert envelope(**{**shape, "target": TREES, **given, "topk": 1}) == found


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"page_size": 64}, "the cache has pages of 64"),
        ({"target": LATENT}, "of latent attention"),
        ({"target": STATES, "page_size": 1}, "of the states"),
    ],
)
def test_trees_are_refused_where_drafts_are_chains(given, says, targets):
    with pytest.raises(HostError, match=f"^--speculative-eagle-topk 4: .*{says}; pass 1, or drop"):
        envelope(**{"steps": 3, "topk": 4, "tokens": 8, "target": TREES, **given})


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


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ((None, None, None), (31, 1, 32)),
        ((None, None, 8), (7, 1, 8)),
        ((5, None, None), (5, 1, 6)),
        ((5, 1, 4), (5, 1, 4)),
    ],
)
def test_without_a_draft_trees_are_chains_as_long_as_the_rows(given, found):
    assert envelope(*given, draft=None) == found


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((None, 4, None), "--speculative-eagle-topk 4: without --speculative-draft-model-path"),
        ((3, None, 8), "--speculative-num-draft-tokens 8: a chain of 3 steps"),
        ((None, None, 1), "--speculative-num-draft-tokens 1"),
    ],
)
def test_chains_that_cannot_be_without_a_draft(given, says):
    with pytest.raises(HostError, match=says):
        envelope(*given, draft=None)


@pytest.mark.parametrize("page_size", [1, 64])
def test_without_a_draft_pages_may_have_any_size(page_size):
    assert envelope(None, None, None, draft=None, page_size=page_size) == (31, 1, 32)


def pair(topk=8, draft="d"):
    return SimpleNamespace(speculative_draft_model_path=draft, speculative_eagle_topk=topk)


def test_chains_of_a_draft_are_not_copied_into():
    for copying, topk in (("on", 2), ("auto", 1), ("off", 1)):
        arguments.check_copying(CastConfig(copying=copying), pair(topk))
    with pytest.raises(HostError, match="--cast-copying on.*--speculative-eagle-topk 2"):
        arguments.check_copying(CastConfig(copying="on"), pair(1))


def test_without_a_draft_and_without_copies_there_is_nothing_to_serve_by():
    for copying in ("on", "auto"):
        arguments.check_copying(CastConfig(copying=copying), pair(1, None))
    for settings, fix in (
        ({"copying": "off"}, "--cast-copying off needs .* takes --cast-copying on"),
        ({"policy": "fixed"}, "--cast-policy fixed needs .* takes --cast-policy auto"),
        ({"trace": "auto"}, "--cast-trace auto needs .* takes --cast-trace none"),
    ):
        with pytest.raises(
            HostError, match=fix.replace("needs .*", "needs --speculative-draft-model.*")
        ):
            arguments.check_copying(CastConfig(**settings), pair(1, None))
