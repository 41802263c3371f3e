"""Compares the speed of the working tree with that of a commit, by benchmarks of both that run in turns.

    python3 benches/compare.py [COMMIT] [--bench loss] [--filter REGEX] [--rounds 5]

A line gives the medians of the rounds in milliseconds, the median ratio of the two times of a round, and the least and the
largest of these ratios. Some lines run no code of this crate, such as "read the bytes" and "copy the bytes": their ratios show the
noise of the machine. Exits with 1 if the median ratio of another line is above 1.1.
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


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def build(source, bench):
    """The path of the benchmark's program. Both trees share the compiled dependencies."""
    command = ["cargo", "bench", "--locked", "--no-run", "--bench", bench, "--message-format", "json"]
    environment = {**os.environ, "CARGO_TARGET_DIR": str(ROOT / "target")}
    cargo = subprocess.run(command, cwd=source, env=environment, stdout=subprocess.PIPE, text=True)
    if cargo.returncode != 0:
        sys.exit(f"the benchmark {bench} does not compile in {source}")
    messages = [json.loads(line) for line in cargo.stdout.splitlines()]
    [program] = [message["executable"] for message in messages if message.get("executable") and message["target"]["name"] == bench]
    # The next build may overwrite the program.
    kept = FOLDER / f"{pathlib.Path(source).name}-{bench}"
    shutil.copy(program, kept)
    return kept


def measure(program, regex):
    """The median time of each line, in milliseconds."""
    home = FOLDER / "criterion"
    shutil.rmtree(home, ignore_errors=True)
    command = [program, "--bench", "--noplot", "--quiet", "--warm-up-time", "0.3", "--measurement-time", "1", regex]
    # The allocator of the benchmark `loss` keeps freed memory.
    environment = {"MIMALLOC_PURGE_DELAY": "-1", **os.environ, "CRITERION_HOME": str(home)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
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
    try:
        commit = git("rev-parse", "--verify", f"{arguments.commit}^{{commit}}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"no commit {arguments.commit!r}: {error.stderr.strip()}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    tree = FOLDER / "base"
    if tree.exists():
        git("worktree", "remove", "--force", str(tree))
    git("worktree", "prune")
    git("worktree", "add", "--detach", "--quiet", str(tree), commit)
    slow = 0
    try:
        print(f"| base: {commit[:12]} | base, ms | now, ms | ratio | spread |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for bench in arguments.bench or ["loss", "linear"]:
            programs = [build(tree, bench), build(ROOT, bench)]
            rounds = []
            for i in range(arguments.rounds):
                # Each of the two is first in every other round.
                order = [0, 1] if i % 2 == 0 else [1, 0]
                times = {side: measure(programs[side], arguments.filter) for side in order}
                rounds.append((times[0], times[1]))
            names = sorted(set(rounds[0][0]) & set(rounds[0][1]))
            if not names:
                sys.exit(f"the benchmark {bench} has no line in both trees that contains {arguments.filter!r}")
            slow += sum(compare(name, [base[name] for base, _ in rounds], [now[name] for _, now in rounds]) for name in names)
    finally:
        git("worktree", "remove", "--force", str(tree))
    sys.exit(f"{slow} lines are more than {LIMIT - 1:.0%} slower" if slow else 0)


if __name__ == "__main__":
    main()
