"""A person whose answers are known beforehand."""

from __future__ import annotations

__all__ = ["Answers"]


class Answers:
    """Gives one answer after the other, then none; remembers what was asked."""

    def __init__(self, *answers: str | None, accept: bool = False) -> None:
        self.answers = list(answers)
        self.accept = accept
        self.questions: list[tuple[str, bool]] = []  # the text, and whether the answer is secret
        self.confirmations: list[str] = []
        self.told: list[str] = []

    def ask(self, text: str, *, secret: bool) -> str | None:
        self.questions.append((text, secret))
        return self.answers.pop(0) if self.answers else None

    def confirm(self, text: str) -> bool:
        self.confirmations.append(text)
        return self.accept

    def tell(self, text: str) -> None:
        self.told.append(text)
