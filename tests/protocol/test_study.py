"""The study file: read whole, refused with every mistake at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from consortium.protocol import Study
from consortium.protocol.errors import MOST_SHOWN, InputError, StudyError
from consortium.protocol.sections import Categorical, Numeric, TabularData, seconds

GOOD = """
format = 1
[study]
name = "breast-cancer"
task = "consortium.client.tasks.tabular:Classifier"
rounds = 20
seed = 7
[data]
target = "malignant"
features = { radius_mean = { min = 0.0, max = 60 }, menopause = { values = ["pre", "post"] } }
missing = "median"
person = "patient_id"
holdout = 0.2
[model]
hidden = [32]
[training]
optimizer = "sgd"
lr = 0.05
batch_size = 32
local_epochs = 1
[strategy]
name = "fedadam"
server_lr = 0.1
[cohort]
min_sites = 3
deadline = "10m"
max_weight = 10000
approvals = 2
[evaluation]
metric = "auroc"
select = "last"
[privacy]
unit = "record"
mechanism = "none"
secure_aggregation = false
[export]
formats = ["onnx", "safetensors"]
"""


def problems(text: str) -> dict[str, str]:
    """The mistakes that a study text is refused for: what each says, by key."""
    with pytest.raises(StudyError) as caught:
        Study.parse(text)
    return {problem.key: str(problem) for problem in caught.value.problems}


def test_a_study_is_read_with_its_types_and_defaults() -> None:
    """Values arrive typed; what the file leaves out has its default."""
    study = Study.parse(GOOD)
    assert (study.name, study.rounds, study.cohort.deadline, study.metric) == (
        "breast-cancer",
        20,
        600.0,
        "auroc",
    )
    assert isinstance(study.data, TabularData)
    assert study.data.features["radius_mean"] == Numeric(min=0.0, max=60.0)
    assert study.data.features["menopause"] == Categorical(values=["pre", "post"])
    assert study.strategy.table() == {"name": "fedadam", "server_lr": 0.1}
    assert study.training.momentum == 0.0
    assert study.built_in


def test_all_mistakes_are_reported_at_once_with_key_value_and_remedy() -> None:
    """An unknown key, a wrong type, a bad range, an impossible pair, an unknown strategy and metric: all in one go."""
    text = (
        GOOD.replace("rounds = 20", 'rounds = "many"')
        .replace("lr = 0.05", "learning_rate = 0.05")
        .replace("batch_size = 32", "batch_size = 0")
        .replace("local_epochs = 1", "local_epochs = 1\nlocal_steps = 5")
        .replace('"fedadam"', '"fedadm"')
        .replace('"auroc"', '"auc"')
        .replace("max = 60", "max = -1")
        .replace("[cohort]", "[cohorts]")
    )
    found = problems(text)
    assert set(found) == {
        "study.rounds", "training.learning_rate", "training.batch_size", "training.local_steps", "strategy.name",
        "evaluation.metric", "data.features.radius_mean", "cohorts",
    }  # fmt: skip
    assert "'many'" in found["study.rounds"]
    assert "integer" in found["study.rounds"]
    assert "did you mean 'fedadam'?" in found["strategy.name"]
    assert "did you mean 'cohort'?" in found["cohorts"]
    assert "one of auroc, accuracy" in found["evaluation.metric"]


def test_the_message_names_the_file_and_the_next_command(tmp_path: Path) -> None:
    """What a person reads: the file, how many mistakes, each on its line, what to type next."""
    path = tmp_path / "study.toml"
    path.write_text(GOOD.replace("rounds = 20", "round = 20"))
    with pytest.raises(StudyError) as caught:
        Study.load(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}: 2 mistakes"
    assert lines[-1] == f"Correct the file, then: consortium study check {path}"
    assert any("did you mean 'rounds'?" in line for line in lines)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("format = 1", "format = 2", "format"),
        ("format = 1", "", "format"),
        (
            'task = "consortium.client.tasks.tabular:Classifier"',
            'task = "consortium.client.tasks.tabular:Clasifier"',
            "study.task",
        ),
        ('task = "consortium.client.tasks.tabular:Classifier"', 'task = "os.system"', "study.task"),
        ('name = "breast-cancer"', 'name = "../etc"', "study.name"),
        ('target = "malignant"', 'target = "radius_mean"', "data.target"),
        ('target = "malignant"', "", "data.target"),
        ("holdout = 0.2", 'holdout = 0.2\nsplit = "fold"', "data.holdout"),
        ("holdout = 0.2", "holdout = 1.0", "data.holdout"),
        ("holdout = 0.2", "holdout = nan", "data.holdout"),
        ("local_epochs = 1", "local_epochs = true", "training.local_epochs"),
        ('"sgd"', '"sdg"', "training.optimizer"),
        ("lr = 0.05", "lr = inf", "training.lr"),
        ("server_lr = 0.1", "server_lr = -1", "strategy.server_lr"),
        ("server_lr = 0.1", "serverlr = 1", "strategy.serverlr"),
        ("min_sites = 3", "min_sites = 3\nsize = 2", "cohort.size"),
        ('deadline = "10m"', 'deadline = "soon"', "cohort.deadline"),
        ('deadline = "10m"', 'deadline = "0s"', "cohort.deadline"),
        ('deadline = "10m"', 'deadline = "31d"', "cohort.deadline"),
        ('metric = "auroc"', 'metric = "rmse"', "evaluation.metric"),
        ('mechanism = "none"', 'mechanism = "none"\nepsilon = 3.0', "privacy.epsilon"),
        ('mechanism = "none"', 'mechanism = "distributed-skellam"', "privacy.mechanism"),
        ("secure_aggregation = false", "secure_aggregation = true", "privacy.secure_aggregation"),
        ('"safetensors"', '"pickle"', "export.formats.1"),
        ('"pre", "post"', '"pre", "pre"', "data.features.menopause.values"),
    ],
)
def test_each_mistake_names_its_key(old: str, new: str, key: str) -> None:
    """One wrong thing in a good file is exactly one problem, under its own key."""
    assert old in GOOD
    assert list(problems(GOOD.replace(old, new, 1))) == [key]


def test_scaffold_wants_plain_sgd_and_select_best_wants_a_holdout() -> None:
    """Two combinations whose parts are right by themselves."""
    scaffold = GOOD.replace('"fedadam"\nserver_lr = 0.1', '"scaffold"').replace('"sgd"', '"adam"')
    assert "plain sgd" in problems(scaffold)["training.optimizer"]
    best = GOOD.replace("holdout = 0.2", "holdout = 0.0").replace('"last"', '"best"')
    assert list(problems(best)) == ["evaluation.select"]


def test_regression_needs_the_target_range() -> None:
    """Without the target's range a step's size would depend on its unit."""
    text = GOOD.replace("tabular:Classifier", "tabular:Regressor").replace('metric = "auroc"\n', "")
    assert list(problems(text)) == ["data.target_range"]
    text = text.replace("holdout = 0.2", "holdout = 0.2\ntarget_range = { min = 0, max = 9 }")
    assert Study.parse(text).metric == "rmse"


def test_an_own_task_may_have_its_own_keys() -> None:
    """[data] and [model] of a study's own task are free; the other sections stay strict."""
    text = 'format = 1\n[study]\nname = "own"\ntask = "task:Mine"\nrounds = 1\n'
    text += '[data]\nfolder = "x"\n[model]\nwidth = 3\n'
    study = Study.parse(text)
    assert (study.data.get("folder"), study.model.get("width"), study.model.get("depth", 2)) == ("x", 3, 2)  # type: ignore[union-attr]
    assert not study.built_in
    assert list(problems(text + "[training]\nwidth = 3\n")) == ["training.width"]


def test_identity_is_of_settings_not_of_spelling() -> None:
    """Comments, order and defaults written out do not change the digest; any setting does."""
    study = Study.parse(GOOD)
    same = Study.parse(
        "# a comment\n"
        + GOOD.replace("lr = 0.05\nbatch_size = 32", "batch_size = 32\nlr = 0.05\nmomentum = 0.0")
    )
    assert same.digest == study.digest
    assert study.with_(training={"lr": 0.06}).digest != study.digest
    assert study.with_(strategy={"name": "fedavg"}).strategy.table() == {"name": "fedavg"}
    with pytest.raises(StudyError, match="rounds"):
        study.with_(study={"rounds": 0})


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"format = ", b"[study]\nname = 1\n[study]\n"])
def test_files_that_are_not_toml_are_input_errors(tmp_path: Path, content: bytes) -> None:
    """Binary, truncated and repeated tables: the file is named, nothing crashes."""
    path = tmp_path / "s.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"s\.toml"):
        Study.load(path)
    with pytest.raises(InputError, match="cannot be read"):
        Study.load(tmp_path / "absent.toml")
    with pytest.raises(InputError, match="cannot be read"):
        Study.load(tmp_path)


@pytest.mark.parametrize("text", ["format = 1\nstudy = 3\n", "format = 1\n[study]\n", "x = 1", ""])
def test_a_file_without_a_study_is_refused(text: str) -> None:
    """Missing sections and sections of the wrong type are mistakes like others."""
    assert problems(text)


def test_durations() -> None:
    """Seconds, minutes, hours, days, or a bare number."""
    assert [seconds(x) for x in ("90s", "1.5m", "2h", "1d", 7)] == [90, 90, 7200, 86400, 7]
    for wrong in ("", "10", "m", "-1s", True, None):
        with pytest.raises(ValueError, match="10m"):
            seconds(wrong)


PRIVATE = 'mechanism = "dp-sgd"\nepsilon = 3.0\ndelta = 1e-5\nclip_norm = 1.0'


def private(asked: str = PRIVATE, **others: tuple[str, str]) -> str:
    """The good study with differential privacy; `others` replaces text elsewhere."""
    text = GOOD.replace('mechanism = "none"', asked)
    for old, new in others.values():
        assert old in text
        text = text.replace(old, new)
    return text


def test_a_study_may_ask_for_each_mechanism() -> None:
    """dp-sgd by record and person with any strategy; noise on whole updates by site."""
    assert Study.parse(private()).privacy.rate == 0.1
    Study.parse(private(unit=('unit = "record"', 'unit = "person"')))
    Study.parse(private(strategy=('"fedadam"\nserver_lr = 0.1', '"krum"')))
    site = ('unit = "record"', 'unit = "site"')
    plain = ('"fedadam"', '"fedadam"\nweighted = false')
    central = PRIVATE.replace("dp-sgd", "central-gaussian")
    Study.parse(private(central, unit=site, strategy=plain))
    Study.parse(private(central + "\nclip_quantile = 0.5", unit=site, strategy=plain))
    Study.parse(private(PRIVATE.replace("dp-sgd", "local-gaussian"), unit=site))


@pytest.mark.parametrize(
    ("old", "new", "key", "right"),
    [
        ("epsilon = 3.0", "", "privacy.epsilon", "needs it"),
        ("epsilon = 3.0", "epsilon = 0.0", "privacy.epsilon", "greater than 0"),
        ("epsilon = 3.0", "epsilon = inf", "privacy.epsilon", "finite"),
        ("delta = 1e-5", "delta = 1.0", "privacy.delta", "less than 1"),
        ("delta = 1e-5", "delta = 0.01", "privacy.delta", "below 1 / 320"),
        ("clip_norm = 1.0", "clip_norm = -1.0", "privacy.clip_norm", "greater than 0"),
        ("clip_norm = 1.0", "clip_norm = 1.0\nsampling_rate = 1.5", "privacy.sampling_rate", "equal to 1"),
        (
            "clip_norm = 1.0",
            "clip_norm = 1.0\nclip_quantile = 0.5",
            "privacy.clip_quantile",
            "central-gaussian",
        ),
        ('unit = "record"', 'unit = "site"', "privacy.unit", "central-gaussian"),
        ('unit = "record"', 'unit = "person"', "data.person", "patient_id"),
        ('metric = "auroc"', 'metric = "auroc"\nauroc = "exact"', "evaluation.auroc", "binned"),
    ],
)
def test_a_mistake_about_privacy_is_named(old: str, new: str, key: str, right: str) -> None:
    """One wrong thing is one problem, which says what would be right."""
    text = private(change=(old, new))
    if key == "data.person":
        text = text.replace('person = "patient_id"\n', "")
    found = problems(text)
    assert list(found) == [key]
    assert right in found[key]


@pytest.mark.parametrize(
    ("strategy", "key", "right"),
    [
        ('"fedmedian"', "strategy.name", "fedavg"),
        ('"krum"', "strategy.name", "dp-sgd"),
        ('"scaffold"', "strategy.name", "control variates"),
        ('"fedavg"', "strategy.weighted", "weighted = false"),
        ('"fedyogi"\nweighted = true', "strategy.weighted", "weighted = false"),
    ],
)
def test_noise_at_the_server_wants_a_strategy_with_a_sensitivity(strategy: str, key: str, right: str) -> None:
    """Refused when the study is read, with what to use instead."""
    central = private(
        PRIVATE.replace("dp-sgd", "central-gaussian"),
        unit=('unit = "record"', 'unit = "site"'),
        strategy=('"fedadam"\nserver_lr = 0.1', strategy),
    )
    found = problems(central)
    assert list(found) == [key]
    assert right in found[key]


@pytest.mark.parametrize("mechanism", ["central-gaussian", "local-gaussian"])
@pytest.mark.parametrize("unit", ["record", "person"])
def test_noise_on_whole_updates_protects_sites_alone(mechanism: str, unit: str) -> None:
    """A person or a record may have moved the whole update, whose bound is the site's: dp-sgd is named instead."""
    text = private(
        PRIVATE.replace("dp-sgd", mechanism),
        unit=('unit = "record"', f'unit = "{unit}"'),
        strategy=('"fedadam"', '"fedadam"\nweighted = false'),
    )
    found = problems(text)
    assert list(found) == ["privacy.unit"]
    assert f"protects by site; for '{unit}' use mechanism = \"dp-sgd\"" in found["privacy.unit"]


MANY = "\n".join(f"key_number_{number} = 1" for number in range(20_000)) + "\n"
CROWDS = {
    "keys without a section": MANY + GOOD,
    "keys of a section": GOOD.replace("[training]\n", f"[training]\n{MANY}"),
    "parameters of a strategy": GOOD.replace("[strategy]\n", f"[strategy]\n{MANY}"),
    "sections": GOOD + "\n".join(f"[section_{number}]" for number in range(20_000)),
}


@pytest.mark.parametrize("what", list(CROWDS))
def test_a_crowd_of_mistakes_is_counted_and_not_listed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty thousand: the first are shown, with hints, and the rest are a number, so that neither the text nor the
    search for similar names grows with them."""
    searched = 0

    def search(*_: object, **__: object) -> list[str]:
        nonlocal searched
        searched += 1
        return []

    monkeypatch.setattr("difflib.get_close_matches", search)
    with pytest.raises(StudyError, match="study: 20000 mistakes") as caught:
        Study.parse(CROWDS[what])
    assert f"and {20_000 - MOST_SHOWN} more" in str(caught.value)
    assert len(caught.value.problems) == 20_000
    assert len(str(caught.value)) < 10_000
    assert searched == MOST_SHOWN


def test_a_key_of_endless_length_is_shown_in_short() -> None:
    """Its first hundred characters, and no similar name is looked for."""
    with pytest.raises(StudyError) as caught:
        Study.parse("k" * 500_000 + " = 1\n" + GOOD)
    assert len(str(caught.value)) < 1000
