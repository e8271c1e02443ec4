import pytest
from hypothesis import given
from hypothesis import strategies as st

from wincey.cli.goflags import Flag, apply_environment, describe, parse_arguments, usage
from wincey.model.errors import UsageError


def lower(text):
    if text != text.lower():
        raise ValueError("must be in lower case")
    return text


FLAGS = (
    Flag("ip-masq", "b", False, "masquerade"),
    Flag("forward", "b", True, "forward"),
    Flag("iface", "l", (), "interface"),
    Flag("prefix", "s", "/net", "prefix", "0.1.0", "0.7.1"),
    Flag("resync", "i", 5, "seconds"),
    Flag("name", "s", "", "name", read=lower),
    Flag("password", "s", "", "password", secret=True),
    Flag("v", "i", 0, "verbosity"),
)


def values(*arguments):
    return parse_arguments(FLAGS, arguments).values


@pytest.mark.parametrize(
    ("arguments", "name", "expected"),
    [
        ([], "prefix", "/net"),
        (["-prefix=/a"], "prefix", "/a"),
        (["--prefix=/a"], "prefix", "/a"),
        (["-prefix", "/a"], "prefix", "/a"),
        (["--prefix", "/a"], "prefix", "/a"),
        (["--prefix="], "prefix", ""),
        (["--prefix=a=b"], "prefix", "a=b"),
        (["--prefix", "--v"], "prefix", "--v"),  # as in Go, what follows is the value
        (["--prefix=/a", "--prefix=/b"], "prefix", "/b"),
        (["--ip-masq"], "ip-masq", True),
        (["-ip-masq=false"], "ip-masq", False),
        (["-forward=0"], "forward", False),
        (["-v", "3"], "v", 3),
        (["-v=0x10"], "v", 16),
        (["-v=010"], "v", 8),
        (["-v=0b11"], "v", 3),
        (["-v=-1"], "v", -1),
        (["-v=1_000"], "v", 1000),
        (["--iface=a", "-iface", "b", "--iface=a"], "iface", ("a", "b", "a")),
        (["--ip-masq", "--"], "ip-masq", True),
        (["--name=abc"], "name", "abc"),
    ],
)
def test_values(arguments, name, expected):
    assert values(*arguments)[name] == expected


@pytest.mark.parametrize("text", ["1", "t", "T", "true", "TRUE", "True"])
def test_true(text):
    assert values(f"--ip-masq={text}")["ip-masq"] is True


@pytest.mark.parametrize("text", ["0", "f", "F", "false", "FALSE", "False"])
def test_false(text):
    assert values(f"--forward={text}")["forward"] is False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ip-masq", "false"], ["'false' after --ip-masq", "write --ip-masq=false"]),
        (["--ip-masq", "eth0"], ["'eth0' is not a flag"]),
        (["--v=1", "false"], ["'false' is not a flag"]),
        (["run", "--ip-masq"], ["'run' is not a flag"]),
        (["--", "--ip-masq"], ["'--ip-masq' is not a flag"]),
        (["-"], ["'-' is not a flag"]),
        ([""], ["'' is not a flag"]),
        (["--ifacee=x"], ["not defined: --ifacee", "did you mean --iface?"]),
        (["--ip_masq"], ["did you mean --ip-masq?"]),
        (["--zzzzzz"], ["not defined: --zzzzzz"]),
        (["--prefix"], ["needs an argument: --prefix"]),
        (["---prefix=a"], ["bad flag syntax: '---prefix=a'"]),
        (["--=a"], ["bad flag syntax"]),
        (["-=a"], ["bad flag syntax"]),
        (["--v=x"], ["invalid value 'x' for flag --v", "whole number"]),
        (["--v=08"], ["whole number"]),
        (["--v= 1"], ["whole number"]),
        (["--v=9223372036854775808"], ["whole number"]),
        (["--v=1.0"], ["whole number"]),
        (["--ip-masq=yes"], ["invalid value 'yes' for flag --ip-masq", "true or false"]),
        (["--ip-masq="], ["true or false"]),
        (["--name=ABC"], ["invalid value 'ABC' for flag --name", "lower case"]),
    ],
)
def test_mistakes_are_explained(arguments, words):
    with pytest.raises(UsageError) as caught:
        values(*arguments)
    assert caught.value.exit_code == 2
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("word", ["-h", "--h", "-help", "--help"])
def test_help_ends_the_reading(word):
    parsed = parse_arguments(FLAGS, ["--v=2", word, "--nonsense"])
    assert parsed.wants_help
    assert parsed.values["v"] == 2


def test_a_mistake_before_help_counts():
    with pytest.raises(UsageError):
        parse_arguments(FLAGS, ["--nonsense", "--help"])


def test_command_line_beats_environment_beats_default():
    parsed = parse_arguments(FLAGS, ["--prefix=/line", "--forward=true"])
    environ = {"FLANNELD_PREFIX": "/env", "FLANNELD_IP_MASQ": "true", "FLANNELD_FORWARD": "false", "FLANNELD_V": ""}
    apply_environment(FLAGS, parsed, environ)
    assert parsed.values["prefix"] == "/line"
    assert parsed.values["ip-masq"] is True
    assert parsed.values["forward"] is True
    assert parsed.values["v"] == 0
    assert parsed.complaints == []


def test_a_list_in_the_environment_is_one_element():
    parsed = parse_arguments(FLAGS, [])
    apply_environment(FLAGS, parsed, {"FLANNELD_IFACE": "eth0,eth1"})
    assert parsed.values["iface"] == ("eth0,eth1",)


def test_a_bad_variable_keeps_the_default_and_the_others_count():
    parsed = parse_arguments(FLAGS, [])
    environ = {"FLANNELD_IP_MASQ": "maybe", "FLANNELD_RESYNC": "x", "FLANNELD_PREFIX": "/env", "FLANNELD_NAME": "X"}
    apply_environment(FLAGS, parsed, environ)
    assert (parsed.values["ip-masq"], parsed.values["resync"], parsed.values["name"]) == (False, 5, "")
    assert parsed.values["prefix"] == "/env"
    assert [complaint.split(" ")[0] for complaint in parsed.complaints] == [
        "FLANNELD_IP_MASQ='maybe'",
        "FLANNELD_RESYNC='x'",
        "FLANNELD_NAME='X'",
    ]


def test_a_misspelt_variable_is_told_and_a_foreign_one_is_not():
    parsed = parse_arguments(FLAGS, [])
    apply_environment(FLAGS, parsed, {"FLANNELD_IPMASQ": "true", "FLANNELD_SERVICE_HOST": "10.0.0.1", "HOME": "/"})
    assert parsed.complaints == ["FLANNELD_IPMASQ is ignored: no flag has this name; did you mean FLANNELD_IP_MASQ?"]


def test_description_hides_secrets():
    parsed = parse_arguments(FLAGS, ["--password=hunter2", "--iface=a", "--iface=b", "--prefix=http://u:hunter2@h/"])
    apply_environment(FLAGS, parsed, {"FLANNELD_V": "2"})
    assert describe(FLAGS, parsed) == "--iface=a,b --prefix=http://***@h/ --password=*** --v=2 (from FLANNELD_V)"
    assert describe(FLAGS, parse_arguments(FLAGS, [])) == "all defaults"


def test_usage():
    assert usage("prog", FLAGS[1:4]) == (
        "Usage: prog [OPTION]...\n"
        "  --forward\n    \tforward (default true)\n"
        "  --iface value\n    \tinterface\n"
        '  --prefix string\n    \tprefix (default "/net") [flannel 0.1.0 to 0.7.1]\n'
    )


@given(
    st.lists(
        st.tuples(st.sampled_from(FLAGS[:6]), st.booleans(), st.booleans(), st.text(), st.booleans(), st.integers())
    )
)
def test_every_spelling_reads_the_same(choices):
    arguments, expected = [], {flag.name: flag.default for flag in FLAGS}
    for flag, one_dash, joined, text, truth, number in choices:
        value = {"b": truth, "i": number % 1000, "l": text, "s": text.lower()}[flag.kind]
        written = str(value).lower() if flag.kind == "b" else str(value)
        dashes = "-" if one_dash else "--"
        if flag.name == "name" and written != written.lower():
            continue
        if flag.kind == "b" or joined:
            arguments.append(f"{dashes}{flag.name}={written}")
        else:
            arguments += [f"{dashes}{flag.name}", written]
        expected[flag.name] = (*expected[flag.name], value) if flag.kind == "l" else value
    assert values(*arguments) == expected


@given(st.lists(st.text(max_size=12)))
def test_any_words_are_read_or_refused(arguments):
    try:
        parse_arguments(FLAGS, arguments)
    except UsageError as error:
        assert str(error)  # noqa: PT017  # words that happen to be right are as good an outcome
