# SPDX-License-Identifier: Apache-2.0
"""The decode command: prompts in, records out, nothing lost on the way."""

import dataclasses
import io
import json
import re
import sys

import pytest

from jaxspec import __main__ as front_door
from jaxspec.answers import TextEvent
from jaxspec.apps import decode
from jaxspec.metrics import Stats

pytestmark = pytest.mark.usefixtures("quick_compiles")

NO_CACHE = "--compilation_cache_dir="


def run(*argv: str) -> int:
  return front_door.main(["decode", NO_CACHE, *argv])


def write_lines(path, *items):
  path.write_text("".join(json.dumps(item) + "\n" for item in items))
  return path


def read_lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path):
  return write_lines(
    tmp_path / "in.jsonl", *[{"prompt": f"p{i}"} for i in range(5)]
  )


# One prompt.


def test_text_streams_to_stdout_and_stats_to_stderr(fake, capsys):
  assert run("--prompt=good day", "--chat") == 0
  out, err = capsys.readouterr()
  assert out == "GOOD.DAY.\n"
  assert err.startswith("prompt 8 tok ") and "accepted=1/4" in err
  assert err.count("\n") == 1
  assert fake.chat


def test_events_as_json_lines(fake, capsys):
  assert run("--prompt=good day", "--emit=jsonl") == 0
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [(e["text"], e["settled"], e["replaces"]) for e in lines] == [
    ("a guess", False, 0), ("GOOD.", True, 7), ("DAY.", True, 0),
    ("", True, 0)]
  assert lines[-1]["completion"]["token_ids"] == [1, 2, 3, 4]
  assert not any("completion" in line for line in lines[:-1])


def test_who_acts_on_text_asks_for_what_is_settled(fake, capsys):
  assert run("--prompt=good day", "--emit=jsonl", "--hold_until_settled") == 0
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [(e["text"], e["replaces"]) for e in lines] == [
    ("GOOD.", 0), ("DAY.", 0), ("", 0)]


def test_json_lines_are_of_one_prompt(fake, prompts, capsys):
  assert run(f"--prompts={prompts}", "--emit=jsonl") == 2
  assert "--emit=jsonl is for one --prompt" in capsys.readouterr().err


class Terminal(io.StringIO):
  """What stands on a line, told what a terminal is told."""

  def isatty(self):
    return True

  def rendered(self):
    line, at, text = [], 0, self.getvalue()
    while text:
      found = re.match(r"\x1b\[(\d*)([DKm])", text)
      if not found:
        line[at:at + 1] = [text[0]]
        at, text = at + 1, text[1:]
        continue
      count, what = found.groups()
      if what == "D":
        at -= int(count)
      elif what == "K":
        del line[at:]
      text = text[found.end():]
    return "".join(line)


def test_a_guess_is_dim_and_then_gone(fake, monkeypatch):
  monkeypatch.setattr(sys, "stdout", Terminal())
  assert run("--prompt=good day") == 0
  assert "\x1b[2ma guess\x1b[0m" in sys.stdout.getvalue()
  assert sys.stdout.rendered() == "GOOD.DAY.\n"


def test_a_guess_stays_on_its_line(fake, monkeypatch):
  """Only so much of it can be taken back."""
  monkeypatch.setenv("COLUMNS", "12")
  monkeypatch.setattr(sys, "stdout", Terminal())
  screen = decode.Terminal()
  screen.show(TextEvent("first\nsecond ", True))
  screen.show(TextEvent("a long guess", False))
  assert sys.stdout.getvalue().endswith("\x1b[2ma lo\x1b[0m")
  screen.show(TextEvent("two\nlines", False, 12))
  assert sys.stdout.rendered() == "first\nsecond two"
  screen.show(TextEvent("wor", True, 9))
  assert sys.stdout.rendered() == "first\nsecond wor"
  screen.show(TextEvent("日本", False))                        # no room
  assert sys.stdout.rendered() == "first\nsecond wor"
  screen.show(TextEvent("d", True, 2))
  assert sys.stdout.rendered() == "first\nsecond word"


def test_nothing_provisional_is_shown_who_holds(fake, monkeypatch):
  monkeypatch.setattr(sys, "stdout", Terminal())
  assert run("--prompt=good day", "--hold_until_settled") == 0
  assert sys.stdout.getvalue() == "GOOD.DAY.\n"


def test_a_prompt_can_come_from_stdin(fake, capsys, monkeypatch):
  monkeypatch.setattr(sys, "stdin", io.StringIO("from afar"))
  assert run("--prompt=-") == 0
  assert capsys.readouterr().out == "FROM.AFAR.\n"


def test_one_prompt_may_have_an_output(fake, tmp_path):
  out = tmp_path / "out.jsonl"
  assert run("--prompt=hi", f"--output={out}") == 0
  (record,) = read_lines(out)
  assert record["text"] == "HI" and record["stats"]["drafted"] == 4


# Settings.


def test_flags_reach_generator_and_options(fake):
  assert (
    run(
      "--prompt=x",
      "--model=m",
      "--drafter=prompt_lookup:length=8",
      "--verifier=exact",
      "--rows=3",
      "--capacity=64",
      "--dtype=float32",
      "--mesh=data=1,tensor=2",
      "--cache=paged",
      "--prefill=layer_major",
      "--kernels=xla",
      "--adapter=tuned",
      "--max_new_tokens=7",
      "--temperature=0.5",
      "--top_k=3",
      "--top_p=0.9",
      "--min_p=0.1",
      "--repetition_penalty=1.5",
      "--presence_penalty=0.25",
      "--frequency_penalty=0.75",
      "--logit_bias=15=-100,22=2.5",
      "--stop=a,b",
      "--stop=c",
      "--stop_token_ids=5,6",
      "--seed=9",
      "--logprobs",
      "--ignore_eos",
    )
    == 0
  )
  assert fake.loaded == dict(
    model="m",
    drafter="prompt_lookup:length=8",
    verifier="exact",
    rows=3,
    capacity=64,
    dtype="float32",
    mesh={"data": 1, "tensor": 2},
    cache="paged",
    prefill="layer_major",
    kernels="xla",
    adapter="tuned",
  )
  options = fake.options
  assert (options.max_new_tokens, options.temperature) == (7, 0.5)
  assert (options.top_k, options.top_p, options.min_p) == (3, 0.9, 0.1)
  assert options.repetition_penalty == 1.5
  assert options.presence_penalty == 0.25
  assert options.frequency_penalty == 0.75
  assert options.logit_bias == {15: -100.0, 22: 2.5}
  assert options.stop == ("a,b", "c") and options.stop_token_ids == (5, 6)
  assert options.seed == 9 and options.logprobs and options.ignore_eos


def test_simulated_acceptance_is_a_verifier_and_says_so(fake, capsys):
  assert run("--prompt=x", "--simulate_acceptance=0.7") == 0
  assert fake.loaded["verifier"] == "simulated:rate=0.7"
  warning = "jaxspec: warning: acceptance is simulated; the text is not the "
  assert capsys.readouterr().err.count(warning) == 1
  assert run("--prompt=x", "--verifier=simulated:rate=0.5") == 0
  assert fake.loaded["verifier"] == "simulated:rate=0.5"
  assert capsys.readouterr().err.count(warning) == 1
  assert run("--prompt=x", "--verifier=typical") == 0
  assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("verifier", ["exact", "rejection", "simulated"])
def test_simulated_acceptance_goes_with_no_other_verifier(
  verifier, fake, capsys
):
  fake.loaded = None
  code = run(
    "--prompt=x", "--simulate_acceptance=0.7", f"--verifier={verifier}"
  )
  assert code == 2 and fake.loaded is None
  err = capsys.readouterr().err
  assert f"leave out --verifier={verifier}" in err and err.count("\n") == 1


def test_other_spellings_mean_the_same(fake):
  assert (
    run(
      "--prompt=x",
      "--draft=prompt_lookup",
      "--max-new-tokens=3",
      "--temp",
      "0.25",
      "--no-chat",
    )
    == 0
  )
  assert fake.loaded["drafter"] == "prompt_lookup"
  assert fake.options.max_new_tokens == 3
  assert fake.options.temperature == 0.25


def test_what_is_not_given_comes_from_the_checkpoint(fake, capsys):
  fake.defaults = {"temperature": 0.6, "top_p": 0.9}
  assert run("--prompt=x", "--top_p=0.5") == 0
  assert (fake.options.temperature, fake.options.top_p) == (0.6, 0.5)
  assert "generation_config sets temperature=0.6\n" in capsys.readouterr().err


def test_bad_options_exit_2(fake, capsys):
  assert run("--prompt=x", "--top_p=1.5") == 2
  assert capsys.readouterr().err == (
    "jaxspec: top_p must be in (0, 1], got 1.5\n"
  )


# --config.

CONFIG = """
import ml_collections

def get_config(length="6"):
  config = ml_collections.ConfigDict()
  config.model = "from config"
  config.max_new_tokens = int(length)
  config.temperature = 1
  config.mesh = ml_collections.ConfigDict({"data": 2, "tensor": 4})
  config.stop = ("one", "two")
  config.top_p = None
  return config
"""


@pytest.fixture
def config(tmp_path):
  path = tmp_path / "config.py"
  path.write_text(CONFIG)
  return path


def test_a_config_is_read(fake, config):
  assert run("--prompt=x", f"--config={config}") == 0
  assert fake.loaded["model"] == "from config"
  assert fake.loaded["mesh"] == {"data": 2, "tensor": 4}
  assert fake.options.max_new_tokens == 6
  assert fake.options.temperature == 1.0
  assert fake.options.stop == ("one", "two")
  assert fake.options.top_p == 1.0


def test_flags_win_over_config_and_config_over_checkpoint(fake, config):
  fake.defaults = {"temperature": 0.6, "top_k": 5}
  assert (
    run(
      "--prompt=x",
      "--max_tokens=2",
      f"--config={config}",
      "--model=from flag",
      "--mesh=data=8",
    )
    == 0
  )
  assert fake.loaded["model"] == "from flag"
  assert fake.loaded["mesh"] == {"data": 8}
  assert fake.options.max_new_tokens == 2
  assert fake.options.temperature == 1.0 and fake.options.top_k == 5


def test_config_values_can_be_changed(fake, config):
  assert (
    run(
      "--prompt=x",
      f"--config={config}:9",
      "--config.mesh.tensor=2",
      "--config.model=other",
    )
    == 0
  )
  assert fake.loaded["model"] == "other"
  assert fake.loaded["mesh"] == {"data": 2, "tensor": 2}
  assert fake.options.max_new_tokens == 9


@pytest.mark.parametrize(
  "argv, words",
  [
    (["--config.modle=x"], "config has no 'modle'"),
    (["--config.modle=x"], "Did you mean 'model'?"),
    (["--config.mesh.tensr=2"], "Did you mean 'tensor'?"),
    (["--config.rows=2"], "Pass it as --rows=..."),
    (["--config.model.x=2"], "config.model has no parts"),
    (["--config.max_new_tokens=many"], "many"),
  ],
)
def test_unknown_config_keys_get_the_nearest(fake, config, argv, words, capsys):
  assert run("--prompt=x", f"--config={config}", *argv) == 2
  err = capsys.readouterr().err
  assert words in err and err.count("\n") == 1


@pytest.mark.parametrize(
  "text, words",
  [
    ("def get_config(): return {'modle': 1}", "Did you mean 'model'?"),
    ("def get_config(): return {'draft': 'x'}", "sets 'draft', which is no"),
    ("def get_config(): return {'rows': 'x'}", "config.rows='x'"),
    ("def get_config(): return 1 / 0", "does not load: division by zero"),
    ("def get_config(:", "does not load"),
    ("import nothing_like_it", "No module named 'nothing_like_it'"),
    ("x = 1", "does not load"),
    ("def get_config(): return None", "does not load"),
  ],
)
def test_a_broken_config_is_one_sentence(fake, tmp_path, text, words, capsys):
  path = tmp_path / "broken.py"
  path.write_text(text)
  assert run("--prompt=x", f"--config={path}") == 2
  err = capsys.readouterr().err
  assert words in err and err.count("\n") == 1


def test_a_missing_config_is_named(fake, capsys):
  assert run("--prompt=x", "--config=nowhere.py") == 2
  assert "there is no file 'nowhere.py'" in capsys.readouterr().err
  assert run("--prompt=x", "--config.model=x") == 2
  assert "comes before --config=FILE" in capsys.readouterr().err


# Many prompts.


def test_results_have_the_order_of_the_prompts(fake, prompts, tmp_path, capsys):
  out = tmp_path / "out.jsonl"
  assert run(f"--prompts={prompts}", f"--output={out}", "--logprobs") == 0
  records = read_lines(out)
  assert [r["text"] for r in records] == ["P0", "P1", "P2", "P3", "P4"]
  assert records[0] == {
    "prompt": "p0",
    "text": "P0",
    "token_ids": [1, 2, 3, 4],
    "finish_reason": "length",
    "stats": records[0]["stats"],
    "logprobs": [-0.5] * 4,
  }
  assert records[0]["stats"]["accepted"] == 1
  stdout, err = capsys.readouterr()
  assert stdout == "" and err.startswith("5 requests ")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_without_an_output_records_go_to_stdout_in_order(fake, prompts, capsys):
  assert run(f"--prompts={prompts}") == 0
  lines = capsys.readouterr().out.splitlines()
  assert [json.loads(x)["prompt"] for x in lines] == [f"p{i}" for i in range(5)]


def test_every_kind_of_prompt_is_read(fake, tmp_path, capsys):
  conversation = [{"role": "user", "content": "héllo"}]
  path = write_lines(
    tmp_path / "in.jsonl",
    {"prompt": "text", "id": 3},
    {"messages": conversation},
    {"turns": ["first", "second"], "category": "writing"},
    {"prompt": [1, 2, 3]},
  )
  path.write_text(path.read_text() + "\n\n")
  out = tmp_path / "out.jsonl"
  assert run(f"--prompts={path}", f"--output={out}") == 0
  assert fake.prompts == ["text", conversation, "first", [1, 2, 3]]
  # Acceptance is told apart by what was asked.
  tasks = [json.loads(x)["stats"]["task"] for x in out.read_text().splitlines()]
  assert tasks == ["", "", "writing", ""]
  err = capsys.readouterr().err
  told = "requests, {} drafts, each next one accepted at [.50 .00]"
  assert f"fake: 3 {told.format(6)}" in err
  assert f"fake on writing: 1 {told.format(2)}" in err


@pytest.mark.parametrize(
  "text, words",
  [
    ("{", ":2 is not JSON"),
    ("[1]", ":2 must be an object with one of prompt, messages and turns"),
    ("{}", "and has none"),
    ('{"prompt": "a", "turns": ["b"]}', "and has prompt, turns"),
    ('{"prompt": 3}', ":2: prompt must hold text, got 3"),
    ('{"prompt": null}', "must hold text"),
    ('{"prompt": [true]}', "must hold text"),
    ('{"turns": []}', "turns must be a list of at least one string"),
    ('{"turns": [1]}', "turns must hold text"),
    ('{"prompt": "a", "task": 3}', ":2: task must be text, got 3"),
    ('{"messages": []}', "messages must be a list of at least one"),
    ('{"messages": [{"role": "user"}]}', "messages[0] needs 'content'"),
    ('{"messages": ["hi"]}', "messages[0] needs 'role'"),
    ("[" * 100000, "is not JSON"),
  ],
)
def test_a_wrong_line_is_named(fake, tmp_path, text, words, capsys):
  path = tmp_path / "in.jsonl"
  path.write_text('{"prompt": "fine"}\n' + text + "\n")
  assert run(f"--prompts={path}") == 2
  err = capsys.readouterr().err
  assert words in err and err.count("\n") == 1 and len(err) < 300


@pytest.mark.parametrize(
  "content, words",
  [
    (None, "No such file"),
    (b"", "holds no prompt"),
    (b'{"prompt": "\xff"}', "byte 12 is not UTF-8"),
  ],
)
def test_an_unreadable_prompts_file_is_named(
  fake, tmp_path, content, words, capsys
):
  path = tmp_path / "in.jsonl"
  if content is not None:
    path.write_bytes(content)
  assert run(f"--prompts={path}") == 2
  err = capsys.readouterr().err
  assert words in err and str(path) in err


def test_contradictions_are_refused(fake, prompts, capsys):
  assert run("--prompt=x", f"--prompts={prompts}") == 2
  assert run("--prompt=x", "--resume") == 2
  err = capsys.readouterr().err
  assert "pass one of --prompt=TEXT" in err and "--resume needs" in err


# Nothing is lost.


@pytest.mark.parametrize("failure, code", [(KeyboardInterrupt, 130)])
def test_what_was_finished_survives_and_is_resumed(
  fake, prompts, tmp_path, capsys, failure, code
):
  out = tmp_path / "out.jsonl"
  argv = [f"--prompts={prompts}", f"--output={out}"]
  fake.fails_after, fake.failure = 2, failure
  assert run(*argv) == code
  err = capsys.readouterr().err
  assert "2 of 5 results are in" in err and "--resume" in err
  assert "Traceback" not in err and not out.exists()

  fake.fails_after = None
  assert run(*argv) == 2
  assert "pass --resume to go on" in capsys.readouterr().err

  assert run(*argv, "--resume", "--rows=2") == 0
  assert fake.prompts == ["p0", "p1", "p2"]
  assert [r["prompt"] for r in read_lines(out)] == [f"p{i}" for i in range(5)]
  assert not (tmp_path / "out.jsonl.partial").exists()

  assert run(*argv, "--resume") == 0
  assert "nothing to do" in capsys.readouterr().err


def test_a_crash_of_our_own_keeps_results_too(fake, prompts, tmp_path):
  out = tmp_path / "out.jsonl"
  fake.fails_after, fake.failure = 3, ZeroDivisionError
  with pytest.raises(ZeroDivisionError):
    run(f"--prompts={prompts}", f"--output={out}")
  assert len(read_lines(tmp_path / "out.jsonl.partial")) == 1 + 3


def test_a_line_cut_short_is_decoded_again(fake, prompts, tmp_path):
  out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
  argv = [f"--prompts={prompts}", f"--output={out}"]
  fake.fails_after = 3
  assert run(*argv) == 130
  partial.write_bytes(partial.read_bytes()[:-20])
  fake.fails_after = None
  assert run(*argv, "--resume") == 0
  assert fake.prompts == ["p0", "p1", "p2"]
  assert len(read_lines(out)) == 5


@pytest.mark.parametrize(
  "other", ["--seed=1", "--model=other", "--chat", "--drafter=prompt_lookup"]
)
def test_results_of_other_settings_are_not_mixed(
  fake, prompts, tmp_path, other, capsys
):
  argv = [f"--prompts={prompts}", f"--output={tmp_path / 'out.jsonl'}"]
  fake.fails_after = 2
  assert run(*argv) == 130
  assert run(*argv, "--resume", other) == 2
  assert "other prompts or settings" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [b"", b"junk\n", b'{"a": 1}\n', b"[]\n1\n"])
def test_a_damaged_partial_file_is_refused(
  fake, prompts, tmp_path, damage, capsys
):
  (tmp_path / "out.jsonl.partial").write_bytes(damage)
  out = f"--output={tmp_path / 'out.jsonl'}"
  assert run(f"--prompts={prompts}", out, "--resume") == 2
  assert "remove" in capsys.readouterr().err
  assert (tmp_path / "out.jsonl.partial").exists()


def test_nothing_finished_leaves_nothing_behind(fake, prompts, tmp_path):
  fake.fails_after = 0
  out = tmp_path / "out.jsonl"
  assert run(f"--prompts={prompts}", f"--output={out}") == 130
  assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_an_older_output_stays_until_the_new_one_is_whole(
  fake, prompts, tmp_path
):
  out = tmp_path / "out.jsonl"
  out.write_text("older\n")
  fake.fails_after = 2
  argv = [f"--prompts={prompts}", f"--output={out}"]
  assert run(*argv) == 130
  assert out.read_text() == "older\n"
  fake.fails_after = None
  assert run(*argv, "--resume") == 0
  assert len(read_lines(out)) == 5


@pytest.mark.parametrize(
  "output, words",
  [("/dev/null", "not a regular file"), ("/no/such/out", "there is no folder")],
)
def test_impossible_outputs_are_refused_at_once(
  fake, prompts, output, words, capsys
):
  fake.loaded = None
  assert run(f"--prompts={prompts}", f"--output={output}") == 2
  assert words in capsys.readouterr().err
  assert fake.loaded is None


def test_an_interrupted_stream_ends_its_line(fake, capsys):
  fake.fails_after = 0
  assert run("--prompt=x") == 130
  out, err = capsys.readouterr()
  assert out == "\n" and err == "jaxspec: interrupted\n"


# With a real generator and a tiny model.


def counts(record) -> Stats:
  names = {field.name for field in dataclasses.fields(Stats)}
  return Stats(**{k: v for k, v in record["stats"].items() if k in names})


def test_speculation_gives_the_same_tokens_and_counts_add_up(
  tiny_model, tmp_path, capsys
):
  path = write_lines(
    tmp_path / "in.jsonl",
    {"prompt": "abcabcabcabc"},
    {"messages": [{"role": "user", "content": "one two one two"}]},
    {"turns": ["to and fro and to"]},
  )
  records = {}
  for drafter in ("autoregressive", "prompt_lookup"):
    out = tmp_path / f"{drafter}.jsonl"
    code = run(
      f"--model={tiny_model}",
      f"--prompts={path}",
      f"--output={out}",
      f"--drafter={drafter}",
      "--rows=2",
      "--capacity=128",
      "--dtype=float32",
      "--max_new_tokens=24",
      "--ignore_eos",
      "--logprobs",
    )
    assert code == 0
    records[drafter] = read_lines(out)
    stdout, err = capsys.readouterr()
    assert stdout == "" and "generation_config sets repetition_penalty" in err
    assert "3 requests " in err and err.rstrip().endswith("verify=exact")
  plain, lookup = records.values()
  assert [r["token_ids"] for r in plain] == [r["token_ids"] for r in lookup]
  assert [r["text"] for r in plain] == [r["text"] for r in lookup]
  assert plain[1]["prompt"] == "[user] one two one two\n"
  for record in (*plain, *lookup):
    counts(record).reconcile()
    assert record["finish_reason"] == "length"
    assert len(record["logprobs"]) == len(record["token_ids"]) == 24
  assert sum(r["stats"]["drafted"] for r in plain) == 0
  assert sum(r["stats"]["accepted"] for r in lookup) > 0


@pytest.mark.medium
def test_a_stream_prints_what_its_record_holds(
  tiny_model, tmp_path, capsysbinary
):
  out = tmp_path / "out.jsonl"
  code = run(
    f"--model={tiny_model}",
    "--prompt=abababab",
    f"--output={out}",
    f"--profile_dir={tmp_path / 'trace'}",
    "--drafter=prompt_lookup",
    "--capacity=128",
    "--dtype=float32",
    "--max_new_tokens=16",
    "--temperature=0.8",
    "--seed=3",
  )
  assert code == 0
  (record,) = read_lines(out)
  stdout, err = capsysbinary.readouterr()
  assert stdout.decode() == record["text"] + "\n"
  counts(record).reconcile()
  assert b"seed=3 verify=exact" in err
  assert list((tmp_path / "trace").rglob("*.xplane.pb"))


@pytest.mark.medium
@pytest.mark.parametrize(
  "argv, label",
  [
    (["--verifier=rejection"], "rejection"),
    (["--verifier=typical:epsilon=0.2"], "typical(lossy)"),
    (["--simulate_acceptance=1"], "simulated(1, not the model's text)"),
  ],
)
def test_every_output_names_the_verifier(
  argv, label, tiny_model, tmp_path, capsys
):
  out = tmp_path / "out.jsonl"
  code = run(
    f"--model={tiny_model}",
    "--prompt=abababab",
    f"--output={out}",
    "--drafter=prompt_lookup:length=3",
    "--capacity=128",
    "--dtype=float32",
    "--max_new_tokens=16",
    *argv,
  )
  assert code == 0
  (record,) = read_lines(out)
  counts(record).reconcile()
  assert record["stats"]["verifier"] == label
  err = capsys.readouterr().err
  assert f" verify={label}\n" in err
  assert ("simulated; the text is not" in err) == ("simulated" in label)
  if "simulated" in label:  # All drafts stood; the limit may cut the last.
    stats = record["stats"]
    pairs = zip(stats["accepted_by_position"], stats["drafted_by_position"])
    assert stats["accepted"] > 0
    assert all(whole - part <= 1 for part, whole in pairs)


@pytest.mark.parametrize(
  "argv, words",
  [
    (["--drafter=prompt_lokup"], "prompt_lookup"),
    (["--drafter=prompt_lookup:lenth=3"], "length"),
    (["--verifier=exakt"], "exact"),
    (["--verifier=typical:delta=2"], "delta must be a number in [0, 1]"),
    (["--simulate_acceptance=1.5"], "rate must be a number in [0, 1]"),
    (["--cache=pagde"], "paged"),
    (["--dtype=float16"], "float16"),
    (["--mesh=tensr=2"], "tensor"),
    (["--mesh=tensor=3"], "3"),
    (["--rows=0"], "rows"),
    (["--capacity=100000"], "capacity"),
    (["--max_new_tokens=400", "--capacity=256"], "capacity"),
    (["--top_p=1.5"], "top_p"),
    (["--temperature=nan"], "temperature"),
    (["--stop_token_ids=99999"], "99999"),
    (["--logit_bias=-5=1"], "-5"),
    (["--seed=-1"], "seed"),
    (["--stop="], "stop"),
    (["--model=/no/such/model"], "/no/such/model"),
  ],
)
def test_what_cannot_be_is_one_sentence(argv, words, tiny_model, capsys):
  assert run(f"--model={tiny_model}", "--prompt=hi", *argv) == 2
  out, err = capsys.readouterr()
  last = err.splitlines()[-1]
  assert last.startswith("jaxspec: ") and words in last
  assert "Traceback" not in err and out.strip() == ""


def test_a_verifier_may_want_more_than_a_drafter_tells(tiny_model, capsys):
  argv = ["--verifier=deferral", "--drafter=prompt_lookup"]
  assert run(f"--model={tiny_model}", "--prompt=abababab", *argv) == 2
  last = capsys.readouterr().err.splitlines()[-1]
  assert "deferral(lossy) must know the law that drafts were drawn" in last


def test_an_empty_prompt_is_refused(tiny_model, capsys):
  assert run(f"--model={tiny_model}", "--prompt=") == 2
  assert "empty" in capsys.readouterr().err
