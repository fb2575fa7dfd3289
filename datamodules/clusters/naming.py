"""Names of clusters: the words that distinguish their typical texts."""

from collections.abc import Callable

import numpy as np

WORDS_PER_NAME = 3
TEXTS_PER_CLUSTER = 8
CHARACTERS_PER_TEXT = 2000  # some hundred words: the vocabulary of thousands of clusters stays small


def cluster_names(typical: np.ndarray, read: Callable[[np.ndarray], list[str]] | None) -> list[str]:
    """Return a name for each cluster, such as ``07 court appeal judge``; the numbers alone without texts.

    The words have the largest TF-IDF where the typical texts of each cluster are one document.

    Args:
        typical: ``(K, t)`` ids of candidates of each cluster, the most typical first.
        read: maps ids ``(n,)`` to n texts.
    """
    width = len(str(len(typical) - 1))
    numbers = [f"{index:0{width}d}" for index in range(len(typical))]
    if read is None:
        return [f"cluster {number}" for number in numbers]
    from sklearn.feature_extraction.text import TfidfVectorizer

    documents = [
        " ".join(text[:CHARACTERS_PER_TEXT] for text in read(np.unique(ids[:TEXTS_PER_CLUSTER]))) for ids in typical
    ]
    vectorizer = TfidfVectorizer(token_pattern=r"(?u)[^\W\d_]{3,}", sublinear_tf=True, max_features=200_000)
    try:
        weights = vectorizer.fit_transform(documents)
    except ValueError:  # no text has a word
        return [f"cluster {number}" for number in numbers]
    vocabulary = vectorizer.get_feature_names_out()
    names = []
    for number, row in zip(numbers, weights, strict=True):
        best = row.indices[np.lexsort((row.indices, -row.data))][:WORDS_PER_NAME]
        names.append(" ".join([number, *vocabulary[best]]))
    return names
