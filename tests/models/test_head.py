"""LMHead: log-probs from hidden states and head match those of the logits of transformers' causal LMs."""

import pytest
import torch
import transformers
from torch import nn

from exo import models
from exo.models.lm_head import LMHead
from exo_kernels import fused_exo_loss, fused_linear_exo_loss, linear_token_logps, token_logps

SMALL = dict(vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SMALL |= dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0)
GPT = dict(vocab_size=67, n_embd=32, n_layer=2, n_head=4, n_positions=64)
FAMILIES = {
    "Llama": SMALL,
    "Mistral": SMALL,
    "Qwen2": SMALL,
    "Qwen3": SMALL,
    "GPT2": GPT,
    "GPTNeoX": SMALL,
    "OPT": dict(vocab_size=67, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                word_embed_proj_dim=16, max_position_embeddings=64),  # a projection before its head
    "Gemma": SMALL,
    "Gemma2": SMALL,  # softcap 30
    "Gemma3": SMALL | dict(final_logit_softcapping=7.0),
    "Cohere": SMALL | dict(logit_scale=0.0625),
    "Cohere2": SMALL | dict(logit_scale=0.3),
    "Granite": SMALL | dict(logits_scaling=6.0),  # divides
    "HyperCLOVAX": SMALL | dict(logits_scaling=1.7),  # multiplies
    "FalconH1": SMALL | dict(lm_head_multiplier=0.4),
    "Phi": SMALL,  # a bias
    "StableLm": SMALL,
}  # fmt: skip


def tiny(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}{'Text' * (family == 'Gemma3')}Config")(**FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():  # makes the softcap and the bias change the logits
        head = model.get_output_embeddings()
        head.weight.mul_(20)
        if head.bias is not None:
            head.bias.normal_()
    return model


ALL_FAMILIES = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name == "FalconH1")) for name in FAMILIES]
)


@ALL_FAMILIES
def test_mapped_weights_equal_loaded_weights(family, tmp_path):
    """Check this for 16-bit files as fp32: parameters, and buffers that a 16-bit model would have rounded."""
    skip_unless_known(family)
    _, tokenizer = models.word_level(["a", "b"])
    models.save(tiny(family).to(torch.bfloat16), tokenizer, tmp_path)
    mapped, loaded = models.load(tmp_path, mapped=True)[0], models.load(tmp_path)[0]
    assert {p.dtype for p in mapped.parameters()} == {torch.bfloat16}
    mapped.float()
    for kind in ("named_parameters", "named_buffers"):
        mapped_tensors, loaded_tensors = (dict(getattr(model, kind)()) for model in (mapped, loaded))
        assert mapped_tensors.keys() == loaded_tensors.keys()
        assert all(
            torch.equal(mapped_tensors[name], loaded_tensors[name])
            and mapped_tensors[name].dtype == loaded_tensors[name].dtype
            for name in mapped_tensors
        )
    ids = torch.randint(67, (2, 9))
    assert torch.equal(mapped.eval()(ids).logits, loaded.eval()(ids).logits)
    assert mapped.config.to_dict() == loaded.config.to_dict()


def is_available(family):
    return hasattr(transformers, f"{family}{'Text' * (family == 'Gemma3')}Config")


def skip_unless_known(family):
    if not is_available(family):
        pytest.skip(f"this transformers has no {family}")


@ALL_FAMILIES
def test_log_probs_match_the_model(family):
    skip_unless_known(family)
    model = tiny(family)
    head = LMHead(model)
    ids = torch.randint(67, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    logits = model(input_ids=ids, attention_mask=mask).logits
    expected = token_logps(logits, labels)
    result = linear_token_logps(head.hidden(input_ids=ids, attention_mask=mask), head.weight, labels, **head.options)
    # a measured scale is rounded to fp32
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, logits)  # the model is unchanged


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Phi"])
def test_gradients_match_the_model(family):
    """Check the gradients of head, body and, for Gemma, the tied embedding."""
    model = tiny(family)
    head = LMHead(model)
    ids, ref = torch.randint(67, (4, 9)), torch.zeros(4)
    grads = []
    for linear in (False, True):
        model.zero_grad()
        if linear:
            loss = fused_linear_exo_loss(head.hidden(input_ids=ids), head.weight, ids, ref, **head.options)
        else:
            loss = fused_exo_loss(model(input_ids=ids).logits, ids, ref)
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close({name: grads[1][name]}, {name: grad}, rtol=1e-6, atol=1e-9)


def test_measuring_the_head_keeps_modes_and_random_state():
    """Check this for a model with dropout in training mode."""
    model = tiny("GPT2").train()
    model.transformer.h[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    LMHead(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert "forward" not in vars(model.lm_head)


def test_unsupported_logits_are_refused():
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Linear(4, 9)

        def get_output_embeddings(self):
            return self.lm_head

        def forward(self, input_ids):
            logits = self.lm_head(torch.zeros(*input_ids.shape, 4))
            return transformers.modeling_outputs.CausalLMOutput(logits=logits**2)

    with pytest.raises(ValueError, match="expected logits softcap"):
        LMHead(Squared())
    model = tiny("Llama")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="expected a linear layer as its head; got Sequential"):
        LMHead(model)


class Normalised(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, nn.functional.normalize(self.weight, dim=1), self.bias)


class Dropped(nn.Linear):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


class Scaled(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, 1.5 * self.weight, self.bias)


class Rounded(nn.Linear):
    def forward(self, x):
        return super().forward(x).to(torch.bfloat16).to(x.dtype)


class Cosine(nn.Linear):
    def forward(self, x):
        return super().forward(nn.functional.normalize(x, dim=-1))


def with_head(kind, family="Llama", dtype=torch.float32):
    model = tiny(family).to(dtype)
    head = kind(*reversed(model.lm_head.weight.shape), bias=False).to(dtype)
    head.weight = model.lm_head.weight
    model.lm_head = head.eval()
    return model


@pytest.mark.parametrize("kind", [Normalised, Dropped, Scaled, Rounded, Cosine])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_head_that_computes_something_else_than_a_linear_layer_is_refused(kind, dtype):
    model = with_head(kind, dtype=dtype)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"expected logits softcap.*{kind.__name__}") as caught:
        LMHead(model)
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), state) and not model.lm_head.training


def test_a_hook_that_changes_some_logits_is_refused_and_one_that_scales_them_is_measured():
    model = tiny("Llama")

    def mask(module, inputs, out):
        return torch.cat([out[..., :50], out[..., 50:] - 9], -1)

    hook = model.lm_head.register_forward_hook(mask)
    with pytest.raises(ValueError, match="expected logits softcap"):
        LMHead(model)
    hook.remove()
    model.lm_head.register_forward_hook(lambda module, inputs, out: 3 * out)
    assert LMHead(model).logit_scale == pytest.approx(3)


def test_a_reparametrized_head_gives_the_log_probs_and_gradients_of_the_model():
    model = tiny("Llama")
    nn.utils.parametrizations.weight_norm(model.lm_head)
    with torch.no_grad():
        model.lm_head.parametrizations.weight.original0.mul_(0.7)
    head, ids = LMHead(model), torch.randint(67, (2, 9))
    results = []
    for linear in (True, False):
        model.zero_grad()
        if linear:
            logps = linear_token_logps(head.hidden(input_ids=ids), head.weight, ids, **head.options)
        else:
            logps = token_logps(model(input_ids=ids).logits, ids)
        logps.sum().backward()
        results.append([logps.detach(), *(p.grad for p in model.lm_head.parameters())])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_plain_head_in_16_bits_is_accepted(dtype):
    LMHead(tiny("Gemma2").to(dtype))
    with pytest.raises(ValueError, match="expected logits softcap"):
        LMHead(with_head(Normalised, dtype=dtype))
