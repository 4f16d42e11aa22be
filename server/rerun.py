"""A run anew without some sites: what it must hold before it begins, and what its admin must know.

A site that is left out is asked nothing by such a run: it is not at hand for it (`server/conversation.py`). Nothing
else of a run depends on who belongs to the federation, so its model is that of a run which these sites never joined.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from consortium.protocol.errors import InputError, RefusedError, nearest
from consortium.protocol.study import Study

PRIVATE = (
    "the study is private: a run anew draws new noise, so no two of its runs give the same model, and every site that "
    "takes part is charged again; what was charged before is never given back"
)
COHORTS = "live cohorts are drawn at random by the operating system, so no two runs of this study give the same model"


def check(
    study: Study, run: str, without: Sequence[str], known: Collection[str], members: Collection[str]
) -> None:
    """Refuse a run anew that would leave out nobody, somebody unknown, or too many.

    run: the one before. known: sites that had a part in it, and all that have joined. members: those that have joined.

    Raises:
        InputError: no site is named, or one is not known here.
        RefusedError: fewer sites than the study's quorum would be left.
    """
    if not without:
        raise InputError("--without: name at least one site; to run it with all: consortium study start NAME")
    for site in without:
        if site not in known:
            hint = nearest(site, known) or ";"
            raise InputError(
                f"--without: no site {site[:80]!r} had a part in run '{run}' or has joined{hint} "
                "see: consortium server sites"
            )
    left = sorted(set(members) - set(without))
    if len(left) < study.cohort.min_sites:
        names = f" ({', '.join(left)})" if left else ""
        raise RefusedError(
            f"study '{study.name}' needs {study.cohort.min_sites} sites, and {len(left)} that have joined would be "
            f"left{names}; invite another, or submit it with a lower [cohort] min_sites"
        )


def notes(study: Study) -> list[str]:
    """Why the model of a run anew is not, bit for bit, that of a run without the sites; nothing where it is."""
    found = [PRIVATE] if study.privacy.mechanism != "none" else []
    return found + ([COHORTS] if study.cohort.size is not None else [])
