"""CAST among SGLang's algorithms: what it says of itself, and what a launch goes through."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.managers.overlap_utils import RelayPayload
from sglang.srt.model_executor.cuda_graph_config import Backend, CudaGraphConfig, PhaseConfig
from sglang.srt.runtime_context import get_context
from sglang.srt.speculative import spec_registry
from sglang.srt.speculative.eagle_info import EagleDraftInput
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from transformers import LlamaConfig

from benchmarks.harness.pairs import tiny_pair
from cast_sglang.errors import ConfigError, HostError
from cast_sglang.serving import algorithm as module
from cast_sglang.serving.algorithm import CastAlgorithm
from cast_sglang.serving.launch import arguments, backends
from cast_sglang.serving.launch.reserve import Reserve
from tests.support.builders import make_identity


@pytest.fixture
def cast(monkeypatch):
    """CAST as SGLang finds it by the name that a user gives."""
    monkeypatch.setattr(spec_registry, "_REGISTRY", {})
    module.register()
    return SpeculativeAlgorithm.from_string("cast")


def server_args(**given):
    graphs = CudaGraphConfig(decode=PhaseConfig(backend=Backend.FULL), prefill=PhaseConfig())
    values = dict(
        model_path="some/target",
        revision=None,
        page_size=None,
        speculative_draft_model_path="some/draft",
        speculative_draft_model_revision=None,
        trust_remote_code=False,
        speculative_num_steps=None,
        speculative_eagle_topk=None,
        speculative_num_draft_tokens=None,
        attention_backend="cast_cpu",
        prefill_attention_backend=None,
        decode_attention_backend=None,
        speculative_draft_attention_backend=None,
        max_running_requests=None,
        enable_mixed_chunk=True,
        enable_lora=False,
        lora_paths=None,
        disable_overlap_schedule=False,
        device="cpu",
        cuda_graph_config=graphs,
    )
    return SimpleNamespace(**{**values, **given})


@pytest.fixture
def checked(monkeypatch):
    """Leave out what reads models and profiles; collect its order."""
    log = []
    monkeypatch.setattr(module, "check_pair", lambda args, target: log.append("pair"))
    monkeypatch.setattr(module, "read_draft_config", lambda *draft: SimpleNamespace())
    target = SimpleNamespace(hf_config=LlamaConfig(), attention_arch=AttentionArch.MHA)
    for reader in (module, backends):
        monkeypatch.setattr(reader, "target_config", lambda args: target)

    def announce(config, args, identity):
        log.append("profile")

    monkeypatch.setattr(module, "announce_profile", announce)
    monkeypatch.setattr(module, "host_identity", lambda args, target: make_identity())
    monkeypatch.setattr(module, "read_launch", lambda *args: None)
    monkeypatch.setattr(module, "shrink_envelope", lambda *args: log.append("envelope"))
    monkeypatch.setattr(module, "reserve_of_server", lambda *args: Reserve([], 128, 40, 0.1, 48))
    return log


def test_the_name_is_registered_with_worker_and_checks(cast):
    from cast_sglang.serving.worker import CastWorker

    assert isinstance(cast, CastAlgorithm) and cast.name == "CAST"
    assert cast.create_worker(SimpleNamespace(disable_overlap_schedule=False)) is CastWorker
    bad_draft = SimpleNamespace(
        speculative_draft_model_path=str(tiny_pair().target) + "/none",
        speculative_draft_model_revision=None,
        trust_remote_code=False,
        page_size=1,
        **{
            flag.removeprefix("--").replace("-", "_"): unset
            for flag, (unset, _) in arguments.UNSUPPORTED.items()
        },
    )
    with pytest.raises(HostError, match="--speculative-draft-model-path"):
        cast.validate_server_args(bad_draft)


def answers(of):
    questions = {
        name
        for name in vars(SpeculativeAlgorithm)
        if name.startswith(("is_", "supports_", "has_", "need", "carries_")) and name != "is_eagle3"
    }
    assert len(questions) > 10
    return {name: getattr(of, name)() for name in questions}


def test_it_behaves_as_eagle_wherever_sglang_asks(cast):
    """SGLang branches by these, so a new one that EAGLE answers otherwise is one to look at."""
    # CAST has no mixed chunks: a launch turns them off.
    wanted = {**answers(SpeculativeAlgorithm.EAGLE), "supports_mixed_chunk": False}
    assert answers(cast) == wanted


def test_without_a_draft_it_behaves_as_an_algorithm_that_reads_no_hidden_states(cast):
    from cast_sglang.serving.draftless import DraftlessWorker

    with get_context().override_server_args(device="cpu", speculative_draft_model_path=None):
        # Grammars are advanced in verify, and there is no draft: no cache and no children of it.
        wanted = {
            **answers(SpeculativeAlgorithm.STANDALONE),
            **{"has_draft_kv": False, "need_topk": False, "supports_grammar_overlap": True},
        }
        assert answers(cast) == wanted and not cast.is_eagle3()
        args = SimpleNamespace(disable_overlap_schedule=False)
        assert cast.create_worker(args) is DraftlessWorker


@pytest.mark.parametrize(
    ("architecture", "is_eagle3"),
    [
        ("LlamaForCausalLMEagle3", True),
        ("LlamaForCausalLMCascadeEagle3", True),
        ("LlamaForCausalLMParallelEagle3", True),
        ("LlamaForCausalLMEagle", False),
    ],
)
def test_the_draft_says_which_eagle_it_is(cast, architecture, is_eagle3, tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    shutil.copy(Path(tiny_pair().draft) / "config.json", path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": [architecture]}))
    spec = SimpleNamespace(
        speculative_draft_model_path=str(tmp_path), speculative_draft_model_revision=None
    )
    monkeypatch.setattr(module, "get_spec", lambda: spec)
    monkeypatch.setattr(module, "get_model", lambda: SimpleNamespace(trust_remote_code=False))
    assert cast.is_eagle() and cast.is_eagle3() == is_eagle3


def test_a_tree_is_no_deeper_than_a_head_drafts_in_one_pass(cast, checked, monkeypatch):
    config = SimpleNamespace(one_pass_depth=5)
    monkeypatch.setattr(module, "read_draft_config", lambda *draft: config)
    args = server_args()
    cast.handle_server_args(args)
    assert args.speculative_num_steps == 5
    cast.handle_server_args(server_args(speculative_num_steps=3))
    with pytest.raises(HostError, match="^--speculative-num-steps 6: .* at most 5"):
        cast.handle_server_args(server_args(speculative_num_steps=6))


def test_what_is_not_given_gets_a_default(cast, checked):
    args = server_args()
    cast.handle_server_args(args)
    envelope = (args.speculative_num_steps, args.speculative_eagle_topk)
    assert (*envelope, args.speculative_num_draft_tokens) == (8, 8, 32)
    assert args.max_running_requests == 48
    assert not args.enable_mixed_chunk and args.disable_overlap_schedule
    assert checked == ["pair", "profile", "envelope"]


def test_what_is_given_stays(cast, checked):
    given = dict(
        speculative_num_steps=3,
        speculative_eagle_topk=4,
        speculative_num_draft_tokens=7,
        max_running_requests=5,
    )
    args = server_args(**given)
    cast.handle_server_args(args)
    assert {name: getattr(args, name) for name in given} == given


@pytest.mark.parametrize("graphs", ["all", "off"])
def test_a_gpu_server_overlaps_and_captures_what_it_can(cast, checked, graphs, monkeypatch):
    monkeypatch.setenv("CAST_GRAPHS", graphs)
    args = server_args(device="cuda", attention_backend="triton")
    cast.handle_server_args(args)
    assert not args.disable_overlap_schedule
    captures = args.cuda_graph_config.decode.backend == Backend.FULL
    assert captures == (graphs == "all")


@pytest.mark.parametrize(
    ("given", "settings", "error", "says"),
    [
        ({"speculative_eagle_topk": 0}, {}, HostError, "--speculative-eagle-topk 0"),
        (
            {"speculative_num_draft_tokens": 16},
            {"CAST_VERIFY_SIZES": "2,17"},
            HostError,
            "--cast-verify-sizes 2,17: each size must be in 2..16",
        ),
        ({}, {"CAST_PROFILE": "none"}, ConfigError, "profile=none"),
    ],
)
def test_what_is_wrong_is_found_before_a_model_is_read(
    cast, checked, given, settings, error, says, monkeypatch
):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(error, match=says):
        cast.handle_server_args(server_args(**given))
    assert checked == []


def test_a_bad_calibration_file_stops_the_launch(cast, checked, tmp_path, monkeypatch):
    path = tmp_path / "learned.json"
    path.write_text("{")
    monkeypatch.setenv("CAST_CALIBRATION_FILE", str(path))
    with pytest.raises(ConfigError, match=f"--cast-calibration-file {path}"):
        cast.handle_server_args(server_args())


def test_what_a_step_hands_on_has_a_place_in_the_schedulers_memory(cast):
    pool = SimpleNamespace(req_to_token=torch.zeros(5, 8, dtype=torch.int32))
    relay = cast.create_future_map(torch.device("cpu"), pool, needs_cpu_seq_lens=False)
    assert relay.spec_algo is cast and relay.needs_cpu_seq_lens is False
    assert len(relay.output_tokens_buf) == 5


def test_without_a_draft_a_step_hands_on_its_tokens_alone(cast):
    """Through the memory that overlapping steps share, whose rows are those of the request pool."""
    pool = SimpleNamespace(req_to_token=torch.zeros(5, 8, dtype=torch.int32))
    none = torch.empty((2, 0))
    handed = EagleDraftInput(
        bonus_tokens=torch.tensor([7, 8]), topk_p=none, topk_index=none.to(torch.int64)
    )
    with get_context().override_server_args(device="cpu", speculative_draft_model_path=None):
        relay = cast.create_future_map(torch.device("cpu"), pool)
        relay.stash(torch.tensor([1, 3]), RelayPayload.from_draft_input(handed))
        taken = EagleDraftInput(future_indices=torch.tensor([3, 1]))
        relay._resolve_spec_extras(SimpleNamespace(spec_info=taken))
    assert taken.bonus_tokens.tolist() == [8, 7]
    assert relay.topk_p_buf is relay.hidden_states_buf is None
