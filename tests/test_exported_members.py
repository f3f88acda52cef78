"""What a user may import."""

import subprocess
import sys

import langgraph_peerctx


def test_every_exported_name_is_there_and_sorted() -> None:
    names = langgraph_peerctx.__all__
    assert names == sorted(names, key=lambda name: (name.lower() == name, name))
    assert all(getattr(langgraph_peerctx, name) is not None for name in names)


def test_every_published_class_and_function_has_a_docstring() -> None:
    for name in langgraph_peerctx.__all__:
        assert getattr(langgraph_peerctx, name).__doc__, name


def test_importing_needs_no_extra() -> None:
    code = (
        "import sys\n"
        "for name in ('confluent_kafka', 'opentelemetry', 'psycopg', 'typer', 'rich'):\n"
        "    sys.modules[name] = None\n"
        "import langgraph_peerctx"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
