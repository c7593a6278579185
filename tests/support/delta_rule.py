"""Gated delta nets without a GPU: prompts in plain torch, as their kernel needs one to be tuned.

Plain steps, verify and the commit of states run SGLang's own kernels.
"""

import contextlib
import functools

import torch


def chunk_gated_delta_rule(
    *,
    q,
    k,
    v,
    g,
    beta,
    initial_state,
    initial_state_indices,
    cu_seqlens,
    use_qk_l2norm_in_kernel,
    inplace_update,
    head_first,
    **more,
):
    """Run the recurrence over prompts, one token after another.

    Args:
        q, k: [1, T, H, K]; v: [1, T, HV, V]; g, beta: [1, T, HV].
        initial_state: [slots, HV, V, K], advanced in place.

    Returns:
        [1, T, HV, V], and two parts that only prompts kept for the prefix cache have.
    """
    assert use_qk_l2norm_in_kernel and inplace_update and not head_first
    assert not [name for name, value in more.items() if isinstance(value, torch.Tensor)]
    groups = v.shape[2] // q.shape[2]
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q[0], k[0]))
    q, k = ((x.repeat_interleave(groups, dim=1)) for x in (q * q.shape[-1] ** -0.5, k))
    attended, ends = torch.zeros_like(v), cu_seqlens.tolist()
    for slot, begin, end in zip(initial_state_indices.tolist(), ends, ends[1:], strict=False):
        state = initial_state[slot].clone()
        for row in range(begin, end):
            state *= g[0, row].exp()[:, None, None]
            known = torch.einsum("hvk,hk->hv", state, k[row])
            change = beta[0, row][:, None] * (v[0, row] - known)
            state += torch.einsum("hv,hk->hvk", change, k[row])
            attended[0, row] = torch.einsum("hvk,hk->hv", state, q[row])
        initial_state[slot] = state
    return attended, None, None


class _OnDevice(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


def _as_on_device(scatter):
    """Let SGLang's commit of states take those of the CPU, which it refuses."""

    @functools.wraps(scatter)
    def commit(states, *args):
        return scatter(states.as_subclass(_OnDevice), *args)

    return commit


def install() -> None:
    """Put these where SGLang calls its kernels, and say what kernels ask of a GPU."""
    from sglang.kernels.ops.attention.fla import layernorm_gated
    from sglang.kernels.ops.mamba import mamba_state_scatter_triton as commits
    from sglang.srt.layers.attention.linear.kernels import gdn_triton

    for name in ("fused_mamba_state_scatter_with_mask", "fused_conv_window_scatter_with_mask"):
        setattr(commits, name, _as_on_device(getattr(commits, name)))

    layernorm_gated._get_sm_count = lambda device: 1
    torch.cpu.device = contextlib.nullcontext
    gdn_triton.chunk_gated_delta_rule = chunk_gated_delta_rule
    # The interpreter does not know all that this one is made of; without it decode runs as verify.
    gdn_triton.TritonGDNKernel.supports_packed_decode = False
