"""`p2ptrain adapters`: put people's adapters together. No swarm is needed, and nothing on the net."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2ptrain.errors import AdapterError

if TYPE_CHECKING:  # the verbs import it when they run: help, and other commands, answer at once
    from p2ptrain.adapters.combine import Combined
    from p2ptrain.adapters.factors import Factors
    from p2ptrain.adapters.files import Adapter
    from p2ptrain.adapters.verdict import Verdict

app = typer.Typer(
    name="adapters",
    help="Combine LoRA adapters of one base, or learn which is best in a given context.",
    no_args_is_help=True,
)
route = typer.Typer(help="Learn which adapter is best for a text, and measure it.", no_args_is_help=True)
app.add_typer(route, name="route")

Length = Annotated[int, typer.Option(min=8, help="Tokens in a window of text.")]
Windows = Annotated[int, typer.Option(min=5, help="Of each text, at most.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of output.")]


class Method(StrEnum):
    CAT = "cat"
    MEAN = "mean"
    SUM = "sum"
    SVD = "svd"
    MERGE = "merge"


@app.command()
def combine(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="Folders as PEFT writes them.")
    ],
    method: Annotated[
        Method,
        typer.Option(
            help="cat: side by side, with the weights as they are; mean: weights made to sum to 1; sum: all "
            "with weight 1; svd: the mean, cut to the largest rank among them; merge: the mean, added to the "
            "base. All are exact but for what --rank, --energy or svd cut off."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not be there yet.")],
    weights: Annotated[str, typer.Option(help="`samples`, or a number for each, such as 1,1,2.")] = "",
    rank: Annotated[int, typer.Option(min=0, help="Cut the result to this rank; 0: do not.")] = 0,
    energy: Annotated[
        float, typer.Option(min=0, max=1, help="Cut it to the rank that keeps this share of it; 0: do not.")
    ] = 0.0,
    into_base: Annotated[
        bool, typer.Option("--into-base", help="Write the base with the result added, not an adapter.")
    ] = False,
    base: Annotated[
        Path | None, typer.Option(help="The folder of the model that they were trained on.")
    ] = None,
    judge_by: Annotated[
        list[Path] | None,
        typer.Option(
            "--eval",
            metavar="FILE",
            help="A text that none of them was trained on, to measure base, parents and result by; may be "
            "repeated.",
        ),
    ] = None,
    length: Length = 192,
    windows: Windows = 200,
    as_json: Json = False,
) -> None:
    """Make one adapter of several, or a model, and say how alike they are and whether it is better."""
    into_base = into_base or method is Method.MERGE
    if rank and energy:
        raise AdapterError("--rank and --energy both say how much to keep; give one of them")
    if into_base and base is None:
        raise AdapterError("to add the result to the base, give the base's folder with --base")
    if judge_by and base is None:
        raise AdapterError("to measure the result with --eval, give the base's folder with --base")

    from p2ptrain.adapters.combine import combine as combined
    from p2ptrain.adapters.combine import weights_for
    from p2ptrain.adapters.files import load_adapter, merge, save_adapter

    read = [load_adapter(path) for path in adapters]
    result = combined(
        read,
        method.value,
        weights_for(read, method.value, weights),
        rank=rank or None,
        energy=energy or None,
    )
    found = None
    if judge_by:
        from p2ptrain.adapters.verdict import judged

        assert base is not None
        found = judged(base, read, result.factors, judge_by, length=length, most=windows, progress=_on_stderr)
    if into_base:
        assert base is not None
        merge(base, result.factors, read[0].settings.fan_in_fan_out, out)
    else:
        save_adapter(out, result.factors, read[0], _note(read, method, result, found), sorted(result.factors))
    if as_json:
        parents = [{"path": str(each.path), "digest": each.digest} for each in read]
        measured = {} if found is None else {"eval": found.facts()}
        facts = {"out": str(out), "method": method, "parents": parents, **result.facts(), **measured}
        typer.echo(json.dumps(facts))
        return
    for line in _lines(read, result):
        typer.echo(line)
    for line in [] if found is None else _judgement(found):
        typer.echo(line)
    typer.echo(f"written: {out}")


Texts = Annotated[list[str], typer.Option(metavar="NAME=FILE", help="A text of each kind; may be repeated.")]


@route.command("train")
def route_train(
    base: Annotated[Path, typer.Option(help="The folder of the model that the adapters were trained on.")],
    adapters: Annotated[
        list[str], typer.Option("--adapters", metavar="NAME=DIR", help="An adapter; may be repeated.")
    ],
    data: Texts,
    out: Annotated[Path, typer.Option(help="Folder to write; it must not be there yet.")],
    prefix: Annotated[int, typer.Option(min=2, help="Tokens that the router looks at.")] = 64,
    length: Length = 192,
    windows: Windows = 200,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Below this confidence the base goes on without an adapter; found out if not given.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Learn from texts which adapter is best after their first tokens."""
    if prefix >= length:
        raise AdapterError(
            f"--prefix {prefix} must be below --length {length}: the rest is what is judged by"
        )
    named, texts = _named(adapters, "--adapters"), _named(data, "--data")

    from p2ptrain.adapters.routers import save_router
    from p2ptrain.adapters.routing import trained

    router, note = trained(
        base,
        named,
        texts,
        prefix=prefix,
        length=length,
        most=windows,
        threshold=threshold,
        progress=_on_stderr,
    )
    save_router(out, router, note)
    _tell(out, note.table, note.confusion, ("base", *named), as_json)


@route.command("eval")
def route_eval(
    router: Annotated[Path, typer.Argument(help="Folder that `route train` has written.")],
    data: Texts,
    length: Length = 192,
    windows: Windows = 200,
    as_json: Json = False,
) -> None:
    """Compare base, each adapter, their mean, the router and the oracle on texts of your own."""
    texts = _named(data, "--data")

    from p2ptrain.adapters.routers import load_router
    from p2ptrain.adapters.routing import judged

    read, note = load_router(router)
    if note.prefix >= length:
        raise AdapterError(
            f"--length {length} must be above {note.prefix}, the tokens that the router looks at"
        )
    table, confusion = judged(read, note, texts, length=length, most=windows, progress=_on_stderr)
    _tell(router, table, confusion, ("base", *(each.name for each in note.adapters)), as_json)


def _on_stderr(line: str) -> None:
    typer.echo(line, err=True)


def _named(words: list[str], option: str) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or not name.isidentifier() or not path or name in named:
            raise AdapterError(f"{option} {word[:60]!r}: expected NAME=PATH, each name a word of its own")
        named[name] = Path(path)
    return named


def _tell(
    folder: Path,
    table: dict[str, dict[str, float]],
    confusion: tuple[tuple[int, ...], ...],
    choices: tuple[str, ...],
    as_json: bool,
) -> None:
    if as_json:
        typer.echo(
            json.dumps({"router": str(folder), "table": table, "choices": choices, "confusion": confusion})
        )
        return
    columns = list(next(iter(table.values())))
    typer.echo("loss after the prefix, nats per token, on texts that were not trained on:")
    typer.echo(" " * 12 + "".join(f"{column[:10]:>11}" for column in columns))
    for way, losses in table.items():
        typer.echo(f"{way[:12]:<12}" + "".join(f"{losses[column]:>11.4f}" for column in columns))
    typer.echo("\nthe best choice (rows), and the router's (columns):")
    typer.echo(" " * 12 + "".join(f"{choice[:10]:>11}" for choice in choices))
    for choice, row in zip(choices, confusion, strict=True):
        typer.echo(f"{choice[:12]:<12}" + "".join(f"{count:>11}" for count in row))
    typer.echo(f"router: {folder}")


def _note(read: list[Adapter], method: Method, result: Combined, found: Verdict | None) -> dict[str, Any]:
    return {
        "base_digest": next((each.note.base_digest for each in read if each.note.base_digest), None),
        "samples": sum(each.note.samples for each in read),
        "combined": {
            "method": method,
            "parents": [
                {"digest": each.digest, "weight": weight}
                for each, weight in zip(read, result.weights, strict=True)
            ],
            "energy_kept": result.energy_kept,
            "eval": None if found is None else found.facts(),
        },
    }


def _lines(read: list[Adapter], result: Combined) -> list[str]:
    lines = [
        f"{number}: {each.path}, rank {_ranks(each)}, {_kilobytes(each.factors):,.0f} kB, weight {weight:g}"
        for number, (each, weight) in enumerate(zip(read, result.weights, strict=True), 1)
    ]
    for each in result.likenesses:
        lines.append(
            f"{each.a + 1} and {each.b + 1}: cosine {each.cosine:+.3f}, {each.sign_agreement:.1%} of values "
            "change in the same direction"
        )
    low, high = result.ranks
    ranks = f"{low}" if low == high else f"{low} to {high}"
    size = _kilobytes(result.factors)
    lines.append(f"result: rank {ranks}, {size:,.0f} kB, {result.energy_kept:.2%} of the exact one's energy")
    return lines


def _judgement(found: Verdict) -> list[str]:
    lines = [f"loss over {found.windows} windows of text, nats per token:"]
    lines += [f"  {name:<10}{loss:.4f}" for name, loss in found.losses.items()]
    lines.append("the result's loss less theirs, with two standard errors, window by window:")
    lines += [
        f"  {each.than:<10}{each.difference:+.4f} ± {each.noise:.4f}"
        f"{'  better' if each.better else '  worse' if each.worse else ''}"
        for each in found.margins
    ]
    reason = {
        "improved": "better than the base and each parent, beyond the noise",
        "within noise": "no better than the best of them, for all that these windows tell",
        "worse": "one of them is better, beyond the noise",
    }
    return [*lines, f"verdict: {found.word}: {reason[found.word]}"]


def _ranks(adapter: Adapter) -> str:
    ranks = {each.rank for each in adapter.factors.values()}
    return f"{min(ranks)}" if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"


def _kilobytes(factors: Mapping[str, Factors]) -> float:
    """In float32."""
    return sum(each.a.numel() + each.b.numel() for each in factors.values()) * 4 / 1e3
