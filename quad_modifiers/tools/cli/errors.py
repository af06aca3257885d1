"""What an exception means to somebody at a terminal: a line of text and an exit code."""

FAILURE = 1
BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
TERMINATED = 143  # 128 + SIGTERM

_FILE_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)

_EXTRAS = {
    **dict.fromkeys(("llmcompressor", "datasets", "accelerate"), "compress"),
    **dict.fromkeys(("typer", "rich", "httpx"), "cli"),
    **{"lm_eval": "eval", "matplotlib": "report", "peft": "peft", "gensim": "text", "gguf": "demo"},
}


def exit_code(error: Exception) -> int:
    """Returns the exit code for an exception.

    Bad input is what the user must change before trying again: arguments, recipe, files. This package raises
    `ValueError` and the file errors for it. Anything else failed while working.
    """
    return BAD_INPUT if _is_usage_error(error) or isinstance(error, (ValueError, *_FILE_ERRORS)) else FAILURE


def describe(error: Exception) -> str:
    """Returns an exception's message as one line; that of a `RecipeError` as one line for each problem."""
    from quad_modifiers.recipe.problems import RecipeError

    if _is_usage_error(error):
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context is not None else ""
        return f"{_one_line(error.format_message())}{hint}"  # type: ignore[attr-defined]
    if isinstance(error, RecipeError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{_one_line(str(error))}{_install_hint(error.name)}"
    message = _one_line(str(error))
    if isinstance(error, (ValueError, OSError, RuntimeError)) and message:
        return message
    # Not worded for users: the type says more than the text.
    return f"{type(error).__name__}: {message}; run the command again with --debug for the traceback"


def _is_usage_error(error: Exception) -> bool:
    """Returns whether an error is click's, of which typer, depending on its version, has a private copy."""
    return callable(getattr(error, "format_message", None))


def _install_hint(module: str) -> str:
    extra = _EXTRAS.get(module.partition(".")[0])
    return f"; install it with `pip install 'quad-modifiers[{extra}]'`" if extra else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())
