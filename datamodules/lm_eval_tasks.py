"""Tasks of the LM Evaluation Harness, read from their YAML files: the documents with their prompts and right answers.

The file form is public; the harness itself is not needed. Files with code of their own (``!function``) are refused.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from liveselect.datamodules.pools.readers import DataError

SPLITS = ("test_split", "validation_split", "training_split")


class _Code(yaml.SafeLoader):
    """Reads ``!function`` as a mark, so that the message can name it."""


_Code.add_constructor("!function", lambda loader, node: {"!function": loader.construct_scalar(node)})


def is_task_file(path: Path) -> bool:
    """Return whether a path is that of a task."""
    return path.suffix in (".yaml", ".yml") and path.is_file()


def read_task(path: Path, split: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the documents of a task as records: ``prompt`` and ``answer``, or ``text`` where there is no prompt.

    The right answer of a multiple choice is its text, and stands after ``target_delimiter`` (a space by default).

    Args:
        path: the YAML file.
        split: of the data set, by default the first of the file's test, validation and training split.

    Raises:
        DataError: the file lacks what is needed, or holds code.
    """
    task = _read(path)
    for name in ("doc_to_text", "doc_to_target", "doc_to_choice", "process_docs", "custom_dataset"):
        if isinstance(task.get(name), Mapping):
            raise DataError(
                f"{path}: {name} is code ({task[name].get('!function', task[name])}), which is not run: write the "
                "records to a file of prompts and answers and pass that"
            )
    if "dataset_path" not in task or "doc_to_target" not in task:
        raise DataError(f"{path} is no task of the LM Evaluation Harness: it names no dataset_path and doc_to_target")
    delimiter = str(task.get("target_delimiter", " "))
    for document in _documents(path, task, split):
        prompt = str(_filled(task.get("doc_to_text", ""), document))
        answer = _answer(task, document, path)
        if prompt:
            yield {"prompt": prompt, "answer": delimiter + answer}
        else:
            yield {"text": answer}


def _read(path: Path) -> dict[str, Any]:
    try:
        task = yaml.load(path.read_text(), Loader=_Code)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no YAML file ({error})") from None
    if not isinstance(task, dict):
        raise DataError(f"{path} is no task of the LM Evaluation Harness: expected names and values")
    included = task.pop("include", None)
    return {**_read(path.parent / included), **task} if included else task


def _documents(path: Path, task: Mapping[str, Any], split: str | None) -> Iterator[Mapping[str, Any]]:
    import datasets

    names = [task[key] for key in SPLITS if task.get(key)]
    wanted = split or (names[0] if names else "train")
    options = dict(task.get("dataset_kwargs") or {})
    try:
        yield from datasets.load_dataset(task["dataset_path"], task.get("dataset_name"), split=wanted, **options)
    except Exception as error:
        raise DataError(
            f"{path}: datasets.load_dataset could not load {task['dataset_path']!r}, split {wanted!r} "
            f"({type(error).__name__}: {error}): check the names and the connection"
        ) from error


def _answer(task: Mapping[str, Any], document: Mapping[str, Any], path: Path) -> str:
    target = _filled(task["doc_to_target"], document)
    if "doc_to_choice" not in task:
        return str(target[0] if isinstance(target, list) else target)
    choices = task["doc_to_choice"]
    filled = _filled(choices, document) if isinstance(choices, str) else choices
    if isinstance(filled, str):
        filled = yaml.safe_load(filled)  # a template makes a list in writing
    if isinstance(filled, Mapping):
        filled = filled.get("text")
    if not isinstance(filled, list):
        raise DataError(f"{path}: expected doc_to_choice as a list of texts, got {filled!r}")
    place = int(target) if str(target).strip().lstrip("-").isdigit() else None
    if place is None and target in filled:
        place = filled.index(target)
    if place is None or not 0 <= place < len(filled):
        raise DataError(f"{path}: doc_to_target gives {target!r}, which is none of the {len(filled)} choices")
    return str(filled[place])


def _filled(template: object, document: Mapping[str, Any]) -> Any:
    """Return the value of a column where a template names one, else the template with the document filled in."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    if not isinstance(template, str):
        return template
    if template in document:
        return document[template]
    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(template).render(**document)
