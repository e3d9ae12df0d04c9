"""The choice of a layout: shared prompts if they save tokens and the model supports them, else a message."""

import json

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM

from exo import align
from exo.data.collate import Collator
from exo.data.text.tokenize import TokenizedExample
from exo.models.attention import choose as attention_choose
from exo.models.attention import masks
from tests.tasks import write_model, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")
PADDED = Collator(0, 4096)
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}


def tiny(family, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SMALL | options)))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            parameter.data.mul_(20)  # makes attention matter
    return model.eval()


def examples(prompt=40, answer=6, k=4):
    draw = torch.Generator().manual_seed(0)

    def ids(n):
        return tuple(torch.randint(1, 64, (n,), generator=draw).tolist())

    return [TokenizedExample(ids(prompt), tuple(ids(answer) for _ in range(k)), None, i) for i in range(6)]


def choose(model, rows, share="auto"):
    return attention_choose.choose_layout([model], rows, Accelerator(cpu=True), PADDED, share, 1.0)


def test_prompts_are_shared_if_that_saves_tokens(capsys):
    model = tiny("llama")
    assert choose(model, examples()) == PADDED._replace(layout="shared", one_row=True)
    assert model.config._attn_implementation == masks.SEGMENTS
    output = capsys.readouterr().out
    assert (
        "each prompt is encoded once for all its completions (exo_segments): 2.88 times fewer tokens than padded"
        in output
    )


def test_prompts_are_not_shared_if_that_saves_nothing_or_is_off(capsys):
    assert choose(tiny("llama"), examples(prompt=1, answer=30)) == PADDED
    assert choose(tiny("llama"), examples(), "off") == PADDED
    assert choose(tiny("llama"), examples(prompt=1, answer=30), "on").layout == "shared"
    assert capsys.readouterr().out.count("each prompt is encoded once") == 1


def test_a_model_that_passes_no_arguments_to_its_attention_gets_a_dense_mask(capsys):
    model = tiny("stablelm", num_key_value_heads=4)
    assert choose(model, examples()) == PADDED._replace(layout="shared")
    assert model.config._attn_implementation == "sdpa"
    output = capsys.readouterr().out
    assert "exo_segments attention is not available" in output and "(a dense mask): 2.88 times" in output
    assert choose(model, examples(prompt=8, answer=30, k=8)) == PADDED, (
        "a dense mask over all pairs of tokens would cost more"
    )


def test_every_model_must_support_the_layout(capsys):
    """Check that an unsupported reference model makes the policy use padded rows, too."""
    policy_and_reference = [tiny("llama"), tiny("bloom")]
    assert (
        attention_choose.choose_layout(policy_and_reference, examples(), Accelerator(cpu=True), PADDED, "on", 1.0)
        == PADDED
    )
    assert "BloomForCausalLM" in capsys.readouterr().out
    assert {model.config._attn_implementation for model in policy_and_reference} == {"sdpa", "eager"}
    both = [tiny("llama"), tiny("qwen2", num_key_value_heads=2)]
    assert attention_choose.choose_layout(both, examples(), Accelerator(cpu=True), PADDED, "on", 1.0).layout == "shared"
    assert {model.config._attn_implementation for model in both} == {masks.SEGMENTS}


@pytest.mark.parametrize(
    "family, options, message",
    [
        ("bloom", {}, "rows are padded, one per completion: "),  # ALiBi: it takes no position ids
        ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 4, "num_layers": 2}, "differ by"),
        ("recurrent_gemma", {"block_types": ["recurrent", "attention"]}, "rows are padded, one per completion: "),
        ("qwen3_next", {"num_hidden_layers": 4}, "layers of the kind linear_attention"),
    ],
)
def test_an_unsupported_model_is_reported_and_gets_padded_rows(family, options, message, capsys):
    assert choose(tiny(family, **options), examples(), "on") == PADDED
    assert message in capsys.readouterr().out


def test_the_trial_includes_the_longest_row(capsys):
    """Check a local attention window that only the longest row exceeds."""
    model = tiny("gpt_neo", attention_types=[[["global", "local"], 1]], window_size=30, num_layers=2)
    short = examples(prompt=8, answer=3)
    assert choose(model, short).layout == "shared"
    assert choose(model, [*short, *examples(prompt=60)[:1]]) == PADDED


def test_sharing_prompts_does_not_change_a_run(tmp_path, capsys):
    start = write_model(tmp_path / "model", scale=2.0)
    rows = [
        {
            "prompt": "red green blue " * 4 + f"{a} {b}",
            "completions": [f" {a} good", f" bad {b} big", " small"],
            "rewards": [1.0, 0.0, 0.5],
        }
        for a in ("red", "big", "good")
        for b in ("bad", "blue", "square")
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    weights = []
    for share in ("on", "off"):
        arguments = ["--model", start, "--data", data, "--share_prompt", share, "--output_dir", str(tmp_path / share)]
        arguments += ["--max_steps", "6", "--batch_size", "4", "--learning_rate", "1e-3", "--device", "cpu"]
        assert align.main([*arguments, "--max_tokens_per_batch", "64", "--beta_pi", "0.5"]) == 0
        record = json.loads((tmp_path / share / "run.json").read_text())
        assert (record["layout"], record["reference"]) == ("shared" if share == "on" else "padded", "cache")
        weights.append(AutoModelForCausalLM.from_pretrained(tmp_path / share).state_dict())
    assert "each prompt is encoded once" in capsys.readouterr().out
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=2e-5), name
