"""Chat messages as text and tokens: where the completion begins, one BOS, and the end of turn of the template."""

import copy

import pytest
from tokenizers.processors import TemplateProcessing

from exo import models
from exo.data import Chat, DataError, Example, Message, read, write_jsonl
from exo.data.text import chat_template, render, tokenize
from exo.data.text.limits import Limits
from exo.models import tiny_models
from tests.tokenizer_kinds import prompt_ids

OPENED = "{% if add_generation_prompt %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + OPENED
    + "<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<h>{{ m.role }}</h>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    + OPENED
    + "<h>assistant</h>\n\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + OPENED + "assistant: {% endif %}"
# The generation prompt opens a thought that the rendered answer does not contain.
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role\nhere') }}{% endif %}" + CHATML

CHAT = Chat([Message("system", "Be kind."), Message("user", "ab abc?")])


@pytest.fixture(scope="module")
def tiny():
    _, tokenizer = models.tiny(["ab abc abcd assistant user system? Be kind. " * 20], hidden_size=32, num_layers=1)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|eot|>", "<bos>"]})
    return tokenizer


@pytest.fixture
def tokenizer(tiny):
    """Yield the tokenizer, and restore its template, EOS and BOS after the test."""
    eos_token = tiny.eos_token
    yield tiny
    tiny.eos_token, tiny.bos_token, tiny.chat_template = eos_token, None, None


def set_up(tokenizer, template, eos, bos=None):
    tokenizer.chat_template, tokenizer.eos_token, tokenizer.bos_token = template, eos, bos
    return tokenizer


def encode(tokenizer, *completions, prompt=CHAT, **limits):
    limits = Limits(**{"max_length": 200, "max_completion_length": None, "truncate": "prompt-left"} | limits)
    return tokenize.encode([Example(prompt, completions, None, 7)], tokenizer, limits, "rows.jsonl")


def test_chatml_ends_with_its_eos_and_not_with_the_line_break(tokenizer):
    set_up(tokenizer, CHATML, "<|im_end|>")
    [example], counts = encode(tokenizer, "ab", " abcd")
    assert tokenizer.decode(example.prompt) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nab abc?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [tokenizer.decode(ids) for ids in example.completions] == ["ab<|im_end|>", " abcd<|im_end|>"]
    assert all(ids.count(tokenizer.eos_token_id) == 1 for ids in example.completions) and not counts


def test_the_bos_of_a_template_appears_once(tokenizer):
    set_up(tokenizer, LLAMA, "<|eot|>", "<bos>")
    [example], counts = encode(tokenizer, "ab", " abcd ")
    assert example.prompt[0] == tokenizer.bos_token_id and example.prompt.count(tokenizer.bos_token_id) == 1
    assert [tokenizer.decode(ids) for ids in example.completions] == ["ab<|eot|>", "abcd<|eot|>"] and not counts


def adds_bos(tokenizer):
    """Return a copy of the tokenizer that adds a BOS to plain texts, as Llama's does."""
    other = copy.deepcopy(tokenizer)
    special = [("<bos>", other.bos_token_id)]
    other.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=special)
    return other


@pytest.mark.parametrize(("template", "eos", "times"), [(LLAMA, "<|eot|>", 1), (CHATML, "<|im_end|>", 0)])
def test_the_template_alone_decides_on_bos(tokenizer, template, eos, times):
    tokenizer = adds_bos(set_up(tokenizer, template, eos, "<bos>"))
    [example], _ = encode(tokenizer, "ab", "abcd")
    assert example.prompt.count(tokenizer.bos_token_id) == times
    assert prompt_ids("ab", tokenizer)[0] == tokenizer.bos_token_id


def test_bos_stays_when_the_prompt_is_cut(tokenizer):
    set_up(tokenizer, LLAMA, "<|eot|>", "<bos>")
    [example], counts = encode(tokenizer, "ab", "abcd", max_length=30, max_prompt_length=18)
    assert example.prompt[0] == tokenizer.bos_token_id and len(example.prompt) == 18
    assert counts == {"rows with the prompt cut on the left to --max_prompt_length": 1}


def test_an_end_of_turn_other_than_eos_ends_completions_and_samples(tokenizer):
    set_up(tokenizer, CHATML, "<eos>")
    [example], counts = encode(tokenizer, "ab", "abcd")
    assert [tokenizer.decode(ids) for ids in example.completions] == ["ab<|im_end|>", "abcd<|im_end|>"] and not counts
    assert chat_template.stop_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>") != tokenizer.eos_token_id


@pytest.mark.parametrize(("content", "second"), [("m.content", " abcd<eos>"), ("m.content | trim", "abcd<eos>")])
def test_eos_ends_the_completions_of_a_template_without_an_end_of_turn(tokenizer, content, second):
    set_up(tokenizer, PLAIN.replace("m.content", content), "<eos>")
    [example], counts = encode(tokenizer, "ab", " abcd")
    assert tokenizer.decode(example.prompt).endswith("user: ab abc?\nassistant: ")
    assert [tokenizer.decode(ids) for ids in example.completions] == ["ab<eos>", second] and not counts


@pytest.mark.parametrize(
    ("template", "eos"), [(CHATML, "<|im_end|>"), (LLAMA, "<|eot|>"), (CHATML, "<eos>"), (PLAIN, "<eos>")]
)
def test_sampling_and_training_use_the_same_prompt(tokenizer, template, eos):
    """Check that the prompt and a completion together equal the rendered conversation, too."""
    set_up(tokenizer, template, eos, "<bos>")
    [example], _ = encode(tokenizer, "ab", "abcd")
    assert tuple(prompt_ids(CHAT, tokenizer)) == example.prompt
    messages = [*CHAT.messages, Message("assistant", "ab")]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    text = tokenizer.decode(example.prompt + example.completions[0])
    assert rendered.rstrip() == (text.removesuffix("<eos>") if template == PLAIN else text)


def test_prompts_and_samples_keep_their_tokens_when_written_and_read(tokenizer, tmp_path):
    set_up(tokenizer, CHATML, "<|im_end|>")
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": CHAT}])
    [prompt_example] = read(tmp_path / "a.jsonl", purpose="prompts").examples
    ids = tokenizer("ab<|im_end|>", add_special_tokens=False)["input_ids"]
    other = ids[:1]
    row = {"prompt": prompt_example.prompt, "completions": ["ab", "a"], "rewards": [1, 2], "token_ids": [ids, other]}
    row |= {"tokenizer": tokenize.tokenizer_hash(tokenizer), "logprobs": [-1, -2], "finish": ["eos", "length"]}
    write_jsonl(tmp_path / "b.jsonl", [row])
    [example] = read(tmp_path / "b.jsonl").examples
    [encoded], _ = tokenize.encode([example], tokenizer, Limits(99, None, "error"), "b.jsonl")
    assert encoded.prompt == tuple(prompt_ids(CHAT, tokenizer))
    assert encoded.completions == (tuple(ids), tuple(other))


def test_completions_that_render_to_the_same_tokens_are_dropped(tokenizer):
    set_up(tokenizer, LLAMA, "<|eot|>", "<bos>")
    rows, counts = encode(tokenizer, "ab", " ab ")
    assert not rows and counts == {"rows dropped: completions identical as tokens": 1}


def test_a_single_completion_is_not_dropped_as_identical(tokenizer):
    set_up(tokenizer, CHATML, "<|im_end|>")
    assert len(encode(tokenizer, "ab")[0]) == 1


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "chat messages, but the tokenizer has no chat template; take the model's instruct version"),
        (THINKING, "the chat template renders the prompt differently once it is answered"),
        (STRICT, "the chat template refuses these messages: no system role"),
        ("{{ messages[9].role.x }}", "the chat template refuses these messages: "),
        ("{% if %}", "the chat template refuses these messages: "),
    ],
)
def test_a_rendering_error_is_one_line_with_file_and_line(tokenizer, template, words):
    set_up(tokenizer, template, "<|im_end|>")
    with pytest.raises(DataError) as caught:
        encode(tokenizer, "ab", "abcd")
    message = str(caught.value)
    assert message.startswith(f"rows.jsonl:7: {words}") and len(message.splitlines()) == 1


def test_an_empty_thought_before_the_answer_belongs_to_the_completion(tokenizer):
    """Check a template that writes an empty thought into an answer, but not into the generation prompt."""
    thought = CHATML.replace(
        "{{ m.content }}", "{{ '<think></think>' if loop.last and m.role != 'user' }}{{ m.content }}"
    )
    set_up(tokenizer, thought, "<|im_end|>")
    renderer = chat_template.Renderer(tokenizer)
    answer = renderer.answer(CHAT, renderer.prompt(CHAT), "ab")
    assert answer == ("<think></think>ab", "<|im_end|>", False)


TALK = [Message("system", "Be kind."), Message("user", "ab?"), Message("assistant", "ab"), Message("user", "abc?")]


@pytest.mark.parametrize(
    ("template", "prompt", "completion"),
    [
        (
            tiny_models.TEMPLATE,
            "System: Be kind.\n\nUser: ab?\n\nAssistant: ab<eos>\n\nUser: abc?\n\nAssistant:",
            " abcd<eos>",
        ),
        (
            render.BUILT_IN["chatml"],
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nab?<|im_end|>\n"
            "<|im_start|>assistant\nab<|im_end|>\n<|im_start|>user\nabc?<|im_end|>\n<|im_start|>assistant\n",
            "abcd<|im_end|>",
        ),
        (
            render.BUILT_IN["plain"],
            "System: Be kind.\n\nUser: ab?\n\nAssistant: ab\n\nUser: abc?\n\nAssistant:",
            " abcd<eos>",
        ),
    ],
    ids=["tiny", "chatml", "plain"],
)
def test_built_in_templates(tokenizer, template, prompt, completion):
    set_up(tokenizer, template, "<eos>")
    [example], _ = encode(tokenizer, "abcd", "ab", prompt=Chat(TALK))
    assert tokenizer.decode(example.prompt) == prompt
    assert tokenizer.decode(example.completions[0]) == completion
