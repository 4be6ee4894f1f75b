"""The command `wsdino-evaluate RUN`: profiles in, results.json out, and a table of the scores on the screen.

For every set in `profiles/`: TVN fitted on DMSO for each channel, fields averaged within a plate, the median of plates
within a treatment, channels concatenated, unit length, NSC and NSCB (Cross-Zamirski et al. 2022, section 2).
"""

from dataclasses import dataclass

from wsdino.errors import UserError, command
from wsdino.run_folder import RunFolder
from wsdino.settings import parse_settings, setting

from .profile_table import TableSettings
from .results import evaluate_run
from .scores import PREFIXES, Protocol, evaluate_set
from .training_log import collapse_verdict

__all__ = ["EvaluateSettings", "collapse_verdict", "evaluate_run", "evaluate_set", "format_table", "main"]


@dataclass
class EvaluateSettings(Protocol, TableSettings):
    """Settings of `wsdino-evaluate`."""

    run: str | None = setting(None, "Run folder with profiles/<set>.parquet.")
    retrieval: bool = setting(False, "Compute mAP too (needs the package copairs).")


def format_table(results: dict) -> str:
    """A short text table of a run's scores, one line per set and, below each, one per channel."""

    def share(score: dict, prefix: str) -> str:
        value = score[prefix]
        if value is None:
            return "no query"
        return f"{100 * value:5.1f} % ({score[f'{prefix}_correct']}/{score[f'{prefix}_total']})"

    def interval(score: dict, prefix: str) -> str:
        low, high = score[f"{prefix}_bootstrap"]
        return "" if low is None else f"{100 * low:.0f}-{100 * high:.0f} %"

    lines = [f"{'':<24}{'NSC':>18}{'NSCB':>18}{'dimensions in use':>20}"]
    for name, scores in results["sets"].items():
        lines.append(f"{name:<24}{share(scores, 'nsc'):>18}{share(scores, 'nscb'):>18}")
        line = f"{interval(scores, 'nsc'):>18}{interval(scores, 'nscb'):>18}"
        lines.append(f"{'  95 %, by compound':<24}{line}")
        for channel, part in scores["channels"].items():
            ratio = f"{part['participation_ratio']:.1f} of {part['features']}"
            lines.append(f"  {channel:<22}{share(part, 'nsc'):>18}{share(part, 'nscb'):>18}{ratio:>20}")
    for name, scores in results["sets"].items():
        part, share_of = scores["average_precision"]["replicate"], scores["reproducibility"]
        if part["value"] is not None:
            lines.append(
                f"{name}: replicate mAP {part['value']:.3f}, {share_of['replicating']} of {share_of['treatments']} "
                "treatments replicate"
            )
    for comparison in results["comparisons"]:
        for prefix in PREFIXES:
            part = comparison[prefix]
            if part["compared"]:
                lines.append(
                    f"{comparison['second']} against {comparison['first']}, {prefix.upper()}: "
                    f"{100 * part['difference']:+.1f} points ({len(part['gained'])} gained, {len(part['lost'])} lost, "
                    f"p = {part['p_compound']:.2g} by compound)"
                )
    for channel, training in results["training"].items():
        verdict = training["collapse"]
        lines.append(f"training, {channel}: {'; '.join([verdict['verdict'], *verdict['reasons']])}")
    counts = results["counts"]
    lines.append(
        f"{counts['scored_treatments']} treatments of {counts['compounds']} compounds, {counts['moas']} MOAs, "
        f"{counts['plates']} plates, {counts['batches']} batches"
    )
    lines += results["notes"]
    if results["simulated"]:
        lines.append("SIMULATED data: these figures say nothing about real cells.")
    return "\n".join(lines)


@command("wsdino-evaluate")
def main(argv: list[str] | None = None) -> None:
    """The command `wsdino-evaluate RUN`."""
    settings = parse_settings(
        EvaluateSettings, argv, prog="wsdino-evaluate", positional=("run",),
        description="Score the profiles of a run folder (NSC and NSCB) and write its results.json. Every file in its "
        "folder profiles is a set, also one of another network: wsdino-extract --model facebook/dino-vits8 --channels "
        "... --dataset ... --output RUN/profiles/imagenet.parquet.",
    )  # fmt: skip
    if settings.run is None:
        raise UserError("Name a run folder: wsdino-evaluate runs/demo.")
    results = evaluate_run(settings.run, protocol=settings, table=settings, retrieval=settings.retrieval)
    print(format_table(results))
    print(f"Written: {RunFolder(settings.run).results_file}")


if __name__ == "__main__":
    main()
