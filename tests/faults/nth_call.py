"""Fail each call to the file system of train, eval, dump and scan in turn, and look at what is left.

A case is right if the command ends with exit code 0, or with 2 and one sentence; no exception is printed; and the same
command, started again without a fault, ends with 0 and leaves, bit for bit, what an undisturbed command leaves.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.faults import commands, warm
from tests.faults.inject import ERRORS, KINDS, Fault, Injector

#: Lines on stderr beside the sentence: progress, and optional output (log, curves) that the run does without.
_BESIDE = re.compile(r"\S+ \d+/\d+ +\d+%|warning: ")


@dataclasses.dataclass(frozen=True)
class Case:
    """One injected fault and its end.

    Attributes:
        command: name of the command.
        fault: what was injected.
        path: the file of the call that failed, without the folder; "" if the fault was never met.
        code: exit code of the disturbed command.
        wrong: what is not as it must be, "" if all is.
        text: the last of what the disturbed command printed on stderr.
    """

    command: str
    fault: str
    path: str
    code: int
    wrong: str
    text: str

    @property
    def hit(self) -> bool:
        """True if the fault was injected."""
        return bool(self.path)


class Bench:
    """The commands, and what each leaves when nothing disturbs it.

    Args:
        data: a small data set.
        folder: an empty folder for everything.
    """

    def __init__(self, data: Path, folder: Path) -> None:
        warm.warm()
        self.folder = folder
        self.commands = commands.of(data, folder / "template")
        self._twins: dict[str, str] = {}
        self._calls: dict[str, Counter[str]] = {}

    def rehearse(self, name: str) -> Counter[str]:
        """Run a command undisturbed, once; return how many calls of each kind it makes."""
        if name not in self._calls:
            command, case = self.commands[name], self._new(name)
            counts = self.folder / "calls.json"

            def prepare() -> None:
                command.inside()
                injector = Injector(command.watched(case))
                injector.install()
                leave = os._exit

                def leave_with_counts(code: int) -> None:
                    with injector._real_open(counts, "w") as file:
                        json.dump(Counter(kind for kind, _ in injector.calls), file)
                    leave(code)

                os._exit = leave_with_counts

            done = warm.verb(command.argv(case), self.folder, prepare)
            if done.code != 0:
                raise AssertionError(f"{name} fails without a fault: {done.code} {done.err[-2000:]}")
            self._twins[name] = command.fingerprint(case)
            self._calls[name] = Counter(json.loads(counts.read_text()))
            shutil.rmtree(case)
        return self._calls[name]

    def faults(self, name: str, errors: Sequence[str] = tuple(ERRORS)) -> Iterator[Fault]:
        """All faults of a command: each kind, each number until none is met, each error."""
        for kind, count in self.rehearse(name).items():
            for number in range(1, count + 1):
                for error in errors:
                    yield Fault(kind, number, ERRORS[error], lasting=(number + ERRORS[error]) % 2 == 0)

    def run(self, name: str, fault: Fault) -> Case:
        """Inject one fault, then run the command again without one, and compare with the twin."""
        self.rehearse(name)
        command, case, note = self.commands[name], self._new(name), self.folder / "fired.txt"
        note.unlink(missing_ok=True)

        def prepare() -> None:
            command.inside()
            Injector(command.watched(case), fault, note).install()

        done = warm.verb(command.argv(case), self.folder, prepare)
        path = note.read_text().split(" ", 1)[1].strip().replace(str(case), "") if note.exists() else ""
        wrong = ended_wrong(done)
        again = warm.verb(command.argv(case), self.folder, command.inside)
        if again.code != 0 or again.has_trace:
            wrong += f"; again: exit {again.code}: {again.err[-800:]}"
        else:
            try:
                same = command.fingerprint(case) == self._twins[name]
            except (OSError, ValueError, KeyError) as error:
                same, wrong = False, f"{wrong}; {error!r}"
            wrong += "" if same else "; what the command leaves when it is run again differs from the undisturbed one"
        if not (wrong and os.environ.get("ZOETROPE_KEEP")):
            shutil.rmtree(case)
        return Case(name, str(fault), path, done.code, wrong.strip("; "), done.err[-1500:])

    def _new(self, name: str) -> Path:
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))
        self.commands[name].prepare(folder)
        return folder


def ended_wrong(done: warm.Outcome) -> str:
    """Return what is wrong with the end of a disturbed command; "" if nothing is."""
    if done.has_trace:
        return f"a trace, exit code {done.code}"
    if done.code not in (0, 2):
        return f"exit code {done.code}"
    if done.code == 2:
        errors = [line for line in done.errors if not _BESIDE.match(line)]
        if len(errors) != 1 or not errors[0].startswith("error: "):
            return f"{len(errors)} lines on stderr instead of one sentence"
    return ""


def kinds_of(faults: Sequence[Fault]) -> dict[str, list[Fault]]:
    """The faults by kind, in the order of KINDS."""
    return {kind: of_kind for kind in KINDS if (of_kind := [fault for fault in faults if fault.kind == kind])}
