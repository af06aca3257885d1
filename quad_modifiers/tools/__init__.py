"""The tools around the subject: command line, evaluation, inspection, publishing, benchmarks, demonstration.

The subject never imports a tool; `tests/test_house` holds it to that.
"""
