"""Text: what `automaton` finds, by looking through the whole text; the definition, for tests."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Text"]


class Text:
    """The tokens of one request.

    Args:
        tokens: from the first to the last.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)

    def ends(self, context: Sequence[int]) -> list[int]:
        """Return the places of the text at which a context ends, ascending."""
        size = len(context)
        return [
            end
            for end in range(size - 1, len(self.tokens))
            if self.tokens[end + 1 - size : end + 1] == list(context)
        ]

    def longest_match(self) -> list[int]:
        """Return the longest end of the text that occurred before, empty for none."""
        for start in range(1, len(self.tokens)):
            if len(self.ends(self.tokens[start:])) > 1:
                return self.tokens[start:]
        return []

    def descend(self, context: Sequence[int], token: int) -> list[int]:
        """Return the longest end of a context and one more token that the text holds."""
        wanted = [*context, token]
        while wanted and not self.ends(wanted):
            wanted = wanted[1:]
        return wanted

    def copy_of(self, context: Sequence[int]) -> tuple[int, int, int, int]:
        """Return what followed a context the last time, and how sure that is.

        Returns:
            token, -1 for none; how long the end of the context is that it followed; how often that
            was followed by anything, and by this token.
        """
        for start in range(len(context)):
            tried = list(context[start:])
            followed = [end for end in self.ends(tried) if end + 1 < len(self.tokens)]
            if followed:
                token = self.tokens[followed[-1] + 1]
                same = sum(self.tokens[end + 1] == token for end in followed)
                return token, len(tried), len(followed), same
        return -1, 0, 0, 0
