"""coremltools' own tests with predictions by the interpreter, as a pytest plugin.

    python -m pytest -p tests.coremltools_suite.plugin --pyargs coremltools.converters.mil.mil.ops.tests.iOS18

The tests are those of the installed coremltools; nothing of them is kept here.
"""
