import doctest
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

import stream.text
from stream.events import Item
from stream.text import MAX_CHARS, clean, item_text


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(stream.text).failed == 0


@given(st.text())
def test_clean_is_one_normal_line(text: str) -> None:
    cleaned = clean(text)
    assert len(cleaned) <= MAX_CHARS
    assert cleaned == " ".join(cleaned.split())
    assert unicodedata.is_normalized("NFKC", cleaned)
    assert not any(unicodedata.category(char) == "Cc" for char in cleaned)


@given(st.text(st.characters(categories=["Lo", "Ll", "Nd"])))
def test_words_of_any_script_are_kept(word: str) -> None:
    assert clean(word) == " ".join(unicodedata.normalize("NFKC", word).split())


def test_a_hostile_text_costs_no_more_than_its_head() -> None:
    assert clean("<a " * 1_000_000) == ("<a " * MAX_CHARS)[:MAX_CHARS].strip()


def test_item_text_says_each_thing_once() -> None:
    item = Item(
        item_id="1",
        title="Alien (1979)",
        text="Alien (1979). Horror in space.",
        categories=["Horror", "Science fiction"],
    )
    assert item_text(item) == "Science fiction. Alien (1979). Horror in space"
    assert item_text(Item(item_id="1", title="", text="")) == ""


def test_a_part_of_a_word_does_not_say_it() -> None:
    assert item_text(Item(item_id="1", title="Star Wars", categories=["War", " "])) == "Star Wars. War"
    assert item_text(Item(item_id="1", title="Tea", text="Teapot, blue")) == "Tea. Teapot, blue"
    assert item_text(Item(item_id="1", title="C++", text="C++ in a nutshell")) == "C++ in a nutshell"
    told = Item(item_id="1", title="三体", text="三体是刘慈欣创作的科幻小说", categories=["科幻"])
    assert item_text(told) == told.text  # no spaces say where its words end
