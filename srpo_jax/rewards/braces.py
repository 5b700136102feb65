r"""Braced LaTeX arguments such as ``\boxed{...}``, found in one pass however they are nested."""

import re

Span = tuple[int, int, int | None]


def braced_spans(text: str, tokens: re.Pattern[str]) -> list[Span]:
    r"""(start, content start, content end) of everything that opens a brace of interest, by start.

    Args:
        text: where to look.
        tokens: matches a brace of interest, with what stands before it, as its group 1; a plain
            ``{`` or ``}``; and, where escaped braces are not to count, an escape as a whole.

    Returns:
        The end is the place of the closing brace, None where there is none.
    """
    spans: list[Span] = []
    open_braces: list[int | None] = []  # the place in ``spans``, None for a plain brace
    for match in tokens.finditer(text):
        if match[1] is not None:
            open_braces.append(len(spans))
            spans.append((match.start(), match.end(), None))
        elif match[0] == "{":
            open_braces.append(None)
        elif match[0] == "}" and open_braces and (place := open_braces.pop()) is not None:
            spans[place] = (*spans[place][:2], match.start())
    return spans
