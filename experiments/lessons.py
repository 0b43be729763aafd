# SPDX-License-Identifier: Apache-2.0
"""Makes the text that the embedded heads learn from, of many kinds.

  apt-get install debian-reference-en developers-reference fortunes-de
  python -m experiments.lessons --questions=gsm8k_train.jsonl --output=DIR

Prompts, which the model answers itself: problems to be worked, all sorts of
requests about everyday topics, summaries, questions about a passage,
translations from German, and code. And texts, which are
learnt from as they are: worked answers, prose and sources. It is all made from
what any machine can install. None of it is of Spec-Bench, on which heads are
judged.

Writes `prompts.jsonl` and `texts.jsonl`, for `jaxspec train_heads --data=`, and
`held_out.jsonl`, other prompts of the same kinds, for `jaxspec calibrate`.
"""

import ast
import html
import json
import pathlib
import random
import re
import sysconfig
from collections.abc import Iterator

from absl import app, flags

FLAGS = flags.FLAGS
PROSE = ("/usr/share/debian-reference", "/usr/share/doc/developers-reference")
GERMAN = "/usr/share/games/fortunes/de"
TOPICS = (
    "the sea", "a lost dog", "photosynthesis", "the French Revolution", "chess",
    "learning to cook", "black holes", "a small village", "democracy", "bees",
    "the stock market", "insomnia", "electric cars", "ancient Rome", "jazz",
    "a job interview", "volcanoes", "friendship", "the human heart", "robots",
    "inflation", "gardening", "a rainy day", "prime numbers", "vaccines",
    "the Moon", "public speaking", "coffee", "climate change", "a dragon",
    "time management", "Shakespeare", "gravity", "running a marathon", "bread",
    "the Internet", "a birthday party", "earthquakes", "poverty", "painting",
    "dreams", "the Great Wall of China", "bicycles", "plate tectonics", "tea",
    "artificial intelligence", "a haunted house", "supply and demand", "birds",
    "the periodic table", "moving to a new city", "saving money", "football",
    "the water cycle", "a train journey", "programming in Python", "glaciers",
    "World War II", "healthy eating", "the number pi", "old age", "castles")
REQUESTS = (
    "Write a short story about {}.", "What is {}?", "Tell me about {}.",
    "Explain {} to a child.", "Give me five tips about {}.",
    "Write a poem about {}.", "Write an email to a friend about {}.",
    "Why does {} matter?", "List some facts about {}.", "Who knows most of {}?",
    "What are the pros and cons of {}?", "How would you describe {}?",
    "Pretend to be a teacher and speak of {}.", "When did {} begin?",
    "Compare {} with something quite different.", "Where can I find {}?",
    "Write a blog post about {}.", "What should I ask about {}?",
    "Is it true that {} can change a life?", "Make a plan to learn of {}.")


def define_flags() -> None:
  """Only when run: flags are one name space, and tests import many files."""
  flags.DEFINE_string(
      "questions", None, "JSON lines of `question` and `answer`", required=True)
  flags.DEFINE_string("output", None, "a folder", required=True)
  flags.DEFINE_multi_string("prose", PROSE, "folders of English HTML")
  flags.DEFINE_string("german", GERMAN, "a folder of German fortunes")
  flags.DEFINE_integer("prompts", 1100, "to be answered")
  flags.DEFINE_integer("worked", 2000, "questions with their answers")
  flags.DEFINE_integer("held_out", 500, "prompts that are not learnt from")
  flags.DEFINE_integer("prose_texts", 250, "texts of prose")
  flags.DEFINE_integer("code_texts", 350, "texts of code")
  flags.DEFINE_integer("seed", 0, "of what is drawn")


def paragraphs(folder: str) -> list[str]:
  """Of all English HTML files of a folder."""
  found = []
  for path in sorted(pathlib.Path(folder).rglob("*.html")):
    if re.search(r"\.(?!en\b)[a-z]{2}(-[a-z]{2})?\.html$", path.name):
      continue
    source = path.read_text(encoding="utf-8", errors="ignore")
    for body in re.findall(r"<p>(.*?)</p>", source, flags=re.S):
      text = html.unescape(re.sub(r"<[^>]*>", "", body))
      text = " ".join(text.split())
      if len(text) > 120:
        found.append(text)
  return list(dict.fromkeys(found))


def passages(lines: list[str], least: int) -> list[str]:
  """Paragraphs joined until they are `least` characters long."""
  found, held = [], ""
  for line in lines:
    held = f"{held}\n{line}" if held else line
    if len(held) >= least:
      found.append(held)
      held = ""
  return found


def sayings(folder: str) -> list[str]:
  """Single sentences of German."""
  found = []
  for path in sorted(pathlib.Path(folder).glob("*")):
    if path.suffix or not path.is_file():
      continue
    for item in path.read_text(encoding="utf-8", errors="ignore").split("\n%"):
      text = " ".join(re.split(r"\s--\s", item)[0].split())
      if 60 < len(text) < 300:
        found.append(text)
  return list(dict.fromkeys(found))


def functions() -> Iterator[tuple[str, str]]:
  """Of the standard library: a header, and the first line of what it does."""
  for path in sources():
    try:
      tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
      continue
    for node in tree.body:
      if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
        doc = (ast.get_docstring(node) or "").split("\n\n")[0]
        if 30 < len(doc) < 200:
          yield (f"{node.name}({ast.unparse(node.args)})",
                 " ".join(doc.split()))


def sources() -> list[pathlib.Path]:
  library = pathlib.Path(sysconfig.get_paths()["stdlib"])
  return sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py"))


def worked(path: str) -> list[tuple[str, str]]:
  """Questions and answers, without the marks of a calculator."""
  lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
  records = [json.loads(line) for line in lines if line.strip()]
  return [(r["question"], re.sub(r"<<.*?>>", "", r["answer"]))
          for r in records]


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"{argv[1]} is no flag; see --help")
  rng = random.Random(FLAGS.seed)
  prose = [p for folder in FLAGS.prose for p in paragraphs(folder)]
  german, code = sayings(FLAGS.german), list(functions())
  problems = worked(FLAGS.questions)
  for name, found in (("prose", prose), ("german", german)):
    if not found:
      raise SystemExit(f"--{name} holds no text; install what the first lines "
                       "of this file name")
  for some in (prose, german, code, problems):
    rng.shuffle(some)

  share = FLAGS.prompts // 8
  short, long = passages(prose, 500), passages(prose, 900)
  everyday = [request.format(topic) for request in REQUESTS for topic in TOPICS]
  rng.shuffle(everyday)
  questions = [question for question, _ in problems]
  german = [f"Translate German to English: {text}" for text in german]
  code = [f"Write a Python function {head}. {doc}" for head, doc in code]
  prompts = (
      questions[:2 * share] + german[:share] + code[:share]
      + [f"Summarize: {text}" for text in long[:share]]
      + [f"{text}\n\nWhat is this about, and what should one know about it?"
         for text in short[:share // 2]])
  rest = FLAGS.prompts - len(prompts)
  prompts += everyday[:rest]
  # Of the same kinds, but for prose, all of which is learnt from.
  fifth = FLAGS.held_out // 5
  held_out = (
      questions[2 * share + FLAGS.worked:][:2 * fifth] + german[share:][:fifth]
      + code[share:][:fifth] + everyday[rest:][:fifth])
  texts = [{"messages": [{"role": "user", "content": question},
                         {"role": "assistant", "content": answer}]}
           for question, answer in problems[2 * share:][:FLAGS.worked]]
  texts += [{"text": text} for text in
            passages(prose, 2000)[-FLAGS.prose_texts:]]
  files = [path.read_text(encoding="utf-8", errors="ignore")
           for path in sources()]
  chunks = [text[at:at + 1600] for text in files
            for at in range(0, max(len(text) - 1600, 1), 1600)]
  rng.shuffle(chunks)
  texts += [{"text": text} for text in chunks[:FLAGS.code_texts]]

  output = pathlib.Path(FLAGS.output)
  output.mkdir(parents=True, exist_ok=True)
  for name, items in (("prompts", [{"prompt": p} for p in prompts]),
                      ("texts", texts),
                      ("held_out", [{"prompt": p} for p in held_out])):
    (output / f"{name}.jsonl").write_text("".join(
        json.dumps(item, ensure_ascii=False) + "\n" for item in items),
        encoding="utf-8")
    print(f"{len(items)} {name}")


if __name__ == "__main__":
  define_flags()
  app.run(main)
