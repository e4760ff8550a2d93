"""What a batch costs, learned from batches that ended."""

from __future__ import annotations

from typing import Final

#: how many batches are remembered: once there are so many, each new one takes this share of the weight
_NEWEST: Final = 1 / 32
#: a batch that took strangely long counts for at most so many times what was expected, unless the one before it did, too
_SURPRISE: Final = 2.0
#: while all batches have had the same size, this part of it is tried when it matters what a smaller one costs
_TRIED: Final = 1 / 8


class BatchCost:
    """Seconds that a batch of one layer keeps the service busy: `fixed_s` and `token_s` for each token.

    A line through the remembered batches by least squares, the older the less they weigh; nothing is known of batches larger than those,
    and then the answer is what is certain: they take at least as long. Before the first batch every batch is free.
    """

    def __init__(self) -> None:
        self.fixed_s = 0.0
        self.token_s = 0.0
        self._number = 0
        self._last_surprise = 0.0
        self._mean_tokens = self._mean_s = 0.0
        self._variance = self._covariance = 0.0

    def __call__(self, tokens: float) -> float:
        """Seconds of a batch of `tokens`."""
        return self.fixed_s + self.token_s * tokens

    @property
    def usual_s(self) -> float:
        """Seconds of the batches as they have been lately; inf before the first."""
        return self._mean_s if self._number else float("inf")

    def tokens_of(self, seconds: float) -> float:
        """How many tokens take so many seconds more than none; a part of those of usual batches to find that out."""
        if self.token_s:
            return seconds / self.token_s
        return _TRIED * self._mean_tokens if self._number and not self._variance else float("inf")

    def of_many(self, tokens: float, batch_tokens: float) -> float:
        """Seconds of `tokens` in batches of `batch_tokens` each, the last one in part."""
        return self.token_s * tokens + self.fixed_s * tokens / batch_tokens

    def learn(self, tokens: int, seconds: float) -> None:
        """One batch of `tokens` has kept the service busy for `seconds`."""
        self._number += 1
        # The first one, which often takes long, has no more weight than the others.
        newest = max(_NEWEST, 1 / self._number)
        if self._number == 1:
            self._mean_tokens, self._mean_s = float(tokens), seconds
        else:
            expected_s = max(self(tokens), self._mean_s * tokens / self._mean_tokens)
            believed_s = max(_SURPRISE, self._last_surprise) * expected_s
            self._last_surprise = seconds / expected_s if expected_s else 0.0
            seconds = min(seconds, believed_s) if expected_s else seconds
            more_tokens, more_s = tokens - self._mean_tokens, seconds - self._mean_s
            self._mean_tokens += newest * more_tokens
            self._mean_s += newest * more_s
            self._variance = (1 - newest) * (self._variance + newest * more_tokens * more_tokens)
            self._covariance = (1 - newest) * (self._covariance + newest * more_tokens * more_s)
        slope = self._covariance / self._variance if self._variance else 0.0
        self.token_s = min(max(slope, 0.0), self._mean_s / self._mean_tokens)
        self.fixed_s = max(0.0, self._mean_s - self.token_s * self._mean_tokens)
