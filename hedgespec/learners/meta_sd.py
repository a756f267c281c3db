"""MetaSD: UCB on how well the chosen drafter agreed with the target, not on how many tokens came of it."""

from __future__ import annotations

from hedgespec.learners.ucb import UCBSpec


class MetaSD(UCBSpec):
    """`UCBSpec` whose reward is mean(acceptance_prob[chosen]) over the tokens of the round, the block; acceptance_prob is
    1 - total variation where proposals are sampled. The mean of several numbers says more of a round than the one count of
    what it emitted.

    Args:
        num_drafters: N >= 1.
        prior: [N], only orders the first N rounds; None is uniform, which is index order.

    Source: MetaSD, arXiv 2604.05417: the reward, which it calls block divergence, and UCB on it. Written from the paper's
    idea and never run against its authors' code, from which it may differ: the block is here what the round emitted, scored
    as all drafters are, so what a draft held after its first rejection does not count, and deeper positions are seen without
    the drafter's own features; the bonus is UCB1's, with no factor to tune; in the other modes acceptance_prob is theirs.

    >>> learner = MetaSD(2)
    >>> learner.update([0.5, 0.0], chosen=0)
    >>> learner.weights().tolist()
    [0.0, 1.0]
    """

    name = "meta_sd"
    hears_scores = True
