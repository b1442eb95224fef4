"""The text of one row: a string in its column `text`, or a chat in its column `messages`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

COLUMNS = ("text", "messages")


def row_text(row: Any, where: str, tokenizer: Any = None) -> str:
    """Return the text of a row; a chat is written out by the tokenizer's chat template.

    Args:
        row: a mapping with `text` or `messages` (a list of `{"role": ..., "content": ...}`), or the string itself.
        where: the row in words, for errors.
        tokenizer: needed for chats.

    Raises:
        ValueError: it has neither, or something else in it; the text cannot be written in UTF-8.
    """
    if isinstance(row, str):
        return writable(row, where)
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: a JSON {type(row).__name__}; one object a line is expected, or an array of them")
    if "text" in row:
        if not isinstance(row["text"], str):
            raise ValueError(
                f"{where}: the column 'text' holds a {type(row['text']).__name__}"
                f"{' (null)' if row['text'] is None else ''}, not a string: drop the row, or mend it"
            )
        return writable(row["text"], where)
    if "messages" in row:
        return writable(_chat_text(row["messages"], where, tokenizer), where)
    raise ValueError(f"{where}: {missing_column(row)}")


def missing_column(found: Iterable[Any]) -> str:
    """The words for rows that have neither column."""
    return (
        f"needs a column 'text' of strings; found: {', '.join(map(str, found))} (a column 'messages' of chats will "
        "do, too: rename the one that is meant)"
    )


def writable(text: str, where: str) -> str:
    """Return `text` itself; ValueError if it has half of a surrogate pair, as JSON escapes may write it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: character {error.start + 1} of the text is a lone surrogate ({text[error.start]!r}), which is "
            "no character: drop the row, or replace it"
        ) from error
    return text


def joined(documents: Iterable[str]) -> Iterator[str]:
    """Yield documents with a blank line between each two."""
    for number, document in enumerate(documents):
        if number:
            yield "\n\n"
        yield document


def _chat_text(messages: Any, where: str, tokenizer: Any) -> str:
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        lacks = "no tokenizer was given" if tokenizer is None else "the tokenizer has no chat template"
        raise ValueError(
            f"{where}: the column 'messages' holds chats, and {lacks}: pass the tokenizer of a chat model, or texts "
            "in a column 'text'"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # of any kind: the template is a program that comes with the tokenizer
        raise ValueError(
            f"{where}: the tokenizer's chat template cannot write its 'messages' ({type(error).__name__}: {error}); "
            "each one needs a 'role' and a 'content'"
        ) from error
