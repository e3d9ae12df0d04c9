"""Reviews by sentiment, the paper's section 4.1: a prompt is the beginning of a review, to be ended kindly.

imdb        the first 10 tokens of a review, as in the published scripts. The source is the unpacked aclImdb
            (train/pos/*.txt and so on), or rows of {"text", "label"}: a file, a directory with train.* and test.*, a
            hub name.
polarity    the first 4 words of a sentence. The source is a directory with rt_polarity.pos and rt_polarity.neg (Pang
            and Lee 2005: cp1252, a sentence a line). It makes a small model on the sentences.

Left out: reviews without a label.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from exo import models
from exo.cli import console
from exo.cli.fields import require
from exo.data import DataError
from exo.data.split import Texts
from exo.experiments.tasks.source import Files, TaskRequest, drop_seen, hold_out, lines, read, source_parts, subsample

PREFIX_TOKENS, PREFIX_WORDS = 10, 4
# Of polarity's model: what two CPU cores fine-tune in minutes, and 10,000 sentences can fill.
SMALL: dict[str, int] = {"vocab_size": 6144, "hidden_size": 128, "num_layers": 2, "num_heads": 4}
_LONGEST = 2048  # characters that the first tokens are looked for in: a token of GPT-2's has 128 at most


class Review(NamedTuple):
    prompt: str
    rest: str
    label: int  # 1 is positive

    @property
    def text(self) -> str:
        return self.prompt + self.rest


def imdb(wanted: TaskRequest) -> Files:
    cut = _first_tokens(wanted.tokenizer)
    place = Path(wanted.source)
    if (place / "train" / "pos").is_dir():
        train, test = (_unpacked(place / part) for part in ("train", "test"))
    else:
        found = source_parts(wanted.source)
        if place.is_dir() and not found.test:
            raise DataError(
                f"{wanted.source}: expected train/pos, train/neg, test/pos and test/neg with .txt files, as in "
                "aclImdb, or train.* and test.* with rows of text and label"
            )
        train, test = (
            [(g.completions[0], g.label or 0) for dataset in read(paths, "labels", wanted) for g in dataset.examples]
            for paths in found
        )
    cleaned, others = (
        _cut(((_clean(t), label) for t, label in subsample(part, wanted)), cut) for part in (train, test)
    )
    if not others:
        cleaned, others = hold_out(cleaned, _texts, wanted.seed)
    return _files(cleaned, others)


def polarity(wanted: TaskRequest) -> Files:
    place = Path(wanted.source)
    files = {name: place / f"rt_polarity.{name}" for name in ("pos", "neg")}
    if not all(file.is_file() for file in files.values()):
        raise DataError(f"{wanted.source}: expected a directory with rt_polarity.pos and rt_polarity.neg")
    sentences = [
        (line.strip(), int(name == "pos"))
        for name, file in files.items()
        for line in _text(file, "cp1252").splitlines()
    ]
    distinct = dict.fromkeys(sentences)
    console.log(f"  {len(sentences):,} sentences, {len(sentences) - len(distinct):,} of them once more")
    train, test = hold_out(_cut(subsample(distinct, wanted), _first_words), _texts, wanted.seed)

    def base(directory: Path) -> int:
        model, tokenizer = models.tiny([review.text for review in train], seed=wanted.seed, **SMALL)
        models.save(model, tokenizer, directory)
        return models.parameter_count(model)

    return _files(train, test) | {"base": base}


def _prompt(review: Review) -> str:
    return review.prompt


def _texts(review: Review) -> Texts:
    return Texts(review.prompt, [review.rest])


def _files(train: Sequence[Review], test: Sequence[Review]) -> Files:
    return {
        "sft.jsonl": lines({"prompt": r.prompt, "completion": r.rest} for r in train),
        "prompts.jsonl": lines({"prompt": r.prompt} for r in train),
        "test.jsonl": lines({"prompt": r.prompt} for r in drop_seen(test, set(map(_prompt, train)), _prompt)),
        "labelled.jsonl": lines({"text": r.text, "label": r.label} for r in train),
    }


def _cut(texts: Iterable[tuple[str, int]], cut: Callable[[str], int]) -> list[Review]:
    """Parted where `cut` says; a text that is no longer than its prompt is left out."""
    found = [Review(text[: cut(text)], text[cut(text) :], label) for text, label in texts]
    kept = [review for review in found if review.rest.strip()]
    if short := len(found) - len(kept):
        console.log(f"  {short:,} texts left out: no longer than a prompt")
    return kept


def _clean(text: str) -> str:
    return text.replace("<br />", "\n").rstrip()


def _unpacked(directory: Path) -> list[tuple[str, int]]:
    for name in ("pos", "neg"):
        if not any((directory / name).glob("*.txt")):
            raise DataError(f"{directory / name}: expected the .txt files of aclImdb; found none")
    return [
        (_text(file, "utf-8"), int(name == "pos"))
        for name in ("pos", "neg")
        for file in sorted((directory / name).glob("*.txt"))
    ]


def _text(file: Path, encoding: str) -> str:
    try:
        return file.read_bytes().decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not {encoding} (byte {error.start + 1})") from None


def _first_words(text: str) -> int:
    """Where the fourth word ends; the blank after it belongs to what follows, as tokenizers have it."""
    return len(" ".join(text.split(" ")[:PREFIX_WORDS]))


def _first_tokens(name: str | None) -> Callable[[str], int]:
    """A function that says where the first 10 tokens of a text end."""
    wanted = f"a model whose first {PREFIX_TOKENS} tokens of a review are its prompt, such as gpt2"
    require(name not in (None, "tiny"), "tokenizer", wanted, name)
    tokenizer: Any = models.load_tokenizer(str(name))
    require(tokenizer.is_fast, "tokenizer", "one that tells where tokens end (tokenizer.json)", name)

    def cut(text: str) -> int:
        options = {"add_special_tokens": False, "return_offsets_mapping": True}
        ends = [end for _, end in tokenizer(text[:_LONGEST], **options)["offset_mapping"]]
        return ends[PREFIX_TOKENS - 1] if len(ends) >= PREFIX_TOKENS else len(text)

    return cut
