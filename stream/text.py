"""From a catalogue's texts, as strangers wrote them, to what an encoder reads, or a terminal shows."""

import html
import re
import unicodedata

from stream.events import Item

MAX_CHARS = 8000  # an encoder reads 256-512 tokens; bounds the work on a hostile text

_TAG = re.compile(r"<[/!a-zA-Z][^<>]{0,1000}>")  # "a < b" is no tag
_URL = re.compile(r"\b(?:https?://|www\.)\S+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u00ad\u200b\ufeff]+")
_COMMANDS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # C0, C1; line ends, directions
# Of scripts that set spaces between words: not Thai, Lao, Burmese, Khmer, kana, Han.
_LETTER = r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]"


def clean(text: str) -> str:
    """One line of plain text: entities decoded; tags, addresses, control characters out; NFKC, <= MAX_CHARS.

    >>> clean("Caf&eacute; <b>noir</b>,\\n see https://example.org/x  2 < 3")
    'Café noir , see 2 < 3'
    """
    text = unicodedata.normalize("NFKC", html.unescape(text[: 4 * MAX_CHARS]))
    for pattern in (_TAG, _URL, _CONTROL):
        text = pattern.sub(" ", text)
    return " ".join(text.split())[:MAX_CHARS]


def shown(text: str) -> str:
    """A stranger's characters that would do something to a terminal as their escapes.

    >>> print(shown("ok\\x1b[2J"))
    ok\\x1b[2J
    """
    return _COMMANDS.sub(lambda found: repr(found[0])[1:-1], text)


def _said(words: str) -> re.Pattern[str]:
    """Not as a part of longer words: Star Wars is no "War"."""
    return re.compile(rf"(?<!{_LETTER}){re.escape(words)}(?!{_LETTER})")


def item_text(item: Item) -> str:
    """Title, categories and text, each said once: what the encoder makes an item's vector from."""
    title, text = clean(item.title), clean(item.text)
    if _said(title).match(text):
        title = ""
    said = f"{title} {text}".casefold()
    categories = ", ".join(c for c in map(clean, item.categories) if c and not _said(c.casefold()).search(said))
    return ". ".join(part.rstrip(".") for part in (title, categories, text) if part)[:MAX_CHARS]
