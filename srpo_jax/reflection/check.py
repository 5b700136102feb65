"""What a reflection must not do: give away that the answer was known, or change the language.

``leaks`` finds three things. Speaking of a key (also where the first attempt was right); stating
the gold as the answer instead of saying what went wrong; and hardly being more than the gold. A
gold that only occurs in a computation, and the model's own right answer repeated, are no leaks.
Every pattern here is tried at few places and looks at a bounded stretch of text: time is linear.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from srpo_jax.rewards.answers import choice_indices, extract_answer, plain_text
from srpo_jax.rewards.braces import braced_spans
from srpo_jax.rewards.quantities import parse_quantity, same_quantity

MIN_OTHER_WORDS = 6  # a reflection that holds the gold must have so many words besides it
MIN_LETTERS = 12  # less text than this has no language; an ideograph counts as _IDEOGRAPH letters
_IDEOGRAPH = 3
_WINDOW = 200  # characters after "the answer is" that are read

# ---------------------------------------------------------------------------- (a) of a given key

_NOUN = r"(?:answer|solution|result|label|response|option|choice)"
_KEY = re.compile(
    r"\bground[ -]?truth\b|\b(?:answer|solution) keys?\b|\bmarking scheme\b"
    r"|\bgold(?:en)?(?:[ -]standard)? (?:final |correct )?" + _NOUN + r"\b"
    r"|\b(?:reference|official|annotated|labell?ed) (?:final |correct )?"
    r"(?:answers?|solutions?|response|label)\b"
    r"|\bexpected (?:final |correct )?answer\b(?! (?:format|form|type|unit|choice|option)"
    r"| should be "
    r"(?:an?|in|given|written)\b| is an? )"
    r"|\b(?:correct|right|true|actual) " + _NOUN + r" (?:is|was|has been|which was|as) "
    r"(?:already )?(?:given|provided|supplied|known|stated|listed|specified)\b"
    r"|\b(?:given|provided|supplied|known) (?:correct|right|true) " + _NOUN + r"\b"
    r"|\b(?:given that|knowing(?: that)?|we (?:now |already )?know(?: that)?|i (?:was|am"
    r"|have been) "
    r"(?:told|given)(?: that)?|as we know,?) the (?:correct |right |true |actual |final )?answer\b"
    r"|\b(?:match(?:es|ed|ing)?|agree(?:s|d|ing)? with|consistent with|align(?:s|ed|ing)? with|"
    r"compar(?:e|es|ed|ing) (?:it |this )?(?:to|with|against)|according to|contradict(?:s|ed|ing)?|"
    r"conflict(?:s|ed|ing)? with|checked against) the (?:correct|right|true|actual) "
    r"(?:final )?(?:answer|solution|option|choice|label)\b(?! (?:choice|option))"
    r"|标准答案|参考答案|参考解答|参考解析|官方答案|真实答案|已知答案|答案给出|正确答案(?:已知|已给|给出|提供)"
    r"|(?:与|和|跟|根据|按照|对照)正确答案|標準答案|參考答案|模範解答|正解データ|모범 ?답안|정답지"
    r"|\bмодельный ответ|\bэталонн\w{1,4} ответ|\bmusterlösung\b|\brespuesta de referencia\b"
    r"|\bréponse de référence\b"
)
# "The given answer" may be the attempt's own: what stands around it decides.
_SHOWN = re.compile(
    r"\b(?:given|provided|supplied|stated) (?:final )?answer\b(?! (?:choice|option|list|format))"
    r"|(?:给定的?|所给的?|提供的)答案"
)
_COMPARED = re.compile(
    r"(?:match(?:es|ed|ing)?|agrees? with|consistent with|align(?:s|ed)? with|differs? from|"
    r"compar(?:ed|ing|e) (?:to|with|against)|according to|based on|contradicts?|from|versus|vs\.?|"
    r"equal to|as per|与|和|跟|根据) ?(?:the )?$"
)
_OWN = re.compile(
    r"wrong|incorrect|mistaken|not (?:right|correct|supported)"
    r"|invalid|flawed|unsupported|错|不对|不正确"
    r"|\b(?:too|off by|must be revised|should (?:be|have been))\b"
)


def _speaks_of_a_key(text: str, first_answer: str, first_correct: bool) -> bool:
    """Whether a known answer is spoken of; ``text`` in lower case on one line."""
    if _KEY.search(text):
        return True
    own = " ".join(plain_text(extract_answer(first_answer)).casefold().split())[:80]
    for found in _SHOWN.finditer(text):
        after = re.split(r"[.。;；!?](?!\d)", text[found.end() : found.end() + 80], maxsplit=1)[0]
        if own and re.search(r"(?<![\w.])" + re.escape(own) + r"(?![\w])", after):
            continue
        compared = _COMPARED.search(text[max(0, found.start() - 30) : found.start()])
        if compared or not (first_correct or _OWN.search(after)):
            return True
    return False


# --------------------------------------------------------------------- (b) the gold as the answer

_ADJECTIVE = (
    r"(?:correct|right|true|actual|final|proper|real|accurate|exact|intended|best|valid|only)"
)
_SUBJECT = (
    r"(?:\b"
    + _ADJECTIVE
    + r"(?: final)? (?:\w+ ){0,2}?(?:answer|result|value|option|choice|solution|"
    r"number|count|total|letter|conclusion|measure|length|area|angle|colou?r|shape|size|reading"
    r"|one)\b"
    r"|\b(?:the|final|my|its?|missing) (?:answer|result|option|choice|solution)\b|\banswer\b"
    r"|\bmissing (?:\w+ ){0,2}?\w+\b)"
)
# Between "the answer" and its verb: "to the question", "for part x".
_PHRASE = r"(?: (?:to|for|of|in|here|among|from|therefore|then)\b[^.;:=\n]{0,50}?)?"
_VERB = (
    r"(?: (?:is|was|be|equals|becomes|(?:should|must|would|has to|had to|ought to|needs to|can only"
    r"|will) (?:be|have been|read|equal)|turns out to be|comes out (?:as|to(?: be)?))\b| ?[:=→]"
    r"| ?,)"
)
_STATED = re.compile(_SUBJECT + _PHRASE + _VERB)
_ATTACHED = re.compile(  # "the correct answer 12", "the correct answer of 12", "(12)"
    r"\b(?:correct|right|true|actual|final) (?:answer|result|value|option|choice|solution)"
    r"(?: of\b| as\b| namely\b| \(| —| -)?"
)
_SHOULD = re.compile(
    r"\b(?:it|this|that|these|which|and|but|i|we|model|attempt|one|have) (?:should|must|ought to"
    r"|has to|"
    r"needs to|needed to|had to) (?:have )?(?:be|been|choose|chosen|select|selected|pick|picked"
    r"|answer|"
    r"answered|mark|marked|report|reported|conclude|concluded|say|said)\b"
    r"|\b(?:should|must|ought to) have (?:been|chosen|selected|picked|answered|marked|reported|"
    r"concluded|said)\b"
)
_CHOSEN = re.compile(
    r"\b(?:so|hence|thus|therefore|which is|i\.e\.|namely|leads? to|leading to|points? to"
    r"|pointing to|"
    r"corresponds? to|corresponding to|match(?:es|ing)?|giving|choose|choosing|select|selecting"
    r"|pick|"
    r"picking)[ ,:]*(?:the )?(?:(?:correct|right|final) )?(?:answer|option|choice)\b"
)
_OPENED = re.compile(r"(\A\{)|[{}]")
# "so option B was never tested" names an option without giving it as the answer.
_JUDGED = re.compile(
    r"[\W_]*\w+\W{0,3} (?:was|is|were|cannot|can|could|should|would|may|might|has|had|does"
    r"|did|seems|must"
    r"|fails|needs)\b"
)
_CHINESE = re.compile(
    r"(?:正确(?:的)?(?:答案|结果|选项|值)|答案|結果|正解|正しい答え|정답)(?:应该|應該|应当|应|應|就|本)?"
    r"(?:是|为|為|该是|は|은|는|:|：|=)+"
    r"|(?:应该|應該|应当)(?:是|为|為|选择?|選擇?)|应(?:为|选)|而是|故选|所以选|因此选"
)
_OTHER_LANGUAGES = re.compile(
    r"\b(?:la (?:respuesta|réponse|resposta|risposta)(?: (?:correcta|final|correcte|finale|correta|"
    r"corretta))?|la (?:bonne|juste) réponse|a resposta(?: correta| final)?|die (?:richtige "
    r"|korrekte )?"
    r"(?:antwort|lösung)|правильный ответ|ответ) ?(?:es|est|é|è|ist|lautet|debe ser|sollte|[:=—-])"
)
_BOXED = re.compile(r"\\(?:boxed|fbox) ?\{")
_LEADS = (_STATED, _ATTACHED, _SHOULD, _CHOSEN, _CHINESE, _OTHER_LANGUAGES, _BOXED)
# Before one of these stands what is called right: "12 is the correct answer".
_CALLED = re.compile(
    r" ?,? (?:is|was|are|being|as|would be|must be|should be)(?: indeed| therefore"
    r"| then)? (?:the |our )?"
    r"(?:only )?(?:(?:correct|right|true|actual|final|proper) (?:answer|result|value|option|choice|"
    r"solution|one|count|total|number)\b|answer\b|(?P<bare>correct|right)\b(?! (?:of|angle|side"
    r"|to)\b))"
    r"|才是正确|是正确(?:的|答案|选项)|が正解|が正しい"
)
_FILLER = re.compile(  # what only wraps or introduces a value: "indeed", "option (", "$"
    r"(?:[\s\"'“”‘’*_`$(\[{:,=→—-]|\\[(\[ ,!]|\\(?:boxed|fbox|text|textbf|mathrm|mathbf) ?\{"
    r"|(?:(?i:indeed|actually|therefore|simply|exactly|just|clearly|instead|rather|thus|then|the"
    r"|equal to|option|choice|answer|number|value|letter|be|in fact|only|choose)|an?(?= ))(?![a-z])"
    r"|选项?|择|就?是|为)+"
)
_NUMBER = re.compile(
    r"(?:[+\-−]?\s?[$€£¥]?\s?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?: ?/ ?\d+)?"
    r"|[+\-−]?\\[dt]?frac ?\{[^{}]{1,20}\} ?\{[^{}]{1,20}\})(?:\\?[%°]|\^\{?\\circ\}?)?"
)
# What makes a number the beginning of a computation or of another number.
_GOES_ON = re.compile(
    r"\s*(?:[+*/×÷·^=<>≤≥]|[-−–]\s?[\d(]|\\(?:times|cdot|div|frac|sqrt|pi|le|ge|pm)"
    r"|(?:times|plus|minus|divided|multiplied|more than|less than|out of)\b|or \d)"
    r"|[.,:]?\d|(?:st|nd|rd|th)\b|[-–]\w|√|π"
)
_WORD_END = re.compile(
    r"[\s\"'”’*_`$)\]}]*(?:$|[.,;:!?。，；！？、(\-—–\n\\]|而|不|(?:because|since|as|and|but|not|rather"
    r"|instead|which|so|for|by|when|if|given|here|while|in|that|to|then|is|was|who|where|after"
    r"|at|on"
    r"|with)\b)"
)
_LETTER = re.compile(r"\(?[A-Z]\)?[.:]?")


class _GoldForms:
    """The shapes in which one gold may stand in a text."""

    def __init__(self, gold: str, choices: tuple[str, ...]):
        text = extract_answer(gold)
        # Without choices a letter names none of them.
        chosen = sorted(choice_indices(text, choices) or ()) if choices else []
        texts = [plain_text(choices[i]) for i in chosen] or [plain_text(text)]
        names = {chr(ord("A") + i) for i in chosen if i < 26}
        if all(_LETTER.fullmatch(t) for t in texts):  # pictures called A to E: a letter is a label
            names = names or {t.strip("().:") for t in texts}
            texts = []
        self.letters = "".join(sorted(names))
        self.numbers = [q for q in map(parse_quantity, texts) if q is not None]
        self.words = [] if self.numbers else [word for t in texts if (word := _fold(t))]
        self.compact = [packed for t in texts if (packed := _compact(t).lstrip("(["))]

    def starts(self, text: str) -> bool:
        """Whether the text begins with the gold, and not with something longer."""
        text = text[_skip(text) :]
        if self.letters and re.match(rf"[{self.letters}](?![\w'’+*/=-]|\s(?:or|nor)\b)", text):
            return True
        number = _NUMBER.match(text)
        if number and self.numbers and not _GOES_ON.match(text, number.end()):
            return self._is_number(number[0])
        folded = _fold(text)
        if any(folded.startswith(w) and _WORD_END.match(folded, len(w)) for w in self.words):
            return True
        if number and self.numbers:
            return False
        packed = _compact(text)
        return any(
            packed.startswith(c) and not re.match(r"[\w^+*/=]|[.]\d", packed[len(c) :])
            for c in self.compact
            if not c.isalpha()
        )

    def ends(self, text: str) -> bool:
        """Whether the last word or number of the text is the gold (a unit may follow a number)."""
        text = re.sub(r"[\s\"'”’*_`$)\]}.:]+$", "", text)
        if self.letters and re.search(rf"(?<![\w'’])[{self.letters}]$", text):
            return True
        folded = _fold(text)
        if any(re.search(r"(?<!\w)" + re.escape(w) + r"$", folded) for w in self.words):
            return True
        text = text[-60:]
        numbers = list(_NUMBER.finditer(text))
        if not numbers or not self.numbers:
            return False
        last = numbers[-1]
        alone = not re.search(r"[+*/×÷=^]\s*$", text[: last.start()])
        unit = re.fullmatch(r"\s?[^\W\d]{0,12}", text[last.end() :])
        return alone and bool(unit) and self._is_number(last[0])

    def _is_number(self, text: str) -> bool:
        found = parse_quantity(plain_text(text.replace("−", "-").rstrip(",")))
        return found is not None and any(same_quantity(gold, found) for gold in self.numbers)

    def without(self, text: str) -> str | None:
        """The text without the gold, None where the gold does not stand in it."""
        out, count = text, 0
        if self.letters:
            letter = (
                rf"(?:\b(?i:option|answer|choice)\s+)?(?:\([{self.letters}]\)|\b[{self.letters}]\b)"
            )
            out, count = re.subn(letter, " ", out)
            if self.letters == "A" and not re.search(
                r"\(A\)|\bA[.)\s]*$|(?i:option|answer) A\b", text
            ):
                count = 0  # the article
        for words in self.words:
            parts = r"\s+".join(map(re.escape, words.split()))
            out, more = re.subn(rf"(?<!\w)(?i:{parts})(?!\w)", " ", out)
            count += more
        if self.numbers:
            before, out = out, _NUMBER.sub(lambda m: " " if self._is_number(m[0]) else m[0], out)
            count += before != out
        return out if count else None


_forms = lru_cache(maxsize=1024)(_GoldForms)


def _skip(text: str) -> int:
    """How much of the beginning only wraps or introduces a value: "indeed", "$", "option (".

    A minus sign and a currency sign belong to the value.
    """
    filler = _FILLER.match(text)
    end = filler.end() if filler else 0
    sign = re.search(r"[-−]$", text[:end])
    return end - 1 if sign and re.match(r"[\d.\\]", text[end:]) else end


def _fold(text: str) -> str:
    return re.sub(r"^(?:an?|the) ", "", " ".join(text.replace("_", " ").casefold().split()))


def _compact(text: str) -> str:
    text = text.replace(r"\dfrac", r"\frac")
    return re.sub(r"\\(?:left|right|,|;|!|quad|text|mathrm)|[\s${}]", "", text)


def _states_gold(text: str, forms: _GoldForms) -> bool:
    """Whether the gold is given as the answer; ``text`` on one line."""
    lower = text.lower()  # of the same length, so that places agree
    if len(lower) != len(text):
        lower = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    for lead in _LEADS:
        for found in lead.finditer(lower):
            window = text[found.end() : found.end() + _WINDOW]
            if lead is _BOXED:
                window = _braced(window)
            if lead is _STATED and _last_side_is_gold(window, forms):
                return True
            computed = lead is _SHOULD and _computed(lower, found.start())
            if computed or (lead is _CHOSEN and _JUDGED.match(window)):
                continue
            if forms.starts(window):
                return True
    for found in _CALLED.finditer(lower):
        before = text[max(0, found.start() - _WINDOW) : found.start()]
        if found["bare"] and re.search(r"\d\s*\w*$", before):
            continue  # "reading 12 is correct" judges a step
        if forms.ends(before):
            return True
    return False


def _braced(text: str) -> str:
    """The text up to the brace that closes one opened before it."""
    _, _, end = braced_spans("{" + text, _OPENED)[0]
    return text if end is None else text[: end - 1]


def _computed(text: str, place: int) -> bool:
    """Whether "should have been 12" speaks of an expression: "3 x 4 should have been 12"."""
    before = text[max(0, place - 25) : place].rstrip()
    return bool(
        re.search(r"[\d)a-z]\s?(?:[+*/×÷·-]|x|times|plus|minus)\s?[\d(a-z]+\)?\$?$", before)
    )


def _last_side_is_gold(window: str, forms: _GoldForms) -> bool:
    """Whether an equation is given as the answer: "the answer is 3 x 4 = 12"."""
    clause = re.split(r"[.;!?。；](?!\d)|,\s|\bnot\b|\bbut\b|\band\b", window, maxsplit=1)[0]
    left, equals, right = clause.rpartition("=")
    return bool(equals) and bool(re.search(r"\d", left)) and forms.starts(right)


# ------------------------------------------------------------------------------------- the check


def leaks(
    reflection: str,
    gold: str,
    choices: Sequence[str],
    first_answer: str,
    first_correct: bool,
) -> bool:
    """Whether a reflection gives away that the gold was known.

    ``choices`` are empty for an open question; ``first_answer`` is the attempt's answer block.
    """
    text = " ".join(unicodedata.normalize("NFKC", reflection).replace("**", "").split())
    if _speaks_of_a_key(text.casefold(), first_answer, first_correct):
        return True
    if first_correct:
        return False
    forms = _forms(gold, tuple(choices))
    if _states_gold(text, forms):
        return True
    rest = forms.without(text) if len(text) < 2000 else None
    return rest is not None and _count_words(rest) < MIN_OTHER_WORDS


def _count_words(text: str) -> int:
    """Words of letters; two ideographs count as one word. Formulas and commands do not count."""
    ideographs = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    text = re.sub(r"\\[a-zA-Z]+", " ", text)
    dense = len(re.findall(rf"[{ideographs}]", text))
    return len(re.findall(rf"[^\W\d_{ideographs}]{{2,}}", text)) + dense // 2


# ------------------------------------------------------------------------------------- language

_NO_PROSE = re.compile(
    r"\$\$[^$]*\$\$|\$[^$\n]*\$|\\\((?:[^\\]|\\(?![()]))*\\\)|\\\[(?:[^\\]|\\(?![\[\]]))*\\\]"
    r"|\\[a-zA-Z]+|<[^<>\n]{1,60}>|\b[^\W\d_]{0,20}\d\w*"
)
# Runs of Latin letters that are names of points or units rather than words: ABC, x, cm.
_SYMBOL = re.compile(r"\b(?:[A-Z]{1,6}|[a-zA-Zα-ωΑ-Ω]{1,2})\b", re.ASCII)
_SYSTEMS = {"CJK": "han", "HIRAGANA": "kana", "KATAKANA": "kana", "HANGUL": "hangul"}
_SHARE = 0.3  # of a question's letters that makes a writing system one of its own
_KANA_SHARE = 0.1  # of kana among ideographs and kana that makes a text Japanese


@lru_cache(maxsize=65536)
def _system(char: str) -> str:
    """The writing system of a letter, "" for what is no letter."""
    if not unicodedata.category(char).startswith("L"):
        return ""
    name = unicodedata.name(char, "").split(" ")[0].split("-")[0]
    return _SYSTEMS.get(name, name.lower())


def _systems(text: str) -> Counter:
    """Letters of prose by writing system: Japanese and Chinese apart, ideographs weighted."""
    prose = _SYMBOL.sub(" ", _NO_PROSE.sub(" ", unicodedata.normalize("NFKC", text)))
    counts: Counter = Counter()
    for char, number in Counter(prose).items():
        counts[_system(char)] += number
    counts.pop("", None)
    counts.pop("modifier", None)
    han, kana = counts.pop("han", 0), counts.pop("kana", 0)
    if han or kana:
        counts["japanese" if kana > _KANA_SHARE * (han + kana) else "chinese"] = (
            _IDEOGRAPH * han + 2 * kana
        )
    return counts


def same_language(question: str, text: str) -> bool:
    """Whether ``text`` is mainly in a writing system of the question.

    Formulas, tags, numbers, units and names of points do not count. A text too short to tell
    (MIN_LETTERS) passes. Languages that share a script are not told apart.
    """
    asked, written = _systems(question), _systems(text)
    if sum(asked.values()) < MIN_LETTERS or sum(written.values()) < MIN_LETTERS:
        return True
    allowed = {name for name, n in asked.items() if n >= _SHARE * sum(asked.values())}
    return not allowed or written.most_common(1)[0][0] in allowed
