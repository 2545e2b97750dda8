"""A picture has its own caption or none: rows, files beside pictures, links and names in every spelling."""

import json
import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from ldm.data.shards.writer import write_dataset
from ldm.data.sources.folder import FolderSource
from ldm.data.sources.item import Item, Reject
from ldm.data.sources.tables import read_table
from ldm.data.sources.tree import pictures_in, walk
from ldm.errors import ConfigError


def folder(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(root / name, "PNG")
    return root


def read(root: Path, **options) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """{path: caption}, [(name, reason)] of the others."""
    items = list(FolderSource(str(root), **options))
    captions = {json.loads(i.fields["json"])["path"]: i.fields["txt"].decode() for i in items if isinstance(i, Item)}
    return captions, [(i.name, i.reason) for i in items if isinstance(i, Reject)]


def rows(path: Path, *captions: tuple[str, str]) -> None:
    path.write_text("".join(json.dumps({"file_name": f, "text": t}) + "\n" for f, t in captions))


def test_a_row_means_the_picture_at_its_path(tmp_path):
    folder(tmp_path, "1.png", "a/1.png", "b/1.png", "b/c/2.png")
    rows(
        tmp_path / "metadata.jsonl", ("1.png", "root"), ("./a//1.png", "a"), ("b\\1.png", "b"), ("b/x/../c/2.png", "c")
    )
    assert read(tmp_path) == ({"1.png": "root", "a/1.png": "a", "b/1.png": "b", "b/c/2.png": "c"}, [])


def test_a_name_without_folders_means_one_picture_only(tmp_path):
    folder(tmp_path, "a/1.png", "b/2.png")
    rows(tmp_path / "metadata.jsonl", ("1.png", "one"), ("2.png", "two"))
    assert read(tmp_path) == ({"a/1.png": "one", "b/2.png": "two"}, [])
    folder(tmp_path, "b/1.png")
    (tmp_path / "b/1.txt").write_text("its own")
    captions, rejects = read(tmp_path)
    assert captions == {"b/1.png": "its own", "b/2.png": "two"}
    assert rejects == [("metadata.jsonl, 1.png", "row of several pictures"), ("a/1.png", "no caption")]
    folder(tmp_path, "1.png")
    assert read(tmp_path)[0] == {"1.png": "one", "b/1.png": "its own", "b/2.png": "two"}


def test_paths_from_the_file_and_from_the_root_of_the_disk(tmp_path):
    root = folder(tmp_path / "pics", "sub/1.png", "2.png")
    rows(tmp_path / "m.jsonl", ("pics/sub/1.png", "from the file"), (f"{root}/2.png", "absolute"))
    assert read(root, captions=str(tmp_path / "m.jsonl"))[0] == {"sub/1.png": "from the file", "2.png": "absolute"}


def test_a_folders_own_metadata_file_comes_first_and_speaks_of_it_alone(tmp_path):
    folder(tmp_path, "1.png", "2.png", "sub/1.png", "sub/3.png")
    rows(tmp_path / "metadata.jsonl", ("1.png", "root 1"), ("sub/1.png", "of the root"), ("sub/3.png", "root 3"))
    rows(tmp_path / "sub/metadata.jsonl", ("1.png", "sub 1"), ("2.png", "no such picture in sub"))
    captions, rejects = read(tmp_path)
    assert captions == {"1.png": "root 1", "sub/1.png": "sub 1", "sub/3.png": "root 3"}
    assert rejects == [("2.png", "no caption")]
    before = FolderSource(str(tmp_path)).identity()
    rows(tmp_path / "sub/metadata.jsonl", ("1.png", "another"))
    assert FolderSource(str(tmp_path)).identity() != before
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.png,old\n")
    with pytest.raises(ConfigError, match=r"metadata.csv and metadata.jsonl: say which, source.captions="):
        read(tmp_path)


def test_spellings_of_one_name(tmp_path):
    composed, split = "café", unicodedata.normalize("NFD", "café")
    folder(tmp_path, f"{split}.png", "Zoë.PNG", f"b/{composed}.JPG")
    (tmp_path / f"{composed}.txt").write_text("beside")
    (tmp_path / "b/metadata.tsv").write_text(f"file_name\tcaption\n{split}.jpg\tin the table\n")
    rows(tmp_path / "metadata.jsonl", ("zoe.png", "another"), ("Zoë.png", "upper case"))
    captions, rejects = read(tmp_path)
    assert captions == {f"{split}.png": "beside", "Zoë.PNG": "upper case", f"b/{composed}.JPG": "in the table"}
    assert rejects == []
    folder(tmp_path, f"{composed}.png")  # whose caption that file is
    captions, rejects = read(tmp_path)
    assert captions[f"{composed}.png"] == "beside" and rejects == [(f"{split}.png", "no caption")]
    before = FolderSource(str(tmp_path)).identity()
    (tmp_path / f"{split}.TXT").write_text("its own")
    assert read(tmp_path)[0][f"{split}.png"] == "its own" and FolderSource(str(tmp_path)).identity() != before


def test_a_picture_has_one_caption(tmp_path):
    folder(tmp_path, "a/1.png")
    rows(tmp_path / "metadata.jsonl", ("a/1.png", "first"), ("./a/1.png", "second"), ("a/1.png", "third"))
    captions, rejects = read(tmp_path)
    assert captions == {"a/1.png": "first"} and [reason for _, reason in rejects] == ["second caption of a picture"] * 2


BAD_LINES = {  # line -> reason
    "null": "unreadable json",
    '["1.png", "b"]': "unreadable json",
    "7": "unreadable json",
    '{"file_name": "1.png", ': "unreadable json",
    '{"file_name": "1.png", "text": "a", "text": "b"}': "unreadable json",
    "[" * 100_000: "unreadable json",
    '{"file_name": "1.png", "text": 7}': "caption is not text",
    '{"file_name": "1.png", "text": true}': "caption is not text",
    '{"file_name": "1.png", "text": {"a": "b"}}': "caption is not text",
    '{"file_name": "1.png", "text": []}': "caption is not text",
    '{"file_name": "1.png", "text": ["a", 1]}': "caption is not text",
    '{"file_name": "1.png", "text": "\\ud83d half"}': "caption is not UTF-8",
    '{"file_name": 1, "text": "a"}': "row without a path",
    '{"text": "a"}': "row without a path",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:40])
def test_a_bad_line_is_a_reject_and_costs_no_other(line, tmp_path):
    folder(tmp_path, "0.png", "1.png", "2.png")
    good = [json.dumps({"file_name": f"{i}.png", "text": f"text {i}\u2028\x85"}, ensure_ascii=False) for i in (0, 2)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(["", good[0], line, " ", good[1], ""]))
    captions, rejects = read(tmp_path)
    assert captions == {"0.png": "text 0", "2.png": "text 2"}
    assert rejects == [("metadata.jsonl, line 3", BAD_LINES[line]), ("1.png", "no caption")]
    write_dataset(FolderSource(str(tmp_path)), tmp_path / "out")


def test_a_line_without_a_caption_says_nothing(tmp_path):
    folder(tmp_path, "0.png", "1.png")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "text": null}\n{"file_name": "1.png", "text": "x"}\n'
    )
    (tmp_path / "0.txt").write_text("beside")
    assert read(tmp_path) == ({"0.png": "beside", "1.png": "x"}, [])


TSV: dict = {  # what stands behind the header: what is read, lines that are rejects
    "quotes as characters": (
        'a\t"Untitled, a lamp\nb\ta horse\nc\t6" pipe\n',
        ['"Untitled, a lamp', "a horse", '6" pipe'],
        0,
    ),
    "quotes at both ends of a text": (
        'a\t"Go" and "stop"\nb\tx\nc\tsay "no"\n',
        ['"Go" and "stop"', "x", 'say "no"'],
        0,
    ),
    "quoted as csv does": ('a\t"say ""no"""\nb\t"a\tb"\nc\t"x"\n', ['say "no"', "a b", "x"], 0),
    "a quoted line break": (
        'a\t"one\ntwo"\nb\tx\nc\t"three\n\nfour ""five"""\n',
        ["one two", "x", 'three four "five"'],
        0,
    ),
    "an open quote before a closing one": ('a\t"open\nb\tx\nc\tclosed"\n', ['"open', "x", 'closed"'], 0),
    "cells too many and too few": ("a\tx\ty\nb\nc\tz\t\n", [None, None, "z"], 2),
    "a lone quote": ('a\t"\nb\t""\nc\t"""\n', ['"', None, '"""'], 0),
}


@pytest.mark.parametrize("name", TSV)
def test_a_line_of_a_tsv_is_a_row(name, tmp_path):
    text, expected, bad = TSV[name]
    folder(tmp_path, "a", "b", "c")
    (tmp_path / "m.tsv").write_text(f"path\tcaption\n{text}")
    table = read_table(tmp_path / "m.tsv")
    got = [table.captions.get(key) for key in "abc"]
    assert [g and " ".join(g.split()) for g in got] == expected and len(table.rejects) == bad


def test_csv(tmp_path):
    path = tmp_path / "metadata.csv"
    long = "many words " * 13000
    path.write_text(
        f'file_name,caption\n0.png,"{long}"\n1.png,a cat, asleep\n2.png\n3.png,"two\nlines"\n4.png,a "b" 6" c,,\n'
    )
    table = read_table(path)
    assert table.captions == {"0.png": long.strip(), "3.png": "two\nlines", "4.png": 'a "b" 6" c'}
    assert [(r.name, r.detail[:7]) for r in table.rejects] == [
        ("metadata.csv, line 3", "3 cells"),
        ("metadata.csv, line 4", "1 cells"),
    ]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'0.png,"a lamp\n1.png,b\n', "lines 2 to 3: unexpected end of data"),
        (b'0.png,x\n1.png,"a lamp" lit\n2.png,y\n', "lines 3 to 3: "),
        (b'0.png,"Untitled, a lamp\n1.png,a horse\n2.png,a road"\n', "goes over into the row of 1.png"),
        (b"0.png,caf\xe9\n", "not UTF-8 on line 2"),
        (b"0.png,a\0b\n", "a NUL character on line 2"),
    ],
)
def test_what_moves_the_rows_of_a_csv_is_an_error_of_the_file(body, words, tmp_path):
    folder(tmp_path, "0.png", "1.png", "2.png")
    (tmp_path / "metadata.csv").write_bytes(b"file_name,caption\n" + body)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path)
    assert words in str(caught.value) and "metadata.csv" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "body", [b"", b"\n\n", b"null\n7\n", b"PAR1", b"file_name,file_name,text\na,b,c\n", b"\x89PNG"]
)
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
def test_a_file_that_is_no_table_is_refused_in_one_line(body, suffix, tmp_path):
    (tmp_path / f"m.{suffix}").write_bytes(body)
    with pytest.raises(ConfigError, match=f"m.{suffix}") as caught:
        read_table(tmp_path / f"m.{suffix}")
    assert "\n" not in str(caught.value)


def test_utf16_tables_and_captions(tmp_path):
    folder(tmp_path, "0.png", "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,caption\n0.png,señor\n", "utf-16")
    (tmp_path / "1.txt").write_text("señora\n", "utf-16")
    assert read(tmp_path)[0] == {"0.png": "señor", "1.png": "señora"}


def test_linked_folders_are_read_once(tmp_path):
    root = folder(tmp_path / "pics", "one.png", "sub/two.png")
    folder(tmp_path / "disk", "three.png", "deep/four.png")
    (root / "all").symlink_to(tmp_path / "disk", target_is_directory=True)
    (root / "again").symlink_to(tmp_path / "disk/deep", target_is_directory=True)
    (root / "inside").symlink_to(root / "sub", target_is_directory=True)
    (root / "sub/up").symlink_to(root, target_is_directory=True)
    (tmp_path / "disk/back").symlink_to(root, target_is_directory=True)
    (root / "self").symlink_to("self")
    (root / "gone").symlink_to(tmp_path / "nowhere", target_is_directory=True)
    (root / "lost.png").symlink_to("nowhere.png")
    (root / "five.png").symlink_to(tmp_path / "disk/three.png")
    tree = walk(root)
    assert [tree.name(p) for p in tree.pictures] == [
        *("all/deep/four.png", "all/three.png", "five.png", "one.png", "sub/two.png"),
    ]
    assert [(r.name, r.reason) for r in tree.rejects] == [
        ("again", "folder is read already"),
        ("all/back", "folder is read already"),
        ("gone", "broken link"),
        ("inside", "folder is read already"),
        ("lost.png", "broken link"),
        ("self", "broken link"),
        ("sub/up", "folder is read already"),
    ]
    assert pictures_in(root) == tree.pictures


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder(tmp_path, "a/1.png", "b/2.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("ldm.data.sources.tree.os.scandir", refusing)
    tree = walk(tmp_path)
    assert [tree.name(p) for p in tree.pictures] == ["a/1.png"]
    assert [(r.name, r.reason) for r in tree.rejects] == [("b", "unreadable folder"), ("pipe.png", "no plain file")]


def test_names_that_are_not_utf8_are_written_and_named(tmp_path):
    good, bad = os.fsdecode(b"caf\xe9.png"), os.fsdecode(b"bl\xe9.png")
    folder(tmp_path / "p", good, bad)
    (tmp_path / "p" / os.fsdecode(b"caf\xe9.txt")).write_text("a caption")
    (tmp_path / "p" / os.fsdecode(b"l\xe9.png")).symlink_to(os.fsdecode(b"nowh\xe9re"))
    written = write_dataset(FolderSource(str(tmp_path / "p")), tmp_path / "out")
    assert written.samples == {"train": 1} and written.rejected == {"no caption": 1, "broken link": 1}
    assert (tmp_path / "out/rejects.jsonl").read_text("utf-8").count("\n") == 2
