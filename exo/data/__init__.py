"""Preference and reward data: one strict reader for all file types and row formats.

`read` converts a path or a hub name (sources/) to examples, each a prompt with its completions, from rows of any format
(formats/), and accounts for every row: used, skipped with a reason, or refused with `file:line: message`. A prompt of
chat messages is a `Chat`. text/ renders it with the chat template and tokenizes it, collate makes batches.

Errors name keys, types and places and never quote a row, because data is often private. Left out: streaming.
"""

from exo.data.dataset import Dataset, Example
from exo.data.errors import DataError
from exo.data.formats.generic import Purpose
from exo.data.formats.messages import Chat, Message, Reply
from exo.data.formats.parsed_row import Tokens
from exo.data.jsonl import read_jsonl, read_rows, write_jsonl
from exo.data.reader import read

__all__ = ["Chat", "DataError", "Dataset", "Example", "Message", "Purpose", "Reply", "Tokens"]
__all__ += ["read", "read_jsonl", "read_rows", "write_jsonl"]
