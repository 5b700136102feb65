"""HTML pages as tests read them, and a text that would run if it were not escaped."""

from html.parser import HTMLParser

VOID = {"meta", "img", "br", "link", "input", "hr"}
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7 * 7 }}</style></p>"


class Page(HTMLParser):
    """The elements of a page; an end tag that does not fit fails."""

    def __init__(self, html):
        super().__init__()
        self.stack, self.tags, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]
