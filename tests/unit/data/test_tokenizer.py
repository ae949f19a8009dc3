"""Tokenizers that come as Python code with the model: refused with the remedy, and run where that is allowed."""

import json

import pytest

from r1mega.config.model_files import TRUST_REMOTE_CODE
from r1mega.config.validate import tokenizer_problems
from r1mega.data.tokenizer import load_tokenizer
from r1mega.errors import DataError

CODE = """
from transformers import PreTrainedTokenizer

class Letters(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tiktoken.model"}

    def __init__(self, vocab_file, **options):
        self.letters = open(vocab_file).read()
        super().__init__(**options)

    @property
    def vocab_size(self):
        return len(self.letters)

    def get_vocab(self):
        return {letter: i for i, letter in enumerate(self.letters)}

    def _tokenize(self, text, **options):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.letters.index(token)

    def _convert_id_to_token(self, index):
        return self.letters[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)
"""


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "tokenization_letters.py").write_text(CODE)
    (tmp_path / "tiktoken.model").write_text("abcdef")
    auto_map = {"AutoTokenizer": ["tokenization_letters.Letters", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Letters", "auto_map": auto_map}))
    return tmp_path


def test_code_is_not_run_unasked(directory, monkeypatch):
    monkeypatch.delenv(TRUST_REMOTE_CODE, raising=False)
    (problem,) = tokenizer_problems(directory, {"vocab_size": 6})
    assert "tokenization_letters.py" in problem and f"{TRUST_REMOTE_CODE}=1" in problem
    with pytest.raises(DataError, match=f"tokenization_letters.py.*{TRUST_REMOTE_CODE}=1"):
        load_tokenizer(directory)


def test_code_is_run_where_it_is_trusted(directory, monkeypatch, tmp_path_factory):
    monkeypatch.setenv(TRUST_REMOTE_CODE, "1")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    assert not list(tokenizer_problems(directory, {"vocab_size": 6}))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.encode("bad") == [1, 0, 3] and tokenizer.decode([5, 0, 3, 4]) == "fade"
