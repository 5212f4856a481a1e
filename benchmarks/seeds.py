"""Runs of the whole pipeline with other seeds, side by side: does a run depend on luck?

mhrlhf test-pipeline --seed 1 --output outputs/seed_1 (and so on), then
python benchmarks/seeds.py outputs/test_pipeline outputs/seed_1 outputs/seed_2 [--json FILE]

The seed is that of the SIMULATED panel, the heads and the tuning; prompts and images are the same for all."""
from pathlib import Path
import argparse, json

def row(run):
    "Gains by the judge, win rate, and the second judge's view of one run."
    summary, dspo = (json.loads((run/name).read_text()) for name in ("summary.json", "dspo_model/dspo.json"))
    win, aspects, second = summary["composite"], summary["aspects"], summary["second_judge"]
    gains = {name: round(a["gain"], 2) for name, a in aspects.items()}
    return dict(seed=dspo["settings"]["seed"], updates=dspo["settings"]["updates"], **gains,
                mean=round(sum(a["gain"] for a in aspects.values()) / len(aspects), 2),
                composite=round(win["gain"], 2), win=round(win["win"], 3), win_low=round(win["win_low"], 3),
                lowest_bound=round(min(summary["together"]["bounds"].values()), 2),
                second_win=round(second["composite"]["win"], 3),
                second_lowest=round(min(s["gain"] for name, s in second.items() if name != "composite"), 2))

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs of test-pipeline")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    o = parser.parse_args()
    rows = [row(run) for run in o.runs]
    for r in rows: print("  ".join(f"{name} {value}" for name, value in r.items()))
    if o.json: o.json.write_text(json.dumps(dict(rows=rows), indent=1) + "\n")

if __name__ == "__main__": main()
