"""Tokens where a text begins and ends: one bos whatever the template writes, and every end token of the model."""

import json
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from r1mega.data import nano_tokenizer
from r1mega.data.preferences import encode
from r1mega.data.sft import segments
from r1mega.data.template import render
from r1mega.data.tokenizer import load_tokenizer, response_text
from r1mega.errors import DataError
from r1mega.rollout.sampler import stop_settings
from r1mega.types import Response

BOS, EOS, EOT = 256, 257, 258


def tokenizer(directory, *, adds_bos=True, **files):
    """Bytes, and Llama 3's names of special tokens. files: generation_config.json and config.json beside it."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")]
    )
    if adds_bos:
        made.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B", special_tokens=[("<|begin_of_text|>", BOS)]
        )
    made.save(str(directory / "tokenizer.json"))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return load_tokenizer(directory)


# --------------------------------------------------------- a bos that the template writes: sglang#888, open-r1#462


@pytest.mark.parametrize(
    "template",
    [
        "<|begin_of_text|><user>{{ question }}<|eot_id|><assistant>",
        "{{ '<|begin_of_text|>' }}User: {{ question }}",
        "\n<|begin_of_text|>{{ question }}",
        "<|begin_of_text|><|begin_of_text|>{{ question }}",
        "{{ question }}",
        "User: {{ question }}",
    ],
)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_no_bos_is_added_to_one(tmp_path, template, adds_bos):
    text = render(template, "hi")
    ids = tokenizer(tmp_path, adds_bos=adds_bos).encode_prompt(text)
    written = template.count("begin_of_text")
    assert ids.count(BOS) == (written or int(adds_bos))
    if not written and adds_bos:
        assert ids[0] == BOS


def test_no_bos_is_added_to_one_by_sentencepiece(tmp_path):
    nano_tokenizer.train_tokenizer(tmp_path)
    plain = load_tokenizer(tmp_path)
    assert type(plain).__name__ == "SentencePieceTokenizer"
    bos = plain._model.id_to_piece(plain.bos_token_id)
    ids = plain.encode_prompt("which of a 5")
    assert ids.count(plain.bos_token_id) == 1 and ids[0] == plain.bos_token_id
    assert plain.encode_prompt(f"{bos}which of a 5") == ids


# ------------------------------------------------------- end tokens of the model: vLLM#4180, vLLM#4182


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({"generation_config": {"eos_token_id": [EOS, EOT]}}, (EOS, EOT)),
        ({"generation_config": {"eos_token_id": EOT}}, (EOS, EOT)),
        ({"generation_config": {"eos_token_id": [EOT, EOT, 65]}}, (65, EOS, EOT)),
        ({"generation_config": {"eos_token_id": []}}, (EOS,)),
        ({"generation_config": {"eos_token_id": None}}, (EOS,)),
        ({"generation_config": {}}, (EOS,)),
        ({"generation_config": {"eos_token_id": EOT}, "config": {"eos_token_id": 65}}, (EOS, EOT)),
        ({"generation_config": {"top_p": 0.9}, "config": {"eos_token_id": EOT}}, (EOS, EOT)),
        ({"config": {"eos_token_id": [EOS, EOT]}}, (EOS, EOT)),
        ({"generation_config": '\ufeff{"eos_token_id": 258}'}, (EOS, EOT)),
        ({}, (EOS,)),
    ],
)
def test_every_end_token_ends_a_response(tmp_path, files, ends):
    made = tokenizer(tmp_path, **files)
    assert stop_settings((), made)[0] == ends
    ids, strings = stop_settings(("</answer>",), made)
    assert (ids, strings) == (ends, ("</answer>",))
    for end in ends:
        response = Response((*made.encode("done"), end), (0.0,) * 5, "stop")
        assert response_text(made, response) == "done", "and belongs to no text"
    assert response_text(made, Response(tuple(made.encode("cut")), (0.0,) * 3, "length")) == "cut"
    assert response_text(made, Response((), (), "length")) == ""


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"eos_token_id": "2"}', '{"eos_token_id": [1.5]}', '{"eos_token_id": -1}']
)
def test_a_damaged_generation_config_is_named(tmp_path, content):
    with pytest.raises(DataError, match="generation_config.json: "):
        tokenizer(tmp_path, generation_config=content)


@pytest.mark.parametrize("name", ["generation_config", "config"])
def test_an_end_beyond_the_vocabulary_is_refused(tmp_path, name):
    with pytest.raises(DataError, match=rf"/{name}.json: eos_token_id is \[258, 259\]: the tokenizer has 259 tokens"):
        tokenizer(tmp_path, **{name: {"eos_token_id": [EOT, EOT + 1]}})


def test_an_end_that_the_data_have_written_is_not_written_again(tmp_path):
    made = tokenizer(tmp_path)
    for response in ("yes", "yes<|end_of_text|>"):
        _, answer = segments({"question": "q", "response": response}, "x:1", made, "{{ question }}")
        assert answer.token_ids == [*made.encode("yes"), EOS]
        assert encode(made, "{{ question }}", "q", response).count(EOS) == 1


def test_a_tokenizer_without_an_end(tmp_path):
    made = SimpleNamespace(eos_token_id=None, end_token_ids=(), encode=lambda text: list(text.encode()))
    assert stop_settings((), made) == ((), ())
