"""Writes the evidence in docs/registration.md from the records of :mod:`benchmarks.registration`, and of real
scans, between its marks: ``python -m benchmarks.registration_page``. No figure is typed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._harness import RESULTS, ROOT, as_markdown, put_between
from benchmarks.registration import Study
from pointcmt.studies.tables import excludes_zero, interval_text, markdown, mean_sd, paired_interval

PAGE = ROOT / "docs" / "registration.md"
IMAGES = ROOT / "docs" / "images"
NAMES = {
    "nothing": "doing nothing",
    "mean motion": "the protocol's mean motion",
    "icp": "ICP (open3d)",
    "gicp": "GICP (small_gicp)",
    "fgr": "FGR on FPFH (open3d)",
    "ransac": "RANSAC on FPFH (open3d)",
    "kiss": "KISS-Matcher",
    "ours": "CMIGNet",
    "no images": "CMIGNet without images",
}
SETS = ("same", "unseen", "noise")
Record = Mapping[str, Any]


def read(folder: Path) -> list[Record]:
    """All records of the study."""
    return [json.loads(path.read_text()) for path in sorted((folder / "records").glob("*.json"))]


def error(record: Record, test: str = "unseen", figure: str = "rotation_error") -> float:
    """A figure of one record."""
    return record["tests"][test]["figures"][figure]


def of(records: Sequence[Record], method: str, protocol: str) -> list[Record]:
    """The records of a method under a protocol, by seed."""
    found = [
        r for r in records if (r["method"], r["protocol"]) == (method, protocol) and not r.get("pair_points")
    ]
    return sorted(found, key=lambda r: r["seed"])


def spread(values: Sequence[float]) -> str:
    """Mean over seeds, with standard deviation where there are several."""
    return mean_sd(list(values)) if len(values) > 1 else f"{values[0]:.1f}"


def protocols(records: Sequence[Record]) -> str:
    """Three protocols, three test sets each: rotation error of every method."""
    parts = []
    for protocol in ("prnet", "independent", "rpmnet"):
        lines = []
        for method, words in NAMES.items():
            mine = of(records, method, protocol)
            if not mine:
                continue
            line = [words, str(len(mine)) if "CMIGNet" in words else ""]
            for test in SETS:
                mean, median = (
                    [error(r, test, f) for r in mine] for f in ("rotation_error", "rotation_median")
                )
                line.append(f"{spread(mean)} ({np.mean(median):.1f})")
            line.append(spread([r["tests"]["unseen"]["defined"]["rotation_error"] for r in mine]))
            after = [r["tests"]["unseen"]["refined_errors"] for r in mine]
            line.append(f"{np.mean(after):.1f} ({np.median(np.concatenate(after)):.1f})")
            shift = np.mean([error(r, "unseen", "translation_error") for r in mine])
            recall = np.mean([error(r, "unseen", "recall_10_0.1") for r in mine])
            lines.append([*line, f"{shift:.3f}", f"{100 * recall:.0f} %"])
        if lines:
            one = of(records, "nothing", protocol) or records
            tests = one[0]["tests"]
            overlap = ", ".join(f"{test} {tests[test]['overlap']:.2f}" for test in SETS)
            headings = ["", "seeds", *SETS, "unseen, no symmetric classes", "unseen, after ICP"]
            headings += ["unseen: translation", "unseen: recall at 10° and 0.1"]
            parts.append(
                f"**{one[0]['protocol_in_words'].replace(': ', '**: ', 1)}. Mean overlap: {overlap}; "
                f"{tests['unseen']['pairs']} pairs each.\n\n{markdown(headings, lines).rstrip()}"
            )
    return "\n\n".join(parts)


def differences(
    records: Sequence[Record], method: str, other: str, test: str = "unseen"
) -> tuple[list[float], tuple[float, float] | None]:
    """Mean error of a method minus that of another: one figure per seed that both have; and, where that is
    one seed, its interval over pairs, else that over seeds."""
    mine, theirs = ({r["seed"]: r for r in of(records, m, "independent")} for m in (method, other))
    seeds = sorted(mine.keys() & theirs.keys())
    gaps = [error(mine[s], test) - error(theirs[s], test) for s in seeds]
    if len(seeds) == 1:
        errors = [np.array(r[seeds[0]]["tests"][test]["rotation_errors"]) for r in (mine, theirs)]
        return gaps, paired_interval(errors[0] - errors[1])
    return gaps, paired_interval(np.array(gaps))


def against_baselines(records: Sequence[Record]) -> str:
    """CMIGNet minus each baseline on the same unseen pairs, at every noise, with intervals over pairs."""
    mine = of(records, "ours", "independent")[:1]
    if not mine:
        return ""
    tests = ["unseen", "noise", *(name for name in mine[0]["tests"] if name.startswith("noise "))]
    lines = []
    for method in ("mean motion", "icp", "gicp", "fgr", "ransac", "kiss"):
        for theirs in of(records, method, "independent"):
            line = [NAMES[method]]
            for test in tests:
                gap = np.subtract(*(r["tests"][test]["rotation_errors"] for r in (mine[0], theirs)))
                line.append(interval_text(paired_interval(gap)))
            lines.append(line)
    headings = ["CMIGNet minus", *("σ = " + _level(test) for test in tests)]
    return (
        "CMIGNet's rotation error minus that of each baseline on the same pairs (`independent`, unseen "
        "categories, first seed), in degrees with the 95 % interval over pairs; below zero: CMIGNet is "
        "better.\n\n" + markdown(headings, lines).rstrip()
    )


def _level(test: str) -> str:
    return {"unseen": "0", "noise": "0.01"}.get(test, test.removeprefix("noise "))


def denser(records: Sequence[Record]) -> str:
    """The baselines on clouds with more points."""
    lines = [
        [NAMES[r["method"]], *(f"{error(r, t):.1f} ({error(r, t, 'rotation_median'):.1f})" for t in SETS)]
        for r in records
        if r.get("pair_points")
    ]
    if not lines:
        return ""
    points = next(r["pair_points"] for r in records if r.get("pair_points"))
    return (
        f"Features of single points need neighbours, which these clouds are poor in. The baselines on clouds "
        f"of {points} points before the crop, `independent`:\n\n" + markdown(["", *SETS], lines).rstrip()
    )


def images_text(records: Sequence[Record]) -> str:
    """What images add: with and without, and with another object's, as sentences."""
    gaps, interval = differences(records, "no images", "ours")
    if not gaps:
        return ""
    over = f"over {len(gaps)} seeds" if len(gaps) > 1 else "over pairs, one seed"
    lines = [["trained and asked without images", over, interval_text(interval)]]
    asked = [r for r in of(records, "ours", "independent") if "asked_otherwise" in r]
    for name in ("another object's images", "empty images") if asked else ():
        change = [r["asked_otherwise"][name]["figures"]["rotation_error"] - error(r) for r in asked]
        if len(change) > 1:
            lines.append([f"trained with its own, asked with {name}", f"over {len(change)} seeds",
                          interval_text(paired_interval(np.array(change)))])  # fmt: skip
        else:
            pairs = [np.array(r["asked_otherwise"][name]["rotation_errors"]) for r in asked]
            own = [np.array(r["tests"]["unseen"]["rotation_errors"]) for r in asked]
            lines.append([f"trained with its own, asked with {name}", "over pairs, one seed",
                          interval_text(paired_interval(pairs[0] - own[0]))])  # fmt: skip
    for extra in ("complete images",):
        gaps, interval = differences(records, extra, "ours")
        if gaps:
            lines.append([f"{extra} of the object in its own pose, a prior", "over pairs, one seed",
                          interval_text(interval)])  # fmt: skip
    trained = differences(records, "no images", "ours")[1]
    verdict = (
        "no gain from images is shown" if trained is None or not excludes_zero(trained) else "images matter"
    )
    return (
        "Rotation error minus that of CMIGNet with its own images, in degrees, on unseen categories of the "
        "protocol `independent`; bold where the 95 % interval excludes zero. Above zero: its own images are "
        f"better. By training with and without them, {verdict}.\n\n"
        + markdown(["", "interval", "difference"], lines).rstrip()
    )


def ablation(records: Sequence[Record], study: Study) -> str:
    """Each part left out or changed, in training and in asking."""
    lines = []
    for method in study.networks:
        gaps, interval = differences(records, method, "ours")
        if method != "ours" and gaps:
            values = [error(r) for r in of(records, method, "independent")]
            what = "over seeds" if len(gaps) > 1 else "over pairs"
            lines.append([method, "trained", spread(values), f"{interval_text(interval)} {what}"])
    asked = [r for r in of(records, "ours", "independent") if "asked_otherwise" in r]
    for name in asked[0]["asked_otherwise"] if asked else ():
        values = [r["asked_otherwise"][name]["figures"]["rotation_error"] for r in asked]
        change = np.concatenate(
            [
                np.array(r["asked_otherwise"][name]["rotation_errors"])
                - np.array(r["tests"]["unseen"]["rotation_errors"])
                for r in asked
            ]
        )
        lines.append([name, "asked", spread(values), f"{interval_text(paired_interval(change))} over pairs"])
    return (
        "Rotation error on unseen categories and its difference to CMIGNet as configured, in degrees; below "
        "zero: better. *trained*: another network; *asked*: the same weights, asked in another way.\n\n"
        + markdown(["change", "", "error", "difference"], lines).rstrip()
    )


def curves(records: Sequence[Record]) -> dict[str, dict[float, float]]:
    """method → noise → mean rotation error on the unseen categories, of the first seed."""
    found: dict[str, dict[float, float]] = {}
    for method, words in {**NAMES, "trained with noise": "CMIGNet, trained with noise"}.items():
        for record in of(records, method, "independent")[:1]:
            if not any(name.startswith("noise ") for name in record["tests"]):
                continue
            line = {0.0: error(record), 0.01: error(record, "noise")}
            for name in record["tests"]:
                if name.startswith("noise "):
                    line[float(name.split()[1])] = error(record, name)
            found[words] = dict(sorted(line.items()))
    return found


def noise_table(records: Sequence[Record]) -> str:
    lines = curves(records)
    levels = sorted({level for line in lines.values() for level in line})
    rows = [[words, *(f"{line[level]:.1f}" for level in levels)] for words, line in lines.items()]
    headings = ["standard deviation of the noise", *(f"{level:g}" for level in levels)]
    return (
        "Mean rotation error on unseen categories of `independent`, first seed:\n\n"
        + markdown(headings, rows).rstrip()
    )


def scans_text(folder: Path) -> str:
    """What `register` does on real scans, from scans.json."""
    from benchmarks.registration_scans import section

    return section(folder)


def cost_text() -> str:
    """Time beside RANSAC and memory of training."""
    parts = []
    for name in ("registration-cost-cpu", "registration-memory-cpu"):
        path = RESULTS / f"{name}.json"
        if path.exists():
            record = json.loads(path.read_text())
            parts.append(as_markdown(record["rows"]))
    return "\n\n".join(parts)


def evidence(folder: Path = RESULTS / "registration", study: Study | None = None) -> str:
    """The section."""
    study = study or Study.read()
    records = read(folder)
    steps = [r["training"] for r in records if r["method"] == "ours"]
    about = study.about.strip()
    if steps:
        count = steps[0]["pairs"] // study.loop["batch_size"] * study.loop["epochs"]
        about += (
            f" {steps[0]['parameters']:,} parameters, {study.pair_points} points of a shape before the crop, "
            f"{count} steps of {study.loop['batch_size']} pairs from {steps[0]['pairs']} training shapes of "
            "ModelNet40's first 20 categories; last epoch."
        )
    parts = [
        about,
        "`python -m benchmarks.registration --data DIR`, cells in `benchmarks/configs/registration.yaml`. "
        "Isotropic rotation error in degrees: mean (median) over pairs, ± standard deviation over seeds. "
        "*same*: test shapes of the training categories; *unseen*: of the other 20; *noise*: those with "
        f"σ = {study.noise:g} on coordinates. Each baseline's voxel is the best of five on training pairs. "
        "*The protocol's mean motion* sees no cloud but their centres: angles of these protocols are "
        "one-sided, so a mean "
        "above that row is worse than not looking at the clouds.",
        protocols(records),
        against_baselines(records),
        denser(records),
        "### What images add",
        images_text(records),
        "### Parts",
        ablation(records, study),
        "### Noise",
        noise_table(records),
        "### Real scans",
        scans_text(folder),
        "### Time and memory",
        cost_text(),
    ]
    return "\n\n".join(part for part in parts if part)


def main() -> int:
    """Rewrite the section."""
    put_between(PAGE, "evidence", evidence())
    print(PAGE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
