"""StreamingLLM against a plain reference that keeps keys unrotated and rotates them anew at their place in the cache.

Shapes: Q query heads, H KV heads, D head size, T tokens.
"""

import pytest
import torch
from calls import attention_call
from masked import masking
from tiny_models import loaded_model

from kvscope.methods.registry import create_method
from kvscope.methods.shape import ModelShape
from kvscope.methods.store import PromptKV

N_PROMPT, N_STEPS = 90, 36


def rotary_of(name):
    """The rotation of a model's first managed layer: ours, and the model's own tables and function."""
    loaded = loaded_model(name)
    rotation = loaded.rotations[loaded.shape.layers[0]]

    def rotate(x_BHTD, positions):
        extra = {} if rotation._layer_type is None else {"layer_type": rotation._layer_type}
        cos, sin = rotation._rotary(torch.empty(1), torch.tensor([positions]), **extra)
        return rotation._apply(x_BHTD, x_BHTD, cos, sin)[0]

    return loaded.shape, rotation, rotate


def plain_streaming(q, k, v, *, step, sinks, window, rotate, scale):
    """One query at position ``step`` over sinks and window, all rotated at positions 0, 1, 2, ... of the cache."""
    n_total = step + 1
    kept = [t for t in range(n_total) if t < sinks or t >= n_total - window]
    G = q.shape[1] // k.shape[1]
    places = list(range(len(kept)))
    k_kept = rotate(k[:, :, kept], places).double().repeat_interleave(G, 1)
    v_kept = v[:, :, kept].double().repeat_interleave(G, 1)
    q_last = rotate(q[:, :, step : step + 1], places[-1:]).double()
    return (q_last @ k_kept.transpose(2, 3) * scale).softmax(-1) @ v_kept


@pytest.mark.parametrize("form", [lambda method: method, masking], ids=["evicting", "masking"])
@pytest.mark.parametrize(("sinks", "window"), [(4, 20), (1, 1), (0, 20), (20, 33), (4, 100), (4, 500)])
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "cohere2", "glm4", "phi3", "gemma3"])
def test_equals_keys_rotated_anew_at_their_place_in_the_cache(name, sinks, window, form):
    if name == "cohere2":
        # Its full-attention layers have no positions; its sliding layers' interleaved rotation is what is tested here.
        loaded = loaded_model(name)
        shape, rotation = loaded.shape, loaded.rotations[0]
        tables, apply = rotation._rotary, rotation._apply

        def rotate(x, positions):
            cos, sin = tables(torch.empty(1), torch.tensor([positions]))
            return apply(x, x, cos, sin)[0]
    else:
        shape, rotation, rotate = rotary_of(name)
    H, Q, D = shape.n_kv_heads, shape.n_q_heads, shape.head_dim
    one_layer = ModelShape(
        layers=(0,), n_layers=1, n_q_heads=Q, n_kv_heads=H, head_dim=D, hidden_size=8, element_bytes=4, page_tokens=16
    )
    generator = torch.Generator().manual_seed(3)
    T = N_PROMPT + N_STEPS
    q = torch.randn(1, Q, T, D, generator=generator) * 2
    k, v = (torch.randn(1, H, T, D, generator=generator) for _ in range(2))
    q_rotated, k_rotated = rotate(q, list(range(T))), rotate(k, list(range(T)))

    pages = torch.zeros(one_layer.pages(N_PROMPT), H, 2, 16, D)
    for t in range(N_PROMPT):
        pages[t // 16, :, 0, t % 16], pages[t // 16, :, 1, t % 16] = k_rotated[0, :, t], v[0, :, t]
    prompt = PromptKV(shape=one_layer, n_tokens=N_PROMPT, pages={0: pages}, dtype=torch.float32)
    sequence = form(create_method(f"sliding_window:sinks={sinks},window={window}")).open(prompt, "cpu")
    # A scale that keeps the scaled tables of YaRN from saturating the softmax, so that sinks carry weight.
    for step in range(N_PROMPT, T):
        at = slice(step, step + 1)
        out = sequence.attend(
            0, attention_call(q_rotated[:, :, at], k_rotated[:, :, at], v[:, :, at], scale=0.3, rotation=rotation)
        )
        expected = plain_streaming(q, k, v, step=step, sinks=sinks, window=window, rotate=rotate, scale=0.3)
        torch.testing.assert_close(out.double(), expected, atol=3e-4, rtol=1e-3)
        assert sequence.n_tokens == step + 1


def test_without_turning_the_query_back_the_answer_is_another():
    shape, rotation, rotate = rotary_of("llama")
    one_layer = ModelShape(
        layers=(0,), n_layers=1, n_q_heads=4, n_kv_heads=2, head_dim=16, hidden_size=8, element_bytes=4, page_tokens=16
    )
    assert (shape.n_q_heads, shape.head_dim) == (4, 16)
    torch.manual_seed(0)
    k, v = (torch.randn(1, 2, 64, 16) for _ in range(2))
    pages = torch.stack([rotate(k, list(range(64))), v], 2)[0].reshape(2, 2, 4, 16, 16).permute(2, 0, 1, 3, 4)
    prompt = PromptKV(shape=one_layer, n_tokens=64, pages={0: pages.contiguous()}, dtype=torch.float32)
    q, k1, v1 = torch.randn(1, 4, 1, 16) * 3, torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16)
    outs = []
    for turned_by in (rotation, None):
        sequence = create_method("sliding_window:window=8").open(prompt, "cpu")
        outs.append(sequence.attend(0, attention_call(q, k1, v1, scale=0.25, rotation=turned_by)))
    assert (outs[0] - outs[1]).abs().max() > 1e-2
