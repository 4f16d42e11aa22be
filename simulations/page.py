"""The report page: one HTML file that fetches nothing. Every text that comes from a study or from data is escaped."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from consortium.simulations import attacked, table
from consortium.simulations.experiment import Experiment

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #ddd; vertical-align: top }
th { font-weight: 600 } .note { background: #fff6e0; border-left: 4px solid #e0a000; padding: .5rem .8rem }
.bad { background: #fde8e4; border-left: 4px solid #c0392b; padding: .5rem .8rem }
img { max-width: 100%; height: auto } pre { background: #f4f4f4; padding: .7rem; overflow-x: auto; font-size: .85rem }
.small { color: #555; font-size: .9rem }
"""
_SECURITY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_MOST_SITES = 200


def render(experiment: Experiment, facts: Mapping[str, Any], drawn: Mapping[str, Path]) -> str:
    """The page.

    facts: as in run.json. drawn: PNG files by what they show.
    """
    study = experiment.study
    name = escape(study.name)
    body = "\n".join(
        [
            f"<h1>{name}</h1>",
            f'<p class="small">{escape(_summary(experiment))}</p>',
            *_notes(experiment),
            *_results(experiment),
            *_images(experiment, drawn),
            *_attacks(experiment),
            *_sites(experiment),
            *_left_out(facts),
            *_again(experiment, facts),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_SECURITY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}: simulation</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _summary(experiment: Experiment) -> str:
    study, seeds = experiment.study, experiment.seeds
    sites = len(experiment.sites.sources) if experiment.sites else len(_asked(experiment))
    many = f"{len(seeds)} seeds ({seeds[0]} to {seeds[-1]})" if len(seeds) > 1 else f"seed {seeds[0]}"
    return f"A simulation: {sites} sites, {study.rounds} rounds, {many}; {experiment.seconds:.1f} s"


def _asked(experiment: Experiment) -> set[str]:
    return {site for t in experiment.trials for one in t.result.outcome.state.rounds for site in one.asked}


def _notes(experiment: Experiment) -> Iterable[str]:
    sites = experiment.sites
    if sites is not None and sites.partition is not None and sites.partition.kind != "column":
        yield (
            f'<p class="note">The partition is artificial: {escape(str(sites.partition))} over {len(sites.sources)} '
            f"sites, drawn with seed {sites.seed}. Real institutions differ in more than their labels or sizes, so "
            "expect other figures live.</p>"
        )
    elif sites is not None:
        yield f'<p class="small">Sites: {escape(sites.origin)}.</p>'
    for fault in experiment.faults:
        when = "always" if fault.rounds is None else "in rounds " + ", ".join(map(str, sorted(fault.rounds)))
        yield f'<p class="note">A scripted fault: {escape(fault.site)} {escape(fault.kind)}, {when}.</p>'
    for trial in experiment.trials:
        if trial.result.status != "finished":
            text = f"{trial.strategy}, seed {trial.seed}: {trial.result.status}: {trial.result.outcome.why}"
            yield f'<p class="bad">{escape(text)}</p>'
    if experiment.stopped:
        yield '<p class="bad">Stopped by hand: strategies and seeds that are not here were not run to their end.</p>'


def _results(experiment: Experiment) -> Iterable[str]:
    rows = table.rows(experiment)
    yield "<h2>Results</h2>"
    if not rows or not rows[0].metrics:
        yield f"<p>{escape(table.nothing(experiment))}</p>"
        return
    head = ["", *(table.heading(name) for name in rows[0].metrics)]
    yield _table(head, [[row.name, *map(str, row.metrics.values())] for row in rows])
    interval = (
        "Mean over seeds ± half of its 95 % interval (Student's t)."
        if len(experiment.seeds) > 1
        else "One seed, so no interval."
    )
    local = " Local-only is the mean over the sites' own models." if experiment.baselines else ""
    yield f'<p class="small">{interval}{local} {escape(table.judged(experiment))}</p>'


def _attacks(experiment: Experiment) -> Iterable[str]:
    found = attacked.document(experiment)
    if not found:
        return
    yield "<h2>Attacks</h2>"
    first = next(iter(found.values()))
    ways, errors = (
        list(first["true_positives"]),
        sorted({way for one in found.values() for way in one["errors"]}),
    )
    head = [
        "",
        *(f"rows found by {way}" for way in ways),
        "promised at most",
        *(f"row's error, {e}" for e in errors),
    ]
    rows = []
    for name, one in found.items():
        cells = [
            *(one["true_positives"].get(way) for way in ways),
            one["bound"],
            *(one["errors"].get(e) for e in errors),
        ]
        rows.append([name, *map(attacked.shown, cells)])
    yield _table(head, rows)
    for name, one in found.items():
        for sentence in attacked.left_out(one):
            yield f"<p>{escape(name)}: {escape(sentence)}</p>"
    yield f'<p class="small">{escape(attacked.MEANING)}</p>'


def _images(experiment: Experiment, drawn: Mapping[str, Path]) -> Iterable[str]:
    auroc = experiment.study.evaluation.auroc
    counted = (
        f" AUROC here is {auroc}, from the counts that sites send." if experiment.metric == "auroc" else ""
    )
    captions = {
        "privacy": "The selected model against epsilon: mean over seeds, band: its 95 % interval. Each site's "
        "guarantee is for its own data; neighbours differ by one record or person that is there or not, or by one "
        "site's update that becomes zero. To choose a setting by such a plot on real records costs what "
        "all its runs cost together.",
        "rounds": "After each round, pooled over the sites: mean over seeds, band: its 95 % interval."
        + counted,
        "sites": "The selected model on each site's own holdout: mean over seeds and its 95 % interval."
        + (f"{counted} A holdout of one class has none." if counted else ""),
    }
    for key, path in drawn.items():
        data = base64.b64encode(path.read_bytes()).decode()
        caption = escape(captions[key])
        yield (
            f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
            f'<figcaption class="small">{caption}</figcaption></figure>'
        )


def _sites(experiment: Experiment) -> Iterable[str]:
    sites = experiment.sites
    if sites is None:
        return
    yield "<h2>Sites</h2>"
    codes = sorted({code for own in sites.classes.values() for code in own})
    head = ["site", "rows to train on", "held out", *(f"class {code}" for code in codes)]
    lines = [
        [name, str(n), str(held), *(str(sites.classes[name][code]) for code in codes)]
        for name, (n, held) in list(sites.counts.items())[:_MOST_SITES]
    ]
    yield _table(head, lines)
    if len(sites.counts) > _MOST_SITES:
        yield f'<p class="small">and {len(sites.counts) - _MOST_SITES} more, in run.json</p>'


def _left_out(facts: Mapping[str, Any]) -> Iterable[str]:
    found = [(s, why, str(n)) for s, reasons in facts["left_out"].items() for why, n in reasons.items()]
    if found:
        yield "<h2>Left out</h2>"
        yield _table(["site", "reason", "times, all strategies and seeds"], found[:_MOST_SITES])


def _again(experiment: Experiment, facts: Mapping[str, Any]) -> Iterable[str]:
    yield "<h2>Run it again</h2>"
    if facts["command"]:
        yield f"<pre>{escape(shlex.join(facts['command']))}</pre>"
        yield (
            "<p>or <code>sh rerun.sh</code> in this folder: with the same data and versions every model has the "
            "same digest.</p>"
        )
    else:
        yield "<p>From Python, with study.toml of this folder, the same sites and seeds.</p>"
    models = [
        [trial.strategy, str(trial.seed), trial.result.status, trial.result.outcome.digest]
        for trial in experiment.trials
    ]
    yield _table(["strategy", "seed", "status", "model (SHA-256)"], models)
    kept = {key: facts[key] for key in ("digest", "seeds", "versions", "data")}
    yield f"<pre>{escape(json.dumps(kept, indent=2))}</pre>"
    yield f"<h2>Study</h2><pre>{escape(experiment.study.text)}</pre>"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    rest = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in line) + "</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{rest}</tbody></table></div>'
