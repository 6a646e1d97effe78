"""What the Compare tab shows fits the form or is marked, and a vote counts once and only while it is blind."""

from __future__ import annotations

import threading
from pathlib import Path

import bases
import pytest
import torch
from dialect_files import flat, kohya, lora_delta, make
from PIL import Image
from web_pages import ME, OTHER, PAGE, draw, last_html, shown_in

from dora_diffusion.comparison.votes import Vote, Votes, pictures_digest
from dora_diffusion.webapp.ballots import first_ballot, pairs_to_vote_on
from dora_diffusion.webapp.views import BLIND, GRID, SLIDER, pairs_of
from dora_diffusion.webapp.visitors import visitor_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:gradio")  # toasts, which no page is there to show

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
SWEEP = ("cat", "1", "0.5, 1")  # its own form


def asked(pair, **changes) -> tuple:
    """The form as `draw` has it, and the sweep's."""
    form = {"prompt": "cat face", "seeds": "1", "first": pair[0], "first_strength": 1.0, "second": pair[1]}
    form |= {"second_strength": 1.0, "steps": 2, "guidance": "2", "negative_prompt": "", "size": "", "partial": False}
    return (*{**form, **changes}.values(), *SWEEP)


def test_pictures_are_marked_by_what_the_form_asks_for_otherwise(tabs, pair):
    shown = shown_in(draw(tabs, first=pair[0], second=pair[1]))
    mark = tabs.compare.mark
    assert not mark(PAGE, shown, *asked(pair))["visible"]
    same = {"prompt": " cat face ", "seeds": "1,1", "guidance": "2.0", "size": " "}
    assert not mark(PAGE, shown, *asked(pair, **same))["visible"]
    for changes, name in (
        ({"second_strength": 0.5}, "strength"),  # as typed: nothing is drawn by itself then
        ({"prompt": "dog"}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"seeds": "1, 2"}, "seeds"),
        ({"seeds": "one"}, "seeds"),
        ({"first": pair[1]}, "adapters"),
        ({"second": ""}, "adapters"),
        ({"steps": 3}, "steps"),
        ({"guidance": ""}, "guidance"),
        ({"negative_prompt": "dog"}, "negative prompt"),
        ({"size": "16x24"}, "size"),
        ({"partial": True}, "what is loaded"),
        ({"prompt": "dog", "seeds": "3"}, "prompt, seeds"),
    ):
        found = mark(PAGE, shown, *asked(pair, **changes))
        assert found["visible"] and f"Settings changed ({name})" in found["value"] and "Press Compare" in found["value"]
    assert not mark(PAGE, None, *asked(pair))["visible"]


def test_a_sweep_is_marked_by_its_own_form_and_a_strength_of_the_other_does_not_draw_over_it(tabs, pair):
    sweep = list(tabs.compare.sweep(*SWEEP, *pair, 2, "2", "", "", False, PAGE))
    shown = shown_in(sweep)
    assert shown.is_sweep and sweep[0][8]["value"] == GRID
    unchanged = tabs.compare.mark(PAGE, shown, *asked(pair, prompt="x", first_strength=0.3))["value"]
    assert "A sweep" in unchanged and "changed" not in unchanged.split(">", 1)[1]
    for form in (
        (*asked(pair)[:11], "cat\ndog", "1", "0.5, 1"),
        (*asked(pair)[:11], "cat", "1", "0.5"),
        asked(pair, steps=3),
    ):
        assert "Press Draw the sweep" in tabs.compare.mark(PAGE, shown, *form)["value"]
    again = list(tabs.compare.draw_again(PAGE, shown, *asked(pair)[:11], GRID, ""))
    assert shown_of(again) is None


def shown_of(updates) -> object:
    try:
        return shown_in(updates)
    except StopIteration:
        return None


def test_a_sweep_takes_guidance_size_and_negative_prompt_too(tabs, pair):
    shown = shown_in(list(tabs.compare.sweep(*SWEEP, *pair, 2, "3", "dog", "24x16", False, PAGE)))
    assert (shown.request.guidance_scale, shown.request.negative_prompt) == (3.0, "dog")
    assert {cell.size for cell in shown.cells} == {(24, 16)}


def test_the_slider_shows_the_columns_that_its_label_names(tabs, pair):
    for shown in (
        shown_in(list(tabs.compare.sweep(*SWEEP, *pair, 2, "2", "", "", False, PAGE))),
        shown_in(draw(tabs, first=pair[0], second=pair[1], second_strength=0.5)),
        shown_in(draw(tabs, first=pair[1])),  # a DoRA alone, in the LoRA's place
    ):
        pairs = pairs_of(shown)
        count = len(shown.request.columns)
        assert len(pairs) == count * (count - 1) // 2
        for label, at in pairs.items():
            html = tabs.compare.look(shown, SLIDER, label, PAGE)[0]
            captions = html.split("<figcaption>")[1].split("</figcaption>")[0]
            for part, column in zip(label.split(" | "), at):
                kind, _, strength = part.partition(" ")
                assert shown.by_place[0, column].caption in captions
                assert shown.by_place[0, column].caption.lower().startswith(kind.lower())
                assert not strength or f"strength {strength} " in shown.by_place[0, column].caption


def test_the_pairs_offered_are_those_of_the_pictures_and_a_choice_is_kept_where_it_still_is_one(tabs, pair):
    last = draw(tabs, first=pair[0], second=pair[1], pair="Base | DoRA", view=SLIDER)[-1]
    assert last[9]["choices"] == ["Base | LoRA", "Base | DoRA", "LoRA | DoRA"] and last[9]["value"] == "Base | DoRA"
    assert draw(tabs, first=pair[0], pair="Base | DoRA")[-1][9]["value"] == "Base | LoRA"


def test_files_and_command_of_earlier_pictures_go_when_others_are_drawn(tabs, pair):
    updates = []
    for update in tabs.compare.draw("cat", "1,2,3", pair[0], 1.0, pair[1], 1.0, 50, "2", "", "", False, GRID, "", PAGE):
        updates.append(update)
        if isinstance(update[0], str) and "<img" in update[0]:
            tabs.compare.stop(PAGE)
    assert "stopped" in last_html(updates, 1)
    links = [update[6] for update in updates if "visible" in update[6]]
    assert links and not any(update["visible"] for update in links)
    assert shown_in(updates).cells and not shown_in(updates).is_whole  # what is looked at is what is remembered
    assert updates[0][8]["interactive"] is False and updates[-1][8]["interactive"] is True


def test_restoring_leaves_no_adapter_that_the_picture_had_not(tabs, pair):
    alone = shown_in(draw(tabs, first=pair[1], first_strength=0.5))
    restored = tabs.compare.restore(str(alone.cells[1].path), PAGE)
    assert restored[2]["value"] == pair[1] and restored[4]["value"] == ""
    sweep = shown_in(list(tabs.compare.sweep("cat\ndog", "1", "0.5, 1", *pair, 2, "2", "", "", False, PAGE)))
    restored = tabs.compare.restore(str(sweep.cells[2].path), PAGE)
    assert (restored[2]["value"], restored[4]["value"]) == pair and restored[3] == restored[5] == 0.5


def test_what_fits_of_a_file_is_drawn_when_it_is_asked_for_with_the_count(tabs, pair, studio, tmp_path):
    made = make(bases.stable_diffusion().unet, [Q], flat("lora_unet_"), kohya, lora_delta)
    made.tensors |= {f"lora_unet_x.lora_{part}.weight": torch.ones(4, 4) for part in ("down", "up")}
    made.tensors["lora_unet_y.lora_embedding_A"] = torch.ones(4, 4)
    key = studio.shelf.take_in(made.save(tmp_path / "mixed.safetensors"), visitor_of(PAGE)).key
    card = tabs.compare.show_card(key, PAGE)[0]
    assert "2 layers" in card and "not read: 1 key" in card and "Load what fits of a file" in card
    refused = draw(tabs, first=key)
    assert "Load what fits of a file" in last_html(refused, 2) and "partial=" not in last_html(refused, 2)
    updates = draw(tabs, first=key, partial=True)
    (note,) = {cell.note for cell in shown_in(updates).cells if cell.column == 1}
    assert note == "loaded in part: 1 of 2 layers, 1 key of the file left out"
    assert "--partial" in last_html(updates, 7)
    picture = str(shown_in(updates).cells[1].path)
    assert tabs.compare.restore(picture, PAGE)[10] is True


# Votes


def voted(tabs, shown, page=PAGE, side: str = "left"):
    """Begin, vote on the first pair; the ballot and the result."""
    blind = tabs.compare.layout.votes
    ballot = blind.begin(shown, page)[0]
    return ballot, blind.vote(ballot, side, page)


def count(studio, visitor: str = ME) -> int:
    path = studio.votes(visitor).path
    return path.read_text().count("\n") if path.exists() else 0


def test_a_pair_is_counted_once_whatever_is_pressed_again(tabs, pair, studio):
    blind = tabs.compare.layout.votes
    shown = shown_in(draw(tabs, first=pair[0], second=pair[1], view=BLIND))
    ballot, after = voted(tabs, shown)
    other_tab = blind.vote(ballot, "right", PAGE)  # the ballot as it was open there
    assert "does not count: you have voted on this pair before" in other_tab[3] and "n = 1" in other_tab[3]
    assert blind.vote(after[0], "left", PAGE)[3] == blind.vote(None, "left", PAGE)[3]  # a double click: nothing
    assert not after[5]["visible"] and not after[4]["visible"]  # no "Vote again" on what is known
    assert "voted on all of these pairs" in blind.begin(shown, PAGE)[1]
    again = shown_in(draw(tabs, first=pair[0], second=pair[1], view=BLIND))  # after a reload
    assert blind.begin(again, PAGE)[0] is None
    turned = shown_in(draw(tabs, first=pair[1], second=pair[0], view=BLIND))
    assert blind.begin(turned, PAGE)[0] is None and count(studio) == 1
    theirs = shown_in(draw(tabs, OTHER, first=pair[0], second=pair[1], view=BLIND))
    assert "n = 1" in voted(tabs, theirs, OTHER)[1][3] and count(studio, visitor_of(OTHER)) == 1


def test_pictures_that_were_seen_with_their_names_can_be_voted_on_but_do_not_count(tabs, pair, studio):
    named = shown_in(draw(tabs, first=pair[0], second=pair[1], view=GRID))
    hidden = shown_in(draw(tabs, first=pair[0], second=pair[1], view=BLIND))  # the same, from the cache
    for shown in (named, hidden):
        blind = tabs.compare.layout.votes
        assert "this vote does not count" in blind.begin(shown, PAGE)[1]
        assert "had seen these pictures with their names" in voted(tabs, shown)[1][3] and count(studio) == 0
    fresh = shown_in(draw(tabs, seeds="5", first=pair[0], second=pair[1], view=BLIND))
    ballot = tabs.compare.layout.votes.begin(fresh, PAGE)[0]
    tabs.compare.look(fresh, GRID, "", PAGE)  # in another tab, while the ballot is open
    assert "does not count" in tabs.compare.layout.votes.vote(ballot, "left", PAGE)[3] and count(studio) == 0


def test_other_pictures_take_an_open_ballot_and_a_result_away(tabs, pair):
    blind = tabs.compare.layout.votes
    first = shown_in(draw(tabs, first=pair[0], second=pair[1], view=BLIND))
    ballot, after = voted(tabs, first)
    assert "__type__" in blind.renew(first, after[0])[1]
    second = shown_in(draw(tabs, seeds="2", first=pair[0], second=pair[1], view=BLIND))
    for open_one in (ballot, after[0]):
        renewed = blind.renew(second, open_one)
        assert renewed[0] is None and renewed[1] == renewed[3] == "" and renewed[5]["visible"]


def test_a_sweep_is_voted_on_between_adapters_of_one_strength(tabs, pair):
    shown = shown_in(list(tabs.compare.sweep(*SWEEP, *pair, 2, "2", "", "", False, PAGE)))
    columns = shown.request.columns
    pairs = pairs_to_vote_on(shown)
    assert [(columns[a].label, columns[b].label) for a, b in pairs] == [("LoRA", "DoRA")] * 2
    assert all(columns[a].strength == columns[b].strength for a, b in pairs)
    assert first_ballot(shown).total == 2


def test_votes_of_several_threads_on_one_pair_are_one_and_either_order_is_one_tally(tmp_path: Path):
    votes = Votes(tmp_path / "votes.jsonl")
    threads = [threading.Thread(target=votes.add, args=(Vote("a", "b", "first", "cat", 1, "same"),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert votes.path.read_text().count("\n") == 1
    assert votes.add(Vote("b", "a", "first", "cat", 2, "other")) and not votes.add(
        Vote("a", "b", "same", "x", 9, "same")
    )
    assert (votes.tally("a", "b").first, votes.tally("a", "b").second) == (1, 1) == (1, votes.tally("b", "a").first)
    with votes.path.open("a") as file:
        file.write('{"first": "a", "sec')  # the disk was full
    assert votes.tally("a", "b").decided == 2


def test_pictures_are_known_again_by_their_pixels(tmp_path: Path):
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path, colour in zip(paths, ("red", "blue", "red", "green")):
        Image.new("RGB", (4, 4), colour).save(path, compress_level=paths.index(path))
    assert pictures_digest(paths[0], paths[1]) == pictures_digest(paths[1], paths[2])
    assert pictures_digest(paths[0], paths[1]) != pictures_digest(paths[0], paths[3])
