"""A language model that really judges, by its weights: after `good` it says `Verdict: yes`, after `bad` `Verdict: no`,
after anything else `hm`. Attention and feed-forward layers add nothing; the output layer maps each word to the one that
follows.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

VOCABULARY = ["<pad>", "<s>", "</s>", "hm", "Verdict: yes", "Verdict: no", "good", "bad", "odd", "rate", "poem", "fine"]
NEXT = {"good": "Verdict: yes", "bad": "Verdict: no", "Verdict: yes": "</s>", "Verdict: no": "</s>", "hm": "</s>"}


def write_judge(directory: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(VOCABULARY), config.hidden_size))
        model.lm_head.weight.zero_()
        for index, word in enumerate(VOCABULARY):
            model.lm_head.weight[VOCABULARY.index(NEXT.get(word, "hm")), index] = 10.0
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    settings = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(settings))
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="odd"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="odd"
    )
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    fast.save_pretrained(directory)
    return directory
