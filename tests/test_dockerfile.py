"""What COPY and ADD take from the context, read from the text of a Dockerfile."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fal_notebook.dockerfile import copy_add_sources

# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("COPY a /x", ["a"]),
        ("copy a /x\nAdd b /x", ["a", "b"]),
        ("  COPY a /x\n\tADD b /x", ["a", "b"]),
        ("COPY a b c /x/", ["a", "b", "c"]),
        ("COPY\ta\t/x", ["a"]),
        ("COPY a /x\nCOPY b /x\nCOPY a /y", ["a", "b", "a"]),
        ("COPY a", []),
        ("COPY", []),
        ("FROM a AS b\nRUN cp a /x\nCOPYING a /x\nLABEL COPY a /x", []),
        ("", []),
    ],
)
def test_all_arguments_but_the_last_are_sources_in_order(text: str, sources: list[str]) -> None:
    assert copy_add_sources(text) == sources


@pytest.mark.parametrize(
    ("written", "source"),
    [
        *(("/a/b", "a/b"), ("//a", "a"), ("/", ".")),
        *(
            (name, name)
            for name in ("*.py", "src/**/x?.[ab]", "dir/", ".", "..", "../a", "$VAR/x", "${V:-a}")
        ),
        *(("[ab].txt", "[ab].txt"), ("[0-9]*/x", "[0-9]*/x")),
    ],
)
def test_a_leading_slash_goes_and_everything_else_stays(written: str, source: str) -> None:
    assert copy_add_sources(f"COPY {written} /x/") == [source]


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("COPY a \\\n  b \\\n  /x", ["a", "b"]),
        ("COPY a\\\n  b /x", ["a", "b"]),
        ("COPY a\\\nb /x", ["ab"]),
        ("COPY a \\   \n b /x", ["a", "b"]),
        ("COPY a \\\n# why b\n  # is here\n b \\\n\n /x", ["a", "b"]),
        ("RUN x \\\n COPY a /x\nCOPY b /x", ["b"]),
        ("COPY a /x \\", ["a"]),
        ("# COPY a /x\nCOPY b /x\n  # COPY c /x", ["b"]),
        ("# COPY a \\\nCOPY b /x", ["b"]),
        ("COPY a#b /x", ["a#b"]),
    ],
)
def test_lines_are_joined_and_comments_are_not_instructions(text: str, sources: list[str]) -> None:
    assert copy_add_sources(text) == sources


def test_windows_line_ends_and_a_byte_order_mark_change_nothing() -> None:
    text = "\ufeffCOPY a \\\r\n  b /x\r\nRUN <<EOF\r\nCOPY c /x\r\nEOF\r\nADD d /x\r\n"

    assert copy_add_sources(text) == ["a", "b", "d"]


def test_the_escape_directive_is_followed() -> None:
    text = "# syntax=docker/dockerfile:1\n# escape=`\nCOPY a `\n  b` c .\\d C:\\x\\\nCOPY e /x"

    assert copy_add_sources(text) == ["a", "b c", ".\\d", "e"]


def test_an_escape_directive_below_a_comment_is_a_comment() -> None:
    assert copy_add_sources("# hello\n# escape=`\nCOPY a \\\n b /x") == ["a", "b"]


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "flags",
    [
        *("--chown=me:us", "--chmod=755 --link", "--link --parents", "--keep-git-dir=true"),
        *('--chown="me and you"', "--exclude=*.txt --exclude=b", "--checksum=sha256:00", "--link=true --"),
    ],
)
@pytest.mark.parametrize("arguments", ["a /x", '["a", "/x"]'])
def test_flags_are_not_sources(flags: str, arguments: str) -> None:
    assert copy_add_sources(f"ADD {flags} {arguments}") == ["a"]


@pytest.mark.parametrize(
    "flags", ["--from=build", "--FROM=build", "--chown=a --from=0 --link", "--link --From=image:tag"]
)
@pytest.mark.parametrize("arguments", ["a /x", '["a", "/x"]'])
def test_what_is_copied_from_a_stage_is_not_in_the_context(flags: str, arguments: str) -> None:
    assert copy_add_sources(f"COPY {flags} {arguments}\nCOPY b /x") == ["b"]


# ---------------------------------------------------------------- what comes from elsewhere


@pytest.mark.parametrize(
    "url",
    [
        *("http://x.org/a.tar", "https://x.org/a", "HTTPS://x.org/a", "git@github.com:a/b.git"),
        *("git://x.org/a", "ssh://git@x.org/a"),
    ],
)
def test_add_leaves_out_what_the_network_gives_and_keeps_the_files_beside_it(url: str) -> None:
    assert copy_add_sources(f"ADD a {url} b /x/\nADD {url} /x") == ["a", "b"]
    assert copy_add_sources(f'ADD ["{url}", "c", "/x/"]') == ["c"]


@pytest.mark.parametrize("name", ["https.txt", "http/a", "git", "me@home", "https://x.org/a"])
def test_a_name_that_looks_similar_is_copied(name: str) -> None:
    assert copy_add_sources(f"COPY {name} /x") == [name]


def test_a_build_that_is_triggered_later_copies_nothing_now() -> None:
    assert copy_add_sources("ONBUILD COPY a /x\nONBUILD RUN <<E\nCOPY b /x\nE\nCOPY c /x") == ["c"]


# ---------------------------------------------------------------- quotes and lists


@pytest.mark.parametrize(
    ("arguments", "sources"),
    [
        ('["a", "b c", "/dest/"]', ["a", "b c"]),
        ('  [ "/a" ,"b" , "/dest/" ]  ', ["a", "b"]),
        ('["a"]', []),
        ("[]", []),
        ("\"a b\" 'c d' e\\ f /x", ["a b", "c d", "e f"]),
        ('a" "b /x', ["a b"]),
        ('"a\\"b" "c\\d" /x', ['a"b', "c\\d"]),
        ("'a\\b' /x", ["a\\b"]),
        ('"" /x', ["."]),
    ],
)
def test_lists_quotes_and_escapes_are_understood(arguments: str, sources: list[str]) -> None:
    assert copy_add_sources(f"COPY {arguments}") == sources


@pytest.mark.parametrize(
    "arguments",
    [
        *('["a", "/x"', '["a", /x]', '["a", "/x"] b', "[a, b]", '["a", 1, "/x"]', "[1, 2]", "[broken"),
        *('"a /x', "a 'b /x", '["a", ["b"], "/x"]', "[" * 100_000),
    ],
)
def test_what_cannot_be_read_is_mentioned_once_and_the_rest_is_read(
    arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert copy_add_sources(f"COPY a /x\nCOPY {arguments}\nCOPY b /x") == ["a", "b"]

    printed = capsys.readouterr()
    assert printed.err.count("Warning: line 2 of the Dockerfile, COPY") == 1
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_what_can_be_read_is_not_mentioned(capsys: pytest.CaptureFixture[str]) -> None:
    copy_add_sources("FROM x\nRUN echo 'it\nCOPY a /x\nCMD [\"x")

    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- heredocs


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("COPY <<EOF /x\nCOPY a /x\nEOF\nCOPY b /x", ["b"]),
        ("COPY <<ONE <<TWO a /x/\nCOPY b /x\nONE\nCOPY c /x\nTWO\nCOPY d /x", ["a", "d"]),
        ("COPY <<\"EOF\" <<'END' /x/\n1\nEOF\n2\nEND\nADD a /x", ["a"]),
        ("ADD <<-EOF /x\n\tCOPY a /x\n\tEOF\nADD b /x", ["b"]),
        ("RUN <<EOF\nCOPY a /x\nEOF\nCOPY b /x", ["b"]),
        ("RUN python3 - <<EOF && \\\n  true\nCOPY a /x\n# EOF\nEOF\nCOPY b /x", ["b"]),
        ("RUN 3<<EOF cat\nCOPY a /x\nEOF\nCOPY b /x", ["b"]),
        ("  RUN <<EOF\n  COPY a /x\n  EOF\n  COPY b /x", ["b"]),
        ("RUN <<EOF\n a \\\nEOF\nCOPY b /x", ["b"]),
        ('COPY "<<a" /x', ["<<a"]),
    ],
)
def test_a_text_in_the_dockerfile_is_neither_file_nor_instruction(text: str, sources: list[str]) -> None:
    assert copy_add_sources(text) == sources


@pytest.mark.parametrize(
    "command",
    ["echo $((1<<2))", "cat <<<EOF", 'echo "a <<EOF b"', "echo a << EOF", "LABEL", "cat <<NEVER"],
)
def test_what_only_looks_like_a_text_hides_nothing(command: str) -> None:
    assert copy_add_sources(f"RUN {command}\nCOPY a /x\nEOF\nCOPY b /x") == ["a", "b"]


# ---------------------------------------------------------------- anything

FRAGMENTS = st.sampled_from(
    [
        *(
            "COPY",
            "ADD",
            "copy",
            "RUN",
            "ONBUILD",
            "FROM x",
            " ",
            "  ",
            "\t",
            "\n",
            "\r\n",
            "\\",
            "\\\n",
            "`",
        ),
        *('"', "'", "[", "]", ",", '"a"', "a", "/b", "--from=x", "--link", "--", "<<EOF", "<<-E", "EOF", "E"),
        *("# escape=`", "#", "# c", "https://x/y", "\0", "\ufeff", "\x0b", "\u2028", "$A", "{", "1", "null"),
    ]
)


@given(st.text() | st.lists(FRAGMENTS, max_size=40).map("".join))
@example("COPY \\")
@example("# escape=`\nCOPY a `")
def test_no_text_makes_it_fail(text: str) -> None:
    sources = copy_add_sources(text)

    assert all(isinstance(source, str) and source and not source.startswith("/") for source in sources)


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1).filter(
    lambda name: not name.startswith("/") and name.strip()
)


@given(st.lists(NAMES, min_size=1, max_size=5))
def test_every_name_can_be_quoted(names: list[str]) -> None:
    """Whatever a file is called, there is a way to write it, and it is read back."""
    quoted = ['"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"' for name in names]

    assert copy_add_sources(f"COPY {' '.join(quoted)} /x/") == names


@given(st.lists(NAMES, min_size=1, max_size=5))
def test_every_name_can_stand_in_a_list(names: list[str]) -> None:
    import json

    assert copy_add_sources(f"COPY {json.dumps([*names, '/x/'])}") == names
