"""One self-contained HTML page about one run or several, and the command `wsdino-report RUN [RUN ...]`.

The page reads what `wsdino-evaluate` wrote (results.json), the training logs, and `pictures/*.png`. It holds every
style, script and picture itself and asks the network for nothing; its templates escape every name that came from data.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from tqdm import tqdm

from wsdino.errors import UserError, command, first_line
from wsdino.files import write_text
from wsdino.run_folder import RunFolder

from . import charts, sections
from .runs import Run, load_run, load_thumbnails

__all__ = ["Run", "load_run", "load_thumbnails", "main", "render_report", "write_report"]

FOLDER = Path(__file__).parent
TEMPLATES = Environment(
    loader=FileSystemLoader(FOLDER),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=StrictUndefined,
)
TEMPLATES.filters["number"] = charts.number


def render_report(runs: Sequence[Run], window: Sequence[float] | None = None) -> str:
    """The page's HTML text.

    Parameters
    ----------
    runs : sequence of Run
        At least one.
    window : (float, float), optional
        First and last epoch over which scores during training are averaged; the last quarter if not given.
    """
    names = [run.name for run in runs]
    for run in runs:
        run.prefix = f"{run.name}: " if len(runs) > 1 else ""
    page = TEMPLATES.get_template("page.html").render(
        runs=runs,
        title=" and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names),
        simulated=[run.name for run in runs if run.results["simulated"]],
        sections=sections,
        window=window,
        style=(FOLDER / "page.css").read_text(encoding="utf-8"),
        script=(FOLDER / "page.js").read_text(encoding="utf-8"),
    )
    return page.lstrip()


def write_report(
    run_folders: Sequence[str | Path],
    output: str | Path | None = None,
    dataset: str | Path | None = None,
    window: Sequence[float] | None = None,
    *,
    thumbnails: bool = True,
) -> Path:
    """Write the page about one or several run folders.

    Parameters
    ----------
    output : str or Path, optional
        The file; `report.html` in the first run folder if not given.
    dataset, thumbnails
        See `load_run`.
    window
        See `render_report`.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    UserError
        A run was not evaluated, or by another version of wsdino-evaluate.
    """
    folders = tqdm(run_folders, desc="Reading", unit="run", disable=None)
    runs = [load_run(folder, dataset, thumbnails=thumbnails) for folder in folders]
    names = Counter(run.name for run in runs)
    for run, folder in zip(runs, run_folders, strict=True):
        if names[run.name] > 1:
            run.name = str(folder)
    output = Path(output) if output else RunFolder(run_folders[0]).report_file
    try:
        page = render_report(runs, window)
    except (KeyError, UndefinedError) as error:
        files = ", ".join(str(RunFolder(folder).results_file) for folder in run_folders)
        raise UserError(f"{files} lacks an entry ({first_line(error)}): run wsdino-evaluate again.") from error
    write_text(output, page)
    return output


@command("wsdino-report")
def main(argv: list[str] | None = None) -> None:
    """The command `wsdino-report RUN [RUN ...]`."""
    parser = argparse.ArgumentParser(
        prog="wsdino-report",
        description="Write one self-contained HTML page about one run, or a comparison of several.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder with a results.json (wsdino-evaluate)")
    parser.add_argument("--output", help="file to write (default: report.html in the first run folder)")
    parser.add_argument(
        "--dataset", help="folder of the dataset, for thumbnails (default: the one in the run's settings)"
    )
    parser.add_argument(
        *("--window",), nargs=2, type=float, metavar=("FIRST", "LAST"),
        help="epochs over which scores during training are averaged (default: the last quarter)",
    )  # fmt: skip
    parser.add_argument("--no_thumbnails", action="store_true", help="leave the treatments' pictures out")
    arguments = parser.parse_args(argv)
    if arguments.dataset and not Path(arguments.dataset).is_dir():
        raise UserError(f"--dataset {arguments.dataset} is not a folder: give the dataset that the run used.")
    if arguments.window and not 0 <= arguments.window[0] <= arguments.window[1]:
        raise UserError("--window takes the first and the last epoch, the first not above the last.")
    path = write_report(
        arguments.runs, arguments.output, arguments.dataset, arguments.window, thumbnails=not arguments.no_thumbnails
    )
    print(f"Written: {path} ({path.stat().st_size / 1e6:.1f} MB)")
