"""Does a change of the code change what a run computes? Every shipped recipe, short, twice.

    python benchmarks/same_results.py                    this checkout: one line a run
    python benchmarks/same_results.py --against c8fa762  and the same runs of another commit

Each run has two rounds and small limits. Compared are the accuracy by round, the bytes in both
directions and a digest of all tensors of the newest checkpoint: equal means equal to the bit.
Run folders are left in --out, so that a second call does only what is missing there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["run.rounds=2", "run.device=cpu", "data.clients=3", "data.limit=120", "data.test_limit=90"]
SPLIT = ["data.limit=300", "data.test_limit=200", "train.front=true"]
LANGUAGE = ["data.limit=24", "data.test_limit=16", "data.max_tokens=48"]

#: Name of a run: recipe and settings. First the recipes as they ship, then other methods and forms.
RUNS: dict[str, tuple[str, list[str]]] = {
    "quickstart": ("quickstart", []),
    "agnews": ("agnews", []),
    "banking77": ("banking77", []),
    "clinc150-domains": ("clinc150-domains", []),
    "mmlu": ("mmlu", LANGUAGE),
    "hellaswag": ("hellaswag", LANGUAGE),
    "split-quickstart": ("split-quickstart", SPLIT),
    "fashion-split": ("fashion-split", SPLIT),
    "cifar10-split": ("cifar10-split", SPLIT),
    **{
        name: ("quickstart", [f"method.name={name}"])
        for name in ("fedavg", "fedprox", "fedmoe", "usage", "non-expert", "frozen-gate")
    },
    **{name: ("quickstart", [f"method.name={name}"]) for name in ("scaffold", "fedadam")},
    "meaning": ("quickstart", ["method.match=meaning", "method.weights=select"]),
    "marginal": ("quickstart", ["method.reference=marginal", "method.gate=local"]),
    "median": ("quickstart", ["method.name=fedavg", "method.robust.name=median"]),
    "trimmed": (
        "quickstart",
        ["method.name=scaffold", "method.robust.name=trimmed-mean", "method.robust.share=0.34"],
    ),
    "clipped": ("quickstart", ["method.name=scaffold", "method.robust.name=norm-clipping"]),
    "limited": (
        "quickstart",
        [
            "method.name=fedadam",
            "method.robust.name=norm-clipping",
            "method.robust.limit=0.5",
            "run.participation=0.67",
        ],
    ),
    "lora": ("quickstart", ["model.lora=4", "method.lora=residual"]),
    "two-workers": ("quickstart", ["run.workers=2", "run.timeout=600"]),
    "bfloat16": ("quickstart", ["model.dtype=bfloat16", "method.name=fedavg"]),
    **{
        f"split-{name}": ("split-quickstart", [*SPLIT, f"method.name={name}"])
        for name in ("sl", "random", "l1", "std", "entropy", "taylor", "topk", "randtopk")
    },
    **{
        f"masked-{name}": (
            "split-quickstart",
            [*SPLIT, f"method.name={name}", "method.warmup=0", "method.ramp_rounds=0"],
        )
        for name in ("acp-sl", "entropy", "l1")
    },
    "budget": (
        "split-quickstart",
        [*SPLIT, "method.warmup=0", "method.ramp_rounds=0", "method.rule=budget"],
    ),
    "split-quantize": ("split-quickstart", [*SPLIT, "method.name=quantize"]),
    "split-bottleneck": ("split-quickstart", [*SPLIT, "method.name=bottleneck"]),
    "sequential": ("split-quickstart", [*SPLIT, "run.form=sequential"]),
    "copies": ("split-quickstart", [*SPLIT, "run.form=copies", "method.masks=client"]),
    "u": (
        "split-quickstart",
        [*SPLIT, "run.form=u", "model.tail=conv4", "method.quantize=int8"],
    ),
    "feedback": (
        "split-quickstart",
        [*SPLIT, "method.quantize=int4", "method.error_feedback=true", "run.fronts=fedadam"],
    ),
}


def main() -> int:
    """Run what is missing; returns 1 if the two commits differ."""
    arguments = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    arguments.add_argument("--against", metavar="COMMIT", help="compare with this commit")
    arguments.add_argument("--only", metavar="A,B", help="these runs")
    arguments.add_argument("--out", type=Path, default=Path("runs/same"))
    args = arguments.parse_args()
    names = args.only.split(",") if args.only else list(RUNS)
    before = {}
    if args.against:
        tree = args.out.resolve() / f"tree-{args.against}"
        if not tree.exists():
            git = ["git", "-C", str(ROOT), "worktree", "add", "--detach"]
            subprocess.run([*git, str(tree), args.against], check=True, stdout=subprocess.DEVNULL)
        for name in names:
            before[name] = line_of(tree, name, args.out / args.against)
    here = args.out / "here"
    shutil.rmtree(here, ignore_errors=True)
    different = []
    for name in names:
        found = line_of(ROOT, name, here)
        verdict = ""
        if args.against:
            same = found == before[name] and "error" not in found
            verdict = "same  " if same else "DIFFERENT  "
            different += [] if same else [name]
        print(f"{verdict}{name}: {json.dumps(found)}", flush=True)
        if args.against and name in different:
            print(f"    {args.against}: {json.dumps(before[name])}", flush=True)
    if args.against:
        print(f"{len(names) - len(different)} of {len(names)} runs are the same")
    return 1 if different else 0


def line_of(tree: Path, name: str, out: Path) -> dict[str, object]:
    """One run of a checkout: what is compared."""
    folder = out / name
    if not (folder / "summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        recipe, settings = RUNS[name]
        known = "head_start" in (tree / "src/sluiceway/experiment/recipe.py").read_text()
        old = ["model.head_start=random"] if known else []  # as heads started before it was there
        given = [part for setting in [*SHORT, *old, *settings] for part in ("--set", setting)]
        done = subprocess.run(
            [sys.executable, "-m", "sluiceway", "run", recipe, *given, "--out", str(folder)],
            env={**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return {"error": done.stderr.strip()[-300:]}
    summary = json.loads((folder / "summary.json").read_text())
    keys = ("accuracy_by_round", "bytes_up", "bytes_down", "mean_personal_accuracy")
    return {key: summary[key] for key in keys} | {"tensors": digest(folder / "checkpoints")}


def digest(checkpoints: Path) -> str:
    """Of all tensors that the newest checkpoint holds, whatever they are called."""
    newest = max(checkpoints.glob("round-*"))
    parts = []
    for file in newest.glob("*.safetensors"):
        for tensor in load_file(file).values():
            told = f"{tensor.dtype} {list(tensor.shape)}".encode()
            raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            parts.append(hashlib.sha256(told + raw).hexdigest())
    return hashlib.sha256("".join(sorted(parts)).encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
