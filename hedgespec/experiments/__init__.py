"""Recorded acceptance: record it, replay learners over it, and measure the result.

- `recording`: `record` decodes a text and stores, for every drafter and position, what would have been accepted (`Trace`).
- `replay`: `replay` runs selection and learning over a trace, without a model.
- `measures`: tokens per round, regret, the best drafter in hindsight, and confidence intervals.

The studies in bench/studies/ use it.
"""
