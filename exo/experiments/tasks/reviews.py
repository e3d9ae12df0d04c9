"""Prepare reviews with sentiment labels, the paper's section 4.1: continue the beginning of a review positively.

imdb        The prompt is the first 10 tokens of a review, as in the published scripts. The source is the unpacked
            aclImdb (train/pos/*.txt etc.), or rows of {"text", "label"}: a file, a directory with train.* and test.*,
            or a hub name.
polarity    The prompt is the first 4 words of a sentence. The source is a directory with rt_polarity.pos and
            rt_polarity.neg (Pang and Lee 2005: cp1252, a sentence per line). Creates a small model for them.

Left out: reviews without a label.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from exo import models
from exo.cli import console
from exo.cli.fields import require
from exo.data import DataError
from exo.experiments.tasks import source
from exo.experiments.tasks.source import Files, TaskRequest, lines

PREFIX_TOKENS, PREFIX_WORDS = 10, 4
# The model of polarity: it is fine-tuned in minutes on two CPU cores, and 10,000 sentences are enough for it.
SMALL: dict[str, int] = {"vocab_size": 6144, "hidden_size": 128, "num_layers": 2, "num_heads": 4}
_LONGEST = 2048  # characters that contain the first tokens of a text: a token of GPT-2 has at most 128


class Review(NamedTuple):
    prompt: str
    rest: str
    label: int  # 1 is positive

    @property
    def completions(self) -> list[str]:
        return [self.rest]


def imdb(request: TaskRequest) -> Files:
    prefix = _first_tokens(request.tokenizer)
    directory = Path(request.source)
    if (directory / "train" / "pos").is_dir():
        texts = [_read_unpacked(directory / part) for part in ("train", "test")]
    else:
        parts = source.source_parts(request.source)
        if directory.is_dir() and not parts.test:
            raise DataError(
                f"{request.source}: expected train/pos, train/neg, test/pos and test/neg with .txt files, as in "
                "aclImdb, or train.* and test.* with rows of text and label"
            )
        examples = [source.read(paths, "labels", request) for paths in parts]
        texts = [[(example.completions[0], example.label or 0) for example in part] for part in examples]
    texts = [[(text.replace("<br />", "\n").rstrip(), label) for text, label in part] for part in texts]
    train, test = (_split_reviews(source.subsample(part, request), prefix) for part in texts)
    if not test:
        train, test = source.hold_out(train, request.seed)
    return _make_files(train, test)


def polarity(request: TaskRequest) -> Files:
    files = {name: Path(request.source) / f"rt_polarity.{name}" for name in ("pos", "neg")}
    if not all(file.is_file() for file in files.values()):
        raise DataError(f"{request.source}: expected a directory with rt_polarity.pos and rt_polarity.neg")
    sentences = [
        (line.strip(), int(name == "pos"))
        for name, file in files.items()
        for line in _read_text(file, "cp1252").splitlines()
    ]
    distinct = dict.fromkeys(sentences)
    console.log(f"  {len(sentences):,} sentences, {len(sentences) - len(distinct):,} of them repeated")
    train, test = source.hold_out(_split_reviews(source.subsample(distinct, request), _first_words), request.seed)

    def base(directory: Path) -> int:
        texts = [review.prompt + review.rest for review in train]
        return source.model_files(*models.tiny(texts, seed=request.seed, **SMALL), directory)

    return _make_files(train, test) | {"base": base}


def _make_files(train: Sequence[Review], test: Sequence[Review]) -> Files:
    unseen = source.drop_seen(test, {review.prompt for review in train}, lambda review: review.prompt)
    return {
        "sft.jsonl": lines({"prompt": r.prompt, "completion": r.rest} for r in train),
        "prompts.jsonl": lines({"prompt": r.prompt} for r in train),
        "test.jsonl": lines({"prompt": r.prompt} for r in unseen),
        "labelled.jsonl": lines({"text": r.prompt + r.rest, "label": r.label} for r in train),
    }


def _split_reviews(texts: Iterable[tuple[str, int]], prefix: Callable[[str], int]) -> list[Review]:
    """Split each text after its first `prefix(text)` characters, and leave out texts that end there."""
    cut = [(text, prefix(text), label) for text, label in texts]
    reviews = [Review(text[:end], text[end:], label) for text, end, label in cut if text[end:].strip()]
    if num_short := len(cut) - len(reviews):
        console.log(f"  {num_short:,} texts left out: no longer than a prompt")
    return reviews


def _read_unpacked(directory: Path) -> list[tuple[str, int]]:
    """Return the (text, label) of the .txt files in pos/ and neg/."""
    files = {name: sorted((directory / name).glob("*.txt")) for name in ("pos", "neg")}
    for name, paths in files.items():
        if not paths:
            raise DataError(f"{directory / name}: expected the .txt files of aclImdb; found none")
    return [(_read_text(file, "utf-8"), int(name == "pos")) for name, paths in files.items() for file in paths]


def _read_text(file: Path, encoding: str) -> str:
    try:
        return file.read_bytes().decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not {encoding} (byte {error.start + 1})") from None


def _first_words(text: str) -> int:
    """Return the end of the fourth word. The blank after it belongs to the completion, as it does for tokenizers."""
    return len(" ".join(text.split(" ")[:PREFIX_WORDS]))


def _first_tokens(name: str | None) -> Callable[[str], int]:
    """Return a function that returns the end of the first 10 tokens of a text."""
    expected = f"a model whose first {PREFIX_TOKENS} tokens of a review are its prompt, such as gpt2"
    require(name not in (None, "tiny"), "tokenizer", expected, name)
    tokenizer: Any = models.load_tokenizer(str(name))
    require(tokenizer.is_fast, "tokenizer", "a fast tokenizer (tokenizer.json), which has offsets", name)

    def prefix(text: str) -> int:
        encoded = tokenizer(text[:_LONGEST], add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"]]
        return ends[PREFIX_TOKENS - 1] if len(ends) >= PREFIX_TOKENS else len(text)

    return prefix
