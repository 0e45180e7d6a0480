"""Text that users write: files, configurations, words."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.files import read_json
from storage.text import check_text, expand_home, first_line, has_word, load_yaml, read_text, spell

LETTERS = st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from("\x85\u2028\u2029\t\n")


@pytest.fixture
def write(tmp_path):
    def write(data, name="file"):
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return write


def test_a_mark_in_front_of_a_text_is_no_letter_of_it(write):
    assert read_text(write(b"\xef\xbb\xbfa robot\r\na cat")) == "a robot\na cat"
    assert read_json(write(b'\xef\xbb\xbf{"a": 1}')) == {"a": 1}
    assert load_yaml(write(b"\xef\xbb\xbfseed: 1")) == {"seed": "1"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_another_encoding_is_refused_in_one_sentence(write, encoding):
    with pytest.raises(ValueError, match=r"^caption .*file (is not UTF-8 text|holds NULs, as UTF-16 does): save it"):
        read_text(write("a café".encode(encoding)), "caption")


@pytest.mark.parametrize("text", ["no", "off", "0042", "010", "1_000", "1:30", "2024-01-01", "1e-4", "0x1F", ".5", "="])
def test_yaml_is_what_was_written(write, text):
    assert load_yaml(write(f"flag: {text}\nlist: [{text}]")) == {"flag": text, "list": [text]}


def test_yaml_says_nothing_in_three_ways(write):
    text = "a: null\nb: ~\nc:\nd: 'null'\nbase: &base {e: '1'}\nf: {<<: *base, g: x}"
    nothing = dict.fromkeys("abc")
    assert load_yaml(write(text)) == nothing | {"d": "null", "base": {"e": "1"}, "f": {"e": "1", "g": "x"}}


REFUSED = {
    "a: 1\na: 2": "a is there twice",
    '{"a": 1, "a": 2}': "a is there twice",
    "a: !!python/object/apply:os.system [ls]": "could not determine a constructor",
    "a: !!int 3": "could not determine a constructor",
    'a: "\\ud83d"': "is not UTF-8",
    'a: "\\0"': "has a NUL",
    '{"a": "\\ud83d"}': "half a character",
    "[" * 10_000: "nested too deeply",
    '{"a":' * 10_000 + "1" + "}" * 10_000: "nested too deeply",
    "a: \x0b": "special characters",
    "a: [": "not YAML",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:20])
def test_yaml_that_is_wrong_is_refused_in_one_sentence(write, text):
    with pytest.raises(ValueError, match=f"(?s)^--config .*file .*{REFUSED[text]}"):
        load_yaml(write(text), "--config")


def test_json_is_read_as_json(write):
    text = json.dumps({"prompt": "a \U0001f600"}, indent="\t")
    assert "\\ud83d" in text and load_yaml(write(text)) == {"prompt": "a \U0001f600"}


@settings(max_examples=200, deadline=None)
@given(text=st.text(LETTERS))
def test_any_text_in_quotes_comes_back_from_yaml(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("yaml") / "file"
    escaped = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t"}
    path.write_bytes(f'a: "{"".join(escaped.get(one, one) for one in text)}"\n'.encode())
    assert load_yaml(path) == {"a": text}


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=60) | st.text("&*!|>%@`-?:{}[],#'\"\\ \n\tab0~<", max_size=40).map(str.encode))
def test_no_file_of_yaml_ends_in_a_traceback(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("yaml") / "file"
    path.write_bytes(data)
    try:
        load_yaml(path)
    except ValueError as error:
        assert str(path) in str(error)


def test_half_a_character_and_a_nul_are_refused():
    for text in ("caf\udce9", "a\0b"):
        with pytest.raises(ValueError, match="^--prompt .*(is not UTF-8|has a NUL)"):
            check_text(text, "--prompt")
    assert check_text("café \u2028", "--prompt") == "café \u2028"


def test_home_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_home("~/x") == str(tmp_path / "x") and expand_home("~") == str(tmp_path)
    assert expand_home("a/~/x") == "a/~/x" and expand_home("./~") == "./~"
    with pytest.raises(ValueError, match="names a home folder that is not known here"):
        expand_home("~nobody-of-this-name/x")


def test_the_first_line_of_an_error_that_says_nothing_is_its_kind():
    assert first_line(ValueError()) == "ValueError()" and first_line(ValueError("\na\nb")) == "a"


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, spelled",
    [
        ("a sks dog", "a <s> dog"),
        ("two desks; she asks", "two desks; she asks"),
        ("sks, sks's sks-like (sks)", "<s>, <s>'s <s>-like (<s>)"),
        ("sks_1 sks2 ésks", "sks_1 sks2 ésks"),
        ("sks\u0301", "sks\u0301"),
    ],
)
def test_words_are_replaced_whole(text, spelled):
    assert spell(text, {"sks": "<s>"}) == spelled
    assert has_word(text, "sks") == (text != spelled)


def test_words_in_brackets_need_nothing_around_them():
    assert spell("a[V]dog [V]s", {"[V]": "<v>"}) == "a<v>dog <v>s"


def test_words_that_hold_each_other_are_replaced_once():
    assert spell("sks dog, sks", {"sks": "<dog>", "sks dog": "<sks>", "dog": "x"}) == "<sks>, <dog>"


def test_a_word_is_found_however_its_accents_are_written():
    assert spell("a cafe\u0301 cup", {"caf\u00e9": "<c>"}) == "a <c> cup"
    assert spell("a caf\u00e9 cup", {"cafe\u0301": "<c>"}) == "a <c> cup"
    assert spell("a cafe\u0301 cup", {"cafe": "<c>"}) == "a cafe\u0301 cup"
