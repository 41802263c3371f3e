"""Compares the speed of the working tree with that of a commit, by benchmarks of both that run in turns.

    python3 benches/compare.py [COMMIT] [--bench loss] [--filter REGEX] [--rounds 5]

A line gives the medians of the rounds in milliseconds, the median ratio of the two times of a round, and the least and the
largest of these ratios. Some lines run no code of this crate, such as "read the bytes" and "copy the bytes": their ratios show the
noise of the machine. Lines of microseconds need a quiet machine and more rounds. Exits with 1 if the median ratio of another line is
above 1.1, and with 2 if there is no comparison.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "target" / "compare"
LIMIT = 1.1
# The ends of the lines that run no code of the crate.
CONTROLS = (
    "read the bytes",
    "copy the bytes",
    "stock ops",
    "candle-nn",
    "zeros and addition",
    "zeros and addition of the gradients",
    "three multiplications",
)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", default="HEAD", help="the commit to compare with (default: HEAD)")
    parser.add_argument("--bench", action="append", choices=["loss", "linear"], help="one of the benchmarks (default: both)")
    parser.add_argument("--filter", default="the bytes|kernel|fused|linear", help="a regular expression that lines must contain")
    parser.add_argument("--rounds", type=int, default=5, help="how often each benchmark runs (default: 5)")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds: got {arguments.rounds}, expected at least 1")
    return arguments


def fail(message):
    print(f"compare.py: {message}", file=sys.stderr)
    sys.exit(2)


def run(command, **options):
    """The standard output of a command that must succeed."""
    try:
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, **options)
    except OSError as error:
        fail(f"cannot run {command[0]}: {error.strerror}")
    if done.returncode != 0:
        fail(f"exit status {done.returncode} of: {' '.join(map(str, command))}")
    return done.stdout


def git(*arguments):
    return run(["git", *arguments], cwd=ROOT).strip()


def build(source, target, bench):
    """The path of the benchmark's program. In one target folder, Cargo would take the two trees for the same package and keep the
    program of the first."""
    command = ["cargo", "bench", "--locked", "--no-run", "--bench", bench, "--message-format", "json"]
    output = run(command, cwd=source, env={**os.environ, "CARGO_TARGET_DIR": str(target)})
    messages = [json.loads(line) for line in output.splitlines()]
    [program] = [message["executable"] for message in messages if message.get("executable") and message["target"]["name"] == bench]
    return program


def measure(program, regex):
    """The median time of each line, in milliseconds."""
    home = FOLDER / "criterion"
    shutil.rmtree(home, ignore_errors=True)
    command = [program, "--bench", "--noplot", "--quiet", "--warm-up-time", "0.3", "--measurement-time", "1", regex]
    # The allocator of the benchmark `loss` keeps freed memory.
    environment = {"MIMALLOC_PURGE_DELAY": "-1", **os.environ, "CRITERION_HOME": str(home)}
    run(command, cwd=ROOT, env=environment)
    times = {}
    for path in home.glob("**/new/benchmark.json"):
        estimates = json.loads((path.parent / "estimates.json").read_text())
        times[json.loads(path.read_text())["full_id"]] = estimates["median"]["point_estimate"] / 1e6
    return times


def compare(name, base, current):
    """Prints a line. Returns whether it is too slow."""
    ratios = [after / before for before, after in zip(base, current)]
    ratio = statistics.median(ratios)
    is_slow = ratio > LIMIT and not name.endswith(CONTROLS)
    times = f"{statistics.median(base):.4g} | {statistics.median(current):.4g}"
    print(f"| {name} | {times} | {ratio:.3f} | {min(ratios):.3f} to {max(ratios):.3f} |{' slower' if is_slow else ''}")
    return is_slow


def main():
    arguments = parse_arguments()
    commit = git("rev-parse", "--verify", f"{arguments.commit}^{{commit}}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    tree = FOLDER / "base"
    # A run that was killed leaves its tree.
    shutil.rmtree(tree, ignore_errors=True)
    git("worktree", "prune")
    git("worktree", "add", "--detach", "--quiet", str(tree), commit)
    slow = 0
    try:
        print(f"| base: {commit[:12]} | base, ms | now, ms | ratio | spread |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for bench in arguments.bench or ["loss", "linear"]:
            programs = [build(tree, FOLDER / "target", bench), build(ROOT, ROOT / "target", bench)]
            rounds = []
            for i in range(arguments.rounds):
                # Each of the two is first in every other round.
                order = [0, 1] if i % 2 == 0 else [1, 0]
                times = {side: measure(programs[side], arguments.filter) for side in order}
                rounds.append((times[0], times[1]))
            base, now = map(set, rounds[0])
            if not base & now:
                fail(f"the benchmark {bench} has no line in both trees that matches {arguments.filter!r}")
            slow += sum(compare(name, [base[name] for base, _ in rounds], [now[name] for _, now in rounds]) for name in sorted(base & now))
            for name in sorted(base ^ now):
                print(f"| {name} | only in the {'base' if name in base else 'current tree'} | | | |")
    finally:
        git("worktree", "remove", "--force", str(tree))
    sys.exit(f"{slow} lines are more than {LIMIT - 1:.0%} slower" if slow else 0)


if __name__ == "__main__":
    main()
