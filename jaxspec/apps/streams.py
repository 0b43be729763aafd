# SPDX-License-Identifier: Apache-2.0
"""Reads, thinks and writes in several streams at once, a row a step.

  python -m jaxspec streams --model=FOLDER --layout=reading \\
    --given='assistant=A:' --push='user=What is two and two?'

Columns are streams. With --listen, lines on stdin are read while the model
writes: `user: Wait!` goes to that stream, one word alone in a line, `/stop`,
stops the writing until there are words again, or an empty line, which lets it
go on. On a terminal they are typed below the rows.
"""

import codecs
import contextlib
import dataclasses
import json
import os
import queue
import shutil
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxspec.apps import launch
from jaxspec.errors import InputError

if TYPE_CHECKING:
  from jaxspec.streams.layout import StreamLayout
  from jaxspec.streams.session import Row, Session, Streams
else:  # Imported when needed, so that --help loads no jax.
  StreamLayout = Row = Session = Streams = Any

_STOP = "/stop"
_NARROWEST = 6
_COLORS = (36, 32, 33, 35, 34, 31)


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags of this command."""
  launch.define_model_flags(values)
  launch.define_place_flags(values)
  launch.define_kernels_flag(values)
  launch.define_sampling_flags(values)
  text = lambda *args: flags.DEFINE_string(*args, flag_values=values)
  many = lambda *args: flags.DEFINE_multi_string(*args, flag_values=values)
  number = lambda *args: flags.DEFINE_integer(*args, flag_values=values)
  text(
    "taught",
    None,
    "a folder that train_streams made of this model: its layout, its stream "
    "embeddings, and its adapter, which is merged",
  )
  text(
    "layout",
    None,
    "reading, auditing, thoughts or single; or a JSON file of the fields of "
    "jaxspec.streams.StreamLayout; by default that of --taught, or reading",
  )
  text(
    "stream_embedding",
    None,
    "a folder with a table of stream embeddings; by default that of --model, "
    "if it is a folder with one",
  )
  text("prefix", "", "the text that all streams share")
  number("prefix_room", 256, "most tokens of --prefix")
  many(
    "given",
    None,
    "STREAM=WORDS, a stream's first words, on which the model goes on; may be "
    "repeated",
  )
  many(
    "push",
    None,
    "STREAM=WORDS for a stream to read, a token a row; may be repeated",
  )
  many(
    "hide",
    None,
    "READER=STREAM, a stream that the reader must not see; may be repeated",
  )
  many(
    "silence_penalty",
    None,
    "STREAM=NUMBER, taken off the logit of the stream's silence, more and more "
    "in the rows behind the last that was read; may be repeated",
  )
  flags.DEFINE_boolean(
    "listen",
    False,
    "read lines from stdin while the model writes: `STREAM: words`, or "
    f"{_STOP} to stop the writing until the next such line or an empty one",
    flag_values=values,
  )
  text(
    "row_drafter",
    "",
    "lookup:length=3 or medusa:heads=FOLDER guesses whole rows, which are "
    "verified together; the rows are the same, but for near ties that wider "
    "passes round otherwise",
  )
  number("room", None, "rows of the table at most")
  number(
    "quiet",
    None,
    "rows of nothing but silence after which it waits for more words, and 0 "
    "for never; by default as the layout says",
  )
  number("stride", 4, "passes between two looks at what was read")
  text(
    "cache",
    "contiguous",
    "contiguous, paged or, where positions are those of rows, window; with "
    "options as in decode",
  )
  flags.DEFINE_enum(
    "emit",
    "text",
    ["text", "jsonl"],
    "a line a row: columns, or a JSON object with the tokens and what each "
    "adds to its stream",
    flag_values=values,
  )


def main(settings: types.SimpleNamespace) -> None:
  """Runs one session as the settings ask."""
  if settings.stride < 1:
    raise InputError(f"--stride must be at least 1, got {settings.stride}")
  layout = _known_layout(settings)
  given: dict[str, str] = {}
  for name, words in launch.by_stream(
    "given", "WORDS", settings.given, layout
  ):
    given[name] = given.get(name, "") + words
  pushed = launch.by_stream("push", "WORDS", settings.push, layout)
  hidden = launch.by_stream("hide", "WORDS", settings.hide, layout)
  for _, name in hidden:
    layout.place(name)
  launch.by_stream(
    "silence_penalty", "NUMBER", settings.silence_penalty, layout
  )
  generator = launch.load_model(settings, kernels=settings.kernels)
  streams = _streams(settings, generator, hidden)
  with streams.open(
    prefix=settings.prefix,
    given=given,
    options=launch.sampling_options(generator, settings),
  ) as session:
    for stream, words in pushed:
      session.push(stream, words)
    show = _shower(settings, streams.layout)
    if settings.listen:
      _listen(session, show, settings.stride)
    else:
      for row in session.rows(settings.stride):
        show(row)
    launch.say(
      f"{session.count} rows of {streams.layout.count} streams, "
      f"{session.passes} passes, {session.accepted} rows drafted and accepted"
    )


def _known_layout(settings: types.SimpleNamespace) -> StreamLayout:
  """The layout as far as it is known before there is a model."""
  from jaxspec.streams import layout as layouts
  from jaxspec.streams import taught

  if settings.taught is None:
    settings.layout = settings.layout or "reading"
    return layouts.parse(settings.layout)
  for flag in ("layout", "stream_embedding"):
    if getattr(settings, flag) is not None:
      raise InputError(f"--{flag} and --taught={settings.taught} both say it; "
                       "leave one of them out")
  return taught.layout_of(settings.taught)


def _streams(
  settings: types.SimpleNamespace, generator: Any, hidden: Sequence[Any]
) -> Streams:
  from jaxspec.streams import layout as layouts
  from jaxspec.streams import model as models
  from jaxspec.streams import taught
  from jaxspec.streams.session import Streams

  model, embedding = None, settings.stream_embedding
  if settings.taught is None:
    layout = layouts.parse(settings.layout, generator.tokenizer)
  else:
    model, layout = taught.load(settings.taught, generator.model)
  for reader, name in hidden:
    layout = layout.without(reader, name)
  for name, penalty in launch.by_stream(
    "silence_penalty", "NUMBER", settings.silence_penalty, layout
  ):
    layout = layout.penalized(name, penalty)
  if settings.quiet is not None:
    if layout.silence is None:
      raise InputError(
        f"--quiet={settings.quiet} counts rows of silence, and the layout has "
        "no silence token; leave it out"
      )
    layout = dataclasses.replace(layout, quiet=settings.quiet)
  if (
    model is None
    and embedding is None
    and os.path.isdir(os.path.expanduser(settings.model))
  ):
    embedding = models.load(settings.model, generator.model)
  return Streams.of(
    generator,
    layout,
    model=model,
    embedding=embedding,
    drafter=settings.row_drafter,
    room=settings.room,
    prefix_room=settings.prefix_room,
    cache=settings.cache,
  )


def _listen(session: Session, show: Callable[[Row], None], stride: int) -> None:
  """Shows rows, and hands over what is typed meanwhile."""
  if not (sys.stdin.isatty() and sys.stdout.isatty()):
    _converse(session, show, stride, sys.stdin)
    return
  with _Prompt(sys.stdin.fileno()) as prompt:

    def above(row: Row) -> None:
      with prompt.aside():
        show(row)

    _converse(session, above, stride, prompt, prompt.aside)


def _converse(
  session: Session,
  show: Callable[[Row], None],
  stride: int,
  lines: Iterable[str],
  aside: Callable[[], Any] = contextlib.nullcontext,
) -> None:
  heard: queue.Queue[str | None] = queue.Queue()

  def read() -> None:
    for line in lines:
      if line.strip() == _STOP:
        session.interrupt()
      else:
        try:
          name, colon, words = line.partition(":")
          if not colon and line.strip():
            raise InputError(f"{line.strip()!r} must look like STREAM: words")
          if words.strip():
            session.push(name.strip(), words.rstrip("\n"))
          elif not line.strip():
            session.resume()
        except InputError as e:  # What is mistyped ends no session.
          with aside():
            launch.say(" ".join(str(e).split()))
      heard.put(line)
    heard.put(None)

  threading.Thread(target=read, daemon=True).start()
  line: str | None = ""
  while line is not None:
    for row in session.rows(stride):
      show(row)
    line = heard.get()
  # Words that came with the end of stdin.
  for row in session.rows(stride):
    show(row)


class _Prompt:
  """A line that is typed below the rows, and stays there while they come.

  A terminal shows what is typed at once, in the midst of whatever is written;
  so here it does not, and the line is drawn again behind each row.
  """

  _MARK = "> "

  def __init__(self, fd: int):
    self._fd, self._typed, self._before = fd, "", None
    self._lock = threading.Lock()

  def __enter__(self) -> "_Prompt":
    import termios
    import tty

    self._before = termios.tcgetattr(self._fd)
    tty.setcbreak(self._fd)
    self._draw()
    return self

  def __exit__(self, *unused: object) -> None:
    import termios

    termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)
    print("\r\x1b[K", end="", flush=True)

  @contextlib.contextmanager
  def aside(self) -> Iterator[None]:
    """Within, whole lines may be printed."""
    with self._lock:
      print("\r\x1b[K", end="", flush=True)
      yield
      self._draw()

  def __iter__(self) -> Iterator[str]:
    """What was typed, line by line, up to an end of file."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    while True:
      read = os.read(self._fd, 1024)
      for letter in decode(read):
        if letter in "\r\n":
          line, self._typed = self._typed, ""
          yield line + "\n"
        elif letter == "\x04":  # Ctrl-D
          return
        elif letter in "\x08\x7f":
          self._typed = self._typed[:-1]
        elif letter.isprintable():
          self._typed += letter
      if not read:
        return
      with self.aside():
        pass

  def _draw(self) -> None:
    from rich.cells import cell_len

    room = shutil.get_terminal_size().columns - len(self._MARK) - 1
    shown = self._typed
    while shown and cell_len(shown) > room:  # Of a long line the end.
      shown = shown[1:]
    print(self._MARK + shown, end="", flush=True)


def _shower(
  settings: types.SimpleNamespace, layout: StreamLayout
) -> Callable[[Row], None]:
  if settings.emit == "jsonl":
    return _show_json
  if sys.stdout.isatty():
    return _Columns(layout.names).show
  print("\t".join(layout.names), flush=True)
  return lambda row: print(
    "\t".join(json.dumps(text, ensure_ascii=False)[1:-1] for text in row.texts),
    flush=True,
  )


def _show_json(row: Row) -> None:
  line: dict[str, Any] = {
    "row": row.number,
    "given": row.given,
    "tokens": dict(zip(row.names, row.tokens)),
    "texts": dict(zip(row.names, row.texts)),
  }
  if any(x is not None for x in row.logprobs):
    line["logprobs"] = dict(zip(row.names, row.logprobs))
  print(json.dumps(line, ensure_ascii=False), flush=True)


class _Columns:
  """Streams side by side on a terminal, each in its color."""

  def __init__(self, names: Sequence[str]):
    self._count = len(names)
    self._line([f"\x1b[1m{cell}" for cell in self._cells(names)])

  def show(self, row: Row) -> None:
    weight = 2 if row.given else 0
    self._line([
      f"\x1b[{weight};{_COLORS[at % len(_COLORS)]}m{cell}"
      for at, cell in enumerate(self._cells(row.texts))
    ])

  def _cells(self, texts: Sequence[str]) -> list[str]:
    from rich.cells import set_cell_size

    columns = shutil.get_terminal_size().columns
    width = max(_NARROWEST, (columns - self._count) // self._count)
    return [
      set_cell_size("".join(c if c.isprintable() else "·" for c in text), width)
      for text in texts
    ]

  def _line(self, cells: Sequence[str]) -> None:
    print("\x1b[0m ".join(cells) + "\x1b[0m", flush=True)
