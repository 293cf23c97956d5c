"""Files of prompts: what ends a prompt, tables, and what cannot be meant as one."""

import json
from pathlib import Path

import pytest

from viditq.data.prompt_files import has_ink, read_prompts
from viditq.data.prompts import CocoCaptions, PromptFile
from viditq.errors import UserError


def written(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines(newline: str, mark: str, tmp_path: Path) -> None:
    text = mark + newline.join(["one", "", "  zwei ü  ", "three"])
    for content in (text, text + newline):
        assert read_prompts(written(tmp_path, "p.txt", content)) == ["one", "zwei ü", "three"]


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_only_newlines_end_a_prompt(inside: str, tmp_path: Path) -> None:
    prompt = f"a red{inside}circle"
    assert read_prompts(written(tmp_path, "p.txt", f"{prompt}\ntwo\n")) == [prompt, "two"]
    table = written(tmp_path, "p.csv", f"id,text\n1,{prompt}\n2,two\n")
    assert read_prompts(table, "text") == [prompt, "two"]
    lines = "\n".join(json.dumps(p, ensure_ascii=False) for p in (prompt, "two")) if inside > "\x1f" else ""
    assert not lines or read_prompts(written(tmp_path, "p.jsonl", lines)) == [prompt, "two"]


@pytest.mark.parametrize("blank", [" ", "\t", "\u200b", "\u00a0\u200d", "\x07", "\x0c", "\u2028", "\u3164", "\ufe0f"])
def test_lines_with_nothing_to_see(blank: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"p\.txt', line 3 has nothing to see in it \(U\+{ord(blank[0]):04X}.*Delete"):
        read_prompts(written(tmp_path, "p.txt", f"one\n\n{blank}\ntwo\n"))
    assert not has_ink(blank) and has_ink(f"{blank}ü")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", '\ufeffid,prompt\r\n1,"one, of many"\r\n\r\n2,"two\nlines"\r\n'),
        ("P.TSV", 'id\tprompt\n1\tone, of many\n2\t"two\nlines"\n'),
        ("p.json", json.dumps([{"id": 1, "prompt": "one, of many"}, {"prompt": "two\nlines"}])),
        ("p.jsonl", '\ufeff{"prompt": "one, of many"}\n\n{"id": 2, "prompt": "two\\nlines"}\n'),
    ],
)
def test_tables(name: str, content: str, tmp_path: Path) -> None:
    path = written(tmp_path, name, content)
    assert read_prompts(path, "prompt") == ["one, of many", "two\nlines"]
    data = PromptFile(path, 1, 1, column="prompt")
    assert (data.prompts, data.calibration_prompts) == (["one, of many"], ["two\nlines"])
    with pytest.raises(UserError, match=r"data\.column=text must .*prompt"):
        read_prompts(path, "text")


def test_plain_entries(tmp_path: Path) -> None:
    assert read_prompts(written(tmp_path, "p.json", '["one", " two "]')) == ["one", "two"]
    assert read_prompts(written(tmp_path, "p.ndjson", '"one"\n"two"')) == ["one", "two"]


BAD = {
    "column of a text": ("p.txt", "one\n", "prompt", "a text file such as .* has no columns.*csv"),
    "no column named": (
        "p.csv",
        "id,prompt\n1,one\n",
        None,
        r"data\.column=NAME must be one of its columns: id, prompt",
    ),
    "column twice": ("p.csv", "a,a\n1,2\n", "a", r"data\.column=a must be one of its columns"),
    "comma without quotes": ("p.csv", "id,a\n1,one\n2,two, three\n", "a", r"line 3: 3 fields .* 2.*double quotes"),
    "open quotes": ("p.csv", 'a\n"one\n', "a", "is no table row: unexpected end of data"),
    "empty field": ("p.csv", "id,a\n1,\n", "a", r"line 2 has nothing to see in it \(no characters\)"),
    "broken json": ("p.json", '["one"', None, "is no json:"),
    "broken line": ("p.jsonl", '"one"\n"two\n', None, "is no json in line 2"),
    "object": ("p.json", '{"prompts": ["one"]}', None, "must hold a list of prompts.*data=coco"),
    "entry of another kind": ("p.json", '["one", 2]', None, r"entry 2: data\.column=null must .*it is 2"),
    "objects without a column": ("p.jsonl", '{"a": "one"}', None, r"entry 1: data\.column=null .*it has a"),
    "text with a column": ("p.json", '["one"]', "a", r"entry 1: data\.column=a must .*it is 'one'"),
    "number in a column": ("p.json", '[{"a": 3}]', "a", "entry 1: 3 is no text"),
    "half a character": ("p.json", r'["\ud83d"]', None, r"U\+D83D, which no text has"),
    "no entries": ("p.json", "[]", None, "holds no prompt"),
    "yaml": ("p.yaml", "- one\n", None, r"\.yaml is not read as prompts.*one prompt a line"),
    "parquet": ("p.parquet", b"PAR1", None, r"\.parquet is not read as prompts"),
    "page": ("p.HTML", "<p>one", None, r"\.html is not read as prompts"),
    "UTF-16 with its mark": ("p.txt", "one\n".encode("utf-16"), None, "is not UTF-8 text.*Save it as UTF-8"),
    "UTF-16 without": ("p.txt", "one\n".encode("utf-16-le"), None, r"line 1 holds U\+0000.*Save it anew as UTF-8"),
    "joined files": ("p.txt", "\ufeffone\n\ufefftwo\n", None, r"line 2 holds U\+FEFF.*joined of several"),
    "a mark alone": ("p.txt", "\ufeff", None, "holds no prompt"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str, tmp_path: Path) -> None:
    name, content, column, message = BAD[case]
    with pytest.raises(UserError, match=message):
        read_prompts(written(tmp_path, name, content), column)


def test_captions_with_a_byte_order_mark(tmp_path: Path) -> None:
    notes = [{"id": 1, "image_id": 1, "caption": "one"}, {"id": 2, "image_id": 2, "caption": "\u200b"}]
    notes.append({"id": 3, "image_id": 3, "caption": "three"})
    path = written(tmp_path, "captions.json", "\ufeff" + json.dumps({"annotations": notes}))
    data = CocoCaptions(path, 1, 1)
    assert (data.prompts, data.calibration_prompts) == (["one"], ["three"])
