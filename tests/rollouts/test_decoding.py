"""Sampling from models with every kind of cache or state gives the tokens of uncached, unbatched sampling."""

import warnings
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from exo.cli import console
from exo.rollouts import decoding, generate

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = {"vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 2}
ATTENTION = SIZE | {
    "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "max_position_embeddings": 64,
}  # fmt: skip
SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
# model type: (config, whether its cache is usable)
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "mamba": (SIZE | {"state_size": 8}, False),
    "mamba2": (
        SIZE | {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
        False,
    ),
    "falcon_mamba": (SIZE | {"state_size": 8}, False),
    "rwkv": (SIZE | {"attention_hidden_size": 32, "context_length": 64}, False),
    "xlstm": (SIZE | {"num_blocks": 2, "num_heads": 2, "chunk_size": 8}, False),
    "recurrent_gemma": (ATTENTION | {"lru_width": 32, "block_types": ["recurrent", "attention"]}, False),
    "minimax": (
        ATTENTION
        | {"num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 8}
        | {"layer_types": ["linear_attention", "full_attention"]},
        False,
    ),
    "openai-gpt": ({"vocab_size": 24, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}, False),
    "jamba": (
        ATTENTION
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1}
        | {"mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        True,
    ),
    "bamba": (ATTENTION | SSM | {"attn_layer_indices": [1]}, True),
    "granitemoehybrid": (
        ATTENTION
        | SSM
        | {"layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1}
        | {"shared_intermediate_size": 32},
        True,
    ),
    "lfm2": (ATTENTION | {"layer_types": ["conv", "full_attention"]}, True),
    "gpt2": ({"vocab_size": 24, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}, True),
    "bloom": ({"vocab_size": 24, "hidden_size": 32, "n_layer": 2, "n_head": 2}, True),
    "mistral": (ATTENTION | {"sliding_window": 4}, True),
}
PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10], [11, 12, 13]]
SETTINGS: dict[str, Any] = {"k": 3, "temperature": 0.9, "max_new_tokens": 7, "seed": 1}


def make(name):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(name, bos_token_id=None, eos_token_id=2, pad_token_id=0, **KINDS[name][0])
        model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():  # makes distributions so peaked that a wrong state changes tokens
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


@torch.no_grad()
def sample_alone(model, prompt, uniforms):
    """Sample one sequence without a cache or padding; return its tokens and log-prob."""
    ids, total = list(prompt), 0.0
    for u in uniforms.tolist():
        logprobs = torch.log_softmax(model(torch.tensor([ids]), use_cache=False).logits[0, -1] / 0.9, -1)
        cdf = logprobs.exp().cumsum(-1)
        ids.append(int((cdf <= u * cdf[-1]).sum()))
        total += float(logprobs[ids[-1]])
        if ids[-1] in (2, 5):
            break
    return tuple(ids[len(prompt) :]), total


@pytest.mark.parametrize("name", KINDS)
def test_completions_match_sampling_each_sequence_alone_without_a_cache(name, monkeypatch, capsys):
    """Check this for all kinds; regressions were tracebacks (Mamba, RWKV, GPT) and wrong logits (MiniMax)."""
    monkeypatch.setattr(console, "_warned", set())
    model = make(name)
    for i, drawn in enumerate(generate.sample(model, (2, 5), PROMPTS, **SETTINGS)):
        for j, one in enumerate(drawn):
            tokens, logprob = sample_alone(model, PROMPTS[i], generate._stream(1, i, j, 7))
            assert one.token_ids == tokens and one.logprob == pytest.approx(logprob, abs=1e-3)
            assert (one.finish == "eos") == (tokens[-1] in (2, 5))
    assert ("without a key-value cache" in capsys.readouterr().out) != KINDS[name][1]


def test_a_cache_that_gives_other_logits_is_not_used(monkeypatch):
    """Check that a cache whose rows are not reordered is detected by its logits."""
    model = make("mistral")
    assert decoding.supports_cache(model, PROMPTS) and decoding.supports_cache(model, [[3]])
    monkeypatch.setattr(decoding.CachedDecoder, "_select", lambda self, rows: None)
    assert not decoding.supports_cache(model, PROMPTS)


def test_a_model_that_gives_nan_is_named_with_the_prompt():
    model = make("gpt2")
    model.transformer.wte.weight.data[10] = torch.nan
    model.name_or_path = "some/model"
    with pytest.raises(RuntimeError, match="model some/model: expected finite logits; got NaN after prompt"):
        generate.sample(model, (2,), PROMPTS, **SETTINGS)
