"""Records of benchmarks and chats, in the forms in which people have them, as what the reference set is made of."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from liveselect.datamodules.pools.readers import RecordError

CHOICES = ("choices", "endings", "options")
QUESTIONS = ("prompt", "question", "query", "ctx", "goal")
ANSWERS = ("answer", "answerKey", "label", "gold", "correct")
COMPLETION, MESSAGES, CONVERSATIONS = "completion", "messages", "conversations"
SPEAKERS = {"human": "user", "gpt": "assistant"}
"""Roles of ShareGPT's conversations, under the names that chat templates know."""

LETTER = re.compile(r"\(?[A-Z]\)?\.?")  # a digit may be the answer itself
LISTED = re.compile(r"(?m)(^|\s)\(?[AB1][.):]")  # a prompt that lists its choices by letters or numbers

Message = Mapping[str, Any]


def is_choice(record: Mapping, names: Mapping[str, str]) -> bool:
    """Return whether a record is a question with several answers of which one is right."""
    has_both = choices_column(record, names) is not None and _first(record, names, "answer", ANSWERS) is not None
    # choices beside a text only describe it
    return has_both and (names["text"] not in record or _first(record, names, "prompt", QUESTIONS) is not None)


def choices_column(record: Mapping, names: Mapping[str, str]) -> str | None:
    """Return the name of the column with the choices, None where a record has none."""
    return _first(record, names, "choices", CHOICES)


def right_choice(record: Mapping, names: Mapping[str, str], where: str) -> tuple[str, str, set[str]]:
    """Return the question, the text of its right choice, and the columns that were read.

    The answer may be the position of the choice, its letter or label, or its text.

    Raises:
        RecordError: there is no question, or the answer names no choice.
    """
    choices_at, answer_at = choices_column(record, names), _first(record, names, "answer", ANSWERS)
    question_at = _first(record, names, "prompt", QUESTIONS)
    if question_at is None or choices_at is None or answer_at is None:
        raise RecordError(
            f"{where} has choices and no question: name its column, ReferenceSet(source, columns={{'prompt': NAME}})"
        )
    choices, answer = record[choices_at], record[answer_at]
    labels: list[str] = []
    if isinstance(choices, Mapping):  # ARC: texts and their labels side by side
        labels, choices = [str(label) for label in choices.get("label", ())], choices.get("text", ())
    texts = [str(choice) for choice in choices]
    labels = labels or [chr(ord("A") + i) for i in range(len(texts))]
    place = _place(answer, texts, labels)
    if place is None:
        raise RecordError(
            f"expected {answer_at!r} of {where} as the position from 0, the label or the text of one of its "
            f"{len(texts)} choices, got {answer!r}"
        )
    return str(record[question_at]), texts[place], {question_at, choices_at, answer_at}


def _place(answer: object, texts: Sequence[str], labels: Sequence[str]) -> int | None:
    if isinstance(answer, (int, np.integer)) and not isinstance(answer, bool):
        return int(answer) if 0 <= int(answer) < len(texts) else None
    text = str(answer)
    if text in texts:
        return texts.index(text)
    if text.strip() in labels:
        return labels.index(text.strip())
    return int(text) if text.isdigit() and int(text) < len(texts) else None  # HellaSwag's labels are "0" to "3"


def answers_of(value: object, prompt: str, column: str, where: str) -> list[str]:
    """Return the answers that count, each once: a text, or a list of texts of which every one is right.

    Raises:
        RecordError: the answer is a position or a letter of choices that the record does not have.
    """
    if isinstance(value, Mapping) and "text" in value:  # SQuAD
        value = value["text"]
    if isinstance(value, (list, tuple, np.ndarray)) and len(value) and all(isinstance(each, str) for each in value):
        return list(dict.fromkeys(map(str, value)))
    if not isinstance(value, str):
        raise RecordError(
            f"expected text in column {column!r} of {where}, got {type(value).__name__}: where it is the position of "
            "the right choice, name the column of the choices, ReferenceSet(source, columns={'choices': NAME})"
        )
    if LETTER.fullmatch(value.strip()) and not LISTED.search(prompt):
        raise RecordError(
            f"expected an answer in column {column!r} of {where}, got the letter {value!r}, and the prompt does not "
            "list what it stands for: the model would be judged by a letter. Name the column of the choices, "
            "ReferenceSet(source, columns={'choices': NAME})"
        )
    return [str(value)]


def chat_of(record: Mapping, names: Mapping[str, str], where: str) -> tuple[list[Message], int, set[str]] | None:
    """Return the messages of a chat, the first of them whose answers count, and the columns read; None for others.

    A prompt and a completion may both be messages: then only the completion counts.
    """
    for column in (names["messages"], CONVERSATIONS):
        if _is_chat(record.get(column)):
            return _messages(record[column], where), 0, {column}
    prompt, completion = names["prompt"], names["answer"] if names["answer"] in record else COMPLETION
    if _is_chat(record.get(prompt)) and _is_chat(record.get(completion)):
        before = _messages(record[prompt], where)
        return [*before, *_messages(record[completion], where)], len(before), {prompt, completion}
    return None


def _is_chat(value: object) -> bool:
    return isinstance(value, (list, tuple, np.ndarray)) and len(value) > 0 and isinstance(value[0], Mapping)


def _messages(value: Sequence[Mapping], where: str) -> list[Message]:
    found: list[Message] = []
    for message in value:
        if "from" in message and "value" in message:
            role = str(message["from"])
            message = {"role": SPEAKERS.get(role, role), "content": message["value"]}
        if "role" not in message or not isinstance(message.get("content"), str):
            raise RecordError(
                f"expected the messages of {where} as dicts of role and content, both text, got {dict(message)!r}"
            )
        found.append(dict(message))
    return found


def _first(record: Mapping, names: Mapping[str, str], role: str, usual: Sequence[str]) -> str | None:
    """Return the column of a role: the named one, else the first of the usual ones that the record has."""
    named = [names[role]] if names[role] != role else []
    return next((column for column in (*named, *usual) if record.get(column) is not None), None)
