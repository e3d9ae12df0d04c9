"""Rewards of third-party classifiers equal those of transformers for each unpadded row, in fp64."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from exo import data, models
from exo.data.collate import Collator
from exo.data.text.tokenize import TokenizedExample
from exo.distributed.accelerator import make_accelerator
from exo.models.reward_head import RewardHead
from exo.rollouts import scorers
from tests.tasks import write_model

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = {"vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
GPT = {"vocab_size": 24, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": SIZE,
    "qwen2": SIZE | {"num_key_value_heads": 1},
    "gpt2": GPT,
    "gpt_neox": SIZE,
    "opt": SIZE | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "bloom": {"vocab_size": 24, "hidden_size": 32, "n_layer": 2, "n_head": 2},
    "ctrl": GPT | {"dff": 64},  # its head is called classifier
}
OTHERS: dict[str, dict[str, Any]] = {  # pooling by the first token, a pooler or a mean
    "bert": SIZE,
    "deberta-v2": SIZE,
    "modernbert": SIZE | {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
    "xlnet": {"vocab_size": 24, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64},
}
PAD = 7
ROWS = [
    TokenizedExample((3, 4, 5), ((6, 9), (8,), (PAD,), (8, PAD), (PAD, 8, PAD, PAD)), None, 1),
    TokenizedExample((9,), ((10, 11, 12, 13, 14), (2,)), None, 2),
]


def make(name, outputs=1, **more):
    torch.manual_seed(0)
    settings = (DECODERS | OTHERS)[name]
    config = AutoConfig.for_model(name, **settings, **more)
    config.num_labels = outputs
    model = AutoModelForSequenceClassification.from_config(config).double().eval()
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    return model


@torch.no_grad()
def unpadded_rewards(model, examples=ROWS):
    """Return the rewards of transformers, one row at a time; without a pad id it pools at the last token."""
    pad_id, model.config.pad_token_id = getattr(model.config, "pad_token_id", None), None
    rows = [[*example.prompt, *completion] for example in examples for completion in example.completions]
    logits = torch.cat([model(torch.tensor([row])).logits for row in rows])
    model.config.pad_token_id = pad_id
    return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]


@pytest.mark.parametrize("name", DECODERS | OTHERS)
def test_rewards_are_those_of_each_row_alone(name):
    for outputs, pad in ((1, PAD), (2, None)):
        model = make(name, outputs, pad_token_id=PAD)
        model.config.pad_token_id = pad
        head = RewardHead(model)
        assert (head.head is not None) == (name in DECODERS)
        with torch.no_grad():
            rewards = head(Collator(0, 999).collate(ROWS))
        expected = unpadded_rewards(model)
        assert float(expected.std()) > 1e-2 and torch.allclose(rewards.double(), expected, atol=2e-6)


def test_rewards_of_a_16_bit_model_have_no_ties():
    """Check that 200 different completions have different rewards; a bfloat16 head gives many equal ones."""
    model = make("llama", pad_token_id=23).float()
    examples = [TokenizedExample((3,), tuple((i % 20, 1 + i // 20) for i in range(200)), None, 1)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        batch = Collator(0, 9999).collate(examples)
        rewards = RewardHead(model)(batch)
        rounded = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]
    assert rewards.dtype == torch.float32 and len(rewards.unique()) >= 199 > 180 > len(rounded.unique())


def test_a_pad_id_in_the_config_alone_changes_no_reward(tmp_path):
    """Check this for a tokenizer that pads with its end of sequence; a regression scored the token before it."""
    _, tokenizer = models.load(write_model(tmp_path / "policy"))
    torch.manual_seed(0)
    model, _ = models.classifier_from(str(tmp_path / "policy"), 1, seed=0)
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    tokenizer.pad_token = None
    model.config.pad_token_id = 0
    models.save(model, tokenizer, tmp_path / "reward")
    assert models.load_tokenizer(str(tmp_path / "reward")).pad_token_id == tokenizer.eos_token_id
    scorer = scorers.load(str(tmp_path / "reward"), None, make_accelerator(device="cpu"), max_length=64)
    texts = [" good", " bad red", " big small good"]
    ids = tokenizer("red")["input_ids"]
    rows = tuple(tuple(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]) for text in texts)
    expected = unpadded_rewards(model.double(), [TokenizedExample(tuple(ids), rows, None, 1)])
    (rewards,) = scorer.score([data.Example("red", tuple(texts), None, 1)])
    assert rewards == pytest.approx(expected.tolist(), abs=1e-5) and max(map(abs, rewards)) > 1e-2


def test_a_reward_that_is_not_finite_names_the_model_and_the_row(tmp_path, monkeypatch):
    write_model(tmp_path / "policy")
    model, tokenizer = models.classifier_from(str(tmp_path / "policy"), 1, seed=0)
    models.save(model, tokenizer, tmp_path / "reward")
    model.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids("bad")] = torch.nan
    monkeypatch.setattr(models, "load_classifier", lambda name: (model, tokenizer))
    name = str(tmp_path / "reward")
    scorer = scorers.load(name, None, make_accelerator(device="cpu"), max_length=64)
    rows = [data.Example("red", (" good",), None, 4), data.Example("red", (" bad",), None, 9)]
    with pytest.raises(RuntimeError, match=f"--reward_model {name}: expected finite rewards; got others in row 9"):
        scorer.score(rows)
