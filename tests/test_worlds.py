"""The plans of the worlds keep the rules of the game, without a binary."""

from __future__ import annotations

from worlds_plan import Check, Deliver, Run, Verb, make_plan

PLANS = [make_plan(seed) for seed in range(300)]


def test_one_seed_is_one_plan():
    assert all(repr(plan) == repr(make_plan(plan.seed)) for plan in PLANS[:50])
    assert len({repr(plan.actions) for plan in PLANS}) == len(PLANS)


def test_a_disturbed_verb_is_repeated_before_any_check():
    for plan in PLANS:
        open_verbs = set()
        for action in plan.actions:
            if isinstance(action, Verb):
                asked = (action.name, action.epoch)
                open_verbs.add(asked) if action.fault else open_verbs.discard(asked)
            if isinstance(action, Check):
                assert not open_verbs, plan.seed


def test_no_other_verb_is_asked_while_a_replay_is_to_be_repeated():
    for plan in PLANS:
        open_verbs = set()
        for action in plan.actions:
            if isinstance(action, Verb):
                asked = (action.name, action.epoch)
                if any(name == "replay" for name, _ in open_verbs):
                    assert asked in open_verbs, plan.seed
                open_verbs.add(asked) if action.fault else open_verbs.discard(asked)


def test_every_check_follows_a_plain_run():
    for plan in PLANS:
        for before, action in zip(plan.actions, plan.actions[1:]):
            if isinstance(action, Check):
                assert isinstance(before, Run) and before.plain, plan.seed


def test_verbs_are_asked_only_of_complete_epochs():
    for plan in PLANS:
        complete = set()
        for action in plan.actions:
            if isinstance(action, Deliver) and action.complete:
                complete.add(action.epoch)
            if isinstance(action, Verb):
                assert action.epoch in complete, plan.seed


def test_the_plans_hold_what_they_promise():
    actions = [action for plan in PLANS for action in plan.actions]
    deliveries = [action for action in actions if isinstance(action, Deliver)]
    rows = [row for action in deliveries for file in action.files for row in file.rows]
    assert any(not action.complete for action in deliveries)
    assert any(not file.rows for action in deliveries for file in action.files)
    assert any(row["pguid"] is None for row in rows)
    assert any(row["seq"] is None for row in rows)
    assert {"I", "U", "D", None, "d"} == {row["op"] for row in rows}
    assert {action.name for action in actions if isinstance(action, Verb)} == {
        "replay",
        "undo",
        "skip",
    }
    assert any(isinstance(action, Run) and len(action.faults) == 2 for action in actions)
    late = [plan for plan in PLANS if _epochs(plan) != sorted(_epochs(plan))]
    assert len(late) > len(PLANS) // 3


def _epochs(plan) -> list[int]:
    return [a.epoch for a in plan.actions if isinstance(a, Deliver) and a.complete]
