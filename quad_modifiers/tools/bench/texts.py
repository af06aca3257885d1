"""The texts that perplexity is measured on; none of them calibrates or trains."""

from collections.abc import Callable

from quad_modifiers.data import news_articles, stdlib_code, wikipedia_articles

WIKIPEDIA = "Wikipedia, held out"
NEWS = "news (Lee corpus)"
CODE = "Python code, held out"

TEXTS: dict[str, Callable[[], list[str]]] = {
    WIKIPEDIA: lambda: wikipedia_articles("held_out"),
    NEWS: news_articles,
    CODE: lambda: stdlib_code("held_out"),
}
