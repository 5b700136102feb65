"""An answer counts only where all of it was read: neighbours of known mistakes, labels."""

import json

import pytest

from srpo_jax.rewards.answers import Question
from srpo_jax.rewards.verifier import Verifier


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=1, timeout=20) as pool:
        yield pool


Y, N = True, False

# Neighbours of known mistakes, by group: gold, answer, right?
GROUPS = {
    "relations are not their bounds": [
    ("7", r"\ge 7", N), ("7", r"x\le7", N), ("7", r"7 \ge x", N), ("7", r"\not\in 7", N),
    ("7", r"\subset 7", N), ("7", "7^-", N), ("7", "7-", N), ("7", "7*", N),
    ("7", r"7 \times", N), ("7", "7=", N), ("7", "=7", Y), ("7", r"\propto 7", N),
    ("7", r"\to 7", N), ("7", r"x \to 7", N), ("7", r"\approx 7", Y), ("7", "≈7", Y),
    ("7", "~7", Y), ("7", "<=7", N), ("7", ">=7", N), ("7", "!=7", N), ("7", r"\lesssim 7", N),
    ("7", r"\ll 7", N), ("7", r"7 \pmod{9}", N), ("7", r"x\equiv 7", N),
    (r"x \equiv 7 \pmod 9", r"x \equiv 7 \pmod 9", Y), ("x<7", "x < 7", Y), ("x<7", "7>x", Y),
    ("x<7", r"x\le 7", N), ("x<7", "x>7", N), (r"x\neq 7", r"x\ne7", Y), (r"x\ne 7", "x=7", N),
    (r"x\ne 7", "7", N),
    ],
    "no part stands for the whole": [
    ("4", r"4\foo", N), ("4", r"4\sqrt{2", N), ("4", r"\unknown{4}", N), ("4", r"4\ 5", N),
    ("4", "4 5", N), ("4", r"4 \& 5", N), ("4", "4;", Y), ("4", "4 or more", N), ("4", "4?", N),
    ("4", "4!", N), ("24", "4!", Y), ("4", "?4", N), ("4", "4 (approximately)", N),
    ("4", "(4", N), ("4", "4)", N), ("4", "{4}", Y), ("4", "[4]", Y), ("4", "|4|", Y),
    ("4", "|-4|", Y), ("4", "$4", Y), ("4", "4$", Y), ("4", r"\(4\)", Y), ("4", r"4\quad", Y),
    ("4", r"4 \text{ exactly}", N), ("4", "4...", N), ("4", r"\dots 4", N), ("4", "4 apples", Y),
    ("4", "4 wrong", N), ("4", "4 maybe", N), ("4", "4 to 5", N), ("4", "4-5", N),
    ("4", "4–5", N), ("4", "between 4 and 5", N), ("4", "4 and 4", N), ("4", "four", Y),
    ("4", "no 4", N), ("4", "never 4", N), ("4", "either 4 or 5", N), ("4", "4 unless x=2", N),
    ("4", "x=4, y=5", N), ("4", "x is 4", N), ("4", "4x", N), ("4", "4 times", N),
    ("4", "4 squared", N), ("4", "4 cubed", N), ("4", "4th", N), ("4", "4%", Y), ("4", r"\%4", N),
    ("4", r"4\frac{1}{2}", N), ("4", "4 1/2", N), ("4.5", "4 1/2", Y),
    (r"\frac{1}{2}", r"\frac{1}{2} or so", N), (r"\frac{1}{2}", r"\frac{1}{2}+", N),
    (r"\frac{1}{2}", r"\frac{1}{2} \text{ (not)}", N),
    (r"\sqrt{7}", r"\sqrt{7} \text{ or } \sqrt{8}", N), (r"\sqrt{7}", r"\pm\sqrt{7}", N),
    (r"\sqrt{7}", r"-\sqrt{7}", N), (r"\sqrt{7}", r"about \sqrt{7}", Y),
    ],
    "an ellipsis equals only itself": [
    ("0.333...", "0.444...", N), ("0.333...", "0.333...", Y),
    (r"2,4,\ldots,2n", r"2, 4, \dots, 2n", Y), ("1,2,3,...", "1,2,3", N),
    ("1,2,3", "1,2,3,...", N), (r"1+3+\cdots+(2n-1)", r"1+3+\cdots+(2n+1)", N),
    (r"a_1,a_2,\ldots,a_n", r"a_1,\ldots,a_n", N), (r"\{1,2,\dots\}", r"\{1,2,\dots\}", Y),
    ],
    "repeating decimals": [
    ("1/9", r"0.\overline{1}", Y), ("1/9", r"0.\bar{1}", Y), ("1/9", r"0.\dot{1}", Y),
    ("1/9", r"0.\overline{2}", N), (r"0.\overline{142857}", r"\frac{1}{7}", Y),
    (r"2.\overline{6}", r"\frac{8}{3}", Y), (r"2.\overline{6}", "2.6", N),
    (r"0.9\overline{9}", "1", Y), (r"0.\overline{27}", r"\frac{3}{11}", Y),
    (r"1.2\overline{3}", r"\frac{37}{30}", Y), ("0.5", r"0.\overline{5}", N),
    ("-1/3", r"-0.\overline{3}", Y),
    ],
    "upright letters, units and scale words": [
    (r"5\mathrm{i}", "5i", Y), (r"5\mathrm{i}", "5", N), ("5", r"5\mathrm{j}", N),
    (r"2+\mathrm{i}", r"2-\mathrm{i}", N), (r"\pi", r"\pi\mathrm{r}", N), (r"\pi", r"\pi r^2", N),
    (r"\pi r^2", r"\pi\mathrm{r}^2", Y), ("6", r"6\mathrm{y}", N), ("6", r"6\mathrm{cm}", Y),
    ("6", r"6\,\mathrm{cm}", Y), ("6", r"6\ \text{kg}", Y), ("6 kg", r"6\text{ g}", N),
    ("6", r"6\text{ foo}", N), ("6", r"6\text{ is it}", N), ("e^{2}", r"\mathrm{e}^2", Y),
    (r"\frac{1}{e}", r"\mathrm{e}^{-1}", Y), (r"\frac{1}{\mathrm e}", "e^{-1}", Y),
    (r"\mathrm{e}^{-1}", "e", N), (r"2\sqrt{3}", r"2\sqrt{3}\mathrm{x}", N),
    (r"2\sqrt{3}", r"2\sqrt{3}\,\mathrm{m}", Y), (r"2\sqrt{3}", r"2\sqrt{3}\text{ units}", Y),
    (r"2\sqrt{3}", r"2\sqrt{3}\text{ cm}^2", Y), (r"x\mathrm{e}^x", "xe^x", Y),
    ("3000000", r"3\text{ million}", Y), ("3", "3 million", N), ("5000", "5 thousand", Y),
    ("5", "5 thousand", N), ("1.5 million", "1500000", Y),
    (r"2 \text{ billion}", "2000000000", Y), ("24", "2 dozen", Y),
    (r"\pi", r"\pi\text{ thousand}", N), ("9.8", r"9.8\ \mathrm{m/s^2}", Y),
    ("9.8 m/s^2", "9.8 m/s", N), (r"30\ \mathrm{km/h}", "30 km/h", Y), (r"\mathrm{AB}=5", "5", Y),
    ("AB=5", "5", Y), ("5", r"\mathrm{AB}=5", Y), (r"\cos\theta", r"\cos\mathrm{x}", N),
    (r"\operatorname{sin}x", r"\sin x", Y), (r"\mathbf{v}", r"\mathbf{w}", N),
    ],
    "small and large numbers": [
    (r"\frac{1}{3^{40}}", r"\frac{1}{3^{41}}", N), (r"\frac{1}{3^{40}}", "3^{-40}", Y),
    (r"6.02\times10^{23}", r"6.03\times10^{23}", N),
    (r"6.02\times10^{23}", r"6.02\cdot10^{23}", Y), (r"6.02\times10^{23}", "6.02e23", Y),
    (r"6.63\times10^{-34}", "0", N), (r"6.63\times10^{-34}", "6.63e-34", Y),
    ("1e-07", "0.0000001", Y), ("1e-07", "e-7", N), ("1e-07", "1.0e-7", Y),
    ("1.5e-09", r"1.5\times 10^{-9}", Y), ("1.5e-09", r"1.4\times 10^{-9}", N),
    ("0.0000001", "0.0000002", N), ("0", "0.0000001", N), ("0", "1e-12", N),
    (r"\frac{\pi}{10^8}", r"\frac{2\pi}{10^8}", N), ("10^{-9}", r"\frac{1}{10^9}", Y),
    (r"(\frac12)^{50}", "2^{-50}", Y), (r"\frac{1}{20!}", r"\frac{1}{19!}", N),
    (r"\sqrt{2}\times10^{-9}", r"\sqrt{3}\times10^{-9}", N), ("1+10^{-12}", "1", N),
    (r"\frac{1}{2^{100}}", r"\left(\frac{1}{2}\right)^{100}", Y),
    ("0.1", "0.10000000149011612", N), ("10^{30}", "10^{30}+1", N), ("123456789", "123456788", N),
    ("0.30000000000000004", "0.3", Y),
    ],
    "decimals are exact unless told otherwise": [
    ("6.2832", "6.283", N), ("3.14159", "3.1416", N), (r"\pi", "3.1416", N),
    (r"\pi", "3.14159265", Y), (r"\pi", "3.14159266", N), (r"\sqrt{2}", "1.41421356", Y),
    (r"\sqrt{2}", "1.414", N), ("2/3", "0.666667", Y), ("2/3", "0.67", N), ("0.67", "2/3", N),
    ("1/7", "0.142857", Y), ("1/8", "0.125", Y), ("1/8", "0.125000", Y), ("0.5", "0.50", Y),
    ("2.50", "2.5", Y), ("1.0000001", "1", N), ("99.99999", "100", N), ("e", "2.718282", Y),
    ],
    "equal forms": [
    ("(0, 3)", "0<x<3", Y), ("[0, 3)", r"0\le x<3", Y), ("(0,3)", r"0\le x\le 3", N),
    ("0<x<3", "(0,3)", Y), (r"x\ge 2", r"[2,\infty)", Y), (r"x\ge 2", r"(2,\infty)", N),
    (r"x>2 \text{ or } x<-2", r"(-\infty,-2)\cup(2,\infty)", Y),
    (r"(-\infty,0)\cup(0,\infty)", r"x\ne 0", Y), (r"\mathbb{R}", r"(-\infty,\infty)", Y),
    (r"\mathbb{R}", r"x \in \mathbb{R}", Y), (r"\mathbb{R}", r"\mathbb{Z}", N),
    (r"\cos 60^\circ", "0.5", Y), (r"\cos 60^\circ", r"\cos 60", N), (r"\cos 60", r"\frac12", N),
    (r"\tan 45^{\circ}", "1", Y), (r"2\sin 30^\circ", "1", Y),
    (r"\frac{1}{\sqrt{n}}", r"\sqrt{\frac{1}{n}}", Y),
    (r"\frac{1}{\sqrt n}", r"\frac{\sqrt{n}}{n}", Y), (r"\frac{1}{\sqrt n}", r"\sqrt{n}", N),
    (r"\varnothing", r"\emptyset", Y), (r"\emptyset", "∅", Y), (r"\emptyset", "0", N),
    ("2:4:6", "1:2:3", Y), ("1:2", "2:4", Y), ("1:2:3", "3:2:1", N), ("2:3", r"\frac23", Y),
    ("12", r"\color{blue}{12}", Y), ("12", r"\textcolor{red}{12}", Y),
    ("12", r"{\color{red}12}", Y), ("12", r"\framebox{12}", Y), ("12", r"\framebox{$12$}", Y),
    ("12", r"\fbox{12}", Y), ("12", r"\framebox{\boxed{12}}", Y),
    ("12", r"\boxed{\color{red}{12}}", Y), ("12", r"\colorbox{yellow}{12}", Y),
    ("12", r"\underline{12}", Y), ("12", r"\boldsymbol{12}", Y), ("12", "{12}", Y),
    ("x^2-1", "(x-1)(x+1)", Y), ("x^2-1", "(x-1)^2", N), ("|x|", "x", N), (r"\sqrt{x^2}", "x", N),
    (r"\sqrt{x^2}", "|x|", Y), (r"\sin^2x+\cos^2x", "1", Y),
    (r"2\cos^2\theta-1", r"\cos 2\theta", Y), (r"\ln x^2", r"2\ln x", Y), (r"\log_3 9", "2", Y),
    (r"\sqrt[3]{27}", "3", Y), ("27^{1/3}", "3", Y), (r"\binom{6}{2}", "15", Y), ("5!", "120", Y),
    (r"\frac{3}{6}", r"\frac12", Y), ("y=2x+1", "2x+1", Y), ("y=2x+1", "y=2x-1", N),
    ("2x+y=3", "4x+2y=6", Y), ("2x+y=3", "y=3-2x", Y), ("2x+y=3", "y=3+2x", N),
    ("x=2, y=3", "y=3, x=2", Y), ("x=2, y=3", "x=3, y=2", N), ("x=2, y=3", "2, 3", Y),
    ("x=2, y=3", "3, 2", N), ("(2,3)", "(2, 3)", Y), ("(2,3)", "(3,2)", N), ("(2,3)", "2,3", Y),
    (r"\{2,3\}", r"\{3,2\}", Y), (r"\{2,3\}", "2, 3", Y), (r"\{2,3\}", r"\{2\}", N),
    (r"x=\pm 2", "2, -2", Y), (r"x=\pm2", "x=2 or x=-2", Y), (r"\pm 2", "2", N),
    ("2,-2", r"\pm 2", Y),
    (r"\frac{-1\pm\sqrt5}{2}", r"\frac{-1+\sqrt5}{2}, \frac{-1-\sqrt5}{2}", Y),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}", Y),
    (r"\begin{pmatrix}1&0\\0&1\end{pmatrix}", r"\begin{pmatrix}0&1\\1&0\end{pmatrix}", N),
    (r"\vec{AB}", r"\overrightarrow{AB}", Y), (r"\frac{1}{1-i}", r"\frac{1+i}{2}", Y),
    ("i^2", "-1", Y), (r"e^{i\pi}", "-1", Y), (r"\lfloor 3.7\rfloor", "3", Y),
    (r"2\sqrt2", r"\sqrt 8", Y), (r"2\sqrt(2)", r"2\sqrt{2}", Y), (r"\sqrt(8)", "2√2", Y),
    ("a^2b", "ba^2", Y), (r"\frac{x+1}{2}", "(x+1)/2", Y), (r"\frac{x+1}{2}", "x+1/2", N),
    ("2^{x+1}", "2·2^x", Y), ("F=ma", "F=ma", Y), (r"60^\circ", "60 degrees", Y),
    (r"\angle ABC=60^\circ", "60", Y), (r"60^\circ", r"\angle B = 60^\circ", Y),
    (r"60^\circ", "61°", N), ("0.25", "25%", Y), ("25%", r"\frac14", Y), ("$3.50", "3.5", Y),
    ("1,234,567", "1234567", Y), ("1,234", "1.234", N), ("12:30", "12:30", Y),
    ("3:45", "1:15", N), ("-7", "7", N), ("- 7", "-7", Y), ("7", "+7", Y),
    (r"1\dfrac{1}{2}", r"\tfrac32", Y), ("x^{10}", "x^10", Y), (r"\left[0,1\right]", "[0,1]", Y),
    ("[0,1]", "(0,1)", N), ("f(x)=x^2", "x^2", Y), (r"P=\frac{1}{6}", r"\frac16", Y),
    (r"\frac{1}{6}", r"P(A)=\frac{1}{6}", Y), ("5", "2+3", Y), ("5", "2+3=5", Y),
    ("5", "5=2+3", Y), ("5", "2+2=5", N), ("5", "x+y=5", N), ("5", "10/2=5", Y),
    ("5", "x=10/2=5", Y), ("5", "x=10/2=4", N), ("5", "y=5", Y), (r"2\pi", r"C=2\pi", Y),
    (r"2\pi", "6.28", N), (r"2\pi", "6.283185", Y), ("3x+2", "2+3x", Y), ("3x+2", "3X+2", N),
    ],
    "found by mutation": [
    ("x<5", "y<5", N), ("7", "not = 7", N), ("7", "not y = 7", N), (r"\infty", r"\infty - 1", N),
        (r"\infty", r"2\infty", N), (r"\infty", r"-\infty", N), ("6.02e23", "6.02e23 - 1", N),
        ("B", "(B) is wrong", N), ("B", "(B) or 1", N), ("B", "(B) not given", Y),
        ("x<5", "5>x", Y), ("x=5", "2x=10", N), ("x=5", "y=5", N),
    ("12", "1 2", N), ("2 1/2", "21/2", N), ("5", r"x \in 5", N), ("5", r"x \in \{5\}", Y),
    ("5", "[5)", N), ("|x-5|", "5-x", N), ("x^2=4", "2x^2=8", Y),
    (r"x>1 \text{ and } x<3", "(1,3)", Y), ("(p,q)=(3,2)", "(3,2)", Y),
    ("V_1:V_2=11:21", "11:21", Y), ("(5, 8), (8, 5)", r"(x, y) = (5, 8) \text{ and } (8, 5)", Y),
    (r"x \in [-2,7]", r"-2 \le x \le 7", Y), ("9", r"Answer \[ 9 \]", Y),
    (r"x \ge 5", r"Therefore $x \geq 5$ is the solution.", Y), ("32349", r"32,\! 349", Y),
    (r"x\in(1,2)", "(1,2)", Y), ("5", "5 (x>3)", N),
    ],
}  # fmt: skip

ANIMALS, TENS, SHUFFLED = ("cat", "dog", "bird"), ("10", "11", "12", "13"), ("B", "D", "A", "C")
LABEL_CASES = [
    ("7", "**Answer:** 7", (), Y), ("7", "### Answer: 7", (), Y),
    ("7", "## Final answer: 7", (), Y), ("7", "__Answer:__ 7", (), Y), ("7", "**7**", (), Y),
    ("7", "Answer: $7$.", (), Y), ("7", "答案：7", (), Y), ("7", "答案是7", (), Y),
    ("7", "**Result:** 7", (), Y), ("7", "**Solution:** 8", (), N), ("7", "**Not:** 7", (), N),
    ("7", "#### 7", (), Y), ("7", "Answer: 7 or 8", (), N), ("B", "**B.** dog", ANIMALS, Y),
    ("B", "**(B)** dog", ANIMALS, Y), ("B", "(B) dog", ANIMALS, Y), ("B", "B (dog)", ANIMALS, Y),
    ("B", "B: dog", ANIMALS, Y), ("B", "B, dog", ANIMALS, Y), ("B", "dog", ANIMALS, Y),
    ("B", "B = dog", ANIMALS, Y), ("B", "B — dog", ANIMALS, Y), ("B", "答案：B", ANIMALS, Y),
    ("B", "选项B", ANIMALS, Y), ("B", "选B", ANIMALS, Y), ("B", "故选B", ANIMALS, Y),
    ("B", "应选：B", ANIMALS, Y), ("B", "C (bird)", ANIMALS, N), ("B", "B (bird)", ANIMALS, N),
    ("B", "**C**: bird", ANIMALS, N), ("B", "B or C", ANIMALS, N), ("B", "A and B", ANIMALS, N),
    ("B", "not B", ANIMALS, N), ("B", "B is wrong", ANIMALS, N),
    ("B", "B is incorrect", ANIMALS, N), ("B", "B is not correct", ANIMALS, N),
    ("B", "B is correct", ANIMALS, Y), ("B", "(B) is correct", ANIMALS, Y),
    ("B", "Option B is the correct answer", ANIMALS, Y), ("B", "I choose B", ANIMALS, Y),
    ("B", "I pick (B)", ANIMALS, Y), ("B", "I choose B or C", ANIMALS, N),
    ("B", "The answer is not B", ANIMALS, N), ("B", "The answer is (B).", ANIMALS, Y),
    ("B", "The correct choice is **B**", ANIMALS, Y), ("B", "Hence the answer is B", ANIMALS, Y),
    ("B", "B.", ANIMALS, Y), ("B", "b", ANIMALS, Y), ("B", r"\mathbf{B}", ANIMALS, Y),
    ("B", r"\textbf{(B) dog}", ANIMALS, Y), ("B", r"\boxed{B}", ANIMALS, Y),
    ("B", "Neither A nor B", ANIMALS, N), ("B", "[B]", ANIMALS, Y), ("dog", "B", ANIMALS, Y),
    ("dog", "Dog", ANIMALS, Y), ("dog", "hot dog", ANIMALS, N), ("dog", "a dog", ANIMALS, Y),
    ("11", "B", TENS, Y), ("11", "11", TENS, Y), ("11", "C. 11", TENS, N),
    ("B", "B, 11", TENS, Y), ("B", "B. 12", TENS, Y), ("C", "B. 12", TENS, N),
    ("B", "11.0", TENS, Y), ("B", "10 or 11", TENS, N), ("B", "$11$", TENS, Y),
    ("B", "x=11", TENS, Y), ("B", r"\frac{22}{2}", TENS, Y), ("A", "A", SHUFFLED, Y),
    ("A", "C", SHUFFLED, N), ("B", "B", SHUFFLED, Y), ("B", "A", SHUFFLED, N),
    ("A", "(A) B", SHUFFLED, Y), ("B", "(A) B", SHUFFLED, N), ("B", "(B)", SHUFFLED, Y),
    ("C", "C", SHUFFLED, Y), ("D", "(D) C", SHUFFLED, Y), ("D", "C", SHUFFLED, N),
    ("AC", "A, C", (), Y), ("AC", "A and C", (), Y), ("AC", "A,C", (), Y), ("AC", "AC", (), Y),
    ("AC", "(A), (C)", (), Y), ("AC", "A, B", (), N), ("AC", "A", (), N),
    ("AC", "A, B, C", (), N), ("AC", "C, A", (), Y), ("A, B, D", "ABD", (), Y),
    ("BD", r"\boxed{B, D}", (), Y), ("ACD", "A;C;D", (), Y), ("BC", "B or D", (), N),
]  # fmt: skip


@pytest.mark.parametrize("group", GROUPS)
def test_an_answer_counts_only_where_all_of_it_was_read(verifier, group):
    found = verifier.check([(Question(gold), answer) for gold, answer, _ in GROUPS[group]])
    assert [c for c, ok in zip(GROUPS[group], found, strict=True) if ok is not c[2]] == []


def test_labels_lead_an_answer_and_options(verifier):
    found = verifier.check(
        [(Question(gold, options), answer) for gold, answer, options, _ in LABEL_CASES]
    )
    assert [c for c, ok in zip(LABEL_CASES, found, strict=True) if ok is not c[3]] == []


def test_answers_judged_by_hand(shared_data, verifier):
    lines = (shared_data / "answer_cases" / "cases.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    found = verifier.check(
        [(Question(row["gold"], tuple(row["choices"] or ())), row["answer"]) for row in rows]
    )
    differ = [row for row, ok in zip(rows, found, strict=True) if ok != row["correct"]]
    assert [row for row in differ if not row["correct"]] == []  # a wrong answer is never paid
    assert len(differ) <= 1, differ
