"""What results add up to: gaps, their spread, the answers, and what is kept on disk."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from p2ptrain.errors import P2PTrainError, StorageError
from p2ptrain.experiment.grid import Arm, Cell, Grid
from p2ptrain.experiment.report import PAGE, PICTURE, cohesions, copies, lines, published, table, write
from p2ptrain.experiment.rows import checks
from p2ptrain.experiment.store import RESULTS, Store, open_store, read_store
from p2ptrain.experiment.summary import Summary, answers, hours, pareto, spearman, summarise
from p2ptrain.experiment.trials import Trial
from peers.cli import app
from tests.unit.experiments import conducted, grid_of

ARMS = (
    Arm(name="sync", strategy="sync"),
    Arm(name="average"),
    Arm(name="sgd", optimizer="sgd", steps=(1,)),
)
PLAIN = {"momentum": 0.0}


def grid_r5(**fields: Any) -> Grid:
    grid = grid_of(
        row="R5", peers=(1, 2, 4), steps=(1, 2, 4, 8), seeds=(1, 2, 3), rates=(0.1,), arms=ARMS, **fields
    )
    return grid.model_copy(update={"optimizer": grid.optimizer.model_copy(update=PLAIN)})


def expected(trial: Trial) -> float:
    """Up in N, up in H; seeds differ by 0.01."""
    cell = trial.cell
    apart = 0.001 * (cell.peers - 1) * cell.steps**2 if cell.arm == "average" else 0.0
    return 2.0 + apart + 0.01 * (trial.seed - 2)


def summary_of(grid: Grid, loss: Any = expected) -> Summary:
    return summarise(grid, conducted(grid, loss)[0])


def test_gap_is_paired_by_seed_and_its_sigma_follows_the_spread() -> None:
    summary = summary_of(grid_r5())
    each = summary.at(Cell("average", 4, 8))
    assert each is not None
    assert each.loss == pytest.approx(2.192)
    assert each.gap == pytest.approx(0.192)
    assert each.percent == pytest.approx(9.6)
    assert each.spread == pytest.approx(0.01)
    assert each.sigma == pytest.approx(0.01 * math.sqrt(2 / 3))
    assert not each.as_synchronous
    assert each.curve == ((32, pytest.approx(3.192)), (64, pytest.approx(2.192)))


def test_spread_that_is_small_by_luck_is_not_believed() -> None:
    summary = summary_of(
        grid_r5(), lambda trial: 2.0 if trial.cell.arm == "average" else 2.0 + 0.1 * trial.seed
    )
    each = summary.at(Cell("average", 2, 4))
    assert each is not None
    assert each.spread == 0
    assert each.sigma == pytest.approx(0.1 * math.sqrt(2 / 3))


def test_each_number_of_peers_gets_one_answer() -> None:
    assert answers(summary_of(grid_r5())) == [
        "average, N = 1: largest H within 2 sigma of synchronous: H = 8 (of 1, 2, 4, 8); H = 8 costs +0.0 %",
        "average, N = 2: largest H within 2 sigma of synchronous: H = 4 (of 1, 2, 4, 8); H = 8 costs +3.2 %",
        "average, N = 4: largest H within 2 sigma of synchronous: H = 2 (of 1, 2, 4, 8); H = 8 costs +9.6 %",
    ]


def test_cell_that_diverges_with_one_seed_has_no_mean() -> None:
    summary = summary_of(
        grid_r5(), lambda trial: None if (trial.cell.steps, trial.seed) == (8, 3) else expected(trial)
    )
    each = summary.at(Cell("average", 4, 8))
    assert each is not None
    assert (each.loss, each.gap, each.curve) == (math.inf, math.inf, ())
    assert answers(summary)[-1].endswith("H = 8 diverges")
    assert table(summary, "average")[-1][-1] == "diverged"


def test_row_that_agrees_with_the_literature_holds() -> None:
    found = checks(summary_of(grid_r5()))
    said = {check.expected: check.holds for check in found}
    assert said["average, N = 4: the loss rises with H"]
    assert said["average, H = 8: the loss rises with N"]
    assert said["sgd, H = 1: the same for every N"]
    assert all(said.values())


def test_row_that_contradicts_the_literature_says_so() -> None:
    def loss(trial: Trial) -> float:
        return (
            expected(trial)
            - 0.1 * (trial.cell.steps == 8)
            + 0.1 * (trial.cell.arm == "sgd") * trial.cell.peers
        )

    said = {check.expected: check.holds for check in checks(summary_of(grid_r5(), loss))}
    assert not said["average, N = 2: the loss rises with H"]
    assert not said["sgd, H = 1: the same for every N"]


def test_parts_are_judged_by_where_they_break() -> None:
    arms = (
        Arm(name="sync", strategy="sync"),
        Arm(name="average"),
        Arm(name="union", strategy="partition", gamma="1"),
        Arm(name="damped", strategy="partition", gamma="1/n"),
    )
    grid = grid_of(row="R6", samples=8000, steps=(1, 5, 100), seeds=(1, 2, 3), rates=(0.01,), arms=arms)

    def loss(trial: Trial) -> float:
        breaks = 3.0 if (trial.cell.arm, trial.cell.steps) == ("union", 100) else 0.0
        return 2.0 + breaks + 0.01 * trial.seed

    assert [check.expected for check in checks(summary_of(grid, loss)) if check.holds] == [
        "union, N = 2, H = 1: few steps cost less than 5 %",
        "union, N = 2, H = 5: few steps cost less than 5 %",
        "union, N = 2, H = 100: many steps cost more than 20 %",
        "union, N = 2, H = 100: worse than average",
        "damped, N = 2, H = 100: damped, it is stable: within 10 % of H = 1",
    ]
    said = [check.holds for check in checks(summary_of(grid, lambda trial: 2.0 + 0.01 * trial.seed))]
    assert said == [True, True, False, False, True]


def test_row_is_not_judged_while_cells_are_missing() -> None:
    grid = grid_r5()
    results, _ = conducted(grid, expected)
    results.popitem()
    summary = summarise(grid, results)
    assert summary.missing == 1
    assert checks(summary) == []


def test_published_row_stands_beside_ours_at_the_nearest_number_of_steps() -> None:
    rows = published(summary_of(grid_r5()))
    assert rows[1] == ["35 M, H = 30, outer Nesterov (2503.09799)", "-0.1", "+0.7", "+2.0", "+3.9"]
    assert rows[-1] == ["ours: average, H = 8", "+0.0", "+3.2", "+9.6", ""]


def test_hours_are_those_of_plan() -> None:
    """64 samples in 2 rounds; each computes for 8 s of half a second a sample, and sends 400 bytes."""
    summary = summary_of(grid_r5(rtt_milliseconds=0.0))
    each = summary.at(Cell("average", 2, 4))
    assert each is not None
    sample_seconds = summary.sample_seconds
    seconds = 2 * (32 * sample_seconds / 2 + 400 / 1e6)
    assert hours(summary, each, 8.0) == pytest.approx(seconds / 3600)


def test_pareto_front_is_what_nothing_beats() -> None:
    assert pareto([(1, 5), (2, 3), (2, 4), (3, 3), (4, 1), (0, math.inf)]) == [0, 1, 4]


def test_rank_correlation_is_spearmans() -> None:
    assert spearman([1, 2, 3, 4, 5], [1, 4, 9, 16, 25]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4, 5], [2, 1, 3, 4, 5]) == pytest.approx(0.9)
    assert spearman([1, 2, 3], [3, 3, 1]) == pytest.approx(-0.866, abs=1e-3)
    assert spearman([1, 2, 3], [3, 3, 3]) == 0


# -- on disk -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of an experiment that is done."""
    path = tmp_path / "done"
    store = open_store(path, grid_r5(), resume=False)
    for result in conducted(grid_r5(), expected)[0].values():
        store.add(result)
    return path


def test_results_are_read_as_they_were_written(folder: Path) -> None:
    grid, results = read_store(folder)
    assert grid == grid_r5()
    assert results == conducted(grid, expected)[0]


def test_line_that_was_torn_is_trained_again(folder: Path) -> None:
    path = folder / RESULTS
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    _, results = read_store(folder)
    store: Store = open_store(folder, grid_r5(), resume=True)
    assert store.results == results
    for result in conducted(grid_r5(), expected)[0].values():
        if result.key not in store.results:
            store.add(result)
    assert path.read_bytes() == whole


def test_folder_is_refused_with_a_sentence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    open_store(tmp_path / "fresh", grid_r5(), resume=False)
    wrong = {
        "nowhere": "there is no folder",
        "empty": "has no grid.json",
        "fresh": "holds no result yet",
    }
    for name, sentence in wrong.items():
        with pytest.raises(StorageError, match=sentence):
            read_store(tmp_path / name)
    with pytest.raises(StorageError, match="holds results already; go on with them by --resume"):
        open_store(folder, grid_r5(), resume=False)
    (folder / RESULTS).write_bytes(b'{"key": 1}\n' + (folder / RESULTS).read_bytes())
    with pytest.raises(StorageError, match=r"line 1 of .* is no result"):
        read_store(folder)
    (folder / "grid.json").write_text("{")
    with pytest.raises(StorageError, match="is damaged"):
        read_store(folder)


# -- the page and the command --------------------------------------------------------------------------------


def test_page_needs_nothing_from_elsewhere_and_says_how_it_was_made(folder: Path) -> None:
    written = write(summarise(*read_store(folder)), folder, ["p2ptrain experiment run <x>"])
    assert [path.name for path in written] == [PAGE, PICTURE]
    page = (folder / PAGE).read_text()
    assert "http" not in page.replace("https://arxiv", "")
    assert "p2ptrain experiment run &lt;x&gt;" in page
    assert "largest H within 2 sigma of synchronous: H = 4" in page
    assert (folder / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_page_does_without_matplotlib(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert [path.name for path in write(summarise(*read_store(folder)), folder, [])] == [PAGE]
    assert "p2ptrain[plot]" in (folder / PAGE).read_text()


def test_report_command_ends_with_one_json_object_when_asked(folder: Path) -> None:
    result = CliRunner().invoke(app, ["experiment", "report", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["missing_cells"] == 0
    assert len(told["cells"]) == 3 + 12 + 3
    assert all(check["holds"] for check in told["checks"])


def test_report_command_is_refused_when_there_is_no_folder() -> None:
    result = CliRunner().invoke(app, ["experiment", "report", "/nowhere"])
    assert isinstance(result.exception, P2PTrainError)
    assert result.exception.exit_code == 6


def test_report_tells_how_parts_fit_together_and_says_nothing_of_others() -> None:
    arms = (Arm(name="sync", strategy="sync"), Arm(name="union", strategy="partition", gamma="1"))
    grid = grid_of(samples=1600, steps=(1, 100), rates=(0.1,), arms=arms)
    results, _ = conducted(grid, lambda trial: 2.0)
    told = {
        key: replace(each, parts_change=-0.2, defect=0.1 * each.seed)
        for key, each in results.items()
        if each.arm == "union"
    }
    assert cohesions(summarise(grid, results | told))[-1] == [
        "union, N = 2, H = 100",
        "-0.2000",
        "-0.0500",
        "+0.1500",
        "yes",
    ]
    assert len(cohesions(summary_of(grid_r5()))) == 1


def test_report_tells_how_far_peers_came_apart_on_the_page_and_for_programs(tmp_path: Path) -> None:
    grid = grid_r5()
    results, _ = conducted(grid, expected)
    told = {
        key: replace(
            each,
            change_norm=0.5,
            cosine=0.25 if each.peers > 1 else None,
            consensus_distance=0.1 * each.seed if each.peers > 1 else None,
            barrier=-0.001 * each.seed if each.peers > 1 else None,
        )
        if each.arm == "average"
        else each
        for key, each in results.items()
    }
    summary = summarise(grid, told)
    rows = copies(summary)
    assert len(rows) == 1 + 12
    assert rows[1] == ["average, N = 1, H = 1", "0.5", "", "", ""]
    assert rows[-1] == ["average, N = 4, H = 8", "0.5", "+0.25", "0.2", "-0.0020"]
    assert any("-0.0020" in line for line in lines(summary))
    store = open_store(tmp_path / "out", grid, resume=False)
    for each in told.values():
        store.add(each)
    said = CliRunner().invoke(app, ["experiment", "report", str(tmp_path / "out"), "--json"])
    cell = json.loads(said.stdout.splitlines()[-1])["cells"][-4]
    assert (cell["arm"], cell["cosine"], cell["barrier"]) == ("average", 0.25, pytest.approx(-0.002))
    assert (cell["cohesion_defect"], cell["parts_change"]) == (None, None)
    assert "How far apart peers came" in (tmp_path / "out" / PAGE).read_text()
