#!/usr/bin/env bash
# transformers 5: a tokenizer class loads from a folder that holds no tokenizer at all, and says nothing.
#
# Expected: T5Tokenizer.from_pretrained(FOLDER) of an empty folder raises, as transformers 4 did for a missing spiece.model.
# Seen with transformers 5.23.0: it returns a tokenizer of special tokens alone (T5: 104 entries, CLIP: 2, Qwen2: 1). It encodes: T5
# makes 7 tokens of "a small circle", and what it does not know becomes <unk>. A copied pipeline that lost its tokenizer folder
# thus samples, from prompts that all say nothing. What helps: compare len(tokenizer) with the text encoder's vocab_size,
# or look for the vocabulary's file before loading.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3 numpy==2.4.6 2>/dev/null
mkdir "$folder/empty"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder/empty" <<'PY'
import sys
from transformers import CLIPTokenizer, Qwen2Tokenizer, T5Tokenizer
import transformers

print("transformers", transformers.__version__)
sizes = {cls.__name__: len(cls.from_pretrained(sys.argv[1])) for cls in (T5Tokenizer, CLIPTokenizer, Qwen2Tokenizer)}
tokens = T5Tokenizer.from_pretrained(sys.argv[1])("a small circle")["input_ids"]
print("entries of tokenizers loaded from an empty folder:", sizes)
print("T5 makes of 'a small circle':", tokens)
assert sizes == {"T5Tokenizer": 104, "CLIPTokenizer": 2, "Qwen2Tokenizer": 1}, "the behaviour has changed"
assert len(tokens) == 7, "the behaviour has changed"
PY
