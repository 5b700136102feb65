r"""The tree of a LaTeX answer: numbers, names, sums, products, powers, functions and relations.

Like the parser it stands for (see ``tokens``), this one reads as much of the text as makes a
whole expression and ignores what follows: "4.Therefore" is 4. Factors side by side bind closer than
``*`` and ``/`` ("1/2\pi" is 1/(2 pi)), powers bind to the left (2^3^2 is 64), and ``\frac`` and
``\sqrt`` need their braces.

A tree is a tuple: ("number", Fraction), ("name",), ("pi",), or an operation's name and its
operands: "add", "sub", "mul", "div", "mod", "neg", "pow", "factorial", "abs", "floor", "ceil",
"binom", a function's name, or a relation ("<", "=", ...). Names have no value, so that it does not
matter which one it is, and subscripts are passed over.
"""

from fractions import Fraction
from itertools import islice

from srpo_jax.benchmarks.latex.tokens import END, LatexError, Token, prepare, tokens

Tree = tuple

_MAX_DIGITS = 4000  # of one number
_MAX_TOKENS = 5000  # of one expression; the parser it stands for gives up at a thousand factors
_RELATIONS = {"=", "<", "<=", ">", ">="}
_CLOSERS = {
    "(": ")", "[": "]", "{": "}", r"\{": r"\}", r"\lgroup": r"\rgroup", r"\lbrace": r"\rbrace",
    r"\lbrack": r"\rbrack", "|": "|", r"\lvert": r"\rvert", r"\vert": r"\vert",
    r"\lfloor": r"\rfloor", r"\llcorner": r"\lrcorner", r"\lceil": r"\rceil",
    r"\ulcorner": r"\urcorner",
}  # fmt: skip
_AROUND = {
    "|": "abs", r"\lvert": "abs", r"\vert": "abs", r"\lfloor": "floor", r"\llcorner": "floor",
    r"\lceil": "ceil", r"\ulcorner": "ceil",
}  # fmt: skip
_ATOMS = {"number", "percent", "pi", "name", "accent"}
_SIMPLE = _ATOMS | {"frac", "binom", "valueless", r"\left", r"\mleft"} | set(_CLOSERS)
_FUNCTIONS = {"func", "sqrt", "e"}


def parse(text: str) -> Tree:
    """The tree of the longest leading expression or relation.

    Raises LatexError where no expression starts the text, where one breaks off inside, and for
    what is never a number (lists, matrices, integrals, limits, sums).
    """
    try:
        parser = _Parser(prepare(text))
        tree = parser.relation()
        if parser.kind in (",", ";"):
            raise LatexError("a list")
    except RecursionError:
        raise LatexError("too deeply nested") from None
    return tree


class _Parser:
    """Recursive descent with one token of look-ahead."""

    def __init__(self, text: str):
        self._tokens = tokens(text)
        self._next: list[Token] = []
        self._left = _MAX_TOKENS
        self._open = [""]  # the brackets around what is read; a bar inside bars closes them

    @property
    def kind(self) -> str:
        return self._peek(0).kind

    def _peek(self, offset: int) -> Token:
        while len(self._next) <= offset:
            self._next += islice(self._tokens, 1)
            self._left -= 1
            if self._left < 0:
                raise LatexError("too long")
        return self._next[offset]

    def _take(self, *kinds: str) -> Token:
        token = self._peek(0)
        if kinds and token.kind not in kinds:
            raise LatexError(f"expected {' or '.join(kinds)}, found {token.text or END!r}")
        return self._next.pop(0)

    def _takes(self, *kinds: str) -> bool:
        """Whether one of these kinds was next, and has been taken."""
        return self.kind in kinds and bool(self._take())

    # ------------------------------------------------------------------------------ operators

    def relation(self) -> Tree:
        tree = self.expression()
        while self.kind in _RELATIONS:
            operator = self._take().kind
            tree = (operator, tree, self.expression())
        return tree

    def expression(self) -> Tree:
        tree = self._product()
        while self.kind in ("+", "-"):
            name = "add" if self._take().kind == "+" else "sub"
            tree = (name, tree, self._product())
        return tree

    def _product(self, functions: bool = True) -> Tree:
        tree = self._signed(functions)
        while self.kind in ("*", "/", ":", "mod"):
            name = {"*": "mul", "mod": "mod"}.get(self._take().kind, "div")
            tree = (name, tree, self._signed(functions))
        return tree

    def _signed(self, functions: bool) -> Tree:
        if self._takes("+"):
            return self._signed(functions)
        if self._takes("-"):
            return ("neg", self._signed(functions))
        tree = self._postfix()
        # An argument without parentheses ends where another function begins.
        while self._starts_factor(functions):
            tree = ("mul", tree, self._postfix())
        return tree

    def _starts_factor(self, functions: bool) -> bool:
        kind = self.kind
        if kind in ("|", r"\vert") and kind == self._open[-1]:
            return False
        return kind in _SIMPLE or (functions and kind in _FUNCTIONS)

    def _postfix(self) -> Tree:
        tree = self._power()
        while self.kind in ("!", "transpose"):
            if self._take().kind == "!":
                tree = ("factorial", tree)
        return tree

    def _power(self) -> Tree:
        tree = self._primary()
        while self._takes("^"):
            tree = ("pow", tree, self._argument())
            self._subscript()
        return tree

    def _argument(self) -> Tree:
        """What ``^`` and ``_`` take: a braced expression or one atom."""
        return self._braced() if self.kind == "{" else self._atom()

    def _subscript(self) -> None:
        """Passes over ``_`` and what belongs to it, where it is next."""
        if not self._takes("_"):
            return
        if not self._takes("{"):
            self._atom()
            return
        self.expression()
        while self._takes(","):
            self.expression()
        self._take("}")

    # ------------------------------------------------------------------------------- operands

    def _primary(self) -> Tree:
        if self._takes(r"\left", r"\mleft"):
            return self._group()
        if self.kind in _CLOSERS:
            return self._group(bare=True)
        if self._takes("frac"):
            return ("div", self._braced(), self._braced())
        if self._takes("binom"):
            return ("binom", self._braced(), self._braced())
        return self._function() if self.kind in _FUNCTIONS else self._atom()

    def _braced(self) -> Tree:
        self._take("{")
        tree = self.expression()
        self._take("}")
        return tree

    def _group(self, *, bare: bool = False) -> Tree:
        r"""A bracketed expression; after ``\left`` the right bracket has its ``\right``."""
        opening = self._take(*_CLOSERS).kind
        self._open.append(opening)
        tree = self.expression()
        if bare and opening == "{" and self._takes("choose"):
            tree = ("binom", tree, self.expression())
        self._open.pop()
        if not bare:
            self._take(r"\right", r"\mright")
        self._take(_CLOSERS[opening])
        return (_AROUND[opening], tree) if opening in _AROUND else tree

    def _atom(self) -> Tree:
        token = self._take(*_ATOMS)
        if token.kind in ("number", "percent"):
            return _number(token.text)
        if token.kind == "pi":
            return ("pi",)
        if token.kind == "accent":
            self._braced()
        self._subscript()
        return ("name",)

    def _function(self) -> Tree:
        token = self._take()
        if token.kind == "e":
            power = self._argument() if self._takes("^") else ("number", Fraction(1))
            return ("exp", power)
        if token.kind == "sqrt":
            root = ("number", Fraction(2))
            if self._takes("["):
                root = self.expression()
                self._take("]")
            return ("root", self._braced(), root)
        name = token.text[1:]
        base = power = None
        while self.kind in ("_", "^"):
            if self._take().kind == "_":
                base = self._argument()
            else:
                power = self._argument()
        tree = (name, self._function_argument())
        if name in ("log", "ln") and base is not None:
            tree = ("log", tree[1], base)
        if power == ("neg", ("number", Fraction(1))) and name in _INVERTED:
            return (f"arc{name}", tree[1])
        return tree if power is None else ("pow", tree, power)

    def _function_argument(self) -> Tree:
        left = self.kind in (r"\left", r"\mleft") and self._peek(1).kind == "("
        if not left and self.kind != "(":
            return self._product(functions=False)
        if left:
            self._take()
        self._take("(")
        tree = self.expression()
        self._takes(r"\right", r"\mright")
        self._take(")")
        return tree


_INVERTED = set("sin cos tan csc sec cot sinh cosh tanh".split())


def _number(text: str) -> Tree:
    digits = text.replace(",", "").removesuffix(r"\%")
    if len(digits) > _MAX_DIGITS:
        raise LatexError(f"a number of {len(digits)} digits")
    value = Fraction("0" + digits)
    return ("number", value / 100 if text.endswith("%") else value)
