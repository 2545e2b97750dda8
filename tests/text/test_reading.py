"""Text is read by one reader: UTF-8 or what a byte order mark says, and what is neither is refused by its line."""

import codecs
import os

import pytest
from commands import here

from ldm.data.fields import read_fields
from ldm.errors import ConfigError
from ldm.pipeline import _texts
from ldm.tasks.sample import _prompts
from ldm.text.reading import NotText, checked, decode, lines, printable, read_text

WRITTEN = {
    "plain": str.encode,
    "utf-8-sig": lambda text: codecs.BOM_UTF8 + text.encode(),
    "utf-16-le": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "utf-16-be": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "utf-32-le": lambda text: codecs.BOM_UTF32_LE + text.encode("utf-32-le"),
    "utf-32-be": lambda text: codecs.BOM_UTF32_BE + text.encode("utf-32-be"),
}

NOT_TEXT = [  # bytes, the words that say where
    ("a cat\nun café".encode("latin-1"), "not UTF-8 on line 2 (byte 0xe9"),
    ("a\r\nb\r\n“x”".encode("cp1252"), "not UTF-8 on line 3 (byte 0x93"),
    ("猫在桌子上\n".encode("gb18030"), "not UTF-8 on line 1"),
    ("a cat\nb".encode("utf-16-le"), "a NUL character on line 1"),
    (codecs.BOM_UTF16_LE + "a\nb".encode("utf-16-le") + b"\0", "not UTF-16 on line 2"),
    (codecs.BOM_UTF16_BE + b"\0a\0\n\xd8\x00\0a", "not UTF-16 on line 2"),
    (b"ok\n\xed\xa0\x80", "not UTF-8 on line 2"),  # a surrogate written as bytes
    (b"ok\0", "a NUL character on line 1"),
]


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_mark_says_is_read(name, tmp_path):
    text = "a red cat\r\nein blauer Hund, 猫 🐈\u2028and more\x85\n"
    (tmp_path / "p.txt").write_bytes(WRITTEN[name](text))
    assert read_text(tmp_path / "p.txt", "prompts=") == text
    assert lines(text) == ["a red cat", "ein blauer Hund, 猫 🐈\u2028and more\x85", ""]
    config = type("Config", (), {"prompts": str(tmp_path / "p.txt"), "prompt": None})
    assert _prompts(config) == ["a red cat", "ein blauer Hund, 猫 🐈\u2028and more"]
    assert read_fields(None, str(tmp_path / "p.txt")).class_names == tuple(_prompts(config))


@pytest.mark.parametrize(("data", "words"), NOT_TEXT)
def test_what_is_no_text_is_refused_by_its_line(data, words, tmp_path):
    (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(NotText) as caught:
        decode(data)
    assert words in str(caught.value)
    for read in (
        lambda path: read_text(path, "prompts="),
        lambda path: read_fields(None, str(path)),
        lambda path: _prompts(type("Config", (), {"prompts": str(path), "prompt": None})),
    ):
        with pytest.raises(ConfigError) as refused:
            read(tmp_path / "p.txt")
        assert words in str(refused.value) and "p.txt" in str(refused.value) and "\n" not in str(refused.value)


def test_class_names_are_one_a_line(tmp_path):
    (tmp_path / "names").write_text("tench\n\nshark\n")
    with pytest.raises(ConfigError, match="line 2 is empty"):
        read_fields(None, str(tmp_path / "names"))
    (tmp_path / "names").write_text("\n")
    with pytest.raises(ConfigError, match="it is empty"):
        read_fields(None, str(tmp_path / "names"))
    with pytest.raises(ConfigError, match=r"data.class_names=.*cannot be read"):
        read_fields(None, str(tmp_path / "none"))


def test_surrogates_are_no_text():
    assert checked("café 🐈") == "café 🐈"
    for text, words in ((os.fsdecode(b"caf\xe9"), "byte 0xe9 after 3"), ("a\ud83d", "U+D83D after 1")):
        with pytest.raises(NotText) as caught:
            checked(text)
        assert words in str(caught.value)
        str(caught.value).encode()
        with pytest.raises(ConfigError, match="prompt is not UTF-8"):
            _texts("prompt", ["good", text])
        printable(text).encode()


@pytest.mark.parametrize("key", ["prompt", "negative_prompt", "checkpoint", "output", "images", "name", "--config-dir"])
def test_an_argument_that_is_not_utf8_is_refused(key, tmp_path):
    result = here("task=sample", os.fsdecode(key.encode() + b"=caf\xe9"), cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == "" and not list(tmp_path.iterdir())
    assert result.stderr.startswith("error: an argument is not UTF-8") and result.stderr.count("\n") == 1
    assert "byte 0xe9" in result.stderr and "ln -s" in result.stderr
