"""The control table: adherence measured alike for every method and base, several bases in one table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from sctool.core.errors import SctoolError, UsageError
from sctool.core.training.objective import DiffusionObjective
from sctool.core.tuners import TUNERS
from sctool.eval.bench import measuring, running, tuner_work
from sctool.eval.bench.collecting import chosen_configs, make_table
from sctool.eval.bench.control import Control
from sctool.eval.bench.page import write_page
from sctool.eval.bench.plan import plan_table, show_plan
from sctool.eval.bench.settings import Settings, make_arms, short_names
from sctool.eval.bench.show import show
from sctool.eval.bench.table import Table
from sctool.eval.bench.transfer import Transfer
from sctool.eval.bench.workshop import Workshop, open_workshop
from sctool.eval.evaluate import evaluate
from sctool.eval.options import Options

Make = Callable[..., Settings]
Finished = tuple[Workshop, Table]
ARMS = ["scedit on tiny", "diffscaler on tiny", "scedit on other", "diffscaler on other"]


def test_every_row_has_quality_adherence_and_costs(controlled: Finished) -> None:
    shop, table = controlled
    assert [row.name for row in table.bases] == ["tiny", "other"]
    assert [row.name for row in table.rows] == ARMS
    quality = ["distance", "clip", "canny.nmse", "canny.nmse_median", "canny.f1", "canny.f1@1px", "loss"]
    assert [key for key in table.keys if key != "peak_bytes"] == [*quality, "step_s", "sample_step_s"]
    for row in table.rows:
        for key in [*quality, "step_s", "sample_step_s"]:
            assert row.values[key].keys() == {0, 1, 2}
            assert row.figures[key].value == pytest.approx(np.mean(list(row.values[key].values())))
        assert row.parameters["total"] == row.parameters["base"] + row.parameters["trainable"]
    for base in table.bases:
        assert base.figures.keys() == {*quality, "sample_step_s"} - {"loss"}
    assert table.example("clip").name == "CLIP score (mini), 100 cos"
    first, *_ = table.rows
    assert first.values["distance"] != table.rows[2].values["distance"]
    assert (shop.run(ARMS[0], 0).name, shop.run(ARMS[2], 0).name) == ("scedit-seed0", "scedit@other-seed0")
    assert [Path(shop.run(arm, 0).config.base).name for arm in ARMS] == ["tiny", "tiny", "other", "other"]


def test_adherence_is_that_of_evaluate_with_the_settings_of_the_maps(controlled: Finished) -> None:
    shop, table = controlled
    folders = {"tiny": shop.base_images("tiny", 1) / "base", ARMS[3]: shop.run(ARMS[3], 1).samples / "tuned"}
    rows = {row.name: row for row in table.all_rows}
    for name, folder in folders.items():
        asked = Options(metrics=("nmse",), quiet=True)
        figures = {f.key: f for f in evaluate(folder, asked, maps=shop.maps).folders[0].figures}
        for key in ("canny.f1", "canny.nmse", "canny.f1@1px"):
            assert rows[name].values[key][1] == figures[key].value
        assert figures["canny.f1"].protocol["annotator"]["low"] == 50
    assert table.protocol["canny.f1"]["annotator"]["low"] == 50
    assert "base_hash" not in table.protocol["canny.f1"]


def test_every_row_draws_the_same_hints_and_captions_from_the_same_noise(controlled: Finished) -> None:
    shop, _ = controlled
    folders = [shop.run(arm, 2).samples / "tuned" for arm in ARMS]
    folders += [shop.base_images(name, 2) / "base" for name in ("tiny", "other")]
    tables = [
        [
            (row["prompt"], row["seed"], (folder / row["hints"]["canny"]).read_bytes())
            for row in map(json.loads, (folder / "metadata.jsonl").read_text().splitlines())
        ]
        for folder in folders
    ]
    assert len(tables[0]) == 10
    assert all(other == tables[0] for other in tables[1:])


def test_a_seed_sees_the_same_data_hints_and_noise_with_every_method(
    controlled: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    original, current = DiffusionObjective.__call__, [""]

    def recording(self: DiffusionObjective, net: Any, batch: Any, draw: Any) -> torch.Tensor:
        parts = (batch["mean"], batch["hints"]["canny"], draw.posterior, draw.noise, draw.t, draw.drop_hint["canny"])
        seen.setdefault(current[0], []).extend(part.clone() for part in parts)
        return original(self, net, batch, draw)

    monkeypatch.setattr(DiffusionObjective, "__call__", recording)
    shop = open_workshop(replace(controlled[0].settings, seeds=1), tmp_path, quiet=True)
    for (arm, seed), config in chosen_configs(shop, {}).items():
        current[0] = arm
        running.train_run(shop, shop.run(arm, seed), config)
    assert list(seen) == ARMS
    # Latents depend on the autoencoder, which the second base has of its own.
    for arm, parts in seen.items():
        latents = seen[ARMS[0] if arm.endswith("tiny") else ARMS[2]][::6]
        assert all(torch.equal(a, b) for a, b in zip(parts[::6], latents, strict=True))
        for part in range(1, 6):
            assert all(torch.equal(a, b) for a, b in zip(parts[part::6], seen[ARMS[0]][part::6], strict=True))


def test_a_second_call_does_nothing_again(controlled: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    shop, table = controlled
    for name in ("sctool.core.training.train.train", "sctool.eval.bench.tuner_work.measure_costs"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("done again"))
    monkeypatch.setattr(running, "sample_heldout", lambda *_, **__: pytest.fail("drawn again"))
    monkeypatch.setattr(tuner_work, "sample_heldout", lambda *_, **__: pytest.fail("drawn again"))
    monkeypatch.setattr(measuring, "evaluate", lambda *_, **__: pytest.fail("measured again"))
    assert make_table(shop).to_json() == table.to_json()
    plan = plan_table(shop)
    assert plan["seconds_left"] == 0
    assert plan["metrics"] == ["fid", "clip", "control"]
    assert "with canny:low=50 maps" in show_plan(plan)


def test_a_further_base_keeps_the_runs_that_are_there(
    controlled: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, _ = controlled
    shutil.copytree(both.out, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "base@other")
    for path in (tmp_path / "copy" / "runs").glob("*@other-*"):
        shutil.rmtree(path)
    trained: list[str] = []
    monkeypatch.setattr("sctool.core.training.train.train", lambda config, run, *_, **__: trained.append(run.name))
    arms = make_arms(("scedit", "diffscaler"), [both.settings.bases["tiny"]])
    alone = open_workshop(replace(both.settings, arms=arms), tmp_path / "copy", quiet=True)
    assert plan_table(alone)["seconds_left"] == 0
    plan = plan_table(open_workshop(both.settings, tmp_path / "copy", quiet=True))
    assert [plan["rows"][arm]["runs_left"] for arm in ARMS] == [0, 0, 3, 3]
    assert [plan["rows"][name]["images_left"] for name in ("tiny", "other")] == [0, 30]
    assert trained == []


def test_the_json_object_says_what_tells_the_rows_apart(controlled: Finished) -> None:
    table = controlled[1]
    content = json.loads(json.dumps(table.to_json()))
    assert content["table"] == "control"
    assert content["methods"].keys() == set(ARMS)
    assert content["bases"].keys() == {"tiny", "other"}
    for key in ("distance", "canny.f1", "step_s"):
        found = content["differences"][key]
        values = {row.name: row.values[key] for row in table.all_rows if key in row.values}
        means = {name: np.mean(list(own.values())) for name, own in values.items() if name in ARMS}
        best = max(means, key=lambda n: means[n]) if key == "canny.f1" else min(means, key=lambda n: means[n])
        assert found["reference"] == best
        assert found["rows"].keys() == values.keys() - {best}
        for name, one in found["rows"].items():
            assert one["mean"] == pytest.approx(np.mean([values[name][s] - values[best][s] for s in range(3)]))
            assert one["interval"][0] <= one["mean"] <= one["interval"][1]
            close = [name, best] in content["not_told_apart"][key] or [best, name] in content["not_told_apart"][key]
            assert close == (one["interval"][0] <= 0 <= one["interval"][1])
    assert [paper["title"].split("'")[0] for paper in content["papers"]] == ["SCEdit", "DiffScaler", "ELR-Diffusion"]


def test_the_page_and_the_terminal_show_every_row(controlled: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    shop, table = controlled
    page = write_page(table, shop).read_text()
    show(table, Console(width=160))
    printed = capsys.readouterr().out
    for name in ("tiny", "other", *ARMS, "ControlNet", "Uni-ControlNet"):
        assert f'<th scope="row">{name}</th>' in page
        assert name in printed
    for text in ("canny F1@1px", "Seed by seed, minus the best mean", "Control of tiny and other by canny:low=50"):
        assert text in page
        assert text in printed
    assert page.count("not comparable with the figures above") == 3
    assert page.count("data:image/png") + page.count("data:image/jpeg") == 8 * (1 + 1 + 6), "real, hint, six rows"
    assert "hint: canny" in page


# ----------------------------------------------------------------------------------------- what cannot be measured


def test_a_missing_clip_is_noted_and_not_fatal(
    controlled: Finished, no_costs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise SctoolError("the CLIP score needs weights.")

    monkeypatch.setattr(measuring, "choose_clip", missing)
    shop = controlled[0]
    assert measuring.available(shop) == (
        ("fid", "control"),
        ["CLIP score is not measured: the CLIP score needs weights."],
    )
    given = replace(shop, settings=replace(shop.settings, measuring=replace(shop.settings.measuring, clip_weights="x")))
    with pytest.raises(SctoolError, match="needs weights"):
        measuring.available(given)


def test_conditions_without_a_score_or_its_weights_are_noted(
    make: Make, controlled: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: Any) -> None:
        raise SctoolError("depth needs weights.")

    monkeypatch.setattr("sctool.eval.control.depth.DepthScore.ready", missing)
    shop = controlled[0]
    both = make(Control(), names=("scedit",), flags={**shop.settings.flags, "cond": "canny,depth,scribbles"})
    metrics, notes = measuring.available(replace(shop, settings=both))
    assert metrics == ("fid", "clip", "control")
    assert notes[0] == "depth adherence is not measured: depth needs weights."
    assert notes[1] == "scribbles adherence is not measured: there is no score for it."
    depth = make(Control(), names=("scedit",), flags={**shop.settings.flags, "cond": "depth"})
    assert measuring.available(replace(shop, settings=depth))[0] == ("fid", "clip")


def test_an_evaluator_must_have_a_use_and_its_weights(controlled: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    def judged_by(*specs: str) -> Workshop:
        how = replace(controlled[0].settings.measuring, evaluators=specs)
        return replace(controlled[0], settings=replace(controlled[0].settings, measuring=how))

    assert measuring.available(judged_by("canny:low=80"))[0] == ("fid", "clip", "control")
    with pytest.raises(UsageError, match="--evaluator color does nothing here: --cond is canny"):
        measuring.available(judged_by("color"))

    def missing(_: Any) -> None:
        raise SctoolError("canny needs weights.")

    monkeypatch.setattr("sctool.eval.control.edges.EdgeScore.ready", missing)
    with pytest.raises(SctoolError, match="canny needs weights"):
        measuring.available(judged_by("canny:low=80"))


# ----------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"names": ("scedit",)}, "add --cond, e.g. --cond canny"),
        ({"names": ("scedit", "lora"), "flags": {"cond": "canny"}}, "--methods lora takes no condition maps"),
        ({"names": ("scedti",), "flags": {"cond": "canny"}}, "Did you mean 'scedit'?"),
        ({"pairs": ("cond=canny",), "names": ("scedit",)}, "given with --cond"),
        ({"names": ("scedit",), "flags": {"cond": "canny"}, "bases": ("mini", "mini")}, "--base names mini twice"),
        ({"names": ("scedit",), "flags": {"cond": "canny"}, "bases": ()}, "--base names no base"),
    ],
)  # fmt: skip
def test_what_is_refused(make: Make, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("?", r"\?")):
        make(Control(), **more)


def test_transfer_refuses_a_method_that_needs_maps(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TUNERS, "scedit", replace(TUNERS["scedit"], control="required"))
    with pytest.raises(UsageError, match="needs condition maps: use sctool bench control"):
        make(Transfer())


def test_bases_of_another_kind_or_size_are_refused(make: Make, tiny_base: Path, tmp_path: Path) -> None:
    flags = {"cond": "canny"}
    with pytest.raises(UsageError, match="mini-dit of dit; a table has one kind of base"):
        open_workshop(make(Control(), names=("scedit",), bases=(str(tiny_base), "mini-dit"), flags=flags), tmp_path)
    with pytest.raises(UsageError, match=r"draws 32 px and mini .* px. Set one for all: size=32"):
        open_workshop(make(Control(), names=("scedit",), bases=(str(tiny_base), "mini"), flags=flags), tmp_path)


def test_names_of_bases_are_as_short_as_they_can_be() -> None:
    assert short_names(["mini", "runs/a/student"]) == ["mini", "student"]
    assert short_names(["runs/a/student", "runs/b/student"]) == ["a/student", "b/student"]
    arms = make_arms(("scedit",), ["runs/a/student", "runs/b/student"])
    assert {name: arm.folder for name, arm in arms.items()} == {
        "scedit on a/student": "scedit", "scedit on b/student": "scedit@b-student"
    }  # fmt: skip
