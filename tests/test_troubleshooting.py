"""docs/troubleshooting.md lists the messages of the code."""

import importlib.util

import pytest


@pytest.fixture(scope="module")
def generator(repo):
    spec = importlib.util.spec_from_file_location(
        "troubleshooting", repo / "docs/troubleshooting.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sections(generator):
    return generator.sections()


def test_page_is_up_to_date(generator, sections):
    page = generator.PAGE.read_text()
    listed = page.partition(generator.BEGIN)[2].partition(generator.END)[0]
    assert listed.strip() == sections, "run python docs/troubleshooting.py"


def test_messages_of_each_form_are_found(generator, tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        """
STALE_ERROR = "call this after that, please"
def check(x, problems):
    problems.append(f"rank {x} is not like the others")
    if x:
        raise ValueError(f"Invalid x: {x!r}; give "
                         f"a number below {x + 1}")
    warnings.warn(f"no compiler is installed: {x}", stacklevel=2)
    logger.warning("%d parameters are float32 now", x)
    print(f"note: the file {x} is lost", file=sys.stderr)
    print("not a message of the kind that matters")
    raise KeyError(x)
"""
    )
    assert list(generator.messages(source)) == [
        ("text", "call this after that, please"),
        ("text", "rank … is not like the others"),
        ("ValueError", "Invalid x: …; give a number below …"),
        ("warning", "no compiler is installed: …"),
        ("warning", "%d parameters are float32 now"),
        ("note", "note: the file … is lost"),
    ]


def test_every_advice_is_for_a_message(generator, sections):
    assert not [part for part in generator.ADVICE if part not in sections]


def test_every_class_of_messages_has_some(sections):
    """A class would have none if its files had moved."""
    classes = sections.split("### ")[1:]
    assert classes and all("\n- " in messages for messages in classes)
