"""Leaks of the gold are found in many wordings, diagnoses pass; the language must stay."""

import time

import pytest

from srpo_jax.reflection.check import leaks, same_language

COLOURS = ("red", "blue", "light green", "yellow")
NUMBERS = ("6", "12", "7", "2")
LETTERS = ("A", "B", "C", "D", "E")

# (reflection, gold, choices, first answer, first answer right)
OPEN = ("12", (), r"$\boxed{7}$", False)
OPTION = ("B", NUMBERS, r"$\boxed{C}$", False)
COLOUR = ("light green", COLOURS, "red", False)
FIGURE = ("B", LETTERS, "C", False)
RIGHT = ("12", (), r"$\boxed{12}$", True)
RIGHT_OPTION = ("B", NUMBERS, "B", True)

LEAKS = [
    # It speaks of a key.
    ("My sum differs from the ground truth, so I must have misread a dot somewhere.", *OPEN),
    ("Comparing with the reference answer shows that one row was left out.", *OPEN),
    ("The reasoning does not match the provided answer, so it needs another look.", *OPEN),
    ("The gold answer suggests that multiplication was intended here, not addition.", *OPEN),
    ("According to the answer key the rows have to be multiplied with each other.", *OPEN),
    ("Since the correct answer is given as larger, the addition has to be a mistake.", *OPEN),
    ("Given that the correct answer is larger, adding the rows cannot be right.", *OPEN),
    ("The reasoning is clear, short and matches the reference solution well.", *RIGHT),
    ("The chain of steps is right and agrees with the correct answer, nothing to fix.", *RIGHT),
    ("The result is consistent with the ground-truth label, so only brevity is lacking.", *RIGHT),
    ("The expected answer is larger than mine, so a factor must have been lost.", *OPEN),
    ("我的计算与标准答案不符，应该检查第二步的乘法是否正确。", *OPEN),
    ("参考答案说明应该把行数和列数相乘，而不是相加。", *OPEN),
    ("根据正确答案，第一步的读图出现了偏差，需要重新数一遍。", *OPEN),
    # It states the gold as the answer.
    ("I added the rows instead of multiplying them; the correct answer is 12.", *OPEN),
    ("The rows were added instead of multiplied. The answer should be 12, not 7.", *OPEN),
    ("Rows and columns are multiplied, so the right result would be $12$ here.", *OPEN),
    (r"Rows and columns have to be multiplied, hence the answer is $\boxed{12}$ dots.", *OPEN),
    (r"Rows and columns have to be multiplied with each other: $3 \times 4 = \boxed{12}$", *OPEN),
    ("The number of dots was misjudged; it should have been 12 because rows multiply.", *OPEN),
    ("The first attempt adds where it has to multiply. Correct answer: 12", *OPEN),
    ("The first attempt adds where it has to multiply. **Final answer:** 12 dots", *OPEN),
    ("The step of adding rows and columns is wrong, the true value = 12.0 here", *OPEN),
    ("The correct answer to the question of how many dots are there is 12.", *OPEN),
    ("The attempt overlooked one whole row of dots, and 12 is the correct answer.", *OPEN),
    ("Counting again row by row makes clear that the answer is 3 x 4 = 12.", *OPEN),
    ("The first attempt confused sum and product. The result is 12 dots in total.", *OPEN),
    ("The unit price was read wrongly; the correct answer is $1,200 for all of them.", "1200", (),
     "120", False),
    ("The scale was ignored; the correct length is 3.5 cm when it is used.", "3.5", (), "7", False),
    ("The sign was lost when moving x, so the final answer should be -4.", "-4", (), "4", False),
    ("The share was inverted; the right value is 3/4 of the whole cake.", r"\frac{3}{4}", (), "4/3",
     False),
    (r"The root was not simplified; the final answer is $2\sqrt{3}$ and nothing else.",
     r"2\sqrt{3}", (), r"\sqrt{6}", False),
    ("The ring repeats after four circles, therefore the correct option is (B).", *OPTION),
    ("The ring repeats after four circles and not three. The answer is B.", *OPTION),
    (r"The ring repeats after four circles and not three: \boxed{B}", *OPTION),
    ("The pattern was misread at the second circle. I should have chosen option B.", *OPTION),
    ("The pattern repeats after four circles, which makes sense only if B is correct.", *OPTION),
    ("The pattern was misread at the second circle, so the correct answer is 12.", *OPTION),
    ("The last step was skipped by mistake, which leads to option B after all.", *OPTION),
    ("The pattern repeats with each second circle. The missing number is 12.", *OPTION),
    ("Blue and yellow mix to another colour; the answer should be light green.", *COLOUR),
    ("Blue and yellow mix differently, so the missing colour must be **Light green**.", *COLOUR),
    ("The overlapping part was ignored although light green is the right choice.", *COLOUR),
    ("Only one of the five figures keeps its order after turning: the answer is (B).", *FIGURE),
    ("这里应该用乘法而不是加法，正确答案是12。", *OPEN),
    ("第二步把行数数错了，所以答案应为 12 个点。", *OPEN),
    ("图形的周期看错了，因此正确选项是B。", *OPTION),
    ("One figure keeps its order after turning, so the answer is A.", "A", LETTERS, "C", False),
    ("The reading of the figure was turned around once too often. Answer: (A)", "A", NUMBERS, "C",
     False),
    ("The names of the points were swapped; the right answer is D here.", "D", ("D", "A", "C", "B"),
     "C", False),
    (r"The points were mirrored twice, so the image is \boxed{(-2, 0)} in the end.", "C",
     ("(2,0)", "(0,2)", "(-2,0)"), "A", False),
    # It is hardly more than the gold.
    ("12", *OPEN),
    ("It is 12, not 7.", *OPEN),
    ("No: 12 dots.", *OPEN),
    ("B", *OPTION),
    ("(B) 12", *OPTION),
    ("Wrong, light green.", *COLOUR),
]  # fmt: skip

CLEAN = [
    ("I read 3 rows of 4 dots, but added: 3 x 4 = 12 dots, not 7, since rows multiply.", *OPEN),
    ("Rows were added although equal rows are multiplied; redo the last step.", *OPEN),
    ("The given answer of 7 ignores one row; each row must be counted again.", *OPEN),
    ("The provided answer is wrong since it adds rows that should be multiplied.", *OPEN),
    ("None of the given answer choices was compared with the sketch; check each one.", *OPEN),
    ("The answer is not supported by the picture: the third row was never counted.", *OPEN),
    ("The final answer is wrong because a row of 12 small dots was taken for one of 7.", *OPEN),
    ("The final answer ignores the 12 cm side given in the figure; use it in step two.", *OPEN),
    ("The answer is 7 because the rows were added, which is not how equal rows combine.", *OPEN),
    ("I read the label 12 correctly but divided it by the wrong base in the next step.", *OPEN),
    ("The correct answer needs the product of both sides, and the attempt used their sum.", *OPEN),
    ("The right value of the height comes from the 12-sided polygon, not from the square.", *OPEN),
    ("The product 3 x 4 should be 12, but it was written as 7 in the second line.", *OPEN),
    ("The first sum is 12 + 5, and the carry was forgotten, so everything after is off.", *OPEN),
    ("The correct result is 12 times larger than the base value, which was overlooked.", *OPEN),
    ("The answer should be a whole number of dots, but a half was left in step two.", *OPEN),
    ("The answer is 120 only if each row holds twice as many, which the image denies.", *OPEN),
    ("The final answer is -12 only when the sign in line one is dropped, which it was.", *OPEN),
    ("The expected answer format is a number; the attempt wrote a sentence without one.", *OPEN),
    ("At 12 o'clock the hands overlap, and this was taken for the asked moment.", *OPEN),
    ("My answer matches the pattern in the ring and each step is needed; it can be shorter.",
     *RIGHT),
    ("The answer 12 is right: 3 rows of 4. The remark on colours can be left out.", *RIGHT),
    ("The correct answer is 12, as computed, and the second check repeats the first.", *RIGHT),
    ("The given answer 12 follows from the rows and columns, so only the style is at issue.",
     *RIGHT),
    ("Choosing B was right; the explanation of the wrong options is longer than needed.",
     *RIGHT_OPTION),
    ("Option B was excluded without looking at the third circle; test it again as well.", *OPTION),
    ("The answer is based on three circles only, and the ring has six of them.", *OPTION),
    ("The answer is C because the second circle was skipped; count the whole ring.", *OPTION),
    ("The final answer should be one of A, B, C or D, and two of them were never tested.", *OPTION),
    ("The ring alternates between large and small, and 12 was read where a 6 stands.", *OPTION),
    ("The second circle breaks the rule, so option B was never tested with the third.", *OPTION),
    ("The names of the points were swapped; the answer is A only for the first picture.", "D",
     ("D", "A", "C", "B"), "A", False),
    ("The correct option is found by comparing sizes, which the attempt never did.", *OPTION),
    ("A circle was missed on the left side, so that the count of the ring is off by one.",
     "A", LETTERS, "C", False),
    ("The answer is a colour that mixes two others, and the mixing step was left out.", "A",
     LETTERS, "C", False),
    ("The light green square was overlooked; the overlap of two squares mixes their colours.",
     *COLOUR),
    ("The answer was chosen from the left square only and ignores the overlapping part.", *COLOUR),
    ("The answer is no longer valid once the second condition is read with care.", "no",
     ("yes", "no"), "yes", False),
    ("Yes was concluded from one case; a single counterexample must be looked for first.", "no",
     ("yes", "no"), "yes", False),
    ("我把行数和列数相加了，但相同的行应该相乘，第二步需要重新计算。", *OPEN),
    ("读图时漏看了一行，共有3行，每行4个点，应该逐行数清楚再计算。", *OPEN),
    ("答案是12，步骤清楚，但最后的验算重复了，可以省略。", *RIGHT),
    ("The area was halved twice, and so a triangle's formula was applied to a square.",
     "1/2", (), "1/4", False),
    ("The truth of the ground rule that angles sum to 180 was not used in the second step.", *OPEN),
    ("The gold medals in the table were counted twice; each country stands there once.", *OPEN),
]  # fmt: skip


@pytest.mark.parametrize(
    ("reflection", "gold", "choices", "first", "right"), LEAKS, ids=[c[0][:40] for c in LEAKS]
)
def test_a_leak_is_found(reflection, gold, choices, first, right):
    assert leaks(reflection, gold, choices, first, right)


@pytest.mark.parametrize(
    ("reflection", "gold", "choices", "first", "right"), CLEAN, ids=[c[0][:40] for c in CLEAN]
)
def test_a_diagnosis_is_no_leak(reflection, gold, choices, first, right):
    assert not leaks(reflection, gold, choices, first, right)


@pytest.mark.parametrize("reflection", ["", " ", "...", "\\boxed{", "$", "\0", "答案"])
def test_odd_texts_are_no_leak(reflection):
    assert not leaks(reflection, *OPEN)


@pytest.mark.parametrize("gold", ["", " ", "$", "}{", "\\frac{1}{", "x" * 5000, "[a-z]+(", "Z"])
def test_odd_golds_do_no_harm(gold):
    text = "The rows were added although they should be multiplied with each other."
    assert not leaks(text, gold, (), "7", False)


HOSTILE = [
    "the correct answer is ",
    "the answer to the question of ",
    "missing a b c ",
    "12 is the correct ",
    "the given answer ",
    "\\boxed{",
    "((((",
    "$",
    "1,",
    "1 / ",
    "a",
    " ",
    "答案是",
    "should be ",
    "the correct option is \\(",
    "\\(",
    "<",
    "- ",
    "12 ",
    "B ",
]


def seconds_for(piece, characters):
    text = (piece * (characters // len(piece) + 1))[:characters]
    start = time.process_time()
    leaks(text, "13", (), "7", False)
    leaks(text, "light green", COLOURS, "red", False)
    same_language(text, text)
    return time.process_time() - start


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_text_takes_no_longer_than_its_length_asks(piece):
    assert seconds_for(piece, 50_000) < 2


@pytest.mark.slow
@pytest.mark.parametrize("piece", HOSTILE)
def test_a_million_characters_take_seconds(piece):
    assert seconds_for(piece, 1_000_000) < 30


# ------------------------------------------------------------------------------------- language

ENGLISH = "How many dots are there in the picture below? <image>"
CHINESE = "如图，在三角形 $ABC$ 中，AB = AC，求阴影部分的面积。"
JAPANESE = "図の三角形の面積を求めなさい。ただし、円周率は3.14とします。"
RUSSIAN = "Сколько точек изображено на рисунке?"
ARABIC = "كم عدد النقاط الموجودة في الصورة؟"
HINDI = "चित्र में कितने बिंदु दिखाई दे रहे हैं?"
KOREAN = "그림에서 점은 모두 몇 개입니까?"
ALL = [ENGLISH, CHINESE, JAPANESE, RUSSIAN, ARABIC, HINDI, KOREAN]


@pytest.mark.parametrize("question", ALL)
@pytest.mark.parametrize("text", ALL)
def test_languages_of_different_scripts_are_told_apart(question, text):
    assert same_language(question, text) == (question == text)


@pytest.mark.parametrize(
    ("question", "text"),
    [
        (CHINESE, r"由勾股定理得 $AD = \sqrt{AB^2 - BD^2}$，所以 \triangle ABC 的面积是 12 cm。"),
        (CHINESE, "在 ABC 中 AB = AC，BC = 6，所以 AD = 4，ABD 与 ACD 全等，面积相等。"),
        (ENGLISH, r"The angle is \(\alpha\) and $\text{площадь треугольника и круга}$ is known."),
        (ENGLISH, "The sign 北京 in the picture was read as the name of another city."),
        (ENGLISH, "12"),
        (ENGLISH, "是的"),
        (ENGLISH, ""),
        ("$x^2 = 4$", "Il manque la solution négative de cette équation."),
        (
            "Translate: 这是一个很长的中文句子，请翻译。 What does it mean?",
            "这个句子的意思是说它很长。",
        ),
        ("Ｈｏｗ ｍａｎｙ ｄｏｔｓ ａｒｅ ｔｈｅｒｅ？", "There are three dots in each row."),
    ],
)
def test_formulas_names_and_short_texts_do_not_change_the_language(question, text):
    assert same_language(question, text)


@pytest.mark.parametrize(
    "text",
    [
        "我把行数和列数相加了，但相同的行应该相乘，第二步需要重新计算。",
        "我把 rows 和 columns 相加了，但相同的行应该相乘，第二步需要重新计算，请注意。",
    ],
)
def test_an_english_question_wants_an_english_text(text):
    assert not same_language(ENGLISH, text)
