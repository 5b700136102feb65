"""A judge of few words behind a real local server, for the tests of what asks it.

A response answers with what follows its last "ANS:"; two answers are the same when they are the
same without case and spaces. "HOPELESS" in a response brings nonsense for ever, "MUMBLE" brings it
at the first try. Ratings are 4, 3, 5 and the number after "USE:".
"""

import json
import re

from tests.openai_server import HTTPError

KEY = "sk-test-0123456789abcdef"
NONSENSE = ("Certainly!", '{"extraction": 7}', '{"judgement": "maybe"}', "", '{"judgement": 2}')


def prompt(body: dict) -> str:
    """The text that the judge was sent."""
    return body["messages"][-1]["content"]


def kind(body: dict) -> str:
    """The prompt file that a request was made from."""
    return body["response_format"]["json_schema"]["name"]


def answer(body: dict) -> str | dict:
    """The judge's reply."""
    text, name = prompt(body), kind(body)
    if "FILTERED" in text:
        raise HTTPError(400, "no", "content_filter")
    if "HOPELESS" in text or ("MUMBLE" in text and body["seed"] == 0):
        return NONSENSE[body["seed"] % len(NONSENSE)]
    if name == "rubric":
        use = float(re.findall(r"USE: *([\d.]+)", text)[-1])
        names = ("logic", "missing_assumptions", "clarity", "suggestions")
        return json.dumps(dict(zip(names, (4, 3, 5, use), strict=True)))
    if name.endswith("extract"):
        found = re.findall(r"ANS: *(.+)", text.rsplit("Response:", 1)[1])
        return "```json\n" + json.dumps({"extraction": found[-1] if found else "NO ANSWER"}) + "```"
    gold = re.findall(r"^Reference(?: answer)?: *(.*)$", text, re.M)[-1]
    given = re.findall(r"^Model's answer: *(.*)$", text, re.M)[-1]
    same = gold.replace(" ", "").lower() == given.replace(" ", "").lower()
    return json.dumps({"judgement": int(same)})
