"""Records as benchmarks and chats have them become the examples that their tokens say."""

import datasets
import pytest
import yaml

from liveselect.datamodules.pools.tokenizers import train_bpe
from liveselect.datamodules.reference import ReferenceSet, load_reference
from liveselect.grammar import IGNORE_INDEX

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
QUESTION, RIGHT, WRONG = "the capital of france is", "paris", "london"


@pytest.fixture(scope="module")
def tokenizer():
    found = train_bpe([f"{QUESTION} {RIGHT} {WRONG} user assistant hello there"] * 20, 300)
    found.chat_template = TEMPLATE
    return found


def examples(tokenizer, source, **settings):
    """The whole text of each example, and the part of it that counts."""
    loaded = load_reference(ReferenceSet(source, **settings), tokenizer, 64)
    return [
        (tokenizer.decode(item.input_ids), tokenizer.decode(item.input_ids[item.labels != IGNORE_INDEX]))
        for item in loaded.items
    ]


ASKED = (f"{QUESTION} {RIGHT}", f" {RIGHT}")


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"question": QUESTION, "choices": {"text": [WRONG, RIGHT], "label": ["A", "B"]}, "answerKey": "B"}, {}),
        ({"question": QUESTION, "choices": {"text": [WRONG, RIGHT], "label": ["1", "2"]}, "answerKey": "2"}, {}),
        (
            {"question": QUESTION, "choices": {"text": [RIGHT, WRONG], "label": ["A", "B"]}, "answerKey": "A"},
            {"prompt": "question", "answer": "answerKey"},
        ),
        ({"question": QUESTION, "choices": [WRONG, RIGHT], "answer": 1, "subject": "geography"}, {}),
        ({"ctx": QUESTION, "endings": [WRONG, RIGHT], "label": "1"}, {}),
        (
            {"ask": QUESTION, "these": [WRONG, RIGHT], "it": RIGHT},
            {"prompt": "ask", "choices": "these", "answer": "it"},
        ),
        ({"prompt": QUESTION, "completion": f" {RIGHT}"}, {}),
        ({"prompt": QUESTION, "answer": f" {RIGHT}"}, {}),
    ],
)
def test_a_question_with_its_right_answer_is_the_same_example_in_every_form(tokenizer, record, columns):
    assert examples(tokenizer, [record] * 2, columns=columns) == [ASKED] * 2
    assert examples(tokenizer, datasets.Dataset.from_list([record] * 2), columns=columns) == [ASKED] * 2


def test_a_letter_or_a_position_without_choices_is_refused_with_the_column_to_name(tokenizer):
    for answer in ("A", " (B)", 1):
        with pytest.raises((ValueError, TypeError), match="'choices': NAME"):
            examples(tokenizer, [{"prompt": QUESTION, "answer": answer}])
    listed = f"{QUESTION}\nA. {RIGHT}\nB. {WRONG}\nthe answer is"
    assert examples(tokenizer, [{"prompt": listed, "answer": " A"}])[0][1] == " A"
    assert examples(tokenizer, [{"prompt": "2 + 3 =", "answer": " 5"}])[0][1] == " 5"  # no choice, but an answer
    with pytest.raises(ValueError, match="one of its 2 choices, got 'C'"):
        examples(tokenizer, [{"question": QUESTION, "choices": [RIGHT, WRONG], "answer": "C"}])


def test_every_answer_of_a_list_is_an_example(tokenizer):
    expected = [ASKED, (f"{QUESTION} {WRONG}", f" {WRONG}")]
    answers = [f" {RIGHT}", f" {WRONG}", f" {RIGHT}"]
    assert examples(tokenizer, [{"prompt": QUESTION, "answer": answers}]) == expected
    squad = {"prompt": QUESTION, "answer": {"text": answers, "answer_start": [0, 1, 0]}}
    assert examples(tokenizer, [squad]) == expected


CHAT = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": RIGHT},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hello there"},
]
WRITTEN = (
    f"<|user|>\n{QUESTION}<|endoftext|><|assistant|>\n{RIGHT}<|endoftext|><|user|>\nhello<|endoftext|>"
    "<|assistant|>\nhello there<|endoftext|>"
)


def test_of_a_chat_the_assistants_turns_count_with_their_ends(tokenizer):
    both = (WRITTEN, f"{RIGHT}<|endoftext|>hello there<|endoftext|>")
    last = (WRITTEN, "hello there<|endoftext|>")
    shared = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in CHAT]
    assert examples(tokenizer, [{"messages": CHAT}]) == [both]
    assert examples(tokenizer, datasets.Dataset.from_list([{"messages": CHAT}])) == [both]
    assert examples(tokenizer, [{"talk": CHAT}], columns={"messages": "talk"}) == [both]
    assert examples(tokenizer, [{"conversations": shared}]) == [both]
    assert examples(tokenizer, [{"prompt": CHAT[:3], "completion": CHAT[3:]}]) == [last]
    ids = load_reference(ReferenceSet([{"messages": CHAT}]), tokenizer, 64).items[0].input_ids.tolist()
    assert ids == tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]


def test_a_chat_without_a_template_or_with_one_that_rewrites_it_is_refused(tokenizer):
    plain = train_bpe([QUESTION] * 5, 280)
    with pytest.raises(ValueError, match="has no chat template"):
        examples(plain, [{"messages": CHAT}])
    plain.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="prompt and answer"):
        examples(plain, [{"messages": CHAT}])
    with pytest.raises(ValueError, match="role and content"):
        examples(tokenizer, [{"messages": [{"role": "user"}]}])


def test_a_split_is_named(tokenizer):
    data = datasets.Dataset.from_list([{"text": QUESTION}])
    splits = datasets.DatasetDict({"train": data, "test": datasets.Dataset.from_list([{"text": RIGHT}])})
    assert examples(tokenizer, splits, split="test") == [(RIGHT, RIGHT)]
    assert examples(tokenizer, datasets.DatasetDict({"test": data})) == [(QUESTION, QUESTION)]
    for wrong in (None, "validation"):
        with pytest.raises(ValueError, match="'train', 'test'"):
            ReferenceSet(splits, split=wrong)
    with pytest.raises(ValueError, match="has no effect"):
        ReferenceSet([{"text": "x"}], split="test")


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "test.jsonl").write_text(f'{{"q": "{QUESTION}", "options": ["{WRONG}", "{RIGHT}"], "gold": 1}}\n')
    base = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}}}
    (tmp_path / "_base.yaml").write_text(yaml.safe_dump(base))

    def write(**further):
        (tmp_path / "task.yaml").write_text(yaml.safe_dump({"include": "_base.yaml", "test_split": "test", **further}))
        return str(tmp_path / "task.yaml")

    return write


@pytest.mark.parametrize(
    "form",
    [
        {"doc_to_text": "{{q}}", "doc_to_target": "gold", "doc_to_choice": "options"},
        {"doc_to_text": "q", "doc_to_target": "{{gold}}", "doc_to_choice": "{{[options[0], options[1]]}}"},
        {"doc_to_text": "q", "doc_to_target": "{{options[gold]}}"},
        {"doc_to_text": "q", "doc_to_target": 1, "doc_to_choice": [WRONG, RIGHT]},
    ],
)
def test_the_file_of_a_task_is_a_reference(tokenizer, task, form):
    assert examples(tokenizer, task(**form)) == [ASKED]


def test_a_task_without_a_prompt_is_text_and_one_with_code_is_refused(tokenizer, task):
    assert examples(tokenizer, task(doc_to_text="", doc_to_target="{{q}}")) == [(QUESTION, QUESTION)]
    path = task(doc_to_text="q", doc_to_target="gold")
    with open(path, "a") as file:
        file.write("process_docs: !function utils.process\n")
    with pytest.raises(ValueError, match="process_docs is code"):
        examples(tokenizer, path)
