"""Does a response's final answer equal the reference? Exact for words and choices, numeric for quantities.

The reference decides the sort: a quantity (number with at most one unit), a choice (one letter) or words. One place of
the response decides, so that naming many answers gains nothing: the last \\boxed{}, else what follows the last "answer
is", else the last number, choice or sentence. A response is foreign text: nothing of it is evaluated, and every
pattern here takes time linear in its length.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

TOLERANCE = Fraction(1, 10**6)  # relative, unless both numbers are whole
MAX_DIGITS = 100  # a longer number is compared as text
MAX_CHARACTERS = 20_000  # of a response: its end, where the final answer is
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_UNITS = {  # dimension -> names of a unit -> its size
    "length": {
        "mm millimeter millimetre": "1/1000",
        "cm centimeter centimetre": "1/100",
        "m meter metre": "1",
        "km kilometer kilometre": "1000",
        "inch inches": "127/5000",
        "ft foot feet": "381/1250",
        "mile mi": "201168/125",
    },
    "mass": {"mg milligram": "1/1000", "g gram": "1", "kg kilogram": "1000"},
    "time": {"ms millisecond": "1/1000", "s sec second": "1", "min minute": "60", "h hr hour": "3600", "day": "86400"},
    "volume": {"ml milliliter millilitre": "1/1000", "l liter litre": "1"},
    "angle": {"° deg degree": "1"},
    "celsius": {"°c": "1"},
    "fahrenheit": {"°f": "1"},
    "share": {"% percent": "1/100"},
    "dollar": {"$ usd dollar": "1"},
    "euro": {"€ eur euro": "1"},
    "sterling": {"£ gbp": "1"},
    "yen": {"¥ yen jpy": "1"},
}
UNITS = {
    name: (dimension, Fraction(size))
    for dimension, units in _UNITS.items()
    for names, size in units.items()
    for name in names.split()
}

PERCENT = ((("share", 1),), Fraction(1, 100))

_UNIT = r"%|°[CFcf]?|[€£¥]|[A-Za-z]+(?:\^?[23])?(?:/[A-Za-z]+(?:\^?[23])?)?"
_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
NUMBER = re.compile(
    rf"""
    (?<![A-Za-z0-9_^{{√/]) (?<![0-9][.:,])         # not within a word, exponent, root, fraction, time or list
    (?P<sign> (?:(?<![)\]}}%])[-+])? ) (?: (?P<currency>\\?[$€£¥]) (?P<inner>[-+]?) )?
    (?: 10\^(?P<power>[-+]?[0-9]{{1,3}})
      | (?P<whole>[0-9]+)[ ](?P<top>[0-9]+)/(?P<bottom>[0-9]+)
      | (?P<number>{_DECIMAL}) (?:[ ]?/[ ]?(?P<divisor>{_DECIMAL}))?
        (?: [eE](?P<exponent>[-+]?[0-9]{{1,3}}) | [ ]?[x*][ ]?10\^(?P<tens>[-+]?[0-9]{{1,3}}) )?
    )
    (?: (?P<gap>[ ]?) (?P<unit>{_UNIT}) )?
    (?! [A-Za-z0-9_^√π\\({{] | [.,:/][0-9] )       # nor the beginning of a longer thing
    """,
    re.VERBOSE,
)
ANSWER = re.compile(
    r"\banswer(?: (?:to|for|of)\b[^.:\n]{0,40}?)?(?: ?(?:is|are)\b(?! ?:)| ?(?:is|are)? ?[:=]| [-\u2013\u2014](?= ))",
    re.IGNORECASE,
)
REASON = re.compile(r",(?= (?!(?:or|and)\b|[-+$(]?[0-9]))| \(?(?:because|since|as|so|which|where) ")
SENTENCE_END = re.compile(r"[.;!?](?=\s|$)|\n")
HEDGE = re.compile(r"n't\b|\b(?:not|no|never|or|than|least|most|between)\b", re.IGNORECASE)
FORMULA = re.compile(r"[+*/^\\_<>≤≥≠±√0-9]|-$")
NEGATION = re.compile(r"(?:\bnot|\bnever|n't)[^\w.]*$", re.IGNORECASE)
COPULA = re.compile(  # a colon between digits is a time's or a ratio's
    r"\b(?:is|are|was|were|equals|it's|that's)\b|=|:(?!(?<=[0-9]:)[0-9])", re.IGNORECASE
)
CHOICE = re.compile(r"\(?([A-Za-z])[.):]?")
CHOICES = re.compile(
    r"(?<!\w)\(([A-Za-z])\)|\b(?:[Oo]ption|[Cc]hoice) ([A-Za-z])\b|\b([A-Z]) is (?:the )?(?:correct|right)\b"
    r"|(?<![\w'])([A-Z])(?![\w']|(?<=[AI]) (?!and\b|or\b)[a-z])"  # neither the article nor the pronoun
)
LEADING_CHOICE = re.compile(r"([A-Za-z])[.):](?= )")
VERDICTS = {"yes", "no", "true", "false"}
LEADING_VERDICT = re.compile(rf"({'|'.join(VERDICTS)})(?=$|[^\w\s])", re.IGNORECASE)
WORDS = re.compile(  # numbers, words and symbols; punctuation and a hyphen between letters only part them
    r"[0-9]+(?:[.,][0-9]+)*|[^\W\d_]+|(?<=[0-9]):(?=[0-9])|(?<![^\W\d_])-|-(?![^\W\d_])|[^\w\s.,:;!?\"'()$\\-]"
)
ARTICLES = {"a", "an", "the"}

SPELLINGS = [  # LaTeX and typography into plain text, in this order
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\\\", "\n"),
        (r"\\(?:left|right|displaystyle)\b|\\[;: ()\[\]]|~", " "),
        (r"[^\S\n]+", " "),
        (r"[\u2212\u2012]", "-"),
        (r"²", "^2"),
        (r"³", "^3"),
        (r"½", " 1/2"),
        (r"[\u2019\u2018]", "'"),
        (r"\\[,!]|\{,\}(?=[0-9])|\*\*|`", ""),
        (r"\\%", "%"),
        (r"\\(?:text|mathrm|textbf|mathbf) ?\{([^{}]*)\}", r"\1"),
        (r"[\u00d7\u00b7]|\\(?:times|cdot)\b", "*"),
        (r"≈|\\approx\b", "="),
        (r"\^ ?\{? ?\\circ ?\}?|\\(?:circ|degree)\b", "°"),
        (r"\^\{([-+]?[0-9A-Za-z]+)\}", r"^\1"),
        (r"(?<=[0-9])\\(?=[dt]?frac)", r" \\"),
        (r"\\[dt]?frac ?\{ ?([0-9]+(?:\.[0-9]+)?) ?\} ?\{ ?([0-9]+(?:\.[0-9]+)?) ?\}", r"\1/\2"),
        (r"\\[dt]?frac([0-9])([0-9])", r"\1/\2"),
        (r" {2,}", " "),
        (r"\bper cent\b", "percent"),
        (r"\b[Dd]egrees? ([CF])(?:elsius|ahrenheit)?\b", r"°\1"),
        (r"\bsquare ([a-z]+)", r"\1^2"),
        (r"\bcubic ([a-z]+)", r"\1^3"),
        (r"([A-Za-z]) per ([A-Za-z])", r"\1/\2"),
    )
]


class Quantity(NamedTuple):
    value: Fraction
    unit: str | None  # a known unit, any other word after the number, or none
    start: int
    end: int


def verify(response: str, reference: str) -> bool:
    """Whether the final answer of `response` equals `reference`.

    Whole numbers must be equal, others to a relative 1e-6. A unit on one side only is ignored, except that 50 % is also
    0.5. Words are compared without case, articles and punctuation.
    """
    reference = _plain(reference).rstrip(".")
    if reference[:1] == reference[-1:] == "$":
        reference = reference.strip("$")
    marked, answers = _final_answer(_plain(_end(response)))
    if (wanted := NUMBER.fullmatch(reference)) and (quantity := _quantity(wanted)):
        got = _only_quantity(answers[-1]) if marked else _last_quantity(answers[0])
        return got is not None and _same(quantity, got)
    if wanted := CHOICE.fullmatch(reference):
        return _choices(answers, marked) == {wanted[1].upper()}
    words = _words(reference)
    if not words:
        return reference in answers
    if not marked and set(words) <= VERDICTS and (verdict := LEADING_VERDICT.match(answers[0])):
        return words == [verdict[1].lower()]
    return any(_words(each) == words for each in answers)


def _end(text: str) -> str:
    """The last MAX_CHARACTERS, without the word that the cut goes through."""
    return text if len(text) <= MAX_CHARACTERS else text[-MAX_CHARACTERS:].partition(" ")[2]


def _plain(text: str) -> str:
    for pattern, plain in SPELLINGS:
        text = pattern.sub(plain, text)
    return text.strip()


def _final_answer(text: str) -> tuple[bool, list[str]]:
    """Whether the response marks its final answer, and what it may be, the longest first.

    Marked: what a box holds; or, after "answer is", the line, its first sentence, and that up to a reason ("5" of "5,
    not 7" or of "5 because"). Else the whole, the last sentence, and the end of that after "is".
    """
    if (boxed := _boxed(text)) is not None:
        return True, [boxed]
    if phrases := list(ANSWER.finditer(text)):
        line = text[phrases[-1].end() :].strip().partition("\n")[0]
        sentence = SENTENCE_END.split(line, maxsplit=1)[0]
        return True, [line, sentence, REASON.split(sentence, maxsplit=1)[0].strip()]
    last = next((each.strip() for each in reversed(SENTENCE_END.split(text)) if each.strip()), "")
    return False, [text, last, COPULA.split(last)[-1].strip()]


def _boxed(text: str) -> str | None:
    """What the last \\boxed{} holds, with the braces within it."""
    start, depth = text.rfind("\\boxed{"), 0
    for brace in re.compile(r"[{}]").finditer(text, start) if start >= 0 else ():
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start + len("\\boxed{") : brace.start()].strip()
    return None


def _quantity(match: re.Match) -> Quantity | None:
    """None for what only looks like a number: 1/0, 2x, more digits than anyone needs."""
    if match.end() - match.start() > MAX_DIGITS:
        return None
    part = {name: (value or "").replace(",", "") for name, value in match.groupdict().items()}
    try:
        if part["power"]:
            value = Fraction(10) ** int(part["power"])
        elif part["whole"]:
            value = int(part["whole"]) + Fraction(int(part["top"]), int(part["bottom"]))
        else:
            value = Fraction(part["number"]) / Fraction(part["divisor"] or 1)
            value *= Fraction(10) ** int(part["exponent"] or part["tens"] or 0)
    except ZeroDivisionError:
        return None
    unit = part["unit"].lower()
    if unit in SCALES:
        value, unit = value * SCALES[unit], ""
    elif unit and not part["gap"] and _known(unit) is None:
        return None
    closed = match.string[match.end() : match.end() + 1] == "$"  # $5$ is mathematics, $5 is money
    currency = "" if closed and part["currency"] == "$" else part["currency"].strip("\\")
    sign = -1 if "-" in part["sign"] + part["inner"] else 1
    return Quantity(sign * value, unit or currency or None, match.start(), match.end())


def _only_quantity(text: str) -> Quantity | None:
    """The one quantity of a marked answer, whose other words neither deny it nor make it part of a formula."""
    text = text.rpartition("=")[2]
    first = next(filter(None, map(_quantity, NUMBER.finditer(text))), None)
    if first is None:
        return None
    before, after = text[: first.start].rstrip(), text[first.end :]
    doubtful = FORMULA.search(before) or FORMULA.search(after) or HEDGE.search(text)
    return None if doubtful else first


def _last_quantity(text: str) -> Quantity | None:
    for match in reversed(list(NUMBER.finditer(text))):
        denied = NEGATION.search(text[max(0, match.start() - 12) : match.start()])
        if not denied and (quantity := _quantity(match)):
            return quantity
    return None


def _known(unit: str | None) -> tuple[tuple, Fraction] | None:
    """((dimension, exponent) of each factor, size) of a unit such as km, cm^2 or km/h; None for any other word."""
    dimensions, size = [], Fraction(1)
    for sign, factor in zip((1, -1), (unit or "").split("/"), strict=False):
        name, power = re.fullmatch(r"([^0-9^]*)\^?([23]?)", factor).groups()
        found = UNITS.get(name) or UNITS.get(name.removesuffix("s"))
        if found is None:
            return None
        exponent = sign * int(power or 1)
        dimensions.append((found[0], exponent))
        size *= found[1] ** exponent
    return tuple(dimensions), size


def _same(reference: Quantity, got: Quantity) -> bool:
    wanted, given = _known(reference.unit), _known(got.unit)
    if wanted and given:
        return wanted[0] == given[0] and _equal(reference.value * wanted[1], got.value * given[1])
    if reference.unit and not wanted and got.unit:  # 5 apples are not 5 pears
        return reference.unit.removesuffix("s") == got.unit.removesuffix("s") and _equal(reference.value, got.value)
    if PERCENT in (wanted, given):
        scales = [(each or (None, 1))[1] for each in (wanted, given)]
        if _equal(reference.value * scales[0], got.value * scales[1]):
            return True
    return _equal(reference.value, got.value)


def _equal(a: Fraction, b: Fraction) -> bool:
    if a == b or a.denominator == b.denominator == 1:
        return a == b
    return abs(a - b) <= TOLERANCE * max(abs(a), abs(b))


def _choices(answers: list[str], marked: bool) -> set[str]:
    """The letters that the answer chooses, upper case."""
    for each in answers:
        if alone := CHOICE.fullmatch(each.strip(" .!$")):
            return {alone[1].upper()}
    text = answers[-1] if marked else answers[1]
    if HEDGE.search(text):
        return set()
    found = [next(filter(None, match.groups())) for match in CHOICES.finditer(text)]
    if leading := LEADING_CHOICE.match(answers[0]):
        found.append(leading[1])
    return {each.upper() for each in found}


def _words(text: str) -> list[str]:
    words = WORDS.findall(text.lower())
    return [word for word in words if word not in ARTICLES] or words
