"""`quad plugins`: what is installed and what it contributes."""

from quad_modifiers.tools.console import print_table


def plugins() -> None:
    """List the installed distributions and what they contribute, such as modifiers, recipes and kernels.

    A plugin that cannot be imported is listed with the reason; the rest works without it.
    """
    from quad_modifiers.plugins import plugin_table

    rows = [
        (row.distribution, row.version, f"FAILED: {row.failure}" if row.failure else "\n".join(row.contributes))
        for row in plugin_table()
    ]
    print_table(("distribution", "version", "contributes"), rows)
