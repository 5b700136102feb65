"""From completion text to `Verdict`: template, answers, verification."""
