"""Short Australian news articles (the Lee background corpus), from the test data inside gensim's wheel.

Text of another kind than the Wikipedia articles that calibrate and train: nothing here is ever calibrated with.
"""

from quad_modifiers.data.wikipedia import gensim_test_data

_FILE = "lee_background.cor"


def news_articles() -> list[str]:
    """Returns the articles, one string each, in the order of the file.

    Raises:
        ImportError: if gensim is not installed.
        FileNotFoundError: if the installed gensim does not contain the articles.
    """
    path = gensim_test_data() / _FILE
    if not path.is_file():
        raise FileNotFoundError(f"the installed gensim has no {_FILE} in its folder test/test_data; install its wheel")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
