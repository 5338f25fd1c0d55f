"""The faults: each takes a world, a seed and an empty folder, injures a command, gives it again, and judges."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from socket import socket
from typing import Any

import pandas as pd

from lit_isdpo.lab.folder import resolve
from lit_isdpo.training.checkpoint_files import StoredCheckpoint
from tests.tools.faults.process import TIMEOUT, Ended, Injury, run, steps_done
from tests.tools.faults.world import (
    NUM_STEPS,
    Outcome,
    World,
    as_lines,
    check_end,
    compare_fit,
    damage,
    describe,
    end_of,
    go_on,
    last,
    same,
    write_study,
)

Fault = Callable[[World, Random, Path], Outcome]
CACHED = "--model.reference.cache=true"
FOLDERS = ("--trainer.strategy=fsdp2", "--checkpoint.monitor=null")  # one rank, checkpoints that are folders


# SIGKILL


def kill_fit(world: World, rng: Random, folder: Path, *more: str) -> Outcome:
    """SIGKILL at a change of a file of the run: in a save, before, after; the fit goes on."""
    events = world.unbroken_fit(*more)[2].events
    at = rng.randrange(len(events))
    ended = world.fit(folder / "run", *more, injury=Injury("kill", at))
    lost, problems = go_on(world, folder / "run", *more, abrupt=True)
    moment = f"file event {at} of {len(events)}: {events[at]}; step {steps_done(folder / 'run.progress')}"
    return Outcome(moment, describe(ended), lost, [*check_end(ended, -signal.SIGKILL), *problems])


def kill_fit_with_folders(world: World, rng: Random, folder: Path) -> Outcome:
    """The same, with checkpoints to which each rank writes its part."""
    return kill_fit(world, rng, folder, *FOLDERS)


def kill_half_a_save(world: World, rng: Random, folder: Path) -> Outcome:
    """SIGKILL when half of a checkpoint, the last or the best, is on the disk."""
    at = rng.randrange(5)
    ended = world.fit(folder / "run", injury=Injury("half", at))
    lost, problems = go_on(world, folder / "run", abrupt=True)
    return Outcome(f"half of checkpoint {at}", describe(ended), lost, [*check_end(ended, -signal.SIGKILL), *problems])


def kill_precompute(world: World, rng: Random, folder: Path) -> Outcome:
    """SIGKILL in ``precompute``; the fit that needs its values computes what is missing."""
    verb = ["precompute", *world.options]
    return _kill_and_fit_cached(world, rng, folder, verb)


def _kill_and_fit_cached(world: World, rng: Random, folder: Path, verb: list[str]) -> Outcome:
    events = _unbroken(world, "precompute", verb, lambda root: "")[1].events
    at, root = rng.randrange(len(events)), folder / "run"
    ended = run([*verb, _into(root)], root, Injury("kill", at))
    again = world.fit(root, CACHED)
    problems = check_end(again, 0) or compare_fit(world, root, CACHED)
    return Outcome(f"file event {at} of {len(events)}: {events[at]}", describe(ended), "at most 1,024 rows", problems)


def kill_test(world: World, rng: Random, folder: Path) -> Outcome:
    """SIGKILL in an evaluation; the next one samples what is missing, and has the same numbers."""
    return _kill_verb(world, rng, folder, "test", _evaluation(world), _evaluated)


def kill_predict(world: World, rng: Random, folder: Path) -> Outcome:
    """SIGKILL while pairs are sampled and labelled: no half of a file, and the next command makes the same."""
    return _kill_verb(world, rng, folder, "predict", _prediction(world), _predicted)


def kill_export(world: World, rng: Random, folder: Path) -> Outcome:
    """SIGKILL in ``export``; what is half written is refused until it is deleted, and made anew."""
    command = ["export", f"--ckpt_path={world.checkpoint}"]
    unbroken = world.unbroken("export", lambda root: run([*command, f"--output_dir={root}"], root))
    at, root = rng.randrange(len(unbroken.events)), folder / "run"
    ended = run([*command, f"--output_dir={root}"], root, Injury("kill", at))
    problems = []
    if root.exists() and any(root.iterdir()):
        problems = check_end(run([*command, f"--output_dir={root}"], root), 2, "exists and is not an empty folder")
        shutil.rmtree(root)
    again = run([*command, f"--output_dir={root}"], root)
    problems += check_end(again, 0)
    weights = [(path / "model.safetensors").read_bytes() for path in (root, world.root / "unbroken" / "export")]
    problems += [] if weights[0] == weights[1] else ["other weights"]
    return Outcome(f"file event {at}: {unbroken.events[at]}", describe(ended), "all of it", problems)


def kill_study(world: World, rng: Random, folder: Path) -> Outcome:
    """SIGKILL of a study at a random moment; the same command ends it, with the same table."""
    return _stop_study(world, rng, folder, signal.SIGKILL)


def _stop_study(world: World, rng: Random, folder: Path, how: signal.Signals) -> Outcome:
    def make(root: Path) -> tuple[str, float]:
        begin = pd.Timestamp.now()
        ended = run(["study", f"--config={write_study(world, root)}"], root)
        assert ended.status == 0, ended.printed
        return _table(root), (pd.Timestamp.now() - begin).total_seconds()

    table, seconds = world.unbroken("study", make)
    wait, begin, root = rng.uniform(0.2, 1.0) * seconds, pd.Timestamp.now(), folder / "run"
    sent = False

    def during(pid: int) -> None:
        nonlocal sent
        if not sent and (pd.Timestamp.now() - begin).total_seconds() > wait:
            sent = True
            os.kill(pid, how) if how == signal.SIGKILL else os.killpg(pid, how)

    command = ["study", f"--config={write_study(world, root)}"]
    ended = run(command, root, during=during)
    problems = [] if how == signal.SIGKILL or ended.status == 0 else check_end(ended, 130, "Stopped by Ctrl-C.")
    done = len(list(root.glob("runs/*/*/done.json")))
    again = run(command, root)
    problems += check_end(again, 0)
    if again.status == 0 and _table(root) != table:
        problems.append("another table than the unbroken study's")
    return Outcome(f"after {wait:.1f} s of {seconds:.1f} s", describe(ended), f"{2 - done} of 2 runs went on", problems)


def _table(root: Path) -> str:
    return (root / "report" / "results.csv").read_text()


# Ctrl-C


def interrupt_fit(world: World, rng: Random, folder: Path) -> Outcome:
    """Ctrl-C at a change of a file; a fit in its steps saves, one line, status 130, and it goes on."""
    events = world.unbroken_fit()[2].events
    at = rng.randrange(len(events))
    ended = world.fit(folder / "run", injury=Injury("int", at))
    problems = check_end(ended, 130 if at < len(events) - 12 else None)
    lost, more = go_on(world, folder / "run")
    return Outcome(f"file event {at} of {len(events)}: {events[at]}", describe(ended), lost, problems + more)


def interrupt_precompute(world: World, rng: Random, folder: Path) -> Outcome:
    """Ctrl-C in ``precompute``: what was computed is kept."""
    return _interrupt(world, rng, folder, "precompute", ["precompute", *world.options], lambda root: "")


def interrupt_test(world: World, rng: Random, folder: Path) -> Outcome:
    """Ctrl-C in an evaluation: likewise."""
    return _interrupt(world, rng, folder, "test", _evaluation(world), _evaluated)


def interrupt_predict(world: World, rng: Random, folder: Path) -> Outcome:
    """Ctrl-C in ``predict``: no half of a file."""
    return _interrupt(world, rng, folder, "predict", _prediction(world), _predicted)


def interrupt_study(world: World, rng: Random, folder: Path) -> Outcome:
    """Ctrl-C in a study: its runs save, and the same command ends it."""
    return _stop_study(world, rng, folder, signal.SIGINT)


# A disk that is full or cannot be written


def full_disk_fit(world: World, rng: Random, folder: Path) -> Outcome:
    """The disk is full in a save; one sentence, the checkpoint before is whole, and with room the fit goes on."""
    size = rng.randrange(60, 500)
    with disk(folder / "run", size) as injury:
        ended = world.fit(folder / "run", injury=injury)
        problems = check_end(ended, 74, "error: ", "of its last.ckpt")
        problems += [] if "No space left" in ended.printed or "File too large" in ended.printed else ["no reason told"]
        make_room(folder / "run")
        lost, more = go_on(world, folder / "run", abrupt=True)
    return Outcome(f"{size} KiB of room", describe(ended), lost, problems + more)


def full_disk_test(world: World, rng: Random, folder: Path) -> Outcome:
    """The disk is full in an evaluation."""
    return _full(world, rng, folder, "test", _evaluation(world), _evaluated)


def full_disk_predict(world: World, rng: Random, folder: Path) -> Outcome:
    """The disk is full in ``predict``."""
    return _full(world, rng, folder, "predict", _prediction(world), _predicted)


def full_disk_precompute(world: World, rng: Random, folder: Path) -> Outcome:
    """The disk is full in ``precompute``."""
    return _full(world, rng, folder, "precompute", ["precompute", *world.options], lambda root: "", least=0)


def full_disk_export(world: World, rng: Random, folder: Path) -> Outcome:
    """The disk is full in ``export``."""
    command = ["export", f"--ckpt_path={world.checkpoint}"]
    size = rng.randrange(4, 40)
    with disk(folder / "run", size) as injury:
        ended = run([*command, f"--output_dir={folder / 'run' / 'out'}"], folder / "run", injury)
    return Outcome(f"{size} KiB of room", describe(ended), "all of it", check_end(ended, 74))


def read_only_fit(world: World, rng: Random, folder: Path) -> Outcome:
    """The folder becomes read only at an optimizer step; one sentence, and later the fit goes on."""
    step, done = rng.randrange(1, NUM_STEPS - 1), False
    root = folder / "run"
    with disk(root, 10_000) as injury:
        if injury.kind == "limit":
            return Outcome("-", "no file system can be mounted here", "-", [])

        def during(pid: int) -> None:
            nonlocal done
            if not done and steps_done(folder / "run.progress") >= step:
                done = subprocess.run(["mount", "-o", "remount,ro", root], capture_output=True).returncode == 0
                if not done:  # a file is open for writing, as in any run: as a disk that has errors does it
                    done = (
                        subprocess.run(["mount", "-o", "remount,ro,force", root], capture_output=True).returncode == 0
                    )

        ended = world.fit(root, during=during)
        subprocess.run(["mount", "-o", "remount,rw", root], check=False)
        lost, problems = go_on(world, root, abrupt=True)
    return Outcome(f"step {step}", describe(ended), lost, problems + check_end(ended, 74 if done else 0))


def read_only_from_the_start(world: World, rng: Random, folder: Path) -> Outcome:
    """Every verb in a folder that cannot be written says so."""
    root = folder / "run"
    with disk(root, 100) as injury:
        if injury.kind == "limit":
            return Outcome("-", "no file system can be mounted here", "-", [])
        subprocess.run(["mount", "-o", "remount,ro", root], check=True)
        verbs = [
            ["precompute", *world.options],
            _evaluation(world),
            _prediction(world),
            ["fit", *world.options, "--trainer.max_steps=1"],
        ]
        verb = rng.choice(verbs)
        ended = run([*verb, _into(root)], root)
    return Outcome(verb[0], describe(ended), "nothing", check_end(ended, 74, "Read-only file system", str(root)))


# Files that are not what was written


def damaged_checkpoint(world: World, rng: Random, folder: Path, *more: str) -> Outcome:
    """A cut or flipped checkpoint is refused in a sentence, or a byte was hit that says nothing."""
    world.unbroken_fit(*more)
    source = last(world.root / "unbroken" / ("fit " + " ".join(more).replace("/", "_")))
    assert source is not None
    root = folder / "run"
    target = root / "version_0" / "checkpoints" / "last.ckpt"
    target.parent.mkdir(parents=True)
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    file = rng.choice(sorted(path for path in target.rglob("*") if path.is_file())) if target.is_dir() else target
    moment = damage(file, rng)
    verb = rng.choice(["fit", "validate"] + (["export"] if not more else []))
    if verb == "export":
        shutil.copytree(source.parent.parent / "model", root / "version_0" / "model")
        ended = run(["export", f"--ckpt_path={target}", f"--output_dir={folder / 'out'}"], root)
    elif verb == "fit":
        ended = world.fit(root, "--trainer.max_steps=12", *more)
    else:
        ended = run(["validate", *world.options, *more, f"--ckpt_path={target}", _into(root)], root)
    problems = check_end(ended, None if ended.status == 0 else 2)
    if ended.status == 0 and not same(end_of(world_root := root), end_of(source.parents[2])) and verb != "fit":
        problems.append(f"it was used: {world_root}")
    return Outcome(f"{verb}: {moment}", describe(ended), "nothing", problems)


def damaged_checkpoint_folder(world: World, rng: Random, folder: Path) -> Outcome:
    """The same, of a folder to which each rank wrote its part."""
    return damaged_checkpoint(world, rng, folder, *FOLDERS)


def damaged_reference_cache(world: World, rng: Random, folder: Path) -> Outcome:
    """A cut or flipped file of the reference's log-probs counts as none: the fit is the unbroken one."""
    root = folder / "run"
    assert run(["precompute", *world.options, _into(root)], root).status == 0
    moment = damage(rng.choice(sorted(root.glob("reference_logps/*/*.parquet"))), rng)
    ended = world.fit(root, CACHED)
    problems = check_end(ended, 0) or compare_fit(world, root, CACHED)
    return Outcome(moment, describe(ended), "the file's rows", problems)


def damaged_responses(world: World, rng: Random, folder: Path) -> Outcome:
    """A cut or flipped shard of an evaluation is sampled or scored anew."""
    root = folder / "run"
    unbroken = _unbroken(world, "test", _evaluation(world), _evaluated)[0]
    assert run([*_evaluation(world), _into(root)], root).status == 0
    moment = damage(rng.choice(sorted(root.glob("evaluations/*/shards/*/*.parquet"))), rng)
    ended = run([*_evaluation(world), _into(root)], root)
    problems = check_end(ended, 0)
    problems += [] if _evaluated(root) == unbroken else ["other numbers"]
    return Outcome(moment, describe(ended), "the shard", problems)


# Processes that die


def worker_dies(world: World, rng: Random, folder: Path) -> Outcome:
    """SIGKILL of a process that reads the data: one sentence, and the fit goes on."""
    step, killed = rng.randrange(1, NUM_STEPS - 2), False

    def during(pid: int) -> None:
        nonlocal killed
        if not killed and steps_done(folder / "run.progress") >= step:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            workers = [child for child in children if "python" in Path(f"/proc/{child}/cmdline").read_text()]
            for child in workers[:1]:
                os.kill(int(child), signal.SIGKILL)
                killed = True

    ended = world.fit(folder / "run", "--data.num_workers=1", during=during)
    problems = check_end(ended, 71, "data.num_workers: DataLoader worker") if killed and ended.status else []
    lost, more = go_on(world, folder / "run", abrupt=True)
    return Outcome(f"step {step}", describe(ended), lost, problems + check_end(ended, None) + more)


def rank_dies(world: World, rng: Random, folder: Path) -> Outcome:
    """SIGKILL of one of two ranks: the other ends within a minute and names it; both go on from the last checkpoint."""
    victim, step, root, pids = rng.randrange(2), rng.randrange(1, NUM_STEPS - 3), folder / "run", {}
    died: list[float] = []

    def during(pid: int, rank: int) -> None:
        pids[rank] = pid
        if len(pids) == 2 and not died and steps_done(folder / "run.progress") >= step:
            died.append(time.monotonic())
            os.kill(pids[victim], signal.SIGKILL)

    ends = _on_two_ranks(world, root, during)
    seconds = time.monotonic() - died[0] if died else 0.0
    problems = check_end(ends[victim], -signal.SIGKILL) + check_end(ends[1 - victim], 71, f"Rank {victim} died")
    problems += [f"it took {seconds:.0f} s"] if seconds > 60 else []
    done, found = steps_done(folder / "run.progress"), last(root)
    saved = int(StoredCheckpoint(found).extras["global_step"]) if found else 0
    again = _on_two_ranks(world, root, lambda pid, rank: None)
    problems += check_end(again[0], 0) + check_end(again[1], 0)
    unbroken = world.unbroken(
        "two ranks", lambda whole: (_on_two_ranks(world, whole, lambda *_: None), end_of(whole))[1]
    )
    problems += [] if same(end_of(root), unbroken) else ["another end than the unbroken run's"]
    moment = f"rank {victim} at step {step}; the other ended after {seconds:.0f} s"
    return Outcome(moment, describe(ends[1 - victim]), f"{done - saved} steps of {done}", problems)


def _on_two_ranks(world: World, root: Path, during: Callable[[int, int], None]) -> list[Ended]:
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    root.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(world.fit, root, *ranks, rank=rank, port=port, during=lambda pid, rank=rank: during(pid, rank))
            for rank in range(2)
        ]
        return [job.result() for job in jobs]


def launched_rank_dies(world: World, rng: Random, folder: Path) -> Outcome:
    """The same where Lightning starts the second rank: the first, its parent, ends too, and the rank is named."""
    root, step = folder / "run", rng.randrange(1, NUM_STEPS - 3)
    command = [sys.executable, "-m", "lit_isdpo", *world.fit_arguments(root)]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=2000", "--trainer.max_epochs=-1"]
    with (folder / "run.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        deadline = time.monotonic() + TIMEOUT
        while steps_done(folder / "run.progress") < step and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = [child for child in children if "lit_isdpo" in Path(f"/proc/{child}/cmdline").read_text()]
        for child in ranks[:1]:
            os.kill(int(child), signal.SIGKILL)
        begin = time.monotonic()
        try:
            status: int | None = process.wait(60)
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(process.pid, signal.SIGKILL)
    ended = Ended(status, (folder / "run.log").read_text())
    problems = [] if ranks else ["there was no second rank"]
    problems += check_end(ended, None) + (
        [] if "ank 1 died" in ended.printed or "[rank: 1]" in ended.printed else ["no name"]
    )
    moment = f"step {step}; the first ended after {time.monotonic() - begin:.0f} s"
    return Outcome(moment, describe(ended), "-", problems)


# What the verbs make


def _into(root: Path) -> str:
    return f"--trainer.default_root_dir={root}"


def _evaluation(world: World) -> list[str]:
    sizes = ["--evaluation.num_prompts=12", "--evaluation.max_new_tokens=4", "--evaluation.batch_size=4"]
    return ["test", *world.options, *sizes, f"--ckpt_path={world.checkpoint}"]


def _evaluated(root: Path) -> str:
    newest = max(root.glob("version_*/evaluation.json"), key=lambda path: path.stat().st_mtime)
    return as_lines(newest, "metrics")


def _prediction(world: World) -> list[str]:
    more = ["--model.sampling.num_responses=3", "--model.sampling.max_new_tokens=40", "--data.max_length=128"]
    labels = ["--labels.reward=LabReward", "--labels.reward.task=lab:posts"]
    policy = (
        f"--model.policy.path={resolve('lab:posts', world.root / 'lab', default='reference')}"  # that ends responses
    )
    return ["predict", *world.options, *more, *labels, policy]


def _predicted(root: Path) -> str:
    files = [*root.glob("version_*/pairs.jsonl"), *root.glob("version_*/predictions.jsonl")]
    newest = sorted(files, key=lambda path: (path.parts[-2], path.name))[-2:]
    return "".join(file.read_text() for file in newest)


def _unbroken(world: World, name: str, command: list[str], read: Callable[[Path], str]) -> tuple[str, Ended]:
    def make(root: Path) -> tuple[str, Ended]:
        ended = run([*command, _into(root)], root)
        assert ended.status == 0, ended.printed
        return read(root), ended

    result: tuple[str, Ended] = world.unbroken(name, make)
    return result


def _kill_verb(
    world: World, rng: Random, folder: Path, name: str, command: list[str], read: Callable[[Path], str]
) -> Outcome:
    expected, unbroken = _unbroken(world, name, command, read)
    at, root = rng.randrange(len(unbroken.events)), folder / "run"
    ended = run([*command, _into(root)], root, Injury("kill", at))
    problems = check_end(ended, -signal.SIGKILL)
    for file in [*root.glob("version_*/*.jsonl"), *root.glob("version_*/evaluation.json")]:
        if file.name != "evaluation.json" and file.read_text() not in expected:
            problems.append(f"half of {file.name}")
    again = run([*command, _into(root)], root)
    problems += check_end(again, 0)
    problems += [] if again.status or read(root) == expected else ["another result"]
    events = unbroken.events
    return Outcome(f"file event {at} of {len(events)}: {events[at]}", describe(ended), "what was in no file", problems)


def _interrupt(
    world: World, rng: Random, folder: Path, name: str, command: list[str], read: Callable[[Path], str]
) -> Outcome:
    expected, unbroken = _unbroken(world, name, command, read)
    at, root = rng.randrange(len(unbroken.events)), folder / "run"
    ended = run([*command, _into(root)], root, Injury("int", at))
    problems = check_end(ended, 130, "Stopped by Ctrl-C.")
    again = run([*command, _into(root)], root)
    problems += check_end(again, 0)
    problems += [] if again.status or read(root) == expected else ["another result"]
    return Outcome(
        f"file event {at} of {len(unbroken.events)}: {unbroken.events[at]}",
        describe(ended),
        "what was in no file",
        problems,
    )


def _full(
    world: World,
    rng: Random,
    folder: Path,
    name: str,
    command: list[str],
    read: Callable[[Path], str],
    least: int = 4,
) -> Outcome:
    expected, _ = _unbroken(world, name, command, read)
    size, root = rng.randrange(least, 24) + 1, folder / "run"
    with disk(root, size) as injury:
        ended = run([*command, _into(root)], root, injury)
        problems = check_end(ended, 74 if ended.status else 0)
        make_room(root)
        again = run([*command, _into(root)], root)
        problems += check_end(again, 0)
        problems += [] if again.status or read(root) == expected else ["another result"]
    return Outcome(f"{size} KiB of room", describe(ended), "what was in no file", problems)


@contextmanager
def disk(root: Path, kib: int) -> Iterator[Injury]:
    """A small file system at ``root``; where none can be mounted, a limit on the size of files."""
    root.mkdir(parents=True)
    is_mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", root], capture_output=True, check=False
    )
    if is_mounted.returncode:
        yield Injury("limit", kib * 1024)
        return
    try:
        yield Injury()
    finally:
        subprocess.run(["umount", "-l", root], check=False)


def make_room(root: Path) -> None:
    """Makes the file system large, where there is one."""
    subprocess.run(["mount", "-o", "remount,size=100m", root], capture_output=True, check=False)


def _public() -> dict[str, Fault]:
    names: dict[str, Any] = globals()
    own = [value for name, value in names.items() if name.split("_")[0] in STEMS and callable(value)]
    return {value.__name__.replace("_", "-"): value for value in own}


STEMS = ("launched", "kill", "interrupt", "full", "read", "damaged", "worker", "rank")
FAULTS = _public()
