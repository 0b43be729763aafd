# SPDX-License-Identifier: Apache-2.0
"""What every command shares: flags to settings, errors to exit codes.

Not a command itself: it defines no `main`. A command file defines

  define_flags(values)   its flags, on the `FlagValues` it is handed
  main(settings)         the work, returning an exit status or None

A setting is taken from the explicit flag, else from `--config`, else from the
flag's default; None means "not set".
"""

import contextlib
import logging
import os
import re
import stat
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxspec import libtpu
from jaxspec.errors import InputError, nearest

if TYPE_CHECKING:
  from jaxspec.generator import Generator, Options
else:  # Imported when needed, so that --help loads no jax.
  Generator = Options = Any

# Exit statuses: ours, and what a shell reports for SIGINT and SIGPIPE.
_USER_ERROR = 2
_INTERRUPTED = 130
_READER_LEFT = 141
# What compiled programs may take on disk before the oldest are evicted.
_COMPILATION_CACHE_BYTES = 4 * 2**30

# Names that other engines' users type, and ours.
_ALIASES = {
  "draft": "drafter",
  "max_tokens": "max_new_tokens",
  "temp": "temperature",
}

_SAMPLING = (
  "max_new_tokens",
  "temperature",
  "top_k",
  "top_p",
  "min_p",
  "repetition_penalty",
  "presence_penalty",
  "frequency_penalty",
  "logit_bias",
  "seed",
  "stop",
  "stop_token_ids",
  "ignore_eos",
  "logprobs",
)


def run(app: types.ModuleType, argv: Sequence[str]) -> int:
  """Parses `argv`, runs the command and returns its exit status."""

  def body() -> int:
    settings = parse(app, argv)
    if settings is None:
      return 0
    libtpu.set_flags()
    if not _joins(settings):
      return app.main(settings) or 0
    _join(settings)
    from jaxspec import hosts

    def main() -> int:
      _check_alike(settings)
      return app.main(settings) or 0

    return hosts.together(lambda: guard(main))

  return guard(body)


def guard(body: Callable[[], int]) -> int:
  """Runs `body`; what the user caused becomes one line and an exit status."""
  try:
    return body()
  except InputError as e:
    say(" ".join(str(e).split()))
    return _USER_ERROR
  except KeyboardInterrupt:
    say("interrupted")
    return _INTERRUPTED
  except BrokenPipeError:
    # The reader of our output left (`| head`). Python would complain when it
    # flushes stdout at exit, so stdout goes nowhere.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _READER_LEFT
  except Exception as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    say(
      "the device ran out of memory; lower --rows or --capacity, load with "
      "--dtype=bfloat16, or spread the model with --mesh=tensor=N"
    )
    return _USER_ERROR


def say(message: str) -> None:
  """Prints a line for the person at the terminal, apart from any output."""
  print(f"jaxspec: {message}", file=sys.stderr, flush=True)


class _Sayer(logging.Handler):
  """Prints what is logged as `say` does."""

  def emit(self, record: logging.LogRecord) -> None:
    say(record.getMessage())


def _say_what_is_logged(name: str) -> None:
  """Has the warnings of a module printed for the person at the terminal."""
  logger = logging.getLogger(name)
  if not any(isinstance(h, _Sayer) for h in logger.handlers):
    logger.addHandler(_Sayer())


# Flags.


def define_model_flags(values: flags.FlagValues) -> None:
  """Defines the flags that name a checkpoint."""
  flags.DEFINE_string(
    "model",
    "smollm2-135m",
    "a Hugging Face folder, GGUF file, Orbax checkpoint or hub id",
    flag_values=values,
  )
  flags.DEFINE_string(
    "dtype",
    None,
    "float32 or bfloat16; by default what suits the device",
    flag_values=values,
  )


def define_adapter_flag(values: flags.FlagValues) -> None:
  """Defines the flag that names what is merged into the model."""
  flags.DEFINE_string(
    "adapter",
    None,
    "a folder that train_heads --recipe=layerskip made of this model; it is "
    "merged, and the text is then the tuned model's",
    flag_values=values,
  )


def define_place_flags(values: flags.FlagValues) -> None:
  """Defines the flags that say where programs lie and run."""
  flags.DEFINE(
    Pairs(int, "data=1,tensor=2"),
    "mesh",
    None,
    "devices along each mesh axis, as data=1,tensor=2",
    flag_values=values,
  )
  flags.DEFINE_string(
    "compilation_cache_dir",
    None,
    "where compiled programs are kept between runs; empty keeps none",
    flag_values=values,
  )


def define_kernels_flag(values: flags.FlagValues) -> None:
  """Defines the flag that says what programs are made of."""
  flags.DEFINE_string(
    "kernels",
    None,
    "xla for programs without kernels; tpu or gpu for those kernels alone, "
    "and an error where one does not take a shape; interpret to try those of "
    "a TPU on a CPU, slowly; by default the best there is for the device",
    flag_values=values,
  )


def define_generator_flags(values: flags.FlagValues) -> None:
  """Defines the flags of `Generator.load`."""
  define_model_flags(values)
  define_adapter_flag(values)
  flags.DEFINE_string(
    "drafter",
    "autoregressive",
    "a file of jaxspec/drafters, with its settings if any: "
    "prompt_lookup:length=8,max_ngram=3; or, with --mesh=stage=N, "
    "layer_stream:heads=FOLDER",
    flag_values=values,
  )
  flags.DEFINE_string(
    "verifier",
    None,
    "a file of jaxspec/verifiers, with its settings if any: "
    "typical:epsilon=0.09; by default exact",
    flag_values=values,
  )
  flags.DEFINE_float(
    "simulate_acceptance",
    None,
    "to measure speed with weights that mean nothing: accept drafts at this "
    "rate, whatever they are; the text is not the model's",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "rows", 1, "prompts decoded side by side", flag_values=values
  )
  flags.DEFINE_integer(
    "capacity",
    None,
    "tokens of a prompt and its answer together; by default 2048, or the "
    "model's context where that is shorter",
    flag_values=values,
  )
  flags.DEFINE_string(
    "cache",
    "contiguous",
    "a file of jaxspec/caches, with options as in paged:page=64,pages=100",
    flag_values=values,
  )
  define_kernels_flag(values)
  flags.DEFINE_enum(
    "prefill",
    "chunk_major",
    ["chunk_major", "layer_major"],
    "chunk by chunk through all layers, or layer by layer through all chunks, "
    "so that early_exit can show a first token before the rest is computed",
    flag_values=values,
  )
  flags.DEFINE_string(
    "first_tokens",
    None,
    "a table of what answers begin with, made by calibrate "
    "--first_tokens=FILE: a likely one is shown, unsettled, before the prompt "
    "is read",
    flag_values=values,
  )
  flags.DEFINE_float(
    "first_token_share",
    0.5,
    "the share of answers that must begin with it for it to be shown",
    flag_values=values,
  )
  define_place_flags(values)
  flags.DEFINE_string(
    "executables",
    None,
    "a folder of compiled programs, as plan --save writes it; what is for "
    "another setup is compiled. It runs: use your own alone",
    flag_values=values,
  )
  flags.DEFINE_string(
    "profile_dir", None, "write an XProf trace there", flag_values=values
  )


def define_hosts_flags(values: flags.FlagValues) -> None:
  """Defines the flags with which several processes find each other."""
  flags.DEFINE_enum(
    "distributed",
    None,
    ["auto"],
    "auto: this is one of several processes that decode together, one a host, "
    "started by what jax knows: a TPU pod slice, Slurm, Open MPI, Kubernetes",
    flag_values=values,
  )
  flags.DEFINE_string(
    "coordinator",
    None,
    "elsewhere, HOST:PORT of the first of these processes, the same for all; "
    "with --processes and --process",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "processes", None, "how many there are", flag_values=values
  )
  flags.DEFINE_integer(
    "process", None, "which this is, from 0 on", flag_values=values
  )


def define_sampling_flags(values: flags.FlagValues) -> None:
  """Defines the flags of `Options`.

  None of them has a default here: what the checkpoint's generation_config says
  comes before the library's defaults.
  """
  integer = lambda *args: flags.DEFINE_integer(*args, flag_values=values)
  number = lambda *args: flags.DEFINE_float(*args, flag_values=values)
  switch = lambda *args: flags.DEFINE_boolean(*args, flag_values=values)
  integer("max_new_tokens", None, "length of the answer at most")
  number("temperature", None, "0 is greedy")
  integer("top_k", None, "keep the k likeliest tokens; 0 keeps all")
  number("top_p", None, "keep the likeliest tokens up to this mass")
  number("min_p", None, "keep tokens above this share of the likeliest")
  number("repetition_penalty", None, "divides logits of tokens seen")
  number("presence_penalty", None, "taken off logits of tokens generated")
  number("frequency_penalty", None, "the same, for each time generated")
  integer("seed", None, "same seed, same tokens")
  switch("ignore_eos", None, "decode past end tokens")
  switch("logprobs", None, "report the log-probability of every token")
  flags.DEFINE(
    Pairs(float, "15=-100,22=2.5", key=int),
    "logit_bias",
    None,
    "added to logits, as TOKEN=BIAS,TOKEN=BIAS",
    flag_values=values,
  )
  flags.DEFINE_multi_string(
    "stop",
    None,
    "text that ends the answer and is left out; may be repeated",
    flag_values=values,
  )
  flags.DEFINE(
    Integers(),
    "stop_token_ids",
    None,
    "token ids that end the answer, as 1,2",
    flag_values=values,
  )


def parse(
  app: types.ModuleType, argv: Sequence[str]
) -> types.SimpleNamespace | None:
  """Returns the settings of one run, or None after printing --help."""
  from ml_collections.config_flags import config_flags

  values = flags.FlagValues()
  values.set_gnu_getopt(True)
  app.define_flags(values)
  keys = frozenset(values)
  for alias, name in _ALIASES.items():
    if name in values:
      flags.DEFINE_alias(alias, name, flag_values=values)
  argv = [_underscored(arg, values) for arg in argv]
  if {"-h", "--help", "--helpfull"} & set(argv):
    print(_help(app, values, keys))
    return None
  config_flags.DEFINE_config_file(
    "config",
    None,
    "a file with get_config(), whose keys are the names of these flags",
    flag_values=values,
    sys_argv=argv,
  )
  _check_config(keys, argv)
  try:
    _, *rest = values(["jaxspec", *argv])
  except flags.UnrecognizedFlagError as e:
    raise InputError(
      f"unknown flag --{e.flagname}." + nearest(e.flagname, values)
    ) from e
  except flags.Error as e:
    raise InputError(str(e)) from e
  if rest:
    raise InputError(
      f"expected flags alone, got {rest[0]!r}; write --name=value, and put "
      "text with spaces in quotes"
    )
  config = values["config"].value
  return types.SimpleNamespace(
    **{name: _value(values[name], config) for name in sorted(keys)}
  )


def _value(flag: flags.Flag, config: Any) -> Any:
  if flag.present or config is None or flag.name not in config:
    return flag.value
  return _from_config(flag, config[flag.name])


def _from_config(flag: flags.Flag, value: Any) -> Any:
  """Reads a config's value as the flag of its name would."""
  if value is None:
    return flag.value
  parser: Any = flag.parser
  try:
    if isinstance(flag, flags.MultiFlag):
      items = [value] if isinstance(value, str) else value
      return [parser.parse(item) for item in items]
    return parser.parse(value)
  except (TypeError, ValueError) as e:
    raise InputError(f"config.{flag.name}={value!r}: {e}") from e


def _check_config(known: Collection[str], argv: Sequence[str]) -> None:
  """Raises InputError where ml_collections would show a traceback."""
  from ml_collections.config_flags import config_flags

  path = None
  names = []
  for at, arg in enumerate(argv):
    name, is_set, value = arg.lstrip("-").partition("=")
    if not arg.startswith("-"):
      continue
    if name == "config":
      path = value if is_set else argv[at + 1] if at + 1 < len(argv) else ""
    elif name.removeprefix("no").startswith("config."):
      if path is None:
        raise InputError(f"--{name} comes before --config=FILE names a file")
      names.append(name.removeprefix("no").removeprefix("config."))
  if path is None:
    return
  file = path.split(":", 1)[0]
  if not os.path.isfile(file):
    raise InputError(f"--config={path}: there is no file {file!r}")
  try:
    config: Any = config_flags.ConfigFileFlagParser("config").parse(path)
    keys = list(config)
  except Exception as e:  # Whatever the file does wrong, it is the user's.
    last = str(e).strip().rpartition("\n")[2] or type(e).__name__
    raise InputError(f"--config={path} does not load: {last}") from e
  for key in keys:
    if key not in known:
      raise InputError(
        f"{file} sets {key!r}, which is no flag of this command."
        + nearest(key, known)
      )
  for name in names:
    node: Any = config
    seen = "config"
    for part in name.split("."):
      if not isinstance(node, Mapping) and not hasattr(node, "keys"):
        raise InputError(f"--config.{name}: {seen} has no parts")
      if part not in node:
        flag = f" Pass it as --{part}=..." if part in known else ""
        raise InputError(
          f"--config.{name}: {seen} has no {part!r}, only "
          f"{', '.join(node.keys())}." + (flag or nearest(part, node.keys()))
        )
      node, seen = node[part], f"{seen}.{part}"


def _underscored(arg: str, values: flags.FlagValues) -> str:
  """Lets --max-new-tokens mean --max_new_tokens."""
  if not arg.startswith("--"):
    return arg
  name, is_set, value = arg[2:].partition("=")
  plain = name.replace("-", "_")
  if plain.removeprefix("no_") in values:
    plain = plain.replace("no_", "no", 1)
  known = plain in values or plain.removeprefix("no") in values
  return f"--{plain}{is_set}{value}" if known else arg


def _help(
  app: types.ModuleType, values: flags.FlagValues, keys: Collection[str]
) -> str:
  lines = [(app.__doc__ or "").strip(), "", "Flags:"]
  for name in [name for name in values if name in keys]:
    flag = values[name]
    default = "" if flag.default is None else f" [{flag.default}]"
    lines.append(f"  --{name}\n      {flag.help}{default}")
  lines.append(
    "  --config\n      a file with get_config(), whose keys are these flags; "
    "--config.KEY=VALUE changes one"
  )
  return "\n".join(lines)


class Pairs(flags.ArgumentParser):
  """Reads KEY=VALUE,KEY=VALUE, or a mapping from a config file."""

  def __init__(
    self,
    value: Callable[[Any], Any],
    example: str,
    key: Callable[[Any], Any] = str,
  ):
    self._key, self._value, self._example = key, value, example

  def parse(self, argument: Any) -> dict[Any, Any]:
    pairs = (
      [item.partition("=")[::2] for item in argument.split(",") if item.strip()]
      if isinstance(argument, str)
      else argument.items()
    )
    try:
      return {self._key(_strip(k)): self._value(_strip(v)) for k, v in pairs}
    except ValueError as e:
      raise ValueError(f"must look like {self._example}") from e

  def flag_type(self) -> str:
    return "pairs"


class Integers(flags.ArgumentParser):
  """Reads 1,2,3, or a sequence from a config file."""

  def parse(self, argument: Any) -> tuple[int, ...]:
    if isinstance(argument, str):
      argument = [item for item in argument.split(",") if item.strip()]
    try:
      return tuple(int(item) for item in argument)
    except ValueError as e:
      raise ValueError("must be whole numbers, as 1,2") from e

  def flag_type(self) -> str:
    return "integers"


def _strip(item: Any) -> Any:
  return item.strip() if isinstance(item, str) else item


# One of several processes.

_JOB = ("distributed", "coordinator", "processes", "process")
# What may differ between processes: names of files, of which those of prompts
# and results are looked at by the first alone.
_OWN = ("process", "model", "adapter", "compilation_cache_dir", "profile_dir",
        "prompt", "prompts", "output", "resume", "emit", "hold_until_settled")


def _joins(settings: types.SimpleNamespace) -> bool:
  return any(getattr(settings, name, None) is not None for name in _JOB)


def _join(settings: types.SimpleNamespace) -> None:
  """Meets the other processes."""
  where = settings.coordinator
  missing = [name for name in _JOB[1:] if getattr(settings, name) is None]
  if settings.distributed is None and missing:
    raise InputError(
      "--coordinator, --processes and --process go together, and "
      f"--{missing[0]} is missing; on a cluster that jax knows pass "
      "--distributed=auto instead"
    )
  if where is not None and not re.fullmatch(r".+:\d+", where):
    raise InputError(
      f"--coordinator={where} must be HOST:PORT, as 10.0.0.2:8476"
    )
  if not missing and not 0 <= settings.process < settings.processes:
    raise InputError(
      f"--process={settings.process} must be in [0, {settings.processes - 1}],"
      f" for --processes={settings.processes}"
    )
  from jaxspec import hosts

  hosts.join(where, settings.processes, settings.process)


def _check_alike(settings: types.SimpleNamespace) -> None:
  """Refuses what the first process was not told."""
  from jaxspec import hosts

  mine = {k: str(v) for k, v in vars(settings).items() if k not in _OWN}
  for name, value in hosts.agree(lambda: mine).items():
    if mine.get(name) != value:
      raise InputError(
        f"--{name}={mine.get(name)} differs from the {value} of process 0; "
        "give all processes the same flags"
      )


def is_first(settings: types.SimpleNamespace) -> bool:
  """Whether this process is alone, or the one that reads, writes and tells."""
  if not _joins(settings):
    return True
  from jaxspec import hosts

  return hosts.index() == 0


def agree(settings: types.SimpleNamespace, value: Callable[[], Any]) -> Any:
  """What the first process says, see `jaxspec.hosts.agree`."""
  if not _joins(settings):
    return value()
  from jaxspec import hosts

  return hosts.agree(value)


# What several commands share.


def by_stream(
  flag: str, form: str, items: Sequence[str] | None, layout: Any
) -> list[tuple[str, str]]:
  """Reads what a flag says of streams, as STREAM=TEXT.

  Args:
    form: what stands for the text in an error.
    layout: the `StreamLayout` that knows the names.
  """
  pairs = []
  for item in items or ():
    name, is_set, text = item.partition("=")
    if not is_set:
      raise InputError(
        f"--{flag}={item} must look like STREAM={form}, with one of "
        f"{', '.join(layout.names)}"
      )
    layout.place(name)
    pairs.append((name, text))
  return pairs


def write(path: str | os.PathLike, text: str) -> None:
  """Writes a file that a flag names."""
  try:
    with open(os.path.expanduser(path), "w", encoding="utf-8") as file:
      file.write(text)
  except OSError as e:
    raise InputError(f"cannot write {path}: {e.strerror}") from e


# Settings to a generator.


def load_model(settings: types.SimpleNamespace, **options: Any) -> Generator:
  """Loads --model with --dtype onto --mesh, in a generator with `options`."""
  use_compilation_cache(settings.compilation_cache_dir)
  from jaxspec.generator import Generator

  with progress("loading") as on_progress:
    return Generator.load(
      settings.model,
      dtype=settings.dtype,
      mesh=settings.mesh,
      on_progress=on_progress,
      **options,
    )


def load_generator(settings: types.SimpleNamespace) -> Generator:
  """Returns the generator that the settings describe."""
  verifier = verifier_text(settings)
  from jaxspec import first_tokens

  more: dict[str, Any] = {}
  if settings.first_tokens:
    more["first_tokens"] = first_tokens.load(
      settings.first_tokens, settings.first_token_share
    )
  if settings.executables is not None:
    if _joins(settings):
      raise InputError("--executables are programs of one process; leave it "
                       "out where several decode together")
    folder = os.path.expanduser(settings.executables)
    if not os.path.isdir(folder):
      raise InputError(f"--executables={settings.executables} is no folder; "
                       "name one that plan --save wrote")
    problem = _not_private(folder)
    if problem:
      raise InputError(f"--executables={settings.executables} {problem}, and "
                       "programs are run; use a folder that is yours alone")
    more["executables"] = folder
    _say_what_is_logged("jaxspec.executables")
  generator = load_model(
    settings,
    drafter=settings.drafter,
    verifier=verifier,
    rows=settings.rows,
    capacity=settings.capacity,
    cache=settings.cache,
    prefill=settings.prefill,
    kernels=settings.kernels,
    adapter=settings.adapter,
    **more,
  )
  if verifier.partition(":")[0] == "simulated":
    say("warning: acceptance is simulated; the text is not the model's")
  return generator


def verifier_text(settings: types.SimpleNamespace) -> str:
  """Returns the verifier that --verifier or --simulate_acceptance names."""
  rate = settings.simulate_acceptance
  if rate is None:
    return settings.verifier or "exact"
  text = f"simulated:rate={rate!r}"
  if settings.verifier not in (None, text):
    raise InputError(
      f"--simulate_acceptance={rate:g} is a verifier of its own; leave out "
      f"--verifier={settings.verifier}"
    )
  return text


def sampling_options(
  generator: Generator, settings: types.SimpleNamespace
) -> Options:
  """Returns the given sampling settings over the checkpoint's defaults."""
  given = {
    name: getattr(settings, name)
    for name in _SAMPLING
    if getattr(settings, name) is not None
  }
  if "stop" in given:
    given["stop"] = tuple(given["stop"])
  return generator.default_options(**given)


def counting(
  on_progress: Callable[[str, int, int], None] | None,
) -> Callable[[int, int], None] | None:
  """`on_progress` of `progress`, for work whose parts have no names."""
  if on_progress is None:
    return None
  return lambda done, total: on_progress("", done, total)


@contextlib.contextmanager
def progress(
  title: str,
) -> Iterator[Callable[[str, int, int], None] | None]:
  """Yields `on_progress(name, done, total)`, or None off a terminal."""
  if not sys.stderr.isatty():
    yield None
    return
  import rich.console
  import rich.progress

  bar = rich.progress.Progress(
    rich.progress.TextColumn("{task.description}"),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeRemainingColumn(),
    console=rich.console.Console(stderr=True),
    transient=True,
  )
  with bar:
    task = bar.add_task(title, total=None)

    def on_progress(name: str, done: int, total: int) -> None:
      bar.update(
        task, description=f"{title} {name}"[:40], completed=done, total=total
      )

    yield on_progress


def use_compilation_cache(directory: str | None) -> str | None:
  """Keeps compiled programs between runs, and returns where, if anywhere.

  Who can write to the cache can run code in the next run, so only a directory
  that is the user's alone is used.

  Args:
    directory: None for the default, under the user's cache home; "" for none.
  """
  import jax

  named = os.environ.get("JAX_COMPILATION_CACHE_DIR")  # jax reads it itself.
  if directory == "":
    if named:
      jax.config.update("jax_enable_compilation_cache", False)
    return None
  if directory is None:
    if named:
      return named
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    directory = os.path.join(home, "jaxspec", "xla")
  # A bucket has its own access rules, and the user asked for it by name.
  if "://" not in directory:
    directory = os.path.abspath(os.path.expanduser(directory))
    problem = _not_private(directory)
    if problem:
      say(
        f"warning: compiled programs are not kept: {directory} {problem}; "
        "name another folder with --compilation_cache_dir"
      )
      return None
  jax.config.update("jax_compilation_cache_dir", directory)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  jax.config.update("jax_compilation_cache_max_size", _COMPILATION_CACHE_BYTES)
  return directory


def _not_private(directory: str) -> str:
  """Makes `directory` for this user alone; returns what is wrong, or ""."""
  try:
    os.makedirs(directory, mode=0o700, exist_ok=True)
    info = os.stat(directory)
  except OSError as e:
    return f"cannot be made ({e.strerror})"
  if not hasattr(os, "getuid"):  # Windows keeps a home's folders private.
    return ""
  if info.st_uid != os.getuid():
    return "belongs to someone else"
  if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
    return f"can be written to by others (mode {stat.S_IMODE(info.st_mode):o})"
  if not os.access(directory, os.W_OK | os.X_OK):
    return "cannot be written to"
  return ""
