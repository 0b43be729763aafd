# SPDX-License-Identifier: Apache-2.0
"""Compiles a model's programs for hardware that is not there, and counts.

  python -m jaxspec plan --model=llama3-70b --topology=v6e:2x4 --rows=1,8,32
  python -m jaxspec plan --model=qwen3-8b --topology=v5e:2x2,v6e:2x2 --sweep

Neither weights nor devices are needed. It says whether the programs fit and by
how much, what a step computes, moves and exchanges, how long that takes at
least by the published figures of the chip, and what limits it.
"""

import dataclasses
import json
import os
import shlex
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxspec.apps import launch
from jaxspec.errors import InputError

if TYPE_CHECKING:
  from jaxspec.planning import Plan
else:  # Imported when needed, so that --help loads no jax.
  Plan = Any

# A compiler for TPUs must not look for one, nor lock it.
WITHOUT_DEVICE = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_LOG_DIR": "disabled",
  "TPU_MIN_LOG_LEVEL": "3",
  "TPU_STDERR_LOG_LEVEL": "3",
}
_GIB, _MIB = 1 << 30, 1 << 20


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags of this command."""
  string = lambda *args: flags.DEFINE_string(*args, flag_values=values)
  string(
    "model",
    "smollm2-135m",
    "a published architecture such as llama3-70b, a folder, a GGUF file or a "
    "hub id; its config alone is read",
  )
  flags.DEFINE_list(
    "topology",
    None,
    "devices, as v5e:4x4, v6e:2x4, v5p:2x2x1, h100:8 or cpu:8; several for "
    "several plans",
    flag_values=values,
  )
  flags.DEFINE(
    launch.Pairs(int, "data=1,tensor=2"),
    "mesh",
    None,
    "devices along each mesh axis, as data=1,tensor=2; by default the mesh "
    "over all devices that takes least memory",
    flag_values=values,
  )
  string("drafter", "autoregressive", "as for decode; heads that are not named "
         "are taken to be of the usual size")
  string("verifier", "exact", "as for decode")
  flags.DEFINE(
    launch.Integers(), "rows", (1,), "prompts decoded side by side; several "
    "for a plan each, as 1,8,32", flag_values=values,
  )
  flags.DEFINE_integer(
    "capacity", 2048, "tokens of a prompt and its answer together",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "prompt", 512, "tokens of a prompt, for the time it takes to read, and "
    "the memory",
    flag_values=values,
  )
  flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float32", "int8"], "of the weights; "
    "int8 is a model rounded to eight bits (jaxspec/quantization.py), another "
    "law", flag_values=values,
  )
  string("cache", "contiguous", "as for decode")
  string("cache_dtype", None, "of keys and values; by default the weights'")
  string("kernels", None, "as for decode")
  flags.DEFINE_list(
    "acceptance",
    None,
    "the rate at which a draft is accepted behind accepted ones, by default "
    "0.6; or, several numbers, the shares of passes that accept something at "
    "each depth, as decode reports them; or a file of stored statistics: what "
    "decode --output or experiments wrote, of the same drafter",
    flag_values=values,
  )
  flags.DEFINE_boolean(
    "few_layers",
    False,
    "compile a few layers, and count from them what all will take: seconds in "
    "place of minutes",
    flag_values=values,
  )
  flags.DEFINE_boolean(
    "sweep",
    False,
    "try all meshes of each topology and rank them by what a token costs",
    flag_values=values,
  )
  flags.DEFINE(
    launch.Pairs(float, "v5e=1.2,v6e=2.7"),
    "price",
    None,
    "what an hour of one chip costs, for --sweep",
    flag_values=values,
  )
  flags.DEFINE_boolean(
    "remedies",
    None,
    "where it does not fit, look for three changes that make it fit and "
    "compile each; by default so",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "workers", 2, "programs compiled at a time; of --sweep, setups",
    flag_values=values,
  )
  string(
    "save",
    None,
    "a folder for the compiled programs, which decode --executables=FOLDER "
    "loads on such devices; prompts of --prompt tokens are provided for",
  )
  flags.DEFINE_boolean(
    "profile",
    False,
    "print where the time of a step goes, by named scope and operation, as "
    "counted in the compiled program",
    flag_values=values,
  )
  string("json", None, "a file for all figures")
  string("plot", None, "a file for a picture: memory, time of a step, and the "
         "roofline of the chip with a point a program")


def main(settings: types.SimpleNamespace) -> int:
  """Plans what the settings ask for; 0 if anything fits."""
  if not settings.topology:
    raise InputError("--topology is missing; name one such as v5e:4x4, "
                     "v6e:2x4 or h100:8")
  _check(settings)
  for name, value in WITHOUT_DEVICE.items():
    os.environ.setdefault(name, value)
  acceptance = _shares(settings.acceptance or ["0.6"], settings.drafter)
  import jax

  most = max((int(t[4:]) for t in settings.topology
              if t.startswith("cpu:") and t[4:].isdigit()), default=0)
  if most > jax.config.jax_num_cpu_devices:
    jax.config.update("jax_num_cpu_devices", most)
  from jaxspec import planning

  setups = _setups(settings)
  if settings.save:
    return _save(settings, setups)
  how = dict(workers=settings.workers, scaled=settings.few_layers)
  plans: list[Plan] = []

  def add(plan: Plan) -> None:
    """Writes after each, so that an error loses none."""
    plans.append(plan)
    _write(settings, plans, acceptance)

  if settings.sweep:
    dropped: list[tuple[Any, str]] = []
    for setup in setups:
      planning.sweep(setup, settings.topology, on_plan=add,
                     on_drop=lambda *why: dropped.append(why), **how)
    plans.sort(key=lambda p: _cost(p, acceptance, settings.price))
    _write(settings, plans, acceptance)
    _say_sweep(settings.model, plans, dropped, acceptance, settings.price)
  else:
    for setup in setups:
      plan = planning.make(setup, **how)
      add(plan)
      for line in report(settings.model, plan, acceptance):
        print(line, flush=True)
      if settings.profile and plan.timed:
        print("\n".join(profile(plan)), flush=True)
      if not plan.fits and settings.remedies is not False:
        _say_remedies(planning.remedies(setup, **how))
  if settings.plot:
    plot(settings.plot, settings.model, plans, acceptance)
  return 0 if any(plan.fits for plan in plans) else 1


def _check(settings: types.SimpleNamespace) -> None:
  """Refuses what cannot be, and what would be given in vain."""
  if settings.workers < 1 or min(settings.rows, default=0) < 1:
    raise InputError("--rows and --workers must be at least 1")
  if settings.sweep and settings.mesh:
    raise InputError("--sweep tries all meshes; leave out --mesh")
  if settings.price and not settings.sweep:
    raise InputError("--price is for --sweep; add that, or leave it out")
  for topology in settings.topology if settings.price else ():
    kind = topology.partition(":")[0]
    if kind not in settings.price:
      raise InputError(
        f"--price does not say what {kind} costs; add {kind}=...")
  if settings.profile and (settings.sweep or settings.few_layers
                           or settings.save):
    raise InputError("--profile is of one program with all its layers; leave "
                     "out --sweep, --few_layers and --save")
  if settings.sweep and settings.remedies is not None:
    raise InputError("--remedies is of one setup, and --sweep tries many; "
                     "leave out one of them")
  if not settings.save:
    return
  if (len(settings.topology) != 1 or len(settings.rows) != 1
      or settings.sweep or settings.few_layers):
    raise InputError("--save is for one topology and one number of rows, "
                     "without --sweep and --few_layers")
  for name in ("json", "plot", "acceptance", "remedies"):
    if getattr(settings, name) is not None:
      raise InputError(f"--save writes programs and makes no plan, of which "
                       f"--{name} is; leave out one of them")


def _write(settings: types.SimpleNamespace, plans: Sequence[Plan],
           acceptance: Sequence[float]) -> None:
  if settings.json:
    launch.write(settings.json, json.dumps(
      [plan.as_dict(acceptance) for plan in plans], indent=2) + "\n")


def _save(settings: types.SimpleNamespace, setups: Sequence[Any]) -> int:
  """Writes the programs of one setup."""
  from jaxspec import planning

  (setup,) = setups
  if settings.cache_dtype is not None:
    ours, theirs = (planning.stored_in(one) for one in (
      setup, dataclasses.replace(setup, cache_dtype=None)))
    if ours != theirs:
      raise InputError(
        f"--save with --cache_dtype={settings.cache_dtype}: decode has no such "
        f"flag and keeps keys and values as {theirs} with these weights; leave "
        "it out")
  seconds = planning.keep(setup, settings.save, workers=settings.workers)
  for name, took in seconds.items():
    print(f"{name}: compiled in {took:.1f} s")
  print(f"{len(seconds)} programs are in {settings.save}, for")
  flags_ = dict(
    model=settings.model, dtype=setup.dtype,
    mesh=",".join(f"{axis}={n}" for axis, n in setup.mesh),
    drafter=setup.drafter, verifier=setup.verifier, rows=setup.rows,
    capacity=setup.capacity, cache=setup.cache, kernels=setup.kernels,
    executables=settings.save)
  print("  python -m jaxspec decode " + " ".join(
    shlex.quote(f"--{name}={value}") for name, value in flags_.items()
    if value is not None))
  return 0


def _setups(settings: types.SimpleNamespace) -> list[Any]:
  from jaxspec import planning

  config = planning.read_config(settings.model)
  if not 16 <= settings.capacity <= config.context:
    raise InputError(f"--capacity must be in [16, {config.context}] (the "
                     f"model's context), got {settings.capacity}")
  if not 1 <= settings.prompt < settings.capacity:
    raise InputError(f"--prompt must be in [1, {settings.capacity - 1}], below "
                     f"--capacity, got {settings.prompt}")
  setups = []
  for topology in settings.topology[:1] if settings.sweep else (
      settings.topology):
    for rows in settings.rows:
      if settings.mesh:
        mesh = tuple(settings.mesh.items())
      elif settings.sweep:
        mesh = ()
      else:
        mesh = planning.default_mesh(
          config, topology, rows, settings.capacity)
      setups.append(planning.Setup(
        config=config, topology=topology, mesh=mesh, drafter=settings.drafter,
        verifier=settings.verifier, rows=rows, capacity=settings.capacity,
        prompt=settings.prompt, dtype=settings.dtype, cache=settings.cache,
        cache_dtype=settings.cache_dtype, kernels=settings.kernels,
      ))
  return setups


def _shares(texts: Sequence[str], drafter: str) -> list[float]:
  """What --acceptance says: numbers, or a file that holds them."""
  (only, *more) = texts
  path = os.path.expanduser(only)
  if not more and os.path.isfile(path):
    from jaxspec import metrics

    found, passes = metrics.stored_acceptance(path, drafter)
    print(f"of {passes} passes in {only}, the share that accepted something at "
          "each depth: " + " ".join(f"{share:.3f}" for share in found))
    # One number alone would be a rate at every depth.
    return found if len(found) > 1 else [*found, 0.0]
  try:
    found = [float(text) for text in texts]
  except ValueError:
    found = []
  if not found or not all(0 <= share <= 1 for share in found):
    raise InputError("--acceptance must be numbers in [0, 1], as 0.6 or "
                     "0.7,0.5,0.3, or a file as decode --output writes it; got "
                     f"{','.join(texts)}, which is neither")
  return found


# Words.


def report(model: str, plan: Plan, acceptance: Sequence[float]) -> list[str]:
  """What a person reads of a plan."""
  setup = plan.setup
  counted = ", counted from a few layers" if plan.scaled else ""
  lines = [
    f"{model}: {setup.said()} ({setup.devices} x {plan.kind}){counted}",
    f"  {verdict(plan)}",
    *_room(plan),
    f"  GiB on each device: weights {plan.weights / _GIB:.2f}, cache "
    f"{plan.cache / _GIB:.2f}, drafter {plan.draft / _GIB:.2f}, text "
    f"{plan.text / _GIB:.2f}, temporaries {plan.working / _GIB:.2f} (fresh "
    f"keys and values {plan.fresh / _GIB:.2f}), code {plan.code / _GIB:.2f}",
    "",
    f"  {'program':<18}{'compiled in':>12}{'temporaries':>13}{'GFLOP':>10}"
    f"{'moved':>12}  exchanged",
  ]
  for name, program in plan.programs.items():
    if program.refused:
      lines.append(f"  {name:<18}{program.seconds:>10.1f} s  "
                   f"{program.refused}")
      continue
    step = ", a step" if name in ("decode", "plain") else ""
    exchanged = ", ".join(
      f"{times:.0f} {kind} {size / _MIB:.2f} MiB"
      for kind, (times, size) in sorted(program.cost.exchanged().items()))
    lines.append(
      f"  {name + step:<18}{program.seconds:>10.1f} s"
      f"{program.temporaries / _MIB:>9.1f} MiB"
      f"{program.cost.all_flops / 1e9:>10.1f}"
      f"{program.cost.bytes / _MIB:>8.1f} MiB  {exchanged or 'nothing'}")
    if program.cost.uncounted:
      lines.append("    arithmetic not counted of "
                   + ", ".join(sorted(set(program.cost.uncounted))))
  if plan.timed:
    lines += ["", "  time at least, by the chip's published figures:"]
    parts = [("one pass without drafts", plan.plain())]
    if plan.height:
      parts += [(f"one pass over {plan.nodes} nodes", plan.verification()),
                ("proposing", plan.head())]
    prefill = plan.prefill()
    if prefill:
      parts.append((f"prompts, {setup.rows} x {setup.prompt}", prefill))
    for name, time in parts:
      lines.append(
        f"    {name:<26}{1e3 * time.seconds:>9.3f} ms, {time.limit} (memory "
        f"{1e3 * time.memory:.3f}, arithmetic {1e3 * time.arithmetic:.3f}, "
        f"interconnect {1e3 * time.interconnect:.3f})")
    gain = plan.per_second(acceptance) * plan.plain().seconds
    lines.append(
      f"  at {plan.tokens_per_pass(acceptance):.2f} tokens a pass, at most "
      f"{plan.per_second(acceptance):.1f} tokens/s a row, "
      f"{setup.rows * plan.per_second(acceptance):.0f} in all"
      + (f", {gain:.2f} times plain decoding" if plan.height else ""))
  return [*lines, ""]


def profile(plan: Plan, top: int = 12) -> list[str]:
  """Where the time of a decoding step goes, by scope and by operation.

  Each is what it takes at least by itself; operations that jax calls the same
  are one, such as those of all layers.
  """
  from jaxspec import hlo, roofline

  def seconds(cost: Any) -> float:
    return roofline.least(cost, plan.kind).seconds

  program = plan.programs["decode"]
  whole = sum(map(seconds, program.costs.values()))
  lines = ["  where a step goes, in the compiled program:",
           f"    {'scope':<10}{'ms':>9}{'share':>8}{'MiB':>10}{'GFLOP':>9}"
           "  limit"]
  for scope, cost in sorted(program.costs.items(),
                            key=lambda item: -seconds(item[1])):
    took = seconds(cost)
    lines.append(
      f"    {scope or 'no scope':<10}{1e3 * took:>9.3f}{took / whole:>8.1%}"
      f"{cost.bytes / _MIB:>10.1f}{cost.all_flops / 1e9:>9.2f}  "
      f"{roofline.least(cost, plan.kind).limit}")
  alike: dict[tuple[str, str, str], hlo.Cost] = {}
  times: dict[tuple[str, str, str], float] = {}
  for one in program.operations:
    name = one.name.rpartition(f"/{one.scope}/")[2]
    key = one.scope, name, one.opcode
    alike.setdefault(key, hlo.Cost()).add(one.cost, one.times)
    times[key] = times.get(key, 0.0) + one.times
  lines += ["", f"    {'ms':>9}{'share':>8}{'MiB':>10}{'times':>7}  operation"]
  ranked = sorted(alike, key=lambda key: -seconds(alike[key]))[:top]
  for key in ranked:
    took = seconds(alike[key])
    lines.append(
      f"    {1e3 * took:>9.3f}{took / whole:>8.1%}"
      f"{alike[key].bytes / _MIB:>10.1f}{times[key]:>7.0f}  "
      f"{key[0] or 'no scope'}: {key[1]} ({key[2]})")
  return [*lines, ""]


def verdict(plan: Plan) -> str:
  """Whether it fits, and by how much."""
  if plan.capacity is None:
    return (f"needs {plan.needs / _GIB:.2f} GiB on each device, whose memory "
            "is not known")
  room = f"of {plan.capacity / _GIB:.2f} GiB on each device"
  if plan.fits:
    return f"fits: {plan.free / _GIB:.2f} {room} stay free"
  if plan.refused:
    over = plan.held - plan.capacity
    more = (f"weights, cache and text alone are {over / _GIB:.2f} GiB more; "
            if over > 0 else "")
    return (f"does not fit the {plan.capacity / _GIB:.2f} GiB of a device: "
            f"{more}the compiler: {plan.refused}")
  return f"does not fit: {-plan.free / _GIB:.2f} GiB more than there are {room}"


def _room(plan: Plan) -> list[str]:
  """Why it is less than the device has."""
  from jaxspec import planning

  share = planning.gpu_share(plan.setup.topology)
  if share is None:
    return []
  return [f"  of a GPU's memory jax takes {share:.0%}; "
          "XLA_CLIENT_MEM_FRACTION, where plan and decode run, sets another "
          "share"]


def _cost(plan: Plan, acceptance: Sequence[float],
          prices: dict[str, float] | None) -> float:
  """Of a million tokens: money, or chip-seconds; infinite if it cannot be."""
  if not plan.fits or not plan.timed:
    return float("inf")
  kind = plan.setup.topology.partition(":")[0]
  # Two devices of tpu7x are a chip.
  chips = plan.setup.devices / (2 if kind == "tpu7x" else 1)
  seconds = 1e6 / (plan.setup.rows * plan.per_second(acceptance))
  return chips * seconds * (prices[kind] / 3600 if prices else 1.0)


def _say_sweep(model: str, plans: Sequence[Plan],
               dropped: Sequence[tuple[Any, str]], acceptance: Sequence[float],
               prices: dict[str, float] | None) -> None:
  unit = "$ a million" if prices else "chip-s a million"
  print(f"{model}, cheapest first\n  {unit:>17}{'tokens/s a row':>16}"
        f"{'in all':>9}{'GiB free':>10}  limit         setup")
  for plan in plans:
    if plan.fits and plan.timed:
      each = plan.per_second(acceptance)
      print(f"  {_cost(plan, acceptance, prices):>17.3f}{each:>16.1f}"
            f"{plan.setup.rows * each:>9.0f}{plan.free / _GIB:>10.2f}  "
            f"{plan.step().limit:<13} {plan.setup.said()}")
    else:
      print(f"  {verdict(plan)}: {plan.setup.said()}")
  for setup, why in dropped:
    print(f"  left out, {why}: {setup.said()}")


def _say_remedies(found: Sequence[tuple[str, Plan]]) -> None:
  if not found:
    print("  no single change that was tried makes it fit\n")
    return
  print("  it fits, compiled, with")
  for words, plan in found:
    print(f"    {words}: {plan.free / _GIB:.2f} GiB free")
  print()


# Files.


def plot(path: str, model: str, plans: Sequence[Plan],
         acceptance: Sequence[float]) -> None:
  """Draws memory of a device, time of a step, and rooflines."""
  try:
    draw(model, plans, acceptance).savefig(os.path.expanduser(path), dpi=150)
  except (OSError, ValueError) as e:     # a folder, or an unknown ending
    raise InputError(f"--plot={path} cannot be written: {e}") from e


def draw(model: str, plans: Sequence[Plan], acceptance: Sequence[float]
         ) -> Any:
  """The figure: memory of a device, time of a step, and rooflines."""
  try:
    import matplotlib.figure
  except ImportError as e:
    raise InputError("--plot needs matplotlib; pip install matplotlib") from e
  figure = matplotlib.figure.Figure(
    figsize=(16, max(1.8 + 0.5 * len(plans), 4.5)), layout="constrained")
  memory, time, roof = figure.subplots(1, 3)
  time.sharey(memory)
  time.tick_params(labelleft=False)
  labels = [f"{p.setup.topology} rows {p.setup.rows}\n" + " ".join(
    f"{a}={n}" for a, n in p.setup.mesh) for p in plans]
  at = range(len(plans))
  left = [0.0] * len(plans)
  for name in ("weights", "cache", "draft", "text", "working", "code"):
    widths = [getattr(p, name) / _GIB for p in plans]
    memory.barh(at, widths, left=left, label=name)
    left = [a + b for a, b in zip(left, widths)]
  for i, plan in enumerate(plans):
    if plan.capacity:
      memory.plot([plan.capacity / _GIB] * 2, [i - 0.45, i + 0.45], "k--")
  memory.set_yticks(list(at), labels)
  memory.set_xlabel("GiB on each device; dashed, what there is")
  memory.legend(fontsize="small")
  timed = [(i, p) for i, p in enumerate(plans) if p.timed]
  for part in ("memory", "arithmetic", "interconnect"):
    offset = ("memory", "arithmetic", "interconnect").index(part) - 1
    time.barh([i + 0.25 * offset for i, _ in timed],
              [1e3 * getattr(p.step(), part) for _, p in timed],
              height=0.25, label=part)
  for i, plan in timed:
    time.annotate(f" {plan.per_second(acceptance):.0f} tokens/s a row",
                  (1e3 * plan.step().seconds, i), va="center", fontsize=8)
  time.margins(x=0.4)                    # room for words
  time.set_xlabel("milliseconds of a step, at least")
  time.legend(fontsize="small")
  _draw_rooflines(roof, [plan for _, plan in timed])
  figure.suptitle(model)
  return figure


def _draw_rooflines(axes: Any, plans: Sequence[Plan]) -> None:
  """What each chip allows, and what each program makes of it at most.

  A point is below its roof by what it exchanges with other devices, and by
  where memory and arithmetic are wanted one after another.
  """
  from jaxspec import roofline

  points = []
  for plan in plans:
    for name, program in plan.programs.items():
      cost = program.cost
      if not program.refused and cost.bytes and cost.all_flops:
        seconds = roofline.together(
          program.costs, program.costs, plan.kind).seconds
        points.append((plan, name, cost.all_flops / cost.bytes,
                       cost.all_flops / seconds))
  eight = any(set(program.cost.flops) & roofline.EIGHT_BITS
              for plan in plans for program in plan.programs.values())
  edges = [x for _, _, x, _ in points]
  for kind in dict.fromkeys(plan.kind for plan in plans):
    chip = roofline.chip(kind)
    assert chip is not None              # or it would not be timed
    peaks = [("bfloat16", chip.bf16)]
    if eight and chip.int8:
      peaks.append(("int8", chip.int8))
    for dtype, peak in peaks:
      ridge = peak / chip.bandwidth
      xs = [min([*edges, ridge]) / 4, ridge, max([*edges, ridge]) * 4]
      axes.plot(xs, [min(peak, x * chip.bandwidth) for x in xs],
                label=f"{kind}, {dtype}")
  marks = dict(zip(dict.fromkeys(name for _, name, _, _ in points), "osD^v<>"))
  shown = set()
  for plan, name, x, y in points:
    axes.plot([x], [y], marks[name], color="k", fillstyle="none",
              label=None if name in shown else name)
    shown.add(name)
    axes.annotate(f" {plan.setup.topology} rows {plan.setup.rows}", (x, y),
                  fontsize=6)
  axes.set_xscale("log")
  axes.set_yscale("log")
  axes.set_xlabel("FLOP a byte moved")
  axes.set_ylabel("FLOP/s of a device, at most")
  if points:
    axes.legend(fontsize="small")
