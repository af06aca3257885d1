"""Lists the packages, which lie in three folders; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["quad_modifiers", "quad_modifiers.*", "quad_peft", "quad_peft.*"]),
        # kernels/ itself must not be a package: transformers probes for the PyPI package `kernels` by that name.
        *find_packages("kernels", include=["quad_kernels", "quad_kernels.*"]),
        # The recipes at the top of the repository are data of the installed package.
        "quad_modifiers._recipes",
    ],
    package_dir={"quad_kernels": "kernels/quad_kernels", "quad_modifiers._recipes": "recipes"},
    package_data={
        "quad_modifiers._recipes": ["*.yaml"],
        "quad_modifiers": ["py.typed", "tools/evaluation/tasks/*.yaml"],
        "quad_kernels": ["py.typed"],
    },
)
