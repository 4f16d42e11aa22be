"""What may run at a site: nothing, but what its operator wrote down."""

from __future__ import annotations

from pathlib import Path

import pytest
from breast_cancer import study_text

from consortium.client import policy
from consortium.client.policy import Policy, Rule
from consortium.protocol.errors import InputError, RefusedError
from consortium.protocol.study import Study

CLASSIFIER = "consortium.client.tasks.tabular:Classifier"
STUDY = Study.parse(study_text(4))


def test_without_a_file_or_with_the_template_nothing_is_allowed(tmp_path: Path) -> None:
    """Default deny."""
    path = tmp_path / "policy.toml"
    assert policy.load(path) == Policy()
    policy.write_template(path)
    assert policy.load(path) == Policy()
    with pytest.raises(RefusedError, match="there is no"):
        policy.load(path).rule_for(STUDY)


def test_the_first_rule_that_fits_gives_the_data(tmp_path: Path) -> None:
    """By task, the study's name and its number of rounds."""
    path = tmp_path / "policy.toml"
    path.write_text(
        f"""format = 1
        [[allow]]
        task = "consortium.client.tasks.image:Classifier"
        data = "scans"
        [[allow]]
        task = "{CLASSIFIER}"
        data = "few"
        rounds = 2
        [[allow]]
        task = "{CLASSIFIER}"
        data = "patients"
        studies = ["heart-*", "breast-*"]
        """
    )
    assert policy.load(path).rule_for(STUDY).data == "patients"
    assert policy.load(path).rule_for(STUDY.with_(study={"rounds": 2})).data == "few"


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (Rule(task="consortium.client.tasks.image:Classifier", data="d"), "there is no .*Classifier"),
        (Rule(task=CLASSIFIER, data="d", studies=["heart-*"]), "'breast-cancer' among its studies"),
        (Rule(task=CLASSIFIER, data="d", rounds=2), "rounds = 2, and study 'breast-cancer' has 3"),
    ],
)
def test_a_refusal_names_the_rule_that_is_missing(rule: Rule, text: str) -> None:
    """And not the data set."""
    with pytest.raises(RefusedError, match=text) as caught:
        Policy((rule,)).rule_for(STUDY)
    assert "'d'" not in str(caught.value)


def test_a_rule_with_an_epsilon_allows_studies_within_it_alone() -> None:
    """And none without differential privacy, of which nothing bounds what it spends."""
    rule = Rule(task=CLASSIFIER, data="d", epsilon=3.0)
    private = STUDY.with_(
        privacy={"mechanism": "dp-sgd", "epsilon": 3.0, "delta": 1e-5, "clip_norm": 1.0},
    )
    assert Policy((rule,)).rule_for(private) == rule
    for study, says in (
        (private.with_(privacy={"epsilon": 3.1}), "asks for 3.1"),
        (STUDY, "asks for no differential privacy"),
    ):
        with pytest.raises(RefusedError, match=f"epsilon = 3, and study 'breast-cancer' {says}"):
            Policy((rule,)).rule_for(study)


def test_own_code_is_refused_whatever_the_policy_says() -> None:
    """Also where a rule bears its name."""
    study = STUDY.with_(
        study={"task": "task:Mine"}, data={"features": None, "target": None}, evaluation={"metric": None}
    )
    with pytest.raises(RefusedError, match="code of its own"):
        Policy((Rule(task="task:Mine", data="d"),)).rule_for(study)


def test_every_mistake_of_the_file_is_named_and_nothing_is_allowed(tmp_path: Path) -> None:
    """A policy with a mistake is no policy."""
    path = tmp_path / "policy.toml"
    path.write_text(
        'format = 1\n[[allow]]\ntask = "task:Mine"\ndata = "d"\n[[allow]]\ntask = "x"\ndata = 1\nround = 2\n'
    )
    with pytest.raises(InputError) as caught:
        policy.load(path)
    for word in ("allow.1.data", "allow.1.round"):
        assert word in str(caught.value)
    path.write_text('format = 1\n[[allow]]\ntask = "task:Mine"\ndata = "d"\n')
    with pytest.raises(InputError, match=r"allow\.0\.task: is none of Consortium's own tasks"):
        policy.load(path)
    path.write_text("format = 2\n")
    with pytest.raises(InputError, match="format"):
        policy.load(path)
