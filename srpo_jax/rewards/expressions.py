r"""A mathematical answer as a tree: every character of it is read, or the text is refused.

LaTeX and plain notation alike. A tree is a tuple of a kind and its operands: ("num", value, step)
with the unit of the last digit as step (0 for an exact number), ("name", text), ("const", text),
("dots",), ("list", whether by "or", *items), ("set", *items), ("tuple", open, close, *items),
("rel", operators, *operands), ("matrix", *rows), ("apply", name, base, argument),
("unit", name, tree), or an operator or command and its operands. Pure, in linear time.
"""

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from srpo_jax.rewards.units import MAX_UNIT, UPRIGHT, canonical_unit

Tree = tuple
Token = Any  # a number's tree, or text
_MAX_TOKENS = 300
_MAX_DEPTH = 60
_MAX_EXPONENT = 400

_SYMBOLS = dict(zip("×÷·⋅∙−–≤≥≠±½¼¾∞°º∪∩∈∅√∠△…∥⊥≡∼≅≈πθαβΔΩℝℤ⁰¹²³⁴⁵⁶⁷⁸⁹", (  # noqa: B905
    r"* / * * * - - \le \ge \ne \pm \frac12 \frac14 \frac34 \infty ^\circ ^\circ \cup \cap \in "
    r"\emptyset \sqrt \angle \triangle \dots \parallel \perp \equiv \sim \cong \approx \pi \theta "
    r"\alpha \beta \Delta \Omega \mathbb{R} \mathbb{Z} ^0 ^1 ^2 ^3 ^4 ^5 ^6 ^7 ^8 ^9"
).split()))  # fmt: skip
_TABLE = str.maketrans({char: text + " " for char, text in _SYMBOLS.items()})
_FONT = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf|normal|up)?|math(?:rm|bf|it|sf|tt|cal|scr|normal)|mbox|hbox|emph|"
    r"underline|boldsymbol|bm|pmb|operatorname\*?)\s*\{([^{}]*)\}"
)
_MONEY = re.compile(r"\s*([+-]?)\s*\\?([$€£¥])\s*([+-]?[\d.][^$]*)")
_CURRENCIES = {"$": "usd", "€": "eur", "£": "gbp", "¥": "yen"}
# What only sets, spaces or escapes the text; then other spellings, in order.
_REWRITTEN = tuple(
    (re.compile(pattern), instead)
    for pattern, instead in (
        (r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|limits|rm|bf|it|quad|qquad|"
         r"mathrm|mathbf|mathit|mathsf)(?![A-Za-z])|\$|~|\\\\\s*$|(?<!\\)\\[,;: ()\[\]$]|"
         r"\\(?:(?:text)?color|colorbox)\s*\{[^{}]*\}", " "),
        (r"(?<=\d),?\s*\\!\s*|\\!|\\(?=%)", ""),
        (r"\{,\}(?=\d)", ","),
        (r"(\d\s*)\\Omega(?![A-Za-z])", r"\1 ohm "),
        (r"\^\s*\{?\s*\\circ\s*\}?\s*([CF])(?![A-Za-z])", r" deg\1 "),
        (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree", r"\\degree "),
        (r"\\not\s*=", r"\\ne "),
        (r"\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?", r"\\overline{\1\2\3}"),
        (r"(\d|\\pi)\s*\{\s*([A-Za-z]{2,})\s*\}$", r"\1 \2"),
        (r"\\mathbb\s*\{?\s*([RZNQC])\s*\}?|(?i:(?:the set of )?all real(?:s| number(?:s)?))()",
         lambda m: rf"\mathbb {m[1] or 'R'} "),
        (r"(\\[dtc]?(?:frac|binom))\s*([0-9a-z])(?:\s*([0-9a-z])(?!\w)|(?=\s*[{\\]))",
         lambda m: rf"{m[1]}{{{m[2]}}}" + (f"{{{m[3]}}}" if m[3] else "")),
        (r"(?<=\d)\s*x\s*(?=10\s*\^)", "*"),
    )
)  # fmt: skip
_GROUPED = re.compile(r"(?<![\d.])\d{1,3}(?:([, ])\d{3})(?:\1\d{3})*(?![\d,])")
_TOKEN = re.compile(
    r"(?P<number>\d+(?:\.\d*)?|\.\d+)(?:\\(?:overline|bar|dot)\s*\{?(?P<again>\d+)\}?)?"
    r"(?:[eE](?P<power>[+-]?\d{1,3})(?![\d.]))?"
    r"|\\(?P<command>[A-Za-z]+|\S)|(?P<word>[A-Za-z]+)|\.\.\.+|[<>!=]=|\*\*|\S"
)
_SPELLINGS = {
    spelling: names.split()[0]
    for names in (
        r"* \times \cdot \ast;/ \div;< \lt;> \gt;<= \le \leq \leqslant;>= \ge \geq \geqslant;"
        r"!= \ne \neq;≈ \approx \simeq;= ==;^ **;: \colon;| \lvert \rvert \vert \mid;\{ \lbrace;"
        r"\} \rbrace;\dots ... \ldots \cdots \dotsc \dotsb;\frac \dfrac \tfrac \cfrac;\log \lg;"
        r"\binom \dbinom \tbinom;\emptyset \varnothing;\vec \overrightarrow;\bar \overline;"
        r"\hat \widehat;\pi pi;\infty infinity;\sqrt sqrt"
    ).split(";")
    for spelling in names.split()
}
_FUNCTIONS = set(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp max min gcd lcm".split()
)
_GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi "
    "rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi "
    "Omega ell partial nabla hbar".split()
)
_ACCENTS = set("bar vec hat tilde dot ddot angle triangle odot measuredangle".split())
_RELATIONS = set(r"= < > <= >= != ≈ \in \parallel \perp \equiv \sim \cong \to \subset".split())
_SEPARATORS = {",", ";", "and", "or", "&"}
_PROSE = {"is", "no", "not", "nor", "the", "but", "may"}
_CLOSING = {"(": ") ]", "[": "] )", r"\{": r"\}", "{": "}", "|": "|", r"\lfloor": r"\rfloor"}
_CLOSING |= {r"\lceil": r"\rceil"}
_LEVELS = (":",), (r"\cup", r"\cap", r"\setminus"), ("+", "-", r"\pm", r"\mp")
_STARTS = {"(", "[", "{", r"\{", r"\frac", r"\binom", r"\sqrt", r"\dots", r"\emptyset", r"\pi"}
_STARTS |= {r"\infty", r"\mathbb", r"\begin", r"\lfloor", r"\lceil"}
_STARTS |= {"\\" + name for name in _FUNCTIONS | _GREEK | _ACCENTS}
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "dozen": 12}
_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()


class Unreadable(ValueError):
    """Not all of a text could be read as mathematics."""


def without_fonts(text: str, instead: str = UPRIGHT + r"\1 ") -> str:
    r"""``text`` with what ``\text``, ``\mathrm`` and the like hold in place of them."""
    for _ in range(5):
        text, count = _FONT.subn(instead, text)
        if not count:
            break
    return text


@lru_cache(maxsize=4096)
def read(text: str) -> Tree:
    """The tree of a whole answer; Unreadable where any part of it could not be read."""
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)  # escaped once too often
    if money := _MONEY.fullmatch(text):
        text = f"{money[1]}{money[3]} {_CURRENCIES[money[2]]}"
    text = without_fonts(text.translate(_TABLE))
    for pattern, instead in _REWRITTEN:
        text = pattern.sub(instead, text)
    if not re.search(r"[(\[]|\\\{", text):  # inside brackets commas separate
        text = _GROUPED.sub(lambda match: re.sub("[, ]", "", match[0]), text)
    try:
        return _Reader(text).whole()
    except RecursionError:
        raise Unreadable("nested too deeply") from None


def tree_of(text: str) -> Tree | None:
    """As ``read``, but None for what cannot be read."""
    try:
        return read(text)
    except Unreadable:
        return None


class _Reader:
    """Recursive descent over the tokens: numbers as trees, the rest as text, "" at the end."""

    def __init__(self, text: str):
        self._text = text
        self._tokens: list[Token] = []
        self._starts: list[int] = []
        for match in _TOKEN.finditer(text):
            tokens = _tokens(match)
            self._tokens += tokens
            self._starts += [match.start()] * len(tokens)
        if len(self._tokens) > _MAX_TOKENS:
            raise Unreadable("too long")
        self._tokens.append("")
        self._at = self._depth = self._bars = 0

    @property
    def _next(self) -> Token:
        return self._tokens[self._at]

    def _take(self, *expected: str) -> Token:
        token = self._next
        if not token or (expected and token not in expected):
            raise Unreadable(f"{token or 'the end'} is out of place")
        self._at += 1
        return token

    def _accept(self, *tokens: str) -> Token:
        return self._take() if self._next and self._next in tokens else ""

    # --- lists, relations ---

    def whole(self) -> Tree:
        """All of the text, items of a list among them."""
        start = self._at
        items = self._items()
        if self._next:
            raise Unreadable(f"{self._next} is out of place")
        return items[0] if len(items) == 1 else ("list", "or" in self._tokens[start:], *items)

    def _items(self) -> list[Tree]:
        items = [self._relation()]
        while self._accept(*_SEPARATORS):
            while self._accept(*_SEPARATORS):
                pass
            items.append(self._relation())
        return items

    def _relation(self) -> Tree:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise Unreadable("nested too deeply")
        operands, operators = [self._measured()], []
        while operator := self._accept(*_RELATIONS):
            operators.append(operator)
            operands.append(self._measured())
        self._depth -= 1
        return ("rel", tuple(operators), *operands) if operators else operands[0]

    def _measured(self) -> Tree:
        """An expression with its unit."""
        tree = self._binary()
        unit, end = self._unit()
        self._at = end
        return ("unit", unit, tree) if unit else tree

    def _unit(self) -> tuple[str, int]:
        """The unit that stands here after a number, and the token behind it; "" without one."""
        here, last = self._at, self._tokens[self._at - 1]
        known = isinstance(last, tuple) or last in (")", "}", "]", r"\pi", r"\degree", *_SCALES)
        if not self._at or not known or not (self._next == "%" or _is_word(self._next)):
            return "", here
        start = self._starts[here]
        found = re.match(
            r"(?:\^\s*\{[^{}]*\}|[^,;(){}\[\]=<>&|\\])*", self._text[start:][:MAX_UNIT]
        )
        unit = re.split(r"\b(?:and|or)\b", found[0] if found else "")[0].strip()
        before = self._text[max(start - 3, 0) : start]
        if len(unit) == 1 and unit.isalpha() and not isinstance(last, tuple):
            if last not in ("}", ")") or not before[-1].isspace():
                return "", here
        name = canonical_unit(unit, glued=not (before[-1].isspace() or unit == "m"))
        if not unit or name is None:
            return "", here
        end = start + len(unit)
        while here < len(self._starts) and self._starts[here] < end:
            here += 1
        return name or "unit", here

    # --- arithmetic ---

    def _binary(self, level: int = 0) -> Tree:
        if level == len(_LEVELS):
            return self._term()
        tree = self._binary(level + 1)
        while operator := self._accept(*_LEVELS[level]):
            tree = (operator, tree, self._binary(level + 1))
        return tree

    def _term(self) -> Tree:
        if sign := self._accept("+", "-", r"\pm", r"\mp"):
            if self._next in ("+", "-"):
                raise Unreadable("two signs")
            tree = self._term()
            return tree if sign == "+" else _negative(tree) if sign == "-" else (sign, tree)
        tree = self._factors()
        while operator := self._accept("*", "/"):
            negative = self._accept("-")
            right = self._factors()
            tree = _product(operator, tree, _negative(right) if negative else right)
        return tree

    def _factors(self, *, argument: bool = False) -> Tree:
        """Factors side by side; those of a function without brackets end before the next one."""
        tree = self._power()
        while self._starts_factor() and not (argument and self._next[1:] in _FUNCTIONS):
            if isinstance(self._next, tuple):  # only a mixed number puts two numbers side by side
                right = ("/", self._take(), self._take("/") and self._take())
                if not (_is_whole(tree) and _is_proper(right)):
                    raise Unreadable("two numbers side by side")
            else:
                right = self._power()
            tree = ("mixed" if _is_whole(tree) and _is_proper(right) else "*", tree, right)
        if scale := self._accept(*_SCALES):
            by = _SCALES[scale]
            tree = (
                ("num", tree[1] * by, tree[2] * by) if tree[0] == "num" else ("*", tree, _whole(by))
            )
        return tree

    def _starts_factor(self) -> bool:
        token = self._next
        if token == "|":
            return not self._bars
        if isinstance(token, tuple) or token in _STARTS:
            return True
        return (
            _is_word(token)
            and token not in _SCALES
            and token not in _SEPARATORS
            and not self._unit()[0]
        )

    def _power(self) -> Tree:
        """An atom with what stands behind it: powers, factorials, degrees."""
        tree = self._atom()
        while operator := self._accept("^", "!", r"\degree"):
            tree = (operator, tree, self._exponent()) if operator == "^" else (operator, tree)
        return tree

    def _exponent(self) -> Tree:
        if self._accept("-"):
            return _negative(self._exponent())
        return self._atom() if self._next == "{" else self._power()

    def _raw(self) -> str:
        """A group or one token as text: of accents and indices."""
        start, depth = self._at, 0
        while True:
            token = self._take()
            depth += (token == "{") - (token == "}")
            if depth <= 0:
                return "".join(_text(token) for token in self._tokens[start : self._at]).strip("{}")

    def _name(self, name: str) -> Tree:
        while sign := self._accept("_", "'"):
            name += "_" + self._raw() if sign == "_" else sign
        return ("name", name)

    def _bracketed(self, opening: str) -> Tree:
        self._bars += opening == "|"
        items = self._items() if self._next != _CLOSING[opening] else []
        if opening == r"\{" and len(items) == 1 and self._accept("|"):
            items = [self._relation()]  # {x | x > 2}: the condition says it all
            self._take(r"\}")
            return items[0]
        closing = self._take(*_CLOSING[opening].split())
        self._bars -= opening == "|"
        if opening in ("|", r"\lfloor", r"\lceil"):
            return (opening, *items)
        if opening == r"\{" or (opening == "{" and len(items) != 1):
            return ("set", *items)
        if len(items) == 1 and closing == _CLOSING[opening][0]:
            return items[0]
        return ("tuple", opening, closing, *items)

    def _atom(self) -> Tree:
        token = self._take()
        if isinstance(token, tuple):
            return token
        if token in _CLOSING:
            return self._bracketed(token)
        if len(token) == 1 and token.isalpha():
            plain = token in "ei" and self._next not in ("_", "'")
            return ("const", token) if plain else self._name(token)
        name = token[1:]
        if token not in _STARTS:
            raise Unreadable(f"{token} is out of place")
        if name in ("frac", "binom"):
            return ("/" if name == "frac" else name, self._atom(), self._atom())
        if name == "sqrt":
            degree = self._atom() if self._next == "[" else _whole(2)
            return ("root", degree, self._atom())
        if name in _FUNCTIONS:
            return self._function(name)
        if name in _GREEK:
            return self._name(name)
        if name in _ACCENTS:
            text = self._raw()
            while name in ("angle", "triangle") and _is_word(self._next):
                text += self._take()
            return self._name(f"{name} {text}")
        if name == "begin":
            return self._matrix()
        if name == "mathbb":
            return ("const", "set " + self._take(*"RZNQC"))
        return {"dots": ("dots",), "emptyset": ("set",)}.get(name, ("const", name))

    def _function(self, name: str) -> Tree:
        power = base = None
        while sign := self._accept("^", "_"):
            power, base = (self._exponent(), base) if sign == "^" else (power, self._atom())
        bare = self._next not in ("(", "{", "[")
        argument = self._factors(argument=True) if bare else self._atom()
        if power == _negative(_whole(1)):
            return ("apply", "arc" + name, base, argument)
        tree = ("apply", name, base, argument)
        return ("^", tree, power) if power else tree

    def _matrix(self) -> Tree:
        kind = self._raw()
        if not kind.endswith(("matrix", "array")):
            raise Unreadable(f"{kind} is not known")
        if kind == "array":
            self._raw()
        rows = [[self._binary()]]
        while not self._accept(r"\end"):
            if self._take("&", r"\\") == "&":
                rows[-1].append(self._binary())
            elif self._next != r"\end":
                rows.append([self._binary()])
        self._raw()
        return ("matrix", *map(tuple, rows))


# --- tokens and small trees ---


def _tokens(match: re.Match) -> list[Token]:
    """A match as tokens; the letters of a short word are factors."""
    text = match[0]
    if match["number"]:
        return [_number(match)]
    word = match["word"] or ""
    if word.lower() in _NUMBER_WORDS:
        return [_whole(_NUMBER_WORDS.index(word.lower()))]
    if word in _FUNCTIONS or (word in _GREEK and len(word) > 2):
        return ["\\" + word]
    text = _SPELLINGS.get(text, text)
    factors = len(word) <= 3 or word.isupper()
    if word and text == word and factors and word.lower() not in _SEPARATORS | _PROSE:
        return list(word)
    return [text]


def _number(match: re.Match) -> Tree:
    digits, _, places = match["number"].partition(".")
    value = Fraction(f"{digits or 0}.{places or 0}")
    step = Fraction(1, 10 ** len(places)) if places else Fraction(0)
    if match["again"]:
        if "." not in match["number"]:
            raise Unreadable("a repeating part without a decimal point")
        nines = (10 ** len(match["again"]) - 1) * 10 ** len(places)
        value, step = value + Fraction(int(match["again"]), nines), Fraction(0)
    power = int(match["power"] or 0)
    if abs(power) > _MAX_EXPONENT:
        raise Unreadable("an exponent out of range")
    by = Fraction(10) ** power
    return ("num", value * by, step * by)


def _is_word(token: Token) -> bool:
    return isinstance(token, str) and token.isalpha()


def _text(token: Token) -> str:
    return str(token[1]) if isinstance(token, tuple) else token


def _whole(value: int) -> Tree:
    return ("num", Fraction(value), Fraction(0))


def _is_whole(tree: Tree) -> bool:
    return tree[0] == "num" and not tree[2] and tree[1].denominator == 1


def _is_proper(tree: Tree) -> bool:
    whole = tree[0] == "/" and _is_whole(tree[1]) and _is_whole(tree[2])
    return whole and 0 < tree[1][1] < tree[2][1]


def _negative(tree: Tree) -> Tree:
    return ("num", -tree[1], tree[2]) if tree[0] == "num" else ("-", tree)


def _product(operator: str, left: Tree, right: Tree) -> Tree:
    """A product; a number times a power of ten is a number as it is written."""
    if (operator, left[0], right[:2]) == ("*", "num", ("^", _whole(10))) and _is_whole(right[2]):
        power = int(right[2][1])
        if abs(power) <= _MAX_EXPONENT:
            return ("num", left[1] * Fraction(10) ** power, left[2] * Fraction(10) ** power)
    return (operator, left, right)
