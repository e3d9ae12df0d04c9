"""The text part of multimodal checkpoints: it has the wrapper's log-probs and is saved as a text-only model."""

import importlib.util
import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from exo import align, models, reward
from exo.models.lm_head import LMHead
from exo_kernels import linear_token_logps, token_logps
from tests.tasks import WORDS, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TEXT |= dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=None)
TEXT |= dict(eos_token_id=2)
VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FAMILIES = {
    "Gemma3": (TEXT, VISION, dict(image_token_index=60, mm_tokens_per_image=4)),
    "Gemma3n": (
        dict(TEXT, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, num_kv_shared_layers=0, laurel_rank=4,
             altup_num_inputs=2, intermediate_size=[48, 48], layer_types=["sliding_attention", "full_attention"],
             activation_sparsity_pattern=[0.0, 0.0]),
        dict(hidden_size=16, vocab_size=8, vocab_offset=50),
        dict(image_token_id=60, audio_token_id=61, audio_config=dict(
            hidden_size=16, vocab_size=8, vocab_offset=58, conf_num_attention_heads=2, conf_num_hidden_layers=1,
            sscp_conv_channel_size=(4, 4),
        )),
    ),
    "Gemma4": (
        dict(TEXT, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, num_kv_shared_layers=0,
             layer_types=["sliding_attention", "full_attention"], global_head_dim=8, final_logit_softcapping=5.0),
        dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
             head_dim=8),
        dict(image_token_id=60, audio_config=None),
    ),
    "Qwen3_5": (
        dict(TEXT, layer_types=["linear_attention", "full_attention"], linear_num_value_heads=2,
             linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, tie_word_embeddings=True),
        dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32),
        dict(image_token_id=60, video_token_id=61),
    ),
    "Llama4": (
        dict(TEXT, num_local_experts=2, intermediate_size_mlp=48, attention_chunk_size=16),
        dict(VISION, vision_output_dim=16, projector_input_dim=16, projector_output_dim=16), dict(),
    ),
    "Mistral3": (
        dict(TEXT, model_type="mistral"), dict(VISION, model_type="pixtral", head_dim=8), dict(image_token_index=60)
    ),
    "Llava": (dict(TEXT, model_type="llama"), dict(VISION, model_type="clip_vision_model"), dict(image_token_index=60)),
    "PaliGemma": (
        dict(TEXT, model_type="gemma"), dict(VISION, model_type="siglip_vision_model"), dict(image_token_index=60)
    ),
    "InternVL": (
        dict(TEXT, model_type="qwen2"), dict(VISION, image_size=[8, 8], patch_size=[4, 4]), dict(image_token_id=60)
    ),
}  # fmt: skip


def write_wrapper(family, directory, **changes):
    """Save a multimodal model with random weights to `directory`; return it."""
    text, vision, options = FAMILIES[family]
    text = text | changes
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"this transformers has no {family}")
    config = getattr(transformers, f"{family}Config")(text_config=dict(text), vision_config=dict(vision), **options)
    torch.manual_seed(0)
    wrapper = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in wrapper.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    _, tokenizer = models.word_level([*WORDS, *(f"w{i}" for i in range(40))])
    models.save(wrapper, tokenizer, directory)
    return wrapper


@contextmanager
def without_timm():
    """Build Gemma 3n with a stand-in for its vision tower, which is a model of timm's, if that is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        if not importlib.util.find_spec("timm"):
            module = pytest.importorskip("transformers.models.gemma3n.modeling_gemma3n")
            build = module.AutoModel.from_config

            def from_config(config, **settings):
                return torch.nn.Linear(2, 2) if "vision" in config.model_type else build(config, **settings)

            patch.setattr(module, "AutoModel", SimpleNamespace(from_config=from_config))
        yield


@pytest.fixture
def tower():
    with without_timm():
        yield


SLOW = ("Llava", "PaliGemma", "InternVL")


@pytest.mark.parametrize("family", [pytest.param(f, marks=[pytest.mark.slow] * (f in SLOW)) for f in FAMILIES])
@pytest.mark.usefixtures("tower")
def test_log_probs_of_text_are_those_of_the_wrapper(family, tmp_path, capsys):
    wrapper = write_wrapper(family, tmp_path / "wrapper")
    model, tokenizer = models.load(tmp_path / "wrapper")
    output = capsys.readouterr().out
    assert f"{type(wrapper).__name__} is multimodal; its text part alone" in output and len(output.splitlines()) == 1
    ids = torch.randint(3, 50, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        expected = token_logps(wrapper(input_ids=ids, attention_mask=mask).logits, labels)
        head = LMHead(model)
        hidden = head.hidden(input_ids=ids, attention_mask=mask)
        result = linear_token_logps(hidden, head.weight, labels, **head.options)
    assert float(expected.abs().max()) > 1
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    # the saved model in transformers has the same log-probs
    models.save(model, tokenizer, tmp_path / "text")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    assert not {"vision_config", "text_config"} & json.loads((tmp_path / "text/config.json").read_text()).keys()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "text")) == len(tokenizer)
    with torch.no_grad():
        logits = again(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(token_logps(logits, labels), expected, rtol=1e-5, atol=1e-5)
    assert not any("vision" in name for name in again.state_dict())


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_a_wrapper_that_needs_another_library_is_a_one_line_error(tmp_path):
    with without_timm():
        write_wrapper("Gemma3n", tmp_path / "wrapper")
    with pytest.raises(ValueError, match="Gemma3nForConditionalGeneration.*requires the timm library") as caught:
        models.load(tmp_path / "wrapper")
    assert "\n" not in str(caught.value)


def test_a_text_part_with_other_logits_is_refused(tmp_path):
    """Check this for Gemma 3 with a softcap, which transformers applies in the text model but not in the wrapper."""
    write_wrapper("Gemma3", tmp_path / "wrapper", final_logit_softcapping=5.0)
    with pytest.raises(ValueError, match="logits that differ from the wrapper's by") as caught:
        models.load(tmp_path / "wrapper")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "reason"), [
    ("Qwen2_5_VL", "no causal LM for its text part .model type 'qwen2_5_vl_text'"),
    ("Mllama", "no causal LM for its text part .model type 'mllama_text_model'"),
    ("Phi4Multimodal", "no text part of its own"),
    ("CLIP", "no causal LM for its text part .model type 'clip_text_model'"),
])  # fmt: skip
def test_a_wrapper_without_a_causal_lm_is_refused(kind, reason):
    with pytest.raises(ValueError, match=f"it is multimodal.*{reason}") as caught:
        models.refuse_unsupported(getattr(transformers, f"{kind}Config")())
    assert "\n" not in str(caught.value)


def test_the_tokenizer_is_the_one_that_was_saved(tmp_path):
    """Check this for qwen3_5, for which transformers selects a tokenizer without these words."""
    write_wrapper("Qwen3_5", tmp_path / "wrapper")
    assert models.load_tokenizer(str(tmp_path / "wrapper"))("red good")["input_ids"] == [
        3 + WORDS.index("red"),
        3 + WORDS.index("good"),
    ]


def rows(path):
    texts = [
        {"prompt": f"{a} {b}", "chosen": f" good {a}", "rejected": f" bad {b} big"} for a in WORDS for b in WORDS[:3]
    ]
    return write_rows(path, texts)


@pytest.mark.parametrize(("family", "options"), [
    ("Gemma3", ["--share_prompt", "on"]),
    pytest.param("Mistral3", ["--share_prompt", "auto", "--lora_r", "2"], marks=pytest.mark.slow),
    pytest.param("Llama4", ["--reference", "live"], marks=pytest.mark.slow),
    ("Qwen3_5", ["--share_prompt", "auto"]),
])  # fmt: skip
def test_an_alignment_from_a_wrapper_saves_a_text_model(family, options, tmp_path, capsys):
    write_wrapper(family, tmp_path / "wrapper")
    arguments = ["--model", str(tmp_path / "wrapper"), "--data", rows(tmp_path / "rows.jsonl"), "--device", "cpu"]
    arguments += ["--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--batch_size", "4", *options]
    assert align.main([*arguments, "--learning_rate", "1e-3", "--max_length", "32"]) == 0
    assert "not comparable" not in capsys.readouterr().out
    before, after = models.load(tmp_path / "wrapper")[0], AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert type(before) is type(after)
    assert any(not torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))


def test_a_reward_model_from_a_wrapper(tmp_path):
    write_wrapper("Gemma3", tmp_path / "wrapper")
    arguments = ["--model", str(tmp_path / "wrapper"), "--data", rows(tmp_path / "rows.jsonl"), "--device", "cpu"]
    arguments += ["--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--batch_size", "4"]
    assert reward.main([*arguments, "--max_length", "32"]) == 0
    model, _ = models.load_classifier(str(tmp_path / "run"))
    assert model.config.num_labels == 1 and not any("vision" in name for name in model.state_dict())


def test_mapped_weights_of_a_wrapper_equal_loaded_weights(tmp_path):
    wrapper = write_wrapper("Gemma3", tmp_path / "wrapper")
    models.save(wrapper.to(torch.bfloat16), models.load_tokenizer(str(tmp_path / "wrapper")), tmp_path / "wrapper")
    mapped, loaded = (models.load(tmp_path / "wrapper", mapped=mapped)[0] for mapped in (True, False))
    assert {p.dtype for p in mapped.parameters()} == {torch.bfloat16}
    ids = torch.randint(3, 50, (2, 9))
    assert torch.equal(mapped.float().eval()(ids).logits, loaded.eval()(ids).logits)


@pytest.mark.parametrize("family", ["Gemma3", "Llama4"])
def test_the_text_part_is_trained_in_4_bits_and_merged(family, tmp_path):
    pytest.importorskip("bitsandbytes")
    write_wrapper(family, tmp_path / "wrapper")
    arguments = ["--model", str(tmp_path / "wrapper"), "--data", rows(tmp_path / "rows.jsonl"), "--device", "cpu"]
    arguments += ["--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--batch_size", "4", "--lora_r", "2"]
    assert align.main([*arguments, "--load_in_4bit", "--learning_rate", "1e-3", "--max_length", "32"]) == 0
    ids = torch.randint(3, 50, (2, 9))
    merged, rounded = models.load(tmp_path / "run")[0], models.load(tmp_path / "wrapper", four_bits=torch.float32)[0]
    unrounded = models.load(tmp_path / "wrapper")[0]
    with torch.no_grad():
        merged_logits, rounded_logits, unrounded_logits = (
            model.eval()(ids).logits for model in (merged, rounded, unrounded)
        )
    assert (merged_logits - rounded_logits).abs().max() < 0.5 * (merged_logits - unrounded_logits).abs().max(), (
        "it must be close to the rounded weights"
    )
    assert not hasattr(merged.config, "quantization_config")
