"""What a compiled TPU program costs, read from its scheduled HLO text; no TPU needed.

The TPU compiler writes its own cost estimate, `estimated_cycles`, on every fusion, copy and matmul.
It writes none on Pallas kernels, whose cycles are passed in, nor on collectives, whose time follows
from the bytes they send and a bandwidth. Loop bodies count as often as they run; the compiler's own
`cost_analysis()` counts them once. All times are static estimates, not measurements.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable

from wallwm_jax.types import WallWMError

COLLECTIVES = (
  'all-gather', 'all-reduce', 'all-to-all', 'collective-permute', 'reduce-scatter',
  'ragged-all-to-all',
)  # fmt: skip
_BYTES = {
  'pred': 1, 's8': 1, 'u8': 1, 'f8e4m3fn': 1, 'f8e5m2': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2,
  'f32': 4, 's32': 4, 'u32': 4, 'f64': 8, 's64': 8, 'u64': 8,
}  # fmt: skip
_SLICES = ('dynamic-slice', 'slice', 'gather')
_FREE = (
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'copy-done',
  'slice-done',
)  # fmt: skip
_CONTEXT_BYTES = 4  # scalars in the result of an asynchronous start
_INSTRUCTION = re.compile(r'^\s*(ROOT )?%([\w.\-]+) = (.*)$')
_OPCODE = re.compile(r'^((?:\([^=]*?\)|\S+)) ([a-z][\w\-]*)\(')
_SIMULATED = re.compile(r'"bundle_analysis_data":\{"estimated_cycles":"(\d+)"')
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  result: bytes of each array of its result, in order. hbm: the same, 0 for those that the compiler
  keeps in a memory of the core (VMEM). cycles: XLA's own estimate; simulated: that of the bundle
  simulation, where it was asked for (`LIBTPU_INIT_ARGS`) and succeeded.
  """

  name: str
  opcode: str
  result: tuple[int, ...]
  hbm: tuple[int, ...]
  operands: tuple[str, ...]
  called: tuple[str, ...]
  cycles: int | None
  simulated: int | None
  text: str


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective as often as it runs. wire_bytes: sent by every device, all runs together."""

  kind: str
  group_size: int
  count: int
  wire_bytes: float
  asynchronous: bool


@dataclasses.dataclass(frozen=True)
class Cost:
  """A program on one device.

  compute_s: fusions, copies and kernels end to end. exposed_s: waiting for collectives when the
  schedule is replayed, asynchronous ones running beside compute, one at a time.
  """

  compute_s: float
  exposed_s: float
  collectives: tuple[Collective, ...]

  @property
  def seconds(self) -> float:
    return self.compute_s + self.exposed_s

  def wire_bytes(self) -> dict[str, float]:
    """Bytes every device sends, by kind of collective."""
    total: dict[str, float] = collections.defaultdict(float)
    for collective in self.collectives:
      total[collective.kind] += collective.wire_bytes
    return dict(total)


@dataclasses.dataclass(frozen=True)
class Chip:
  """Constants of a chip.

  wire_bytes_per_s: what a device sends in a collective, of its kind and the size of its groups.
  """

  clock_hz: float
  hbm_bytes_per_s: float
  wire_bytes_per_s: Callable[[str, int], float]


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Computations by name, instructions in schedule order, and the name of the entry.

  Raises:
    WallWMError: the text has no entry computation.
  """
  computations: dict[str, list[Instruction]] = {}
  entry, current = None, None
  for line in text.splitlines():
    if line.endswith('{') and ' -> ' in line and not line.startswith(' '):
      is_entry = line.startswith('ENTRY ')
      name = line.removeprefix('ENTRY ').split(' ', 1)[0].lstrip('%')
      current = computations.setdefault(name, [])
      entry = name if is_entry else entry
    elif current is not None and (match := _INSTRUCTION.match(line)):
      current.append(_instruction(match.group(2), re.sub(r'/\*.*?\*/', '', match.group(3))))
  if entry is None:
    raise WallWMError('expected the text of a compiled program (ENTRY computation), found none.')
  return computations, entry


def cost(
  text: str, chip: Chip, kernel_seconds: Callable[[Instruction], float] | None = None
) -> Cost:
  """Replays the schedule of a compiled program.

  Args:
    text: `compiled.as_text()`.
    kernel_seconds: time of one run of a Pallas kernel.

  Raises:
    WallWMError: a Pallas kernel without `kernel_seconds`, or a loop whose trip count is unknown.
  """
  computations, entry = parse(text)
  replay = _Replay(computations, chip, kernel_seconds)
  replay.run(entry, 1)
  return Cost(replay.compute, replay.exposed, tuple(replay.collectives))


class _Replay:
  """Time of one device through a schedule. Loops run their body once and multiply."""

  def __init__(self, computations, chip: Chip, kernel_seconds):
    self.computations, self.chip, self.kernel_seconds = computations, chip, kernel_seconds
    self.compute = self.exposed = self.clock = self.link_free = 0.0
    self.collectives: list[Collective] = []
    self.ready: dict[str, float] = {}

  def run(self, name: str, times: int) -> None:
    for op in self.computations[name]:
      self._step(op, times)

  def _step(self, op: Instruction, times: int) -> None:
    if op.opcode == 'while':
      body, trips = loop(self.computations, op)
      self.run(body, times * trips)
      return
    if op.opcode in ('call', 'conditional'):
      for called in op.called:
        self.run(called, times)
      return
    kind = self._collective(op)
    if kind is not None:
      self._communicate(op, kind, times)
    elif op.name.split('.')[0].endswith('-done') or op.opcode.endswith('-done'):
      for operand in op.operands:
        if operand in self.ready:
          waited = max(0.0, self.ready.pop(operand) - self.clock)
          self.exposed += waited
          self.clock += waited
    else:
      seconds = self._seconds(op) * times
      self.compute += seconds
      self.clock += seconds

  def _collective(self, op: Instruction) -> str | None:
    kind = op.opcode.removesuffix('-start')
    if kind in COLLECTIVES:
      return kind
    if op.opcode == 'async-start':  # wraps the collective in a computation of its own
      for called in op.called:
        for inner in self.computations[called]:
          if inner.opcode in COLLECTIVES:
            return inner.opcode
    return None

  def _communicate(self, op: Instruction, kind: str, times: int) -> None:
    size = _group_size(op.text)
    asynchronous = op.opcode.endswith('-start')
    nbytes = float(sum(n for n in op.result if n > _CONTEXT_BYTES))
    if asynchronous:  # it returns (operands, results, contexts), but an all-reduce its results only
      share = {'all-reduce': 1.0, 'all-gather': size / (size + 1), 'reduce-scatter': 1 / (size + 1)}
      nbytes *= share.get(kind, 0.5)
    wire = times * nbytes * _wire_factor(kind, size)
    self.collectives.append(Collective(kind, size, times, wire, asynchronous))
    seconds = wire / self.chip.wire_bytes_per_s(kind, size)
    begin = max(self.clock, self.link_free)
    self.link_free = begin + seconds
    if asynchronous:
      self.ready[op.name] = self.link_free
    else:
      self.exposed += self.link_free - self.clock
      self.clock = self.link_free

  def _seconds(self, op: Instruction) -> float:
    if op.opcode == 'custom-call' and 'tpu_custom_call' in op.text:
      if self.kernel_seconds is None:
        raise WallWMError(f'{op.name}: the compiler estimates no cycles for a Pallas kernel.')
      return self.kernel_seconds(op)
    return (op.cycles or 0) / self.chip.clock_hz


def loop(computations: dict[str, list[Instruction]], op: Instruction) -> tuple[str, int]:
  """(name of the body, how often it runs) of a `while`.

  Raises:
    WallWMError: the number is not known.
  """
  body, condition = (
    re.search(rf'{k}=%([\w.\-]+)', op.text).group(1) for k in ('body', 'condition')
  )
  known = re.search(r'known_trip_count":\{"n":"(\d+)"', op.text)
  if known:
    return body, int(known.group(1))
  constants = [
    int(m.group(1))
    for inner in computations[condition]
    if (m := re.search(r's32\[\]\S* constant\((\d+)\)', inner.text))
  ]
  if len(constants) != 1:
    raise WallWMError(f'{op.name}: expected one constant in its condition, got {constants}.')
  return body, constants[0]


class Traffic:
  """Bytes that the instructions of a compiled program move through the memory of the device."""

  def __init__(self, computations: dict[str, list[Instruction]]):
    self._computations = computations
    self._known: dict[str, tuple[dict[int, int], int]] = {}

  def of(self, op: Instruction, made: dict[str, Instruction]) -> int:
    """Bytes that one run of `op` reads and writes: of a slice of an array, or an update in place,
    those of the slice. What the compiler keeps in the core counts nothing.

    Args:
      made: the instructions of its computation by name.
    """
    if op.opcode in _FREE:
      return 0
    if op.opcode == 'copy-start':  # (destination, source, context)
      return sum(op.hbm[:2])
    if op.opcode == 'slice-start':  # ((source), destination, context): a part is prefetched
      return (op.result[1] if op.hbm[0] else 0) + op.hbm[1]
    reads = [sum(made[name].hbm) if name in made else 0 for name in op.operands]
    if op.opcode in _SLICES:
      return min(reads[0], sum(op.result)) + sum(op.hbm)
    if op.opcode == 'dynamic-update-slice':
      return 2 * sum(made[op.operands[1]].result)
    saved = 0
    for called in op.called if op.opcode == 'fusion' else ():
      parts, saved = self._parts(called)
      reads = [min(size, parts.get(at, size)) for at, size in enumerate(reads)]
    return sum(reads) + max(0, sum(op.hbm) - saved)

  def _parts(self, name: str) -> tuple[dict[int, int], int]:
    """({parameter: bytes that are read}, of parameters that only slices are read of; bytes of its
    results that are old contents of arrays updated in place) of a fused computation."""
    if name in self._known:
      return self._known[name]
    body = self._computations[name]
    made = {op.name: op for op in body}
    users = collections.defaultdict(list)
    for op in body:
      for at, operand in enumerate(op.operands):
        users[operand].append((op, at))
    reads, saved = {}, 0
    for op in body:
      if op.opcode == 'dynamic-update-slice':
        saved += sum(op.result) - sum(made[op.operands[1]].result)
      if op.opcode == 'parameter':
        parts = [self._part(user, at) for user, at in users[op.name]]
        if None not in parts:
          reads[int(re.search(r'parameter\((\d+)\)', op.text).group(1))] = sum(parts)
    self._known[name] = reads, saved
    return reads, saved

  def _part(self, user: Instruction, at: int) -> int | None:
    """Bytes that `user` reads of its operand number `at`, None for all of it."""
    if user.opcode in _SLICES and at == 0:
      return sum(user.result)
    if user.opcode == 'dynamic-update-slice' and at == 0:
      return 0
    if user.opcode == 'fusion':
      return self._parts(user.called[0])[0].get(at)
    return None


def _instruction(name: str, rest: str) -> Instruction:
  match = _OPCODE.match(rest)
  shape, opcode = match.groups() if match else ('', 'unknown')
  found = _ARRAY.findall(shape)
  arrays = tuple(
    _BYTES.get(kind, 0) * math.prod(int(d) for d in dims.split(',') if d) for kind, dims, _ in found
  )
  hbm = tuple(0 if 'S(' in layout else n for n, (*_, layout) in zip(arrays, found, strict=True))
  arguments = rest[match.end() :].split(')', 1)[0] if match else ''
  simulated = _SIMULATED.search(rest)
  cycles = re.search(r'"estimated_cycles":"(\d+)"', _SIMULATED.sub('', rest))
  called = re.search(r'(?:calls|to_apply|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)', rest)
  return Instruction(
    name,
    opcode,
    arrays,
    hbm,
    tuple(re.findall(r'%([\w.\-]+)', arguments)),
    tuple(re.findall(r'%([\w.\-]+)', called.group(1))) if called else (),
    int(cycles.group(1)) if cycles else None,
    (int(simulated.group(1)) or None) if simulated else None,  # 0: the simulation gave up
    rest,
  )


def _group_size(text: str) -> int:
  explicit = re.search(r'replica_groups=\{\{([\d,]+)\}', text)
  if explicit:
    return len(explicit.group(1).split(','))
  iota = re.search(r'replica_groups=\[(\d+),(\d+)\]', text)
  if iota:
    return int(iota.group(2))
  named = re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', text)
  if named:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named.group(2)))
  return 2  # collective-permute: pairs


def _wire_factor(kind: str, size: int) -> float:
  """Bytes sent per byte of result on a ring of `size` devices."""
  share = (size - 1) / size
  return {'all-reduce': 2 * share, 'reduce-scatter': size - 1.0, 'collective-permute': 1.0}.get(
    kind, share
  )
