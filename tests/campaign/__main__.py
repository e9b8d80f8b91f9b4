"""Many random cases: `python tests/campaign NAME --cases 1000 --seed 0 --jobs 16`.

    python tests/campaign                          the campaigns that there are
    python tests/campaign forms --cases 10000      as many cases, in a process for each --jobs
    python tests/campaign forms --case 123         one case again, with its traceback

Ends with a line that counts what came of them; the exit status is 1 when a case failed. See
`docs/campaign.md` for the counts reached, `runner.py` for how to write one.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the cores
os.environ.setdefault("MKL_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
# As the tests have it, in the processes of the campaign too; and not this directory itself.
sys.path[:] = [str(HERE.parent)] + [p for p in sys.path if Path(p or ".").resolve() != HERE]
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
).rstrip(os.pathsep)

from campaign import runner  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python tests/campaign",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", choices=runner.names())
    parser.add_argument("--cases", type=int, default=100, help="how many [100]")
    parser.add_argument("--seed", type=int, default=0, help="other seeds, other cases [0]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes [all cores]")
    parser.add_argument("--first", type=int, default=0, help="number of the first case [0]")
    parser.add_argument("--case", type=int, help="run this one alone, here, with its traceback")
    given = parser.parse_args()
    if given.name is None:
        print("\n".join(runner.names()))
        return 0
    if given.case is not None:
        with runner.prepared(given.name) as directory:
            print(runner.run_case(given.name, given.seed, given.case, directory))
        return 0
    if given.cases < 1 or given.jobs < 1:
        parser.error("--cases and --jobs must be at least 1")
    begin = time.perf_counter()
    outcome = runner.run(given.name, given.cases, given.seed, given.jobs, given.first)
    print(runner.summary(given.name, given.seed, outcome, time.perf_counter() - begin))
    return bool(outcome.failures)


if __name__ == "__main__":
    sys.exit(main())
