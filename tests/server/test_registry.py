"""A registry of models: versions, aliases, acts; whole after any interruption, and nothing withdrawn is served."""

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consortium.protocol import cli
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError, RefusedError
from consortium.server import load_model, seal
from consortium.server.serving import registry as module
from consortium.server.serving.registry import Registry, locate
from consortium.server.serving.versions import Shelf, promoted, registered, rolled_back, withdrawn


def variant(exported: Path, folder: Path, number: int) -> Path:
    """A bundle that differs from the exported one in its card alone: another version of the same model."""
    copy = shutil.copytree(exported, folder / f"variant-{number}")
    card = copy / "MODEL_CARD.md"
    card.write_text(card.read_text() + f"\nVariant {number}.\n")
    import hashlib

    files = json.loads((copy / "manifest.json").read_bytes())["files"]
    files["MODEL_CARD.md"] = hashlib.sha256(card.read_bytes()).hexdigest()
    (copy / "manifest.json").write_bytes(seal.manifest(files, None))
    return copy


def model_of(path: Path) -> str:
    return str(load_model(path).contract["model"])


def filled(exported: Path, tmp_path: Path, count: int = 2) -> Registry:
    """A registry of versions 1 to `count` of 'toy'."""
    found = Registry(tmp_path / "models", lambda: 7.0, "tester")
    for number in range(1, count + 1):
        found.register(variant(exported, tmp_path, number), "toy", model_of)
    return found


def consortium(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main([str(one) for one in arguments])
    return int(end.value.code or 0)


ACTS = st.lists(
    st.one_of(
        st.just(("register", 0)), st.just(("promote", 0)), st.just(("rollback", 0)),
        st.tuples(st.just("promote"), st.integers(1, 5)), st.tuples(st.just("withdraw"), st.integers(1, 5)),
    ),
    max_size=30,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(ACTS)
def test_no_order_of_acts_puts_a_withdrawn_version_to_use(acts: list[tuple[str, int]]) -> None:
    """Whatever is done: champion and candidate are versions that exist and are not withdrawn, and numbers stay."""
    shelf = Shelf()
    for place, (act, number) in enumerate(acts):
        try:
            if act == "register":
                shelf = registered(shelf, f"bundle-{place}", "m", 1.0)
            elif act == "promote":
                shelf = promoted(shelf, number or None)
                assert shelf.champion is not None
            elif act == "rollback":
                before = shelf.champion
                shelf = rolled_back(shelf)
                assert shelf.champion != before
            else:
                shelf = withdrawn(shelf, number, "why")
        except (InputError, RefusedError):
            continue
        assert [one.number for one in shelf.versions] == list(range(1, len(shelf.versions) + 1))
        for alias in (shelf.champion, shelf.candidate):
            found = None if alias is None else shelf.version(alias)
            assert alias is None or (found is not None and not found.withdrawn)
        assert shelf.candidate is None or shelf.candidate != shelf.champion


def test_rollback_does_not_go_back_to_the_champion_of_now() -> None:
    """1, then 2, then 1 again; where 2 is withdrawn there is nothing to go back to."""
    shelf = registered(registered(Shelf(), "a", "m", 1.0), "b", "m", 1.0)
    shelf = withdrawn(promoted(promoted(promoted(shelf, 1), 2), 1), 2, "why")
    with pytest.raises(RefusedError, match="no champion of before"):
        rolled_back(shelf)


def test_promote_rollback_withdraw(exported: Path, tmp_path: Path) -> None:
    """The champion follows the acts, each of which is kept; a withdrawn bundle is refused everywhere, in copies too."""
    one = filled(exported, tmp_path)
    assert one.promote("toy", 1).champion == 1
    assert one.promote("toy", None).champion == 2
    assert one.rollback("toy", "worse").champion == 1
    assert locate(f"{one.folder}/toy", lambda: 0.0) == one.folder / "toy" / "1"
    assert locate(f"{one.folder}/toy@candidate", lambda: 0.0) == one.folder / "toy" / "2"
    shelf = one.withdraw("toy", 1, "wrong units")
    assert (shelf.champion, shelf.candidate) == (None, 2)
    copy = shutil.copytree(one.folder / "toy" / "1", tmp_path / "copy")
    for path in (one.folder / "toy" / "1", copy):
        with pytest.raises(
            IntegrityError, match=r"withdrawn\.json: this model was withdrawn \(wrong units\)"
        ):
            load_model(path)
    with pytest.raises(RefusedError, match="version 1 was withdrawn"):
        one.promote("toy", 1)
    with pytest.raises(InputError, match="there is no toy@champion"):
        one.resolve("toy", "champion")
    with pytest.raises(RefusedError, match="this very bundle already, withdrawn"):
        one.register(tmp_path / "variant-1", "toy", model_of)
    acts = [(act.act, act.version, act.by, act.why) for act in one.state().history]
    assert acts == [
        ("register", 1, "tester", ""), ("register", 2, "tester", ""), ("promote", 1, "tester", ""),
        ("promote", 2, "tester", ""), ("rollback", 1, "tester", "worse"), ("withdraw", 1, "tester", "wrong units"),
    ]  # fmt: skip


def test_altered_version_is_not_promoted(exported: Path, tmp_path: Path) -> None:
    """A version whose folder holds another bundle than the registered one, though whole, is refused and named."""
    one = filled(exported, tmp_path)
    shutil.rmtree(one.folder / "toy" / "2")
    shutil.copytree(one.folder / "toy" / "1", one.folder / "toy" / "2")
    with pytest.raises(IntegrityError, match=r"toy/2/manifest\.json: is not the bundle that was registered"):
        one.promote("toy", 2)
    assert one.state().models["toy"].champion is None


def test_interrupted_register_leaves_the_registry_as_it_was(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash before the state is written leaves no version; the next call goes through, and nothing lies about."""
    one = filled(exported, tmp_path, 1)

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_private", crash)
        with pytest.raises(KeyboardInterrupt):
            one.register(variant(exported, tmp_path, 2), "toy", model_of)
    assert len(one.state().models["toy"].versions) == 1
    assert one.register(variant(exported, tmp_path, 3), "toy", model_of).number == 2
    assert model_of(one.resolve("toy", "2"))
    assert {path.name for path in one.folder.iterdir()} == {".lock", "registry.json", "toy"}


def _promote(folder: Path, number: int) -> None:
    for _ in range(20):
        Registry(folder, lambda: 1.0, "p").promote("toy", number)


def test_acts_of_several_processes_do_not_lose_each_other(exported: Path, tmp_path: Path) -> None:
    """Two processes that promote at once: every act is in the history."""
    one = filled(exported, tmp_path)
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_promote, args=(one.folder, n)) for n in (1, 2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert len([act for act in one.state().history if act.act == "promote"]) == 40


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "models": {"a": 1}}'])
def test_damaged_registry_is_said(tmp_path: Path, content: str) -> None:
    """A state that is none is damage, not a crash; a folder without one is wrong input."""
    with pytest.raises(InputError, match="is no registry"):
        Registry(tmp_path, lambda: 0.0).state()
    (tmp_path / "registry.json").write_text(content)
    with pytest.raises(ConsortiumError) as caught:
        Registry(tmp_path, lambda: 0.0).state()
    assert caught.value.exit_code == 4


def test_commands(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line: exit codes 0, 2, 3, 4; a simulation's model only where that is said; what to type."""
    models, first = tmp_path / "models", variant(exported, tmp_path, 1)
    assert consortium("model", "register", first, "--registry", models) == 4
    assert "add --unsigned" in capsys.readouterr().err
    assert consortium("model", "register", first, "--registry", models, "--unsigned") == 0
    assert "toy@1: is the candidate" in capsys.readouterr().out
    assert consortium("model", "register", first, "--registry", models, "--unsigned") == 3
    assert consortium("model", "promote", "toi", "--registry", models) == 2
    assert "did you mean 'toy'" in capsys.readouterr().err
    assert consortium("model", "promote", "toy", "--registry", models, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"name": "toy", "champion": 1, "candidate": None}
    assert consortium("model", "rollback", "toy", "--registry", models) == 3
    assert consortium("model", "show", f"{models}/toy") == 0
    assert consortium("model", "withdraw", "toy", "--registry", models, "--why", "x") == 2
    assert consortium("model", "withdraw", "toy@1", "--registry", models, "--why", " ") == 2
    assert consortium("model", "withdraw", "toy@1", "--registry", models, "--why", "wrong units") == 0
    assert consortium("model", "verify", models / "toy" / "1") == 4
    capsys.readouterr()
    assert consortium("model", "list", models) == 0
    assert "withdrawn: wrong units" in capsys.readouterr().out
    assert consortium("model", "list", models, "--json") == 0
    assert json.loads(capsys.readouterr().out)["models"]["toy"]["versions"][0]["withdrawn"] is True
    assert consortium("model", "list", tmp_path) == 2
