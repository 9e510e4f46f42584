"""DeiT's command for Slurm: python run_with_submitit.py --nodes 2 --model deit_base_patch16_224 --data-path DIR

It submits run_scripts/slurm.sh with sbatch. All options but those below go to main.py.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="All other options go to main.py.", allow_abbrev=False
    )
    p.add_argument("--ngpus", "--gpu", type=int, default=8, help="GPUs of a node (default: 8)")
    p.add_argument("--nodes", "--node", type=int, default=2, help="nodes (default: 2)")
    p.add_argument("--timeout", type=int, default=2800, help="time limit, minutes (default: 2800)")
    p.add_argument(
        "--job_dir",
        "--job-dir",
        default="output/%j",
        help="folder of the job's output and of its checkpoints; %%j is its number",
    )
    p.add_argument("--partition", help="partition of the cluster (default: the cluster's)")
    p.add_argument("--use_volta32", action="store_true", help="ask for nodes with the feature volta32gb")
    p.add_argument("--comment", help="a message for the scheduler")
    options, rest = p.parse_known_args(argv)
    log = Path(ROOT, options.job_dir.rstrip("/") + ".txt")  # Slurm creates no folders.
    if "%" not in str(log.parent):
        log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        "sbatch",
        f"--nodes={options.nodes}",
        f"--gpus-per-node={options.ngpus}",
        f"--time={options.timeout}",
        f"--output={log}",
        *([f"--partition={options.partition}"] if options.partition else []),
        *(["--constraint=volta32gb"] if options.use_volta32 else []),
        *([f"--comment={options.comment}"] if options.comment else []),
        str(ROOT / "run_scripts" / "slurm.sh"),
    ]
    if not any(argument.split("=")[0] in ("--output_dir", "--output-dir", "--output") for argument in rest):
        rest += ["--output-dir", options.job_dir]  # slurm.sh replaces %j by the job's number.
    try:
        return subprocess.run(command + rest, cwd=ROOT).returncode
    except FileNotFoundError:
        sys.stderr.write(
            "error: there is no sbatch here: this command needs a Slurm cluster; on one machine, use dist_train.sh\n"
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
