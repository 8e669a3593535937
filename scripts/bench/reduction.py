"""Memory that the reduction of feature statistics takes, at several numbers of processes.

python scripts/bench/reduction.py [--features 2048] [--processes 2 8]

Each process holds the mean and covariance of its own features, and all of them are merged, as an
evaluation on several processes does at its end. What the peak of a process grows by, in the
reduction, must not depend on how many processes there are. The ratio to the first number of
processes is printed.
"""

import argparse
import os
import re
import resource
import subprocess
import sys

MIB = 1024  # of the kilobytes in which the peak is counted


def measure(num_features: int) -> None:
    """Merge statistics in this process, one of several, and print how the peak grew in MiB."""
    import torch
    import torch.distributed as dist

    from difftrain.core.launch import join_processes, leave_processes
    from difftrain.evaluation.distances.moments import packed_moments, reduced_moments

    torch.set_num_threads(1)
    join_processes()
    own = torch.randn(64, num_features, dtype=torch.float64)
    packed = packed_moments(own)
    # What every process and gloo need once
    reduced_moments(packed_moments(own[:, :8]))
    dist.barrier()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reduced_moments(packed)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"grew {(after - before) / MIB:.1f} MiB", flush=True)
    leave_processes(0)


def growth(num_processes: int, num_features: int) -> float:
    """Return the largest growth of a process, in MiB."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]
    launcher += [str(num_processes), "--master_port", "29517"]
    done = subprocess.run(
        [*launcher, __file__, "--features", str(num_features), "--measure"],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    # Lines of several processes may run together.
    return max(float(found) for found in re.findall(r"grew ([\d.]+) MiB", done.stdout))


def main() -> None:
    """Run the measurement at each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=2048, help="width of the features")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.features)
        return
    matrix = given.features**2 * 8 / 2**20
    print(f"{given.features} features, a matrix of {matrix:.1f} MiB")
    first = None
    for num_processes in given.processes:
        found = growth(num_processes, given.features)
        first = first or found
        ratio = found / first
        print(f"{num_processes:3d} processes: {found:6.1f} MiB in the reduction, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
