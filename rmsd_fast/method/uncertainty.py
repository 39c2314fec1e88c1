"""Learned weights of the terms of a loss: each term has a log-variance s, and the weights exp(-s) follow from it.

    task:      sum over terms of  1/2 * (exp(-s) * L + s)              one s per term
    instance:  sum over terms and questions of  exp(-s) * L + s        one s per term and question

The minimum over s is at exp(s) = L. A term is therefore divided by its own value, and a single term would only become
its logarithm. At s = 0, the weights are 1/2 (task) and 1 (instance).

Source: the code of Beta-KD (arXiv 2603.21426). Its paper has another form, with b = softplus(network) as the weight and
the penalty -(d/2) log b.
"""

import torch
from torch import Tensor

# Bound of |s|.
LIMIT = 5.0
# Hidden units of the network that computes s from the features of a question.
HIDDEN = 128
_FACTORS = {"task": 0.5, "instance": 1.0}


def term_weights(log_variance: Tensor, *, form: str) -> Tensor:
    """Return the weights of the terms in the model's loss, in the shape of `log_variance`.

    Args:
        log_variance: s, any shape, floating.
        form: `task` or `instance`.
    """
    return _FACTORS[form] * torch.exp(-log_variance)


def uncertainty_loss(values: Tensor, shares: Tensor, log_variance: Tensor, *, form: str) -> Tensor:
    """Return the loss of which s is trained: sum of factor * (exp(-s) * value + share * s), a scalar.

    A term's mean over tokens is divided among the questions. Question i has the part `values[i]` of the mean, and the
    share `shares[i]` of its tokens. L of question i is then values[i] / shares[i]. A question without the term has
    share 0, and its s gets no gradient.

    Args:
        values: part of each question in each term, [Q, M], constants.
        shares: share of each question in the tokens of each term, [Q, M], constants.
        log_variance: s, [Q, M], or [M] for all questions.
        form: `task` or `instance`.
    """
    return _FACTORS[form] * (torch.exp(-log_variance) * values + shares * log_variance).sum()
