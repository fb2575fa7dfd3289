"""Encoders small enough for tests, with and without a tokenizer of their own."""

from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from liveselect.regressors import EncoderRegressor

TINY = {
    "model_type": "bert",
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
}
"""Fields of a BERT that reads token ids below 60 in chunks of at most 16."""


def tiny_regressor(**kwargs) -> EncoderRegressor:
    defaults = {"encoder": TINY, "epochs": 8, "learning_rate": 3e-3, "batch_size": 32, "evaluations": 8}
    return EncoderRegressor(**{**defaults, **kwargs})


def save_pretrained(folder: Path, tokenizer_words: int = 50) -> str:
    """Save a tiny BERT of 64 words together with a tokenizer whose words are the numbers below ``tokenizer_words``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(str, range(tokenizer_words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **names).save_pretrained(folder)
    fields = {key: value for key, value in TINY.items() if key != "model_type"}
    with torch.random.fork_rng(devices=[]):
        BertModel(BertConfig(**{**fields, "vocab_size": 64})).save_pretrained(folder)
    return str(folder)
