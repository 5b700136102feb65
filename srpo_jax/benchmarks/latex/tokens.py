r"""Tokens of LaTeX answers, as the parser latex2sympy2 reads them.

MathVision and EMMA compare expressions by what latex2sympy2 1.9 makes of them. That package is not
maintained and needs an older antlr than sympy's parser, so its language is read here by our own
code (after its published grammar): tokens in this module, trees in ``tree``, values in ``value``.
Two properties decide verdicts and are kept: the longest token wins, so that words such as
"triangles" start with the keyword "tr"; and tokens are read only as far as the parser looks, so
that an impossible character behind a complete expression does no harm.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

END = "end"


class Token(NamedTuple):
    """One token: its kind (what the parser asks for) and its text."""

    kind: str
    text: str


class LatexError(ValueError):
    """Text that the parser does not accept."""


def _commands(text: str) -> list[str]:
    return ["\\" + name for name in text.split()]


# Kind -> the literal texts of that kind.
_LITERALS = {
    "/": ["/", r"\over"],
    "*": ["*", r"\times", r"\cdot"],
    ":": [":", r"\div"],
    "mod": [r"\mod"],
    "<=": _commands("leq le leqslant"),
    ">=": _commands("geq ge geqslant"),
    "transpose": ["^T", "^{T}", r"^{\top}", "'"],
    "func": _commands(
        "log ln exp sin cos tan csc sec cot arcsin arccos arctan arccsc arcsec arccot sinh cosh "
        "tanh arsinh arcosh artanh arcsinh arccosh arctanh floor ceil det"
    ),
    "sqrt": [r"\sqrt"],
    "frac": [r"\frac"],
    "binom": _commands("binom tbinom dbinom"),
    "choose": [r"\choose"],
    "pi": [r"\pi"],
    "e": ["e", r"\exponentialE"],
    "name": _commands(
        "alpha beta Gamma gamma Delta delta epsilon varepsilon zeta eta Theta theta vartheta iota "
        "kappa Lambda lambda mu nu Xi xi omicron Pi varpi rho varrho Sigma sigma varsigma tau "
        "Upsilon upsilon Phi phi varphi chi Psi psi Omega omega Bbbk wp nabla bigstar angle "
        "nexists diagdown measuredangle eth emptyset diagup sphericalangle clubsuit varnothing "
        "Diamond complement diamondsuit imath Finv triangledown heartsuit jmath Game triangle "
        "spadesuit ell hbar vartriangle hslash blacklozenge lozenge blacksquare mho blacktriangle "
        "sharp prime Im flat square backprime Re natural surd circledS"
    ),
    "accent": _commands(
        "acute bar overline breve check widecheck dot ddot grave hat tilde widetilde vec "
        "overrightarrow bm boldsymbol text textit mathbb mathbin mathbf mathcal mathclap mathclose "
        "mathellipsis mathfrak mathinner mathit mathnormal mathop mathopen mathord mathpunct "
        "mathrel mathring mathrlap mathrm mathscr mathsf mathsterling mathtt"
    ),
    # What has no value, whatever it stands for: an expression that goes on with it has none either.
    "valueless": ["==", "!=", "!=="]
    + _commands(
        r"equiv ne neq not\equiv in infty partial gcd lcm max min lim int sum prod operatorname |"
    )
    + [rf"\begin{{{kind}}}" for kind in ("matrix", "pmatrix", "bmatrix", "vmatrix")],
    # Tokens that no expression can go on with: one behind an expression ends it.
    "stop": _commands(
        "to rightarrow Rightarrow longrightarrow Longrightarrow xrightarrow xRightarrow "
        "leftrightarrow Leftrightarrow"
    )
    + ["<->", "<=>", r"\\", "E"]
    + [rf"\end{{{kind}}}" for kind in ("matrix", "pmatrix", "bmatrix", "vmatrix")]
    + (
        "arsinh arcsinh arcosh arccosh artanh arctanh gcd lcm floor ceil eye zeros ones cols rows "
        "diag norm rank trace tr rref hstack vstack orth ortho orthogonal orthogonalize nullspace "
        "eig eigen diagonalize eigenvals eigenvalues eigenvects eigenvectors svd SVD matrix "
        "pmatrix bmatrix vmatrix"
    ).split(),
}
_OWN_KIND = [*"+-()[]{}|_^=!,;.&<>"] + _commands(
    "lgroup rgroup { } lbrace rbrace lbrack rbrack lvert rvert vert lfloor rfloor llcorner "
    "lrcorner lceil rceil ulcorner urcorner left right mleft mright"
)
_KINDS = {text: kind for kind, texts in _LITERALS.items() for text in texts}
_KINDS |= {text: text for text in _OWN_KIND}
_LITERAL = re.compile("|".join(re.escape(text) for text in sorted(_KINDS, key=len, reverse=True)))
_SKIPPED = re.compile(r"(?:[ \t\r\n]+|\\\$)+")
_PATTERNS = {
    "literal": _LITERAL,
    "valueless": re.compile(r"d[ \t\r\n]*(?:[a-zA-Z]|\\[a-zA-Z]+)"),  # a differential
    "name": re.compile(r"[a-df-zA-DF-Z]"),
    "number": re.compile(r"\d*(?:,\d{3})*\.\d+|\d+(?:,\d{3})*", re.ASCII),
}

_FALLING = re.compile(r"\(([a-zA-Z0-9+\-*/\\ ]+?)\)_{([a-zA-Z0-9+\-*/\\ ]+?)}")
_REPLACED = (
    (r"\dfrac", r"\frac"), (r"\tfrac", r"\frac"), (r"\mathrm{T}", "T"), (r"\mathrm{d}", "d"),
    (r"{\rm d}", "d"), (r"\left[\begin{matrix}", r"\begin{bmatrix}"),
    (r"\end{matrix}\right]", r"\end{bmatrix}"),
)  # fmt: skip
_BLANKED = (r"\displaystyle", r"\quad", r"\qquad", "~", r"\,", "$")


def prepare(text: str) -> str:
    """The text with the rewritings that latex2sympy2 does before it reads tokens."""
    for old, new in _REPLACED:
        text = text.replace(old, new)
    text = _FALLING.sub(r"\\frac{(\1)!}{((\1)-(\2))!}", text)
    for old in _BLANKED:
        text = text.replace(old, " ")
    return text


def tokens(text: str) -> Iterator[Token]:
    """The tokens of prepared text one by one, then END for ever.

    Raises LatexError when it comes to a character that begins no token.
    """
    position = 0
    while True:
        if skipped := _SKIPPED.match(text, position):
            position = skipped.end()
        if position >= len(text):
            yield Token(END, "")
            continue
        token = _longest(text, position)
        position += len(token.text)
        yield token


def _longest(text: str, position: int) -> Token:
    """The longest token at a position; of equal ones that which the grammar names first."""
    matches = {kind: pattern.match(text, position) for kind, pattern in _PATTERNS.items()}
    found = [Token(kind, match[0]) for kind, match in matches.items() if match]
    if not found:
        raise LatexError(f"no token starts with {text[position]!r}")
    kind, best = max(found, key=lambda token: len(token.text))
    if kind == "number" and text.startswith(r"\%", position + len(best)):
        return Token("percent", best + r"\%")
    return Token(_KINDS[best] if kind == "literal" else kind, best)
