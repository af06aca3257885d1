"""Conversations as documents: each is rendered by the tokenizer's chat template when it is read."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CHAT_COLUMNS = ("messages", "conversations", "conversation")
Message: TypeAlias = dict[str, Any]

# The two spellings that data sets use: keys of the speaker and of what is said.
_SPELLINGS = (("role", "content"), ("from", "value"))
_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response"), "tool"),
    "system": "system",
    "developer": "developer",
}


def is_conversation(value: Any) -> bool:
    """Returns whether a value is a list of messages, with role and content or with from and value."""
    messages = _as_list(value)
    return bool(messages) and all(isinstance(each, Mapping) and _spelling(each) is not None for each in messages)


def messages_of(value: Any) -> list[Message]:
    """Returns a conversation with the keys `role` and `content`, whatever its spelling.

    The roles human and gpt become user and assistant. Content that is a list of parts becomes its text. Further keys,
    such as `tool_calls`, are kept where they hold something.

    Raises:
        ValueError: for a role that is not known, or content that is neither text nor parts of text.
    """
    return [_message(each) for each in _as_list(value)]


class ChatDocuments(Sequence[str]):
    """Conversations, rendered as they are indexed; one that the template refuses is an empty document.

    Args:
        rows: conversations, or None for a row without one.
        tokenizer: the tokenizer whose chat template renders them.
        where: place of the conversations, for errors.

    Raises:
        ValueError: if there is no tokenizer, or it has no chat template.
    """

    def __init__(self, rows: Sequence[Any], tokenizer: "PreTrainedTokenizerBase | None", where: str) -> None:
        if tokenizer is None:
            raise ValueError(f"{where} holds conversations, which need a tokenizer with a chat template; give one")
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"{where} holds conversations, but the tokenizer has no chat template; give the tokenizer of a chat "
                "model (tokenizer), set its chat_template, or name a column of plain text (text_column)"
            )
        self._rows, self._tokenizer, self._where = rows, tokenizer, where
        self._refused: dict[int, str] = {}

    def __len__(self) -> int:
        """Number of conversations."""
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        """The text of a conversation, with the special tokens of the template; empty if it was refused."""
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        row = self._rows[index]
        if row is None or not _as_list(row):
            return ""
        try:
            return str(self._tokenizer.apply_chat_template(messages_of(row), tokenize=False))
        except ImportError:
            raise
        except Exception as error:  # templates are programs: they raise what they like
            self._refused[index] = f"{' '.join(str(error).split()) or type(error).__name__}"
            return ""

    def report_refused(self) -> None:
        """Warns of conversations that could not be rendered so far.

        Raises:
            ValueError: if that was every one.
        """
        if not self._refused:
            return
        first, reason = min(self._refused.items())
        if len(self._refused) == len(self):
            raise ValueError(
                f"{self._where}: not one of the {len(self)} conversations can be rendered by the chat template "
                f"(conversation {first}: {reason}); correct the data, or give another tokenizer"
            )
        logger.warning(
            "%s: %d conversations were left out, the chat template refuses them (conversation %d: %s)",
            self._where,
            len(self._refused),
            first,
            reason,
        )


def _as_list(value: Any) -> list[Any]:
    """Returns a conversation's messages; a table may hold them as one list per key."""
    if isinstance(value, Mapping) and value and all(isinstance(column, Sequence) for column in value.values()):
        return list(_rows_of(value))
    return list(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else []


def _rows_of(columns: Mapping[str, Sequence[Any]]) -> Iterator[Message]:
    length = max(map(len, columns.values()))
    for index in range(length):
        yield {key: column[index] for key, column in columns.items() if index < len(column)}


def _spelling(message: Mapping[str, Any]) -> tuple[str, str] | None:
    return next((keys for keys in _SPELLINGS if all(key in message for key in keys)), None)


def _message(message: Any) -> Message:
    spelling = _spelling(message) if isinstance(message, Mapping) else None
    if spelling is None:
        found = sorted(message) if isinstance(message, Mapping) else type(message).__name__
        raise ValueError(f"a message must have role and content, or from and value, but this one has {found}")
    role, content = message[spelling[0]], message[spelling[1]]
    if role not in _ROLES:
        raise ValueError(f"the role {role!r} is not known; known are {', '.join(_ROLES)}")
    further = {key: value for key, value in message.items() if key not in spelling and value not in (None, [], {})}
    return {**further, "role": _ROLES[role], "content": _text(content)}


def _text(content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "\n".join(texts)
    raise ValueError(f"the content of a message must be text, not {json.dumps(content, default=str)[:60]}")
