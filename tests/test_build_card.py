"""What a card says beside its numbers: what training saw, and the rule the scores were made by."""

import copy

import pytest
from test_push_to_hub import card_of, make_results


@pytest.fixture(scope="module")
def results():
    return make_results(simulated=False)


def test_a_card_says_that_training_saw_the_mechanisms(results):
    plain = card_of(results, ["tubulin"])
    assert "mechanisms seen in training" not in plain
    seen = copy.deepcopy(results)
    seen["settings"]["arguments"]["weak_label"] = "moa"
    seen["notes"] = ["Training saw the MOA of every treatment: these scores are those of a training set."]
    card = card_of(seen, ["tubulin"])
    head, _, table = card.partition("| features | NSC | NSCB |")
    assert table and f"> **{seen['notes'][0]}**" in head
    assert "NSC (mechanisms seen in training)" in card and "NSCB (mechanisms seen in training)" in card


def test_a_card_says_which_compounds_training_did_not_see(results):
    kept_out = copy.deepcopy(results)
    kept_out["settings"]["arguments"]["exclude_compounds"] = ["taxol", "AZ-C"]
    fields = results["settings"]["dataset"]["fields"]
    assert f"its part `annotated` of {fields:,} fields." in card_of(results, ["tubulin"])
    assert f"its part `annotated` of {fields:,} fields, without those of taxol and AZ-C." in card_of(
        kept_out, ["tubulin"]
    )


def test_a_card_describes_the_rule_the_scores_were_made_by(results):
    card = " ".join(card_of(results, ["tubulin"]).split())
    assert "whose nearest neighbour among *other" in card and "from *another batch*" in card
    other = copy.deepcopy(results)
    other["protocol"] |= {"k": 5, "batch_rule": "plate"}
    card = " ".join(card_of(other, ["tubulin"]).split())
    assert "whose 5 nearest neighbours' vote among *other" in card and "from *another plate*" in card
