"""The tokenizer of the nano model: sentencepiece, one piece a word of the nano task, bytes for everything else."""

from __future__ import annotations

import io
import itertools
import json
import string
from pathlib import Path

from r1mega.data import nano, nano_general
from r1mega.files import write_atomic

VOCAB_SIZE = 448
"""An upper bound that the model's embedding is sized for; the trained vocabulary is a little smaller."""
PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
_NUM_SENTENCES = 2000


def train_tokenizer(directory: Path) -> None:
    """Train on the corpus and write tokenizer.model (sentencepiece) and tokenizer.json (the same for transformers).

    tokenizer.model appears last and whole: where it is, all is. Deterministic: fixed sentences, one thread. Any text encodes without <unk> (bytes), whitespace is kept.
    """
    import sentencepiece

    sentences = [f"User: {q} Assistant: {c}" for q, c in nano.corpus(0, _NUM_SENTENCES)]
    letters = " ".join(string.ascii_letters + string.digits + string.punctuation)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain(sentences, [letters] * 20),
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCAB_SIZE,
        hard_vocab_limit=False,
        byte_fallback=True,
        user_defined_symbols=[f"▁{word}" for word in (*nano.WORDS, *nano_general.WORDS)],  # new words come last: ids stay
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        pad_piece=PAD, bos_piece=BOS, eos_piece=EOS, unk_piece=UNK,
    )  # fmt: skip
    _write_transformers_files(directory, sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()))
    write_atomic(directory / "tokenizer.model", model.getvalue())


def _write_transformers_files(directory: Path, model) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.vocab_size())]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=model.unk_id(), byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [PAD, BOS, EOS, UNK]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(i): {
                "content": token,
                "special": True,
                "normalized": False,
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
            }
            for i, token in enumerate(special)
        },
    }
    write_atomic(directory / "tokenizer_config.json", json.dumps(config, indent=1))
