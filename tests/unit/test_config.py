"""What a run file and a peer file may say, what is said when they are wrong, and what their hashes bind."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from p2ptrain.config import (
    MAX_FILE_BYTES,
    BytesTask,
    CausalLmTask,
    DigitsTask,
    Lora,
    Optimizer,
    OwnTask,
    PeerConfig,
    RunConfig,
    Schedule,
    canonical_json,
    check_together,
    commented_toml,
    difference,
    explain,
    fingerprint,
    load_either,
    load_peer,
    load_run,
    parse_run,
    run_digest,
    schema,
)
from p2ptrain.errors import BadMessage, ConfigError
from peers.config_cli import app

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted((CONFIGS / "runs").glob("*.toml"))
PEERS = sorted((CONFIGS / "peers").glob("*.toml"))
EXPERIMENTS = sorted((CONFIGS / "experiments").glob("*.toml"))  # test_experiment_grid loads these


@pytest.fixture
def write(tmp_path):
    """Writes a file with this content and gives its path."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "some.toml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def refusal(load, path) -> str:
    """The one sentence with which `load` refuses the file."""
    with pytest.raises(ConfigError) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message.replace(str(path), "FILE")


# -- the files we ship ---------------------------------------------------------------------------------------

# A changed digest means that peers with the old and the new p2ptrain, or the old and the new file, train
# different runs and refuse each other, and that invites to the old run no longer fit. If that is meant, put
# the new digest here.
DIGESTS = {
    "default": "1e926709a5de4bf6318a6ad4f7b724004297a279712437f35bb9bacf093a4838",
    "digits": "7f1f51a5c6c752679b4f0fbd2c3b1f5e9b3795efe87f56054bcadada5aa0fa70",
    "local": "dfc86d819a272e5c66580a17a74bc122c7c5e336226aa4e9db45cb94ef2c1ca4",
    "own-text": "26494c3fece8a42553d33ab54629c4b451088e6149ca851cdd0edcc3ee2ffa82",
    "partition": "1c8355340f10385d991565a1390ecbe64b8c1bf63d8de3300117ec1bd6c8df57",
    "rehearsal": "f2c218157d46bae1de5696b07902e0b46b5fb0877642e27545c84e328f40236d",
    "rehearsal-leased": "df4b0938bbf2acc2065bd46f277983a3a5508563ab52c0e31a6520c5362ab408",
    "rehearsal-slow": "98a5fff4e0190fd373c6e345605c9d1dae9b461f0daa832c93d31f1780ca5488",
    "rehearsal-tiny": "f6f834121d51538f1a7a7c506891a71a0c733a6d77479559d7af0dd186d55ca8",
    "tiny": "e4bb6822715a002ec2f9da28c1ca18afe394737e069af70017c3fdcc97fe7f44",
    "web-text-125m": "fee9430b12b8c1166265fcc3336ce702fb6ca4099ccb02eca4e611d7d1a57b00",
    "wikitext-lora": "a1caa99ce9fbccf47eae58cdc9207e3a5de0bb86b64f438c67cf7463c6fcede3",
}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_run_file_has_its_known_digest_when_loaded(path):
    assert run_digest(load_run(path)) == DIGESTS[path.stem]


@pytest.mark.parametrize("path", PEERS, ids=lambda path: path.stem)
def test_peer_file_loads_and_fits_the_default_run_when_shipped(path):
    check_together(RunConfig(), load_peer(path))


def test_shipped_files_are_all_tested_when_one_is_added():
    assert {path.stem for path in RUNS} == set(DIGESTS)
    assert set(CONFIGS.rglob("*.toml")) == {*RUNS, *PEERS, *EXPERIMENTS}


@pytest.mark.parametrize(("folder", "config"), [("runs", RunConfig()), ("peers", PeerConfig())])
def test_default_file_spells_out_every_default_and_its_documentation_when_read(folder, config):
    """If this fails, `p2ptrain config default run` (or peer) prints what the file must hold."""
    path = CONFIGS / folder / "default.toml"
    assert load_either(path) == config
    assert path.read_text() == commented_toml(config)


@pytest.mark.parametrize("path", [*RUNS, *PEERS], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_commented_toml_gives_the_same_config_when_loaded(path, write):
    config = load_either(path)
    assert load_either(write(commented_toml(config))) == config


def test_commented_toml_keeps_the_settings_of_a_task_when_they_need_escapes(write):
    task = OwnTask(factory="toys:make", settings={"a-b": 'x"\x7f\n', "c": 3, "d": 0.5, "e": True})
    assert load_run(write(commented_toml(RunConfig(task=task)))).task == task


@given(name=st.text(max_size=64).filter(lambda text: text.isprintable() or "\x7f" in text))
def test_commented_toml_keeps_a_text_when_it_needs_escapes(name, tmp_path_factory):
    path = tmp_path_factory.mktemp("peer") / "peer.toml"
    path.write_text(commented_toml(PeerConfig(name=name, threads=3)), encoding="utf-8")
    assert load_peer(path).name == name


# -- what a file may say -------------------------------------------------------------------------------------


def test_run_is_the_default_one_when_the_file_is_empty(write):
    assert load_run(write("")) == load_either(write("")) == RunConfig()


def test_whole_number_counts_as_a_number_when_the_field_is_a_number(write):
    run = load_run(write("[optimizer]\nlr = 1"))
    assert run == RunConfig(optimizer=Optimizer(lr=1.0))
    assert run_digest(run) == run_digest(RunConfig(optimizer=Optimizer(lr=1.0)))


def test_list_is_taken_when_the_field_is_a_tuple(write):
    peer = load_peer(write('listen = ["/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/31337"]'))
    assert peer.listen == ("/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/31337")


def test_file_is_read_when_windows_wrote_it(write):
    assert load_run(write(b"\xef\xbb\xbfseed = 3\r\n\r\n[task]\r\nlayers = 2\r\n")).task.layers == 2


@pytest.mark.parametrize(
    ("text", "kind"),
    [("seed = 1", RunConfig), ("[task]\nlayers = 1", RunConfig), ("threads = 1", PeerConfig)],
)
def test_either_tells_run_from_peer_when_it_sees_the_keys(write, text, kind):
    assert isinstance(load_either(write(text)), kind)


def test_config_cannot_be_changed_when_made():
    with pytest.raises(ValidationError):
        RunConfig().task.layers = 5


# -- what is said when it is wrong ---------------------------------------------------------------------------

NEAREST = "the nearest known key is"
ID_PATTERN = "^[a-z0-9][a-z0-9-]{0,62}$"
ANY_KIND = '"bytes" or "digits" or "causal_lm" or "own"'
WRONG_RUNS = {
    # an unknown key, and the nearest known one
    "total_stps = 9": f'unknown key "total_stps" in FILE; {NEAREST} total_steps of the run file',
    "[task]\nlayrs = 2": f'unknown key "task.layrs" in FILE; {NEAREST} task.layers of the run file',
    "lr = 0.1": f'unknown key "lr" in FILE; {NEAREST} optimizer.lr of the run file',
    "[optimiser]\nlr = 1": f'unknown key "optimiser" in FILE; {NEAREST} optimizer of the run file',
    "threads = 2": 'unknown key "threads" in FILE; it belongs in the peer file',
    "qqq = 2": 'unknown key "qqq" in FILE; `p2ptrain config schema` lists all keys',
    # out of range
    "[optimizer]\nlr = 20": "optimizer.lr in FILE must be a number, above 0 and at most 10, but is 20",
    # the kind of task
    "[task]\nkind = 'poems'": f'task.kind in FILE must be {ANY_KIND}, but is "poems"',
    "[task]\nkind = 3": f'task.kind in FILE must be {ANY_KIND}, but is "3"',
    "[task]\nkind = 'digits'\nwidth = 0": (
        "task.width in FILE must be a whole number from 1 to 65536, but is 0"
    ),
    "[task]\nkind = 'digits'\nlayers = 1": (
        'unknown key "task.layers" in FILE; it belongs in a table of another task.kind'
    ),
    "[task]\nlayers = 0": "task.layers in FILE must be a whole number from 1 to 64, but is 0",
    "seed = 0x" + "f" * 4000: (
        "seed in FILE must be a whole number, at least 0 and below 2147483648, "
        "but is an integer beyond 64 bits"
    ),
    "[schedule]\nfinal_ratio = nan": "schedule.final_ratio in FILE must be a number from 0 to 1, but is NaN",
    "[task]\ncorpus = ''": 'task.corpus in FILE must be text of 1 to 300 characters, but is ""',
    "codec = 'int7'": (
        'codec in FILE must be "fp32" or "fp16" or "bf16" or "int8" or "int4" or "topk" or "lowrank", '
        'but is "int7"'
    ),
    "strategy = 'alone'": 'strategy in FILE must be "sync" or "local" or "partition", but is "alone"',
    "run_id = 'My Run'": (
        f'run_id in FILE must be text like "python-stdlib" (pattern {ID_PATTERN}), but is "My Run"'
    ),
    # the wrong type
    "[task]\nlayers = 4.0": "task.layers in FILE must be a whole number from 1 to 64, but is 4.0",
    "total_steps = '9'": 'total_steps in FILE must be a whole number from 1 to 1000000000, but is "9"',
    "[optimizer]\nlr = true": "optimizer.lr in FILE must be a number, above 0 and at most 10, but is true",
    "[optimizer]\nnesterov = 1": "optimizer.nesterov in FILE must be true or false, but is 1",
    "run_id = 2026-11-23": (
        f'run_id in FILE must be text like "python-stdlib" (pattern {ID_PATTERN}), but is "2026-11-23"'
    ),
    "task = 3": "task in FILE must be a table of keys, but is 3",
    # several at once: an unknown key first, it may explain the others
    "seed = -1\nsede = 1": (
        'unknown key "sede" in FILE; the nearest known key is seed of the run file (1 of 2 problems)'
    ),
    # fields that do not fit together
    "[task]\nwidth = 100\nheads = 3": (
        "FILE: task.width (100) must be divisible by twice task.heads (3), because each head turns its "
        "values in pairs; the nearest width that is: 102"
    ),
    "min_peers = 9\nmax_peers = 8": (
        "FILE: min_peers (9) must be at most max_peers (8), or no round could ever begin; "
        "lower min_peers or raise max_peers"
    ),
    "heartbeat_seconds = 2": (
        "FILE: silence_seconds (5) must be at least 3 times heartbeat_seconds (2), or one late heartbeat "
        "would drop a healthy peer; raise silence_seconds to 6 or lower heartbeat_seconds"
    ),
    "total_steps = 50": (
        "FILE: schedule.warmup_steps (50) must be less than total_steps (50), or the run would never reach "
        "its learning rate; lower schedule.warmup_steps or raise total_steps"
    ),
    'audit = 0.5\ncodec = "int8"': (
        "FILE: audit (0.5) needs a codec that keeps nothing for later steps, fp32 or fp16, and not int8: "
        "what is kept could not be checked; change the codec or set audit to 0"
    ),
    "audit = 1.0\nmax_peers = 200": (
        "FILE: audit (1) allows max_peers of at most 128, not 200: what a peer signs must name all others; "
        "lower max_peers or set audit to 0"
    ),
    'data = "leased"\ndelay = 1': (
        'FILE: data = "leased" needs delay = 0, not 1: who may take which samples follows from the last '
        'round, and with a delay that is not over yet; set delay to 0 or data to "drawn"'
    ),
    'data = "leased"': (
        'FILE: data = "leased" needs task.exact = true: a sample is leased by its number, so all peers must '
        'have the same text; set task.exact to true or data to "drawn"'
    ),
    'data = "leased"\ntask = { kind = "causal_lm" }': (
        'FILE: data = "leased" needs task.exact = true: a sample is leased by its number, so all peers must '
        'have the same text; set task.exact to true or data to "drawn"'
    ),
    'data = "leased"\ntask = { kind = "causal_lm", dataset = "owner/name", exact = true }': (
        'FILE: data = "leased" needs data with an end, and owner/name is read from the hub as a stream; set '
        'data to "drawn", or task.dataset to a name without a slash and have the files on every peer'
    ),
    # not TOML
    "seed = 1\nlr =\n": "FILE is not valid TOML: Invalid value (at line 2, column 5)",
    "seed = 1\nseed = 2\n": "FILE is not valid TOML: Cannot overwrite a value (at line 2, column 9)",
}


@pytest.mark.parametrize("text", WRONG_RUNS, ids=lambda text: text[:24])
def test_run_file_is_refused_in_one_sentence_when_wrong(write, text):
    assert refusal(load_run, write(text)) == WRONG_RUNS[text]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seed = 1", 'unknown key "seed" in FILE; it belongs in the run file'),
        ("listen = '/ip4/0.0.0.0/tcp/0'", "listen in FILE must be a list of at most 16 entries"),
        ("listen = ['0.0.0.0:31337']", 'listen[0] in FILE must be text like "/ip4/0.0.0.0/tcp/31337"'),
        ("announce = ['/ip4/1.2.3.4/tcp/1', 2]", "announce[1] in FILE must be text like"),
        (
            "micro_batch_size = 0",
            'micro_batch_size in FILE must be a whole number from 1 to 65536 or "auto", but is 0',
        ),
        ("micro_batch_size = true", 'micro_batch_size in FILE must be a whole number from 1 to 65536 or "au'),
        ("device = 'gpu'", 'device in FILE must be text like "cuda:0" (pattern '),
        ("precision = 'tf32'", 'precision in FILE must be "auto" or "fp32" or "bf16" or "fp16", but is "tf'),
        ("metrics_port = 70000", "metrics_port in FILE must be a whole number from 0 to 65535, but is 70000"),
    ],
)
def test_peer_file_is_refused_in_one_sentence_when_wrong(write, text, sentence):
    assert refusal(load_peer, write(text)).startswith(sentence)


def test_file_is_refused_when_it_is_none(tmp_path):
    assert refusal(load_run, tmp_path / "none.toml") == "cannot read FILE: No such file or directory"
    assert refusal(load_peer, tmp_path) == "cannot read FILE: Is a directory"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            b"# " + b"x" * MAX_FILE_BYTES,
            f"FILE is larger than {MAX_FILE_BYTES} bytes, so it is no run or peer file",
        ),
        (b"run_id = '\xff'", "FILE is not UTF-8 text (byte 10); save it as UTF-8"),
        (b"x = " + b"[" * 9000, "FILE is not valid TOML: "),
    ],
    ids=["large", "latin-1", "deep"],
)
def test_file_is_refused_when_it_is_no_text_of_ours(write, content, sentence):
    assert refusal(load_run, write(content)).startswith(sentence)


def test_silence_of_three_heartbeats_is_enough_when_floats_round():
    assert 3 * 0.1 > 0.3
    assert RunConfig(heartbeat_seconds=0.1, silence_seconds=0.3).silence_seconds == 0.3


# -- run and peer together -----------------------------------------------------------------------------------


def test_peer_is_refused_when_its_micro_batch_exceeds_the_target():
    with pytest.raises(
        ConfigError, match=r"^target_batch_size \(64\) of run r is smaller than this peer's "
    ) as caught:
        check_together(RunConfig(run_id="r", target_batch_size=64), PeerConfig(micro_batch_size=128))
    assert "(128); lower micro_batch_size in the peer file" in str(caught.value)
    check_together(RunConfig(target_batch_size=64), PeerConfig(micro_batch_size=64))


def test_peer_is_refused_when_only_the_run_says_where_the_text_is():
    """An invite must not be able to make a volunteer train on, and so give away, a folder of its choice."""
    run = RunConfig(task=BytesTask(corpus="/home"))
    with pytest.raises(ConfigError, match=r'wants the corpus "/home", .* set corpus in the peer file'):
        check_together(run, PeerConfig())
    check_together(run, PeerConfig(corpus="texts"))


# -- identity ------------------------------------------------------------------------------------------------

runs = st.builds(
    RunConfig,
    run_id=st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True),
    seed=st.integers(0, 2**31 - 1),
    target_batch_size=st.integers(1, 2**24),
    codec=st.sampled_from(["fp32", "fp16", "int8"]),
    task=st.builds(DigitsTask, width=st.integers(1, 9))
    | st.builds(
        OwnTask,
        settings=st.dictionaries(
            st.just("a-b"), st.booleans() | st.integers(0, 9) | st.text(max_size=9, alphabet='\x7f"\\\né')
        ),
    )
    | st.builds(CausalLmTask, dataset=st.sampled_from(["stdlib", "poems", "owner/poems"]))
    | st.builds(
        BytesTask, corpus=st.text(min_size=1, max_size=300, alphabet=st.characters(exclude_categories=["Cs"]))
    ),
    optimizer=st.builds(
        Optimizer,
        lr=st.floats(0, 10, exclude_min=True),
        weight_decay=st.floats(0, 1),
        nesterov=st.booleans(),
    ),
)


@given(run=runs)
def test_run_arrives_unchanged_when_sent_as_canonical_json(run):
    text = canonical_json(run)
    assert text.isascii()
    assert len(text) <= MAX_FILE_BYTES
    assert parse_run(text) == parse_run(text.encode()) == run
    assert canonical_json(parse_run(text)) == text


@given(a=runs, b=runs)
def test_digests_agree_when_and_only_when_there_is_no_difference(a, b):
    assert (run_digest(a) == run_digest(b)) == (difference(a, b) == [])
    assert difference(a, a) == []


def test_difference_names_keys_and_both_values_when_runs_differ():
    here = RunConfig(seed=1)
    there = RunConfig(optimizer=Optimizer(lr=1e-3), task=BytesTask(corpus="texts"))
    assert difference(here, there) == [
        "seed: 1 here, 0 there",
        'task.corpus: "stdlib" here, "texts" there',
        "optimizer.lr: 0.0015 here, 0.001 there",
    ]


TABLE = [("embed.weight", (256, 128), "float32"), ("norm.weight", (128,), "float32")]


def test_fingerprint_is_the_known_one_when_nothing_changed():
    """As with DIGESTS: a new value means that old and new peers never meet. PROTOCOL_VERSION counts too."""
    assert fingerprint(RunConfig(run_id="golden"), TABLE) == (
        "94e912bcb09ae9535071bc85e47fb3c804af8fe9fb745bb84d3a7ec7278fa7aa"
    )


@pytest.mark.parametrize(
    ("run", "table"),
    [
        (RunConfig(seed=1), TABLE),
        (RunConfig(schedule=Schedule(warmup_steps=51)), TABLE),
        (RunConfig(), [("embed", (256, 128), "float32"), TABLE[1]]),
        (RunConfig(), [("embed.weight", (128, 256), "float32"), TABLE[1]]),
        (RunConfig(), [("embed.weight", (256, 128), "float64"), TABLE[1]]),
        (RunConfig(), [TABLE[1], TABLE[0]]),
        (RunConfig(), TABLE[:1]),
    ],
    ids=["seed", "warmup", "name", "shape", "dtype", "order", "missing"],
)
def test_fingerprint_differs_when_peers_could_not_average(run, table):
    assert fingerprint(run, table) != fingerprint(RunConfig(), TABLE)


def test_fingerprint_differs_when_adapters_are_for_another_base():
    assert len({fingerprint(RunConfig(), TABLE, base) for base in ("", "a" * 64, "b" * 64)}) == 3


# -- a run from a stranger -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the run that a peer sent is not JSON: EOF while parsing a value at line 1 column 0"),
        ("[]", "the run that a peer sent must be a table of keys, but is []"),
        ("[" * 5000, "the run that a peer sent is not JSON: recursion limit exceeded"),
        ('{"optimizer":{"lr":1e999}}', "optimizer.lr in the run that a peer sent must be a number, above 0"),
        ('{"tempo":1}', 'unknown key "tempo" in the run that a peer sent'),
        ('{"min_peers":70}', "the run that a peer sent: min_peers (70) must be at most max_peers (64)"),
        ('{"\\u001b[2J' + "x" * 5000 + '":1}', 'unknown key "\\u001b[2Jxxx'),
        (b"\xff\xfe", "the run that a peer sent is not JSON: "),
        ('{"run_id":"\\ud800"}', "the run that a peer sent is not JSON: "),
    ],
    ids=["empty", "list", "deep", "infinite", "unknown", "misfit", "escape", "binary", "surrogate"],
)
def test_run_of_a_peer_is_refused_in_a_short_printable_sentence_when_wrong(text, sentence):
    with pytest.raises(BadMessage) as caught:
        parse_run(text)
    message = str(caught.value)
    assert message.startswith(sentence)
    assert message.endswith("; if the swarm runs a newer p2ptrain, upgrade this one")
    assert message.isprintable()
    assert len(message) < 300


def test_run_of_a_peer_is_refused_unread_when_too_large():
    with pytest.raises(BadMessage, match="at most 65536 are read"):
        parse_run(b" " * (MAX_FILE_BYTES + 1))


@given(text=st.binary(max_size=200) | st.text(max_size=200))
def test_run_of_a_peer_gives_a_run_or_bad_message_when_anything_is_sent(text):
    with contextlib.suppress(BadMessage):
        assert isinstance(parse_run(text), RunConfig)


# -- documentation -------------------------------------------------------------------------------------------

TASKS = (BytesTask, CausalLmTask, DigitsTask, OwnTask)
FIELDS = [
    (model, name, field)
    for model in (RunConfig, *TASKS, Lora, Optimizer, Schedule, PeerConfig)
    for name, field in model.model_fields.items()
]


@pytest.mark.parametrize(
    ("model", "name", "field"), FIELDS, ids=lambda value: getattr(value, "__name__", None)
)
def test_field_is_documented_in_sentences_when_declared(model, name, field):
    assert field.description
    assert field.description.rstrip().endswith(".")
    assert len(field.description) > 20


def test_explain_gives_range_default_and_text_when_the_key_is_known():
    head, text = explain("optimizer.lr").split("\n", 1)
    assert head == "optimizer.lr (run file): a number, above 0 and at most 10; default 0.0015"
    assert text.startswith("Learning rate after warm-up.")
    assert explain("micro_batch_size").startswith(
        'micro_batch_size (peer file): a whole number from 1 to 65536 or "auto"; default "auto"\n'
    )
    assert explain("task.layers").startswith("task.layers (run file, task.kind bytes): ")
    assert explain("schedule").startswith("schedule (run file): a table of kind, warmup_steps, final_ratio\n")


def test_explain_tells_tasks_apart_when_a_key_means_something_else_in_each():
    of_bytes, of_digits, _ = explain("task.width").split("\n\n")
    assert of_bytes.startswith("task.width (run file, task.kind bytes): a whole number from 8 to 4096; ")
    assert of_digits.startswith("task.width (run file, task.kind digits): a whole number from 1 to 65536;")


@pytest.mark.parametrize("kind", ["run", "peer"])
def test_explain_knows_every_key_when_the_schema_does(kind):
    document = schema()[kind]
    assert document["additionalProperties"] is False
    for key in document["properties"]:
        assert explain(key).startswith(f"{key} ({kind} file")


def test_explain_names_the_nearest_key_when_there_is_none():
    with pytest.raises(ConfigError, match=r'^there is no key "heads"; .* is task.heads of the run file$'):
        explain("heads")


# -- the command ---------------------------------------------------------------------------------------------


def output(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_check_says_what_a_file_is_and_means_when_it_is_valid():
    path = CONFIGS / "runs" / "tiny.toml"
    text = output("check", str(path))
    assert text.startswith(f"{path} is a valid run file\n")
    assert DIGESTS["tiny"] in text
    assert "is a valid peer file" in output("check", str(CONFIGS / "peers" / "laptop.toml"))


def test_check_ends_with_one_json_object_when_asked():
    last = json.loads(output("check", str(CONFIGS / "runs" / "tiny.toml"), "--json").splitlines()[-1])
    assert (last["kind"], last["digest"]) == ("run", DIGESTS["tiny"])
    assert RunConfig.model_validate(last["config"]) == load_run(CONFIGS / "runs" / "tiny.toml")


def test_check_raises_what_the_command_line_prints_when_a_file_is_wrong(write):
    result = CliRunner().invoke(app, ["check", str(write("lr = 1"))])
    assert isinstance(result.exception, ConfigError)
    assert result.exception.exit_code == 2
    assert result.output == ""


def test_command_prints_explanations_schemas_and_defaults_when_asked():
    assert output("explain", "codec") == explain("codec") + "\n"
    assert json.loads(output("explain", "codec", "--json").splitlines()[-1])["key"] == "codec"
    assert json.loads(output("schema")) == schema()
    assert json.loads(output("schema", "peer", "--json")) == schema()["peer"]
    assert output("default", "run") == commented_toml(RunConfig())


def test_config_imports_neither_torch_nor_hivemind_when_a_command_starts():
    script = "import sys, peers.config_cli; print({'torch', 'hivemind', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
