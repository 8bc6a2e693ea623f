#!/usr/bin/env bash
# tokenizers 0.23.3: the "id" of an added token in tokenizer.json is not obeyed. A token that the file gives the number 9,
# beside a vocabulary of 2, gets the number 2 when the file is loaded, without an error or a warning; saved again, the
# file says 2. A model whose embedding has a gap before its special tokens is then fed other rows than it was trained with.
#
# Seen:  in the file 9   loaded 2   encoded [2]   saved again 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PYTHON'
import json

from tokenizers import AddedToken, Tokenizer, models

made = Tokenizer(models.WordLevel({"one": 0, "two": 1}, unk_token="one"))
made.add_special_tokens([AddedToken("<end>", special=True)])
file = json.loads(made.to_str())
file["added_tokens"][0]["id"] = 9
loaded = Tokenizer.from_str(json.dumps(file))
again = json.loads(loaded.to_str())["added_tokens"][0]["id"]
found = loaded.token_to_id("<end>"), loaded.encode("<end>").ids, again
print("in the file 9   loaded", found[0], "  encoded", found[1], "  saved again", found[2])
assert found == (2, [2], 2)
PYTHON
