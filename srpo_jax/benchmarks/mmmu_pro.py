"""MMMU-Pro's rule (MMMU-Benchmark/MMMU, mmmu-pro/evaluate.py): an option letter by patterns.

Where nothing in a response names an option, the official code draws one at random without a seed.
Such a row has no answer here, counts as wrong, and is reported apart.
"""

from collections.abc import Sequence

from srpo_jax.benchmarks import common
from srpo_jax.benchmarks.judge.flows import options_first

DRAWS = "nothing names an option; the official code draws one at random, without a seed"

DOMAINS = {
    "Art and Design": ["Art", "Art_Theory", "Design", "Music"],
    "Business": ["Accounting", "Economics", "Finance", "Manage", "Marketing"],
    "Science": ["Biology", "Chemistry", "Geography", "Math", "Physics"],
    "Health and Medicine": [
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy", "Public_Health",
    ],
    "Humanities and Social Science": ["History", "Literature", "Sociology", "Psychology"],
    "Tech and Engineering": [
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics",
        "Energy_and_Power", "Materials", "Mechanical_Engineering",
    ],
}  # fmt: skip
_ORDER = [*DOMAINS, *(subject for subjects in DOMAINS.values() for subject in subjects)]
_DOMAIN_OF = {subject: domain for domain, subjects in DOMAINS.items() for subject in subjects}


def groups(row: common.Row) -> common.Groups:
    """The official tables: domains, subjects, and the settings where rows name theirs."""
    subject = subject_of(row)
    domain = _DOMAIN_OF.get(subject or "")
    groups = {"domain": domain, "subject": subject, "setting": row.get("setting")}
    return {table: [str(group)] for table, group in groups.items() if group is not None}


def order(group: str) -> tuple[int, str]:
    """Sorts domains and subjects as the official table lists them."""
    return (_ORDER.index(group) if group in _ORDER else len(_ORDER), group)


def subject_of(row: common.Row) -> str | None:
    """The row's subject, read from an id such as "test_Art_Theory_12" where no field names it."""
    if row.get("subject") is not None:
        return str(row["subject"]).replace(" ", "_")
    middle = "_".join(str(row.get("id", "")).split("_")[1:-1])
    return middle if middle in _DOMAIN_OF else None


def official(row: common.Row) -> common.Scored:
    """The official outcome: the option letter, twice, and the verdict."""
    letter = read_option(row)
    if letter is None:
        return common.Scored(None, None, False, DRAWS)
    return common.Scored(letter, letter, letter == common.gold(row))


def read_option(row: common.Row) -> str | None:
    """The option letter that the row brings or its response names, None where it names none."""
    options = common.needed_choices(row)

    def read(text: str) -> str | None:
        return after_answer(text, options) or parse_choice(text, options, spaced=False)

    return common.extraction_or(read, row)


def after_answer(text: str, options: Sequence[str]) -> str | None:
    """The only option letter that occurs after the last "Answer:", None without just one."""
    head, mark, tail = text.rpartition("Answer:")
    letters = [letter for letter in common.LETTERS[: len(options)] if letter in tail]
    return letters[0] if mark and len(letters) == 1 else None


def parse_choice(text: str, options: Sequence[str], *, spaced: bool) -> str | None:
    """The option letter that a response names, None where it names none.

    "(B)" first, then a letter beside white space, then the text of an option if the response has
    more than five words; of several the last in the text. ``spaced`` says how MMMU reads a letter,
    " B "; MMMU-Pro reads "B " and then "B.".
    """
    for char in ",.!?;:'":
        text = text.strip(char)
    text = f" {text} "
    letters = common.LETTERS[: len(options)]
    shapes = ("({})", " {} ") if spaced else ("({})", "{} ", "{}.")
    for shape in shapes:
        found = [letter for letter in letters if shape.format(letter) in text]
        if found:
            # The official code looks for " B " again, whatever it found: one it does not find
            # stands at -1, so that the first letter wins where all are like that.
            place = "({})" if shape == "({})" else " {} "
            return max(found, key=lambda letter: text.rfind(place.format(letter)))
    if len(text.split()) <= 5:
        return None
    lowered = text.lower()
    places = {
        letter: lowered.rfind(option.lower())
        for letter, option in zip(letters, options, strict=False)
    }
    named = [letter for letter, place in places.items() if place >= 0]
    return max(named, key=places.__getitem__) if named else None


BENCHMARK = common.Benchmark(
    name="mmmu_pro",
    counts={1730: "one setting"},
    form=common.Form(
        "id options answer subject",
        images=("image",),
        numbered=True,
        default_question="Answer the multiple-choice question that the image shows.",
    ),
    places={
        "standard_10": common.Place("MMMU/MMMU_Pro", "test", ("standard (10 options)",)),
        "standard_4": common.Place("MMMU/MMMU_Pro", "test", ("standard (4 options)",)),
        "vision": common.Place("MMMU/MMMU_Pro", "test", ("vision",)),
    },
    groups=groups,
    official=common.by_row(official),
    draws=DRAWS,
    order=order,
    judge=options_first(read_option),
    check=common.needed_choices,
    shows_question=lambda row: False,  # vision rows have it in their image
)
