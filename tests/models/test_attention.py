"""Every layout gives the log-probs and gradients of one row per text, for every model family, in fp64."""

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM

from exo import models
from exo.data.collate import Collator, split_completions
from exo.data.text.tokenize import TokenizedExample
from exo.models import logps as model_logps
from exo.models.attention import flash, masks
from exo.models.lm_head import LMHead
from exo.models.logps import completion_hidden, map_micro_batches
from exo_kernels import linear_token_logps

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8, "pad_token_id": 0}  # fmt: skip
SLIDING = {"sliding_window": 5, "num_hidden_layers": 3}
FAMILIES = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "olmo2": {}, "phi3": SLIDING, "mistral": SLIDING, "gemma": {},
    "gemma2": SLIDING,
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": SLIDING, "granite": {}, "starcoder2": SLIDING, "stablelm": {}, "smollm3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {"num_key_value_heads": None}, "phi": {"num_key_value_heads": 4},
}  # fmt: skip
LAYOUTS = [(layout, one_row) for layout in ("packed", "shared") for one_row in (False, True)]


@pytest.fixture
def all_in_fp64(monkeypatch):
    """Replace float32 by float64, because transformers casts norms, rotary angles and softmax to float32."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def tiny(family, implementation):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SMALL | FAMILIES[family]))
    config._attn_implementation = implementation
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).double().eval()


def examples():
    """Return examples of 1 to 4 completions, with texts from one token to longer than the sliding windows."""
    draw = torch.Generator().manual_seed(0)

    def ids(n):
        return tuple(torch.randint(1, 64, (n,), generator=draw).tolist())

    sizes = [(1, (1, 3)), (9, (4, 1, 6)), (3, (2, 2)), (12, (7, 5, 1, 2)), (6, (1,))]
    return [TokenizedExample(ids(p), tuple(map(ids, answers)), None, i) for i, (p, answers) in enumerate(sizes)]


def scored(model, rows, collator):
    """Return the log-probs of the completions' tokens and the gradient of a weighted sum of them."""
    head = LMHead(model)
    model.zero_grad()

    def score_batch(part):
        batch = collator.collate(part)
        logps = linear_token_logps(completion_hidden(head, batch), head.weight, **batch.loss_inputs(), **head.options)
        (logps * torch.sin(3.0 * batch.targets)).sum().backward()
        return [torch.cat(rows).detach() for rows in split_completions(part, logps)]

    logps = torch.cat(map_micro_batches(rows, score_batch, collator))
    return logps, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("implementation", ["sdpa", "eager", masks.SEGMENTS])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("all_in_fp64")
def test_every_layout_gives_the_same_log_probs_and_gradients(family, implementation):
    if family == "gemma2" and implementation != "eager":
        pytest.skip("its attention has a softcap")
    if family == "stablelm" and implementation == masks.SEGMENTS:
        pytest.skip("it passes no arguments to its attention, which the trial at the start of a run detects")
    model = tiny(family, "eager" if family == "gemma2" else "sdpa")
    expected = scored(model, examples(), Collator(0, 10**6))
    models.attend(model, implementation)
    assert expected[1].abs().max() > 1e-3
    for layout, one_row in LAYOUTS:
        for max_tokens in (10**6, 40, 1):
            result = scored(model, examples(), Collator(0, max_tokens, layout, one_row))
            for value, expected_value in zip(result, expected, strict=True):
                assert (value - expected_value).abs().max() < 1e-10, (layout, one_row, max_tokens)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text", "gpt_neox"])
def test_flex_attention_gives_the_same_log_probs(family):
    """Check the forward pass with softcaps and windows; on a CPU flex attention runs uncompiled."""
    model = tiny(family, "eager").float()
    accelerator = Accelerator(cpu=True)
    expected = model_logps.token_logps(model, examples(), accelerator, Collator(0, 10**6), 1.0)
    models.attend(model, masks.FLEX)
    for layout in ("packed", "shared"):
        result = model_logps.token_logps(model, examples(), accelerator, Collator(0, 60, layout, True), 1.0)
        for value, expected_value in zip(sum(result, []), sum(expected, []), strict=True):
            assert (value - expected_value).abs().max() < 1e-5


def test_flash_attention_gets_the_sequence_lengths_of_a_row():
    rows = examples()[:2]
    batch = Collator(0, 60, "packed", True).collate(rows)
    config = tiny("llama", "eager").config
    config._attn_implementation = flash.FLASH
    inputs = masks.inputs(batch, config)
    lengths = [len(example.prompt) + len(answer) for example in rows for answer in example.completions]
    assert inputs["cu_seq_lens_q"].diff().tolist() == lengths and inputs["max_length_k"] == max(lengths)
    assert (
        inputs["position_ids"].tolist() == [[i for n in lengths for i in range(n)]] and "attention_mask" not in inputs
    )
