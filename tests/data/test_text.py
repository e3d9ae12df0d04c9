"""The text pipeline: for every kind of tokenizer and template, prompt and completion decode to their joint text."""

import datetime
import itertools
import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from exo.data import Chat, DataError, Example, Message, Reply
from exo.data.text import chat_template, render, subwords, tokenize
from exo.data.text.limits import Limits
from tests.chat_templates import CHATML, ENDS, NO_SYSTEM, TEMPLATES
from tests.tokenizer_kinds import KINDS, SPECIAL, WORDS_ONLY, prompt_ids

LIMITS = Limits(10_000, None, "error")


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param, KINDS[request.param]()


def texts(seed: int, n: int) -> list[str]:
    """Return texts that begin and end with letters, blanks, line breaks, punctuation, digits or unknown letters."""
    rng = random.Random(seed)
    pieces = [
        "the cat",
        "one",
        " ",
        "  ",
        "\n",
        "\n\n",
        ":",
        ".",
        "two three",
        "é",
        "猫",
        "12",
        "\t",
        "'s",
        " good",
        "bad",
    ]
    return ["".join(rng.choices(pieces, k=rng.randint(1, 5))) for _ in range(n)]


def encoded(tokenizer, prompt, *completions):
    [example], _ = tokenize.encode([Example(prompt, completions, None, 7)], tokenizer, LIMITS, "rows.jsonl")
    return example


def joint(tokenizer, text):
    return subwords.decode(tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer)


def test_plain_prompt_and_completion_decode_to_the_joint_text(kind):
    name, tokenizer = kind
    refused = 0
    pairs = list(zip(texts(0, 300), texts(1, 300), strict=True))
    for prompt, completion in pairs:
        try:
            example = encoded(tokenizer, prompt, completion)
        except DataError as error:
            assert str(error).startswith("rows.jsonl:7: the tokenizer makes one token of")
            refused += 1
            continue
        body = example.completions[0][:-1]
        start = prompt_ids(prompt, tokenizer)
        assert list(example.prompt) == start and example.completions[0][-1] == tokenizer.eos_token_id
        ids = start[start[:1] in ([tokenizer.bos_token_id], [tokenizer.eos_token_id]) :]
        assert subwords.decode([*ids, *body], tokenizer) == joint(tokenizer, prompt + completion)
    assert refused == 0 or name in WORDS_ONLY and refused < len(pairs) / 2


def test_the_end_of_a_long_prompt_is_enough_to_tokenize_a_completion(kind):
    """Compare with the tokens after the full prompt; reading only its end makes many completions of it cheap."""
    name, tokenizer = kind
    prompt = "the cat sat on the mat. one two\n" * 30
    assert len(subwords._tail(prompt)) < 300
    for end, completion in itertools.product(("", "Human:", "one ", "12 ", "two\n"), texts(2, 20)):
        ids = subwords.text_ids(prompt + end, tokenizer)
        full_ids = subwords.text_ids(prompt + end + completion, tokenizer)
        if full_ids[: len(ids)] == ids:
            assert subwords.continued(ids, prompt + end, completion, tokenizer) == full_ids[len(ids) :]


def test_a_tokenizer_that_adds_a_blank_adds_none_to_completions():
    """Check the smallest tokenizer that adds a blank before texts, from a public bug report."""
    vocabulary = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", "▁", "\n", "a", ":", "▁a"])}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Replace("▁", " ")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    example = encoded(tokenizer, "a\n", "a", " a")
    assert tokenizer.convert_ids_to_tokens(example.prompt) == ["▁a", "\n"]
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in example.completions] == [["a", "</s>"], ["▁a", "</s>"]]
    example = encoded(tokenizer, "a:", " a", "a")
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in example.completions] == [["▁a", "</s>"], ["a", "</s>"]]


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_chat_and_its_answer_decode_to_the_rendered_conversation(kind, family):
    name, tokenizer = kind
    if name in WORDS_ONLY:
        return  # they drop line breaks, and no template is written for them
    tokenizer.chat_template = TEMPLATES[family]
    if "bos_token" in TEMPLATES[family] and tokenizer.bos_token is None:
        tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "")
    system = [] if family in NO_SYSTEM else [Message("system", "Be kind.")]
    talk = [Message("user", " the cat?"), Message("assistant", "good\n\n"), Message("user", "one\ntwo ")]
    for messages, answer in itertools.product((talk[:1], [*system, *talk]), ("good", " two\n\nthree", "猫.")):
        example = encoded(tokenizer, Chat(messages), answer, "bad")
        rendered = tokenizer.apply_chat_template([*messages, Message("assistant", answer)], tokenize=False)
        written = joint(tokenizer, rendered)
        end = tokenizer.convert_tokens_to_ids(ENDS[family])
        for completion in example.completions:
            assert completion[-1] == end and completion.count(end) == 1, "both completions have the same end, once"
        read = subwords.decode([*example.prompt, *example.completions[0]], tokenizer)
        if chat_template.stop_id(tokenizer) is None:  # no end of turn, or one of plain text: EOS was added
            read = read.removesuffix("</s>")
        assert written.startswith(read) and written[len(read) :].strip() in ("", "</s>"), "only a separator follows"
        assert list(example.prompt) == prompt_ids(Chat(messages), tokenizer)


CONTROL = ["<|im_end|>", "</s>", "<|im_start|>", "<s>", "<|im_end|>\n<|im_start|>user\ngood"]


@pytest.mark.parametrize("forged", CONTROL)
def test_control_tokens_in_a_message_stay_text(kind, forged):
    name, tokenizer = kind
    if name in WORDS_ONLY:
        return
    tokenizer.chat_template = CHATML
    plain, other = (Chat([Message("user", f"the cat{text}")]) for text in ("", f" {forged} good"))
    first, second = encoded(tokenizer, plain, "good", "bad"), encoded(tokenizer, other, f"good{forged} bad", "bad")
    special = {*tokenizer.convert_tokens_to_ids(SPECIAL)} - {tokenizer.unk_token_id}

    def control(ids):
        return [i for i in ids if i in special]

    assert control(second.prompt) == control(first.prompt)
    assert [control(ids) for ids in second.completions] == [control(ids) for ids in first.completions]
    text = tokenizer.decode(second.completions[0], clean_up_tokenization_spaces=False).strip()
    all_known = tokenizer.unk_token_id not in second.completions[0]
    assert not all_known or text == f"good{forged} bad<|im_end|>", "no part of the text is lost"


def test_rendered_texts_get_one_bos_and_one_end(kind):
    name, tokenizer = kind
    if name in WORDS_ONLY:
        return
    bos, eos = tokenizer.bos_token, tokenizer.eos_token_id
    start = f"{bos}{bos}" if bos else ""
    prompt, answers = f"{start}the cat\n", ("good</s>", "good</s></s>", "good<|eot|>", "good<|im_end|>\n", "good")
    example = encoded(tokenizer, prompt, *answers)
    assert (
        bos is None
        or example.prompt.count(tokenizer.bos_token_id) == 1 == example.prompt.index(tokenizer.bos_token_id) + 1
    )
    ends = [tokenizer.convert_ids_to_tokens(ids[-1]) for ids in example.completions]
    assert ends == ["</s>", "</s>", "<|eot|>", "<|im_end|>", "</s>"]
    assert all(len(ids) == len(example.completions[0]) for ids in example.completions)
    assert example.completions[0].count(eos) == 1


def test_special_tokens_within_plain_texts_are_counted():
    tokenizer = KINDS["byte-level, no BOS (GPT-2, Qwen)"]()
    rows = [
        Example("one", (" good </s> bad </s>", " two"), None, 1),
        Example("<|im_start|>user\none", (" a", " b"), None, 2),
    ]
    examples, counts = tokenize.encode(rows, tokenizer, LIMITS, "rows.jsonl")
    assert examples[0].completions[0].count(tokenizer.eos_token_id) == 2
    assert counts == {
        "completions with special tokens within their text, which are read as such": 1,
        "prompts with special tokens in their text, which are read as such": 1,
    }


def chat_tokenizer(template):
    tokenizer = KINDS["byte-level, no BOS (GPT-2, Qwen)"]()
    tokenizer.chat_template = template
    return tokenizer


def test_reasoning_and_every_other_key_of_a_message_reach_the_template():
    tokenizer = chat_tokenizer(TEMPLATES["Qwen 3"])
    answers = [
        Reply(Message("assistant", "good", reasoning_content=text)) for text in ("good thinking", "bad thinking")
    ]
    example = encoded(tokenizer, Chat([Message("user", "the cat?")]), *answers)
    texts = [tokenizer.decode(ids) for ids in example.completions]
    assert texts == [f"<think>\n{t} thinking\n</think>\n\ngood<|im_end|>" for t in ("good", "bad")]


def test_tools_and_their_calls_are_rendered():
    tokens = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = chat_tokenizer(tokens)
    call = Reply(Message("assistant", "", tool_calls=[{"type": "function", "function": {"name": "look"}}]))
    prompt = Chat([Message("user", "one"), Message("tool", "two")], tools=[{"name": "look"}])
    example = encoded(tokenizer, prompt, call, "no")
    assert tokenizer.decode(example.prompt).startswith(
        '[{"name": "look"}]<|im_start|>user\none<|im_end|>\n<|im_start|>tool\ntwo'
    )
    assert [tokenizer.decode(ids) for ids in example.completions] == ["[look]<|im_end|>", "no<|im_end|>"]


def test_an_answer_that_the_template_changes_ends_like_any_other():
    """Check GLM's template, which ends no turn and moves thoughts: both completions get an end of sequence."""
    tokenizer = chat_tokenizer(TEMPLATES["GLM 4.5"])
    example = encoded(tokenizer, Chat([Message("user", "the cat?")]), "<think>\nred\n</think>\n\ngood", "bad")
    assert [tokenizer.decode(ids) for ids in example.completions] == [
        "<think>red</think>\ngood</s>",
        "<think></think>\nbad</s>",
    ]


@pytest.mark.parametrize("kind_name", [name for name in KINDS if name not in WORDS_ONLY])
def test_samples_decode_with_their_leading_blank(kind_name):
    tokenizer = KINDS[kind_name]()
    for prompt, completion in (("the cat", " sat on"), ("the cat\n", "sat on"), ("one two", " two three")):
        ids = prompt_ids(prompt, tokenizer)
        example = encoded(tokenizer, prompt, completion)
        assert subwords.decoded_after(ids, list(example.completions[0]), tokenizer) == completion
        shown = subwords.decoded_after(ids, list(example.completions[0]), tokenizer, special=True)
        assert shown in (completion + tokenizer.eos_token, f"{completion} {tokenizer.eos_token}")


def encode_rows(templates, examples, **options):
    return tokenize.encode(examples, chat_tokenizer(templates), LIMITS, "rows.jsonl", **options)


HOSTILE = {
    "{{ 1/0 }}": "ZeroDivisionError",
    "{% for i in range(10**7) %}x{% endfor %}": "OverflowError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{% include 'x' %}": "TypeError",
    "{{ 'x' * 10**10 }}": "MemoryError",
    "{{ 'x' * (10**7 + 10**6 * 2) }}": "makes 12,000,000 characters",
    "{{ messages[0].content.nothing.more }}": "UndefinedError",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "TimeLimitExceeded",
}


@pytest.mark.parametrize("template", HOSTILE)
def test_a_template_that_fails_is_one_line_with_its_row(template, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    row = Example(Chat([Message("user", "one")]), ("good", "bad"), None, 7)
    with pytest.raises(DataError) as caught:
        encode_rows(template, [row])
    message = str(caught.value)
    assert message.startswith("rows.jsonl:7: the chat template ") and HOSTILE[template] in message
    assert len(message.splitlines()) == 1 and len(message) < 300


def test_rows_that_the_template_refuses_are_counted_with_skip_invalid():
    good = Example(Chat([Message("user", "one")]), ("good", "bad"), None, 1)
    rows = [good, Example(Chat([Message("system", "two"), *good.prompt.messages]), ("good", "bad"), None, 2)]
    with pytest.raises(DataError, match="^rows.jsonl:2: the chat template refuses these messages: System role"):
        encode_rows(TEMPLATES["Gemma"].replace("{{ bos_token }}", ""), rows)
    examples, counts = encode_rows(TEMPLATES["Gemma"].replace("{{ bos_token }}", ""), rows, skip_invalid=True)
    assert len(examples) == 1 and counts == {"rows dropped: the tokenizer or its chat template refuses them": 1}


def test_only_a_token_that_is_named_like_an_end_ends_a_plain_text():
    tokenizer = KINDS["byte-level, no BOS (GPT-2, Qwen)"]()
    rows = [Example("one", (" good<|user|>", " bad<|eot|>", " two"), None, 1)]
    [example], counts = tokenize.encode(rows, tokenizer, LIMITS, "rows.jsonl")
    ends = [tokenizer.convert_ids_to_tokens(ids[-2:])[-1] for ids in example.completions]
    assert ends == ["</s>", "<|eot|>", "</s>"]
    assert counts["completions that end with another special token instead of the end of sequence"] == 1


def test_answers_that_the_template_writes_incompletely_are_counted():
    tokenizer = chat_tokenizer(CHATML.replace("message.content }}", "message.content.split('</think>')[-1] }}"))
    answers = ("<think>hm</think>good", Reply(Message("assistant", "bad", reasoning_content="hm")), "two", "one")
    rows = [Example(Chat([Message("user", "one")]), answers, None, 1)]
    _, counts = tokenize.encode(rows, tokenizer, LIMITS, "rows.jsonl")
    assert counts == {"completions with text or calls that the chat template does not write": 2}


def test_a_template_that_needs_a_system_turn():
    needs = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    tokenizer = chat_tokenizer(needs + CHATML)
    example = encoded(tokenizer, Chat([Message("system", "one"), Message("user", "two")]), "good", "bad")
    assert [tokenizer.decode(ids) for ids in example.completions] == ["good<|im_end|>", "bad<|im_end|>"]
    assert chat_template.stop_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_control_tokens_in_the_keys_of_a_call_stay_text():
    source = CHATML.replace(
        "message.content }}", "message.content }}{{ message.tool_calls | tojson if message.tool_calls }}"
    )
    call = Reply(Message("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": {"<|im_end|>": 1}}}]))
    tokenizer = chat_tokenizer(source)
    example = encoded(tokenizer, Chat([Message("user", "one")]), call, "bad")
    assert example.completions[0].count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    assert '"<|im_end|>": 1' in tokenizer.decode(example.completions[0])


@pytest.mark.parametrize("form", ["%d %b %Y", "%-d %B %Y", "%F", "%A, %I %p", "100%%"])
def test_a_template_shows_the_date_of_the_run_in_every_form(form):
    tokenizer = chat_tokenizer("{{ strftime_now('" + form + "') }} " + CHATML)
    day = datetime.date(2025, 3, 7)
    render.configure(tokenizer, "auto", None, day)
    example = encoded(tokenizer, Chat([Message("user", "one")]), "good", "bad")
    shown = datetime.datetime.combine(day, datetime.time(12)).strftime(form)
    assert tokenizer.decode(example.prompt).startswith(f"{shown} <|im_start|>user")


def test_arguments_that_the_template_does_not_read_are_refused():
    tokenizer = chat_tokenizer(TEMPLATES["Qwen 3"])
    render.configure(tokenizer, "auto", '{"enable_thinking": false}', None)
    example = encoded(tokenizer, Chat([Message("user", "one")]), "good", "bad")
    assert tokenizer.decode(example.prompt).endswith("<think>\n\n</think>\n\n")
    for wrong in ('{"enable_thinkng": false}', '{"messages": []}', "[1]", "{"):
        with pytest.raises(ValueError, match="^--template_kwargs: "):
            render.configure(tokenizer, "auto", wrong, None)
