"""Every public object has an example, and the examples run."""

import doctest
import inspect

import pytest

import sharded_bf16_adamw

PUBLIC = [name for name in sharded_bf16_adamw.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", PUBLIC)
def test_example_of_public_object_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = getattr(sharded_bf16_adamw, name)
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(found) or "")
    assert examples, f"the docstring of {name} has no example"
    test = doctest.DocTest(examples, {}, name, None, None, None)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    output = []
    runner.run(test, out=output.append)
    assert runner.failures == 0, "".join(output)
