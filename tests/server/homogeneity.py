"""Do two samples of token sequences come from one distribution?"""

from collections import Counter

import numpy as np
from scipy.stats import chi2_contingency

MIN_EXPECTED = 5  # the usual bound for the chi-square approximation


def homogeneity_p_value(first: np.ndarray, second: np.ndarray) -> float:
    """Return the p-value of a chi-square test of homogeneity.

    Args:
        first, second: [samples, tokens] or [samples]; a row is one outcome. Outcomes too rare for
            the test are counted together.
    """
    counts = [Counter(map(tuple, np.atleast_2d(rows.T).T.tolist())) for rows in (first, second)]
    outcomes = sorted(counts[0].keys() | counts[1].keys())
    table = np.array([[count[outcome] for outcome in outcomes] for count in counts])
    smaller_share = min(len(first), len(second)) / (len(first) + len(second))
    is_rare = table.sum(axis=0) * smaller_share < MIN_EXPECTED
    table = np.column_stack([table[:, ~is_rare], table[:, is_rare].sum(axis=1)])
    table = table[:, table.sum(axis=0) > 0]
    if table.shape[1] < 2:
        return 1.0  # one outcome in both
    return float(chi2_contingency(table).pvalue)
