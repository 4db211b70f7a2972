"""Drafts by prompt lookup: what followed the last few tokens where they stood before, in the same request.

Source: Saxena, Prompt Lookup Decoding, 2023; the idea of drafts that are verified in one forward is from Leviathan et
al., arXiv 2211.17192.
"""
from __future__ import annotations

LENGTHS = (3, 2)  # of what is looked up, the longest first


class Lookup:
    """Where each short run of a request's tokens stood last; it reads on in `tokens` as they grow."""

    def __init__(self, tokens: list[int]):
        self.tokens, self.seen = tokens, 0
        self.behind: dict[tuple[int, ...], int] = {}  # a run -> the position behind it

    def draft(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next; none where the last ones never stood before."""
        if most < 1:
            return []
        for end in range(self.seen, len(self.tokens)):  # runs that end before the last token
            for length in LENGTHS:
                if end >= length:
                    self.behind[tuple(self.tokens[end - length : end])] = end
        self.seen = len(self.tokens)
        for length in LENGTHS:
            found = self.behind.get(tuple(self.tokens[-length:]))
            if found is not None:
                return self.tokens[found : found + most]
        return []
